"""RSO: statistical rejection sampling optimisation (Liu et al., 2024, arXiv 2309.06657).

The losses of DPO and SLiC fit the best policy by maximum likelihood, which asks for pairs of that policy's own answers.
RSO makes some: of many answers of the untrained policy it accepts those that follow the policy tilted by a judge's
reward, has the judge rank them in pairs, and learns these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.evaluation.language import share_won
from guerdon.experience.completions import write_answers
from guerdon.experience.datasets import Data, batch_count
from guerdon.experience.pairs import PairReplay, pooled
from guerdon.experience.prompts import Prompted
from guerdon.feedback.base import BothOrders, Feedback, compare
from guerdon.feedback.preference_model import reward_against
from guerdon.objectives.pair_losses import PairLoss
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.sides import with_reference
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix, row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.sampling import (
    Pairs,
    Prefer,
    acceptance_rate,
    accepted_rows,
    first_of_equals,
    first_round,
    tournament,
)

LOSSES: dict[str, PairLoss] = {"sigmoid_norm": "sigmoid", "hinge_norm": "hinge", "hinge": "slic"}


@dataclass
class RSO:
    """Three losses on pairs from three sources. Defaults are the paper's (there with Adafactor); DPO is ``direct`` with
    ``sigmoid_norm``, SLiC ``sft_sample_rank`` with ``hinge`` and ``tournament``."""

    headline: ClassVar[str] = "accuracy"

    source: Literal["rso_sample_rank", "sft_sample_rank", "direct"] = (
        "rso_sample_rank"  # accepted answers, any of the untrained policy, or recorded pairs
    )
    loss: Literal["sigmoid_norm", "hinge_norm", "hinge"] = (
        "sigmoid_norm"  # of log-ratios to the untrained policy, but hinge of log-probabilities
    )
    ranking: Literal["first_round", "tournament"] = (
        "first_round"  # pair every answer once, or let winners go on
    )
    beta: float = 0.5  # temperature of the reward in the policy that answers are drawn from; 0 takes the best
    gamma: float = 0.05  # scale of the log-ratios in the loss; for short answers more
    candidates: int = 64  # answers to a prompt, of which some are accepted
    num_samples: int = 8  # accepted answers to a prompt (sft_sample_rank draws no more than these)
    temperature: float = 0.7  # of the candidates
    top_k: int = 40  # candidates are drawn from so many likeliest tokens; 0 takes all
    pointwise: bool = False  # the judge's score is the reward, not the log-odds against one answer a prompt
    position_swap: bool = False  # ask the judge in both orders, if it is not indifferent to order by itself
    distinct: bool = False  # of equal candidates to a prompt keep one, which is another proposal
    rounds: int = 100  # rounds of answering, all before the first update
    prompts_per_round: int = 64  # prompts answered a round
    epochs: int = 1  # passes over the pairs
    batch_size: int = 32  # pairs an optimiser step
    lr: float = 1e-5  # of AdamW
    select_every: int = (
        0  # updates between win rates over the untrained policy, the best is kept; 0: the last
    )
    select_prompts: int = 64  # prompts of these win rates
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # pairs a forward and backward pass

    def __post_init__(self) -> None:
        if self.beta < 0 or not 2 <= self.num_samples <= self.candidates:
            raise UsageError(
                f"beta is {self.beta}, num_samples {self.num_samples} of {self.candidates} candidates; expected beta of "
                "at least 0, and from 2 samples to as many as there are candidates"
            )

    @property
    def judged(self) -> bool:
        """Whether a judge is needed."""
        return self.source != "direct" or self.select_every > 0

    @property
    def unread(self) -> set[str]:
        """Parameters of `train` that these options make no use of."""
        return set() if self.source == "direct" else {"preferences"}

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        return {"actor": RoleSettings(AdamW(self.lr), self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(
        self,
        run: Run,
        actor: Role,
        experience: Prompted,
        feedback: Feedback,
        preferences: Data | None = None,
    ) -> None:
        """Answer, accept, rank; then fit the log-ratios to the pairs. The untrained policy answers and is the reference."""
        judge = BothOrders(feedback) if self.position_swap else feedback
        reference = actor.copy(frozen=True)
        best = run.adopt("best", actor.copy(not self.lora_rank, "best")) if self.select_every else actor
        data: Any = preferences
        if self.source != "direct":
            data = run.track("pairs", PairReplay())
            for step in run.steps(self.rounds, "round"):
                generator = torch.Generator().manual_seed(mix(run.seed, 0x450, step))
                traj, group = self.answered(run, reference, experience, judge, generator)
                pairs = self.ranked(run, traj, group, judge, generator)
                write_answers(run.samples / f"answers_{step}.jsonl", traj)
                data.add(step, pooled(traj), pairs)  # the loss is of probabilities at temperature 1
        if data is None or not len(data):
            raise UsageError(
                "RSO has no pairs to learn from: give recorded ones (direct), or a judge that tells answers apart"
            )
        updates = batch_count(len(data), self.batch_size, self.epochs)
        objective = PairwiseObjective(LOSSES[self.loss], self.gamma)
        for batch in run.batches(data, self.batch_size, self.epochs):
            if objective.reads_reference:
                batch = with_reference(batch, reference)
            run.log(**actor.update(batch, objective))
            if self.select_every and (actor.updates % self.select_every == 0 or actor.updates == updates):
                prompts = experience.prompts.texts[: self.select_prompts]  # and noise, the same each time
                seeds = row_seeds(mix(run.seed, 0x451), 0, 2 * len(prompts)).chunk(2)
                run.log(win_rate=(rate := share_won(judge, actor, reference, prompts, seeds)))
                if rate > run.state.get("win_rate", 0.0):
                    run.state["win_rate"] = rate
                    best.follow(actor, 1.0)
                if actor.updates == updates:
                    actor.follow(best, 1.0)

    def answered(
        self, run: Run, reference: Role, experience: Prompted, judge: Any, generator: torch.Generator
    ) -> tuple[Trajectories, Tensor]:
        """Answers of one round that go into pairs, with their rewards where they have some; and which draw of a prompt
        each belongs to."""
        filtered = self.source == "rso_sample_rank"
        count = self.candidates if filtered else self.num_samples
        size = count + (filtered and not self.pointwise)  # and one whose reward is 0
        options = {"temperature": self.temperature, **({"top_k": self.top_k} if self.top_k else {})}
        drawn = experience.collect(reference, self.prompts_per_round * size, group_size=size, **options)
        rows = torch.arange(len(drawn), device=drawn.mask.device).view(-1, size)
        traj, group = drawn[rows[:, :count].flatten()], rows[:, :count].flatten() // size
        if self.pointwise:
            traj = traj.judged(judge.score(traj))
        elif filtered:
            baseline = drawn[rows[:, -1:].expand(-1, count).flatten()]
            traj = traj.judged(reward_against(judge, traj, baseline))
        if not filtered:
            return traj, group
        score, pool = traj.score().view(-1, count), None
        if self.distinct:
            pool = first_of_equals(group, traj.inputs["step", "token"], traj.mask).view(-1, count)
        kept = accepted_rows(score, self.beta, self.num_samples, generator, pool)
        rate = acceptance_rate(score, max(self.beta, 1e-12)).mean()  # near 1 / candidates where beta is small
        run.log(reward=score.mean(), reward_accepted=traj[kept].score().mean(), acceptance=rate)
        return traj[kept], group[kept]

    def ranked(
        self, run: Run, traj: Trajectories, group: Tensor, judge: Any, generator: torch.Generator
    ) -> Pairs:
        """Pairs of different answers to one prompt, as the judge (or its reward) ranks them."""
        prefer: Prefer = lambda a, b: compare(judge, traj[a], traj[b])
        if self.pointwise:
            total = traj.score()
            prefer = lambda a, b: torch.sigmoid(total[a] - total[b])
        found = (first_round if self.ranking == "first_round" else tournament)(group, prefer, generator)
        different = found.differ(traj)
        run.log(
            pairs=different.sum() / self.prompts_per_round,
            different=different.float().mean(),
            strength=found.strength.mean(),
            length=traj.lengths.float().mean(),
        )
        return found.where(different)
