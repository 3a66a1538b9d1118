"""Fine-tuning on the model's own good answers: RFT (Yuan et al., 2023, arXiv 2308.01825), RAFT (Dong et al., 2023), ReST
(Gulcehre et al., 2023).

They differ in what is good: RFT keeps all different answers that pass a check, RAFT the best of each prompt, ReST those
above a threshold of the normalised score.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError, nearest
from guerdon.experience.base import Grouped
from guerdon.feedback.base import Feedback
from guerdon.objectives.likelihood import WeightedLikelihood
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.sampling import best_of_n, first_of_equals

Keep = Literal["best", "above", "passed"]


@dataclass
class RejectionSampling:
    """Supervised fine-tuning on sampled answers that were kept."""

    judged: ClassVar[bool] = True

    rounds: int = 10  # rounds of sampling and learning; each samples from the policy as it then is
    prompts_per_round: int = 64  # prompts answered a round
    group_size: int = 8  # answers to each prompt
    keep: Keep = "best"  # the best of each prompt, all above the threshold of the normalised score, or of the score itself
    threshold: float = (
        0.7  # with above, of scores brought to [0, 1] in each round; with passed, of the scores as they are
    )
    distinct: bool = True  # of equal answers to a prompt learn one
    epochs: int = 1  # passes over the kept answers of a round
    minibatch: int = 32  # answers an optimiser step
    lr: float = 1e-5  # of AdamW
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # answers a forward and backward pass

    def __post_init__(self) -> None:
        if self.keep not in get_args(Keep):
            raise UsageError(f"unknown keep '{self.keep}'; {nearest(self.keep, get_args(Keep))}")

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        return {"actor": RoleSettings(AdamW(self.lr), self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def kept(self, traj: Trajectories) -> Tensor:
        """The rows of a judged round to learn from."""
        score = traj.score()
        if self.keep == "best":
            draw = torch.arange(len(score), device=score.device) // self.group_size
            return best_of_n(score, draw)
        if self.keep == "above":
            low, high = score.min(), score.max()
            good = (score - low) > self.threshold * (high - low)
        else:
            good = score >= self.threshold
        if self.distinct and "token" in traj.inputs["step"]:
            rows = good.nonzero().squeeze(1)
            answers = traj[rows]
            return rows[first_of_equals(answers.group, answers.inputs["step", "token"], answers.mask)]
        return good.nonzero().squeeze(1)

    def train(self, run: Run, actor: Role, experience: Grouped, feedback: Feedback) -> None:
        """Answer each prompt several times, score, keep the good answers, raise their likelihood; repeat."""
        for _ in run.steps(self.rounds):
            traj = experience.collect(
                actor, self.prompts_per_round * self.group_size, group_size=self.group_size
            )
            traj = traj.judged(feedback.score(traj))
            rows = self.kept(traj)
            run.log(reward=traj.score().mean(), kept=len(rows) / traj.batch_size[0])
            if len(rows):  # a round in which nothing passed teaches nothing
                run.step(
                    actor.fit(traj[rows], WeightedLikelihood(), self.epochs, self.minibatch, run.generator)
                )
