"""CoPG: contrastive policy gradient (Flet-Berliac et al., 2024, arXiv 2406.19185).

Several answers to each prompt, whoever gave them, and a reward for each. An answer's baseline is the others' reward
minus what they cost in KL. No importance weights, no critic, and as few fresh samples as one likes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from guerdon.errors import UsageError
from guerdon.experience.base import Grouped
from guerdon.experience.datasets import Data
from guerdon.experience.recent import Recent, distinct, regrouped
from guerdon.experience.views import Groups, Subset, cached_reference
from guerdon.feedback.base import Feedback
from guerdon.objectives.contrastive import Baseline, ContrastivePolicyGradient
from guerdon.objectives.sides import with_reference
from guerdon.optim import Adam
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class CoPG:
    """Contrastive policy gradient, from recorded answers, from fresh ones, or from those of the last rounds."""

    home: ClassVar[str] = "reviews"

    source: Literal["recorded", "sampled"] = "recorded"  # rated answers of a data set, or the actor's own
    beta: float = 0.1  # what a nat of KL costs in units of reward
    group_size: int = 2  # answers to a prompt that are compared
    epochs: int = 1  # passes over the recorded answers, or over those that are kept in each round
    rounds: int = 100  # rounds of sampling and learning (sampled)
    prompts_per_round: int = 32  # different prompts that are answered in a round (sampled)
    kept_rounds: int = 1  # rounds whose answers are learned from; more than 1 is a replay (sampled)
    minibatch: int = 32  # groups an optimiser step
    form: Literal["squared", "detached"] = "squared"  # two ways to write a loss with the same gradient
    baseline: Baseline = (
        "contrast"  # what an answer is compared with; the others are there to be compared (detached)
    )
    length_average: bool = False  # log-probabilities are means over tokens instead of sums: another optimum
    lr: float = 1e-6  # of Adam
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # groups a forward and backward pass

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise UsageError(
                f"group_size is {self.group_size}; an answer is compared with others: at least 2"
            )

    @property
    def headline(self) -> str:
        """The metric to watch: the rewards of recorded answers stay what they are."""
        return "reward" if self.source == "sampled" else "spread"

    @property
    def judged(self) -> bool:
        """Whether answers are scored on the way."""
        return self.source == "sampled"

    @property
    def unread(self) -> set[str]:
        """Parameters of `train` that these options make no use of."""
        return {"rated"} if self.source == "sampled" else {"experience", "feedback"}

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        rows = self.micro_batch * self.group_size if self.micro_batch else None
        return {"actor": RoleSettings(Adam(self.lr), self.max_grad_norm, lora, micro_batch=rows)}

    def train(
        self,
        run: Run,
        actor: Role,
        rated: Data | None = None,
        experience: Grouped | None = None,
        feedback: Feedback | None = None,
    ) -> None:
        """Compare the answers to a prompt with one another, a minibatch of groups at a time."""
        reference = actor.copy(frozen=True)
        objective = ContrastivePolicyGradient(self.beta, self.form, self.baseline, self.length_average)
        if self.source == "recorded":
            if rated is None:
                raise UsageError("there are no rated answers to learn from; --source sampled makes its own")
            groups = _distinct(Groups(cached_reference(rated, reference), self.group_size), self.group_size)
            for batch in run.batches(groups, self.minibatch, self.epochs):
                run.log(**actor.update(regrouped(batch, self.group_size), objective))
            return
        if experience is None or feedback is None:
            raise UsageError(
                "source 'sampled' needs prompts and a reward; 'recorded' learns from rated answers"
            )
        kept = run.track("recent", Recent(self.kept_rounds, self.group_size))
        for _ in run.steps(self.rounds):
            rows = self.prompts_per_round * self.group_size
            traj = experience.collect(actor, rows, group_size=self.group_size)
            traj = traj.judged(feedback.score(traj))
            run.log(reward=traj.score().mean())
            differ = distinct(traj, self.group_size)
            if differ.any():
                kept.add(with_reference(traj[differ.repeat_interleave(self.group_size)], reference))
            for _ in range(self.epochs if len(kept) else 0):
                for batch in kept.minibatches(self.minibatch, run.generator):
                    run.log(**actor.update(batch, objective))


def _distinct(groups: Groups, size: int) -> Data:
    """Without the groups whose answers are all the same."""
    parts = [distinct(groups.take(rows), size) for rows in torch.arange(len(groups)).split(256)]
    return Subset(groups, torch.cat(parts).cpu().nonzero().flatten())
