"""Nash learning from human feedback (Munos et al., 2024, arXiv 2312.00886): Nash-MD-PG and Nash-EMA-PG.

No reward: a judge says how often one answer is preferred to another, and the policy looks for answers that no others
beat, by playing against its own mixture with the reference (mirror descent) or against the average of its past.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.experience.prompts import Prompted
from guerdon.feedback.base import Feedback, compare
from guerdon.objectives.nash import PreferenceGradient
from guerdon.objectives.sides import with_reference
from guerdon.optim import AdamW, Schedule
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix, row_seeds, uniform
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class NashMD:
    """Nash mirror descent by policy gradient. Defaults are the paper's for summaries (judges in [0, 1]).

    The end points are baselines: ``mixture`` 0 is self-play, 1 the best response to the reference, and ``judge``
    "scores" reinforcement learning from a reward. The opponent's answers are drawn anew each round, by the newest
    weights. Of Nash-EMA both policies are kept: the last in the actor, the average in the run's folder ``average``.
    """

    headline: ClassVar[str] = "win_rate"
    judged: ClassVar[bool] = True

    opponent: Literal["mixture", "ema"] = "mixture"  # policy and reference mixed, or the average of the past
    mixture: float = 0.125  # share of the reference in the mixture: 0 plays itself, 1 plays the reference
    ema: float = 0.999  # of the average of past weights, the share that each update leaves
    tau: float = 0.008  # what a nat of KL from the reference costs (of rewards: in units of the reward)
    judge: Literal["pairs", "scores"] = "pairs"  # win rates; or differences of scores, as in RLHF
    choices: bool = False  # the judge only says which of two it prefers: 0 or 1, drawn with its probability
    credit: Literal["step", "trajectory"] = "step"  # charge a step with the KL from it on, or with all of it
    rounds: int = 10_000  # rounds of sampling and learning
    samples: int = 64  # prompts a round, an answer of the policy and of its opponent to each
    win_rate_every: int = 50  # rounds between measurements of the win rate over the reference; 0: never
    lr: float = 1e-6  # of AdamW
    schedule: Schedule = "constant"  # how the learning rate falls to 0 over the rounds
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # answers a forward and backward pass

    def __post_init__(self) -> None:
        for name in ("mixture", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1")

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        optimiser = AdamW(self.lr, self.schedule, total=self.rounds)
        return {"actor": RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, experience: Prompted, feedback: Feedback) -> None:
        """Answer prompts, let the opponent answer them, ask the judge, take a step of the gradient; repeat."""
        reference = actor.copy(frozen=True)
        average = None
        if self.opponent == "ema":  # of an adapted actor a frozen copy is its reference, which cannot move
            average = run.adopt("average", actor.copy(frozen=not self.lora_rank, name="average"))
        objective = PreferenceGradient(self.tau, self.credit)
        for step in run.steps(self.rounds, "round"):
            traj = experience.collect(actor, self.samples)
            seeds = row_seeds(mix(run.seed, 20), step * self.samples, self.samples)
            other = self.answers(traj.prompts, seeds, actor, reference, average)
            traj.advantage = traj.per_step(self.gain(traj, other, seeds, feedback))
            if self.win_rate_every and (step + 1) % self.win_rate_every == 0:
                untrained = reference.sample(
                    traj.prompts, row_seeds(mix(run.seed, 21, step), 0, self.samples)
                )
                run.log(win_rate=compare(feedback, traj, untrained).mean())
                if average is not None:
                    run.log(win_rate_average=compare(feedback, other, untrained).mean())
            traj = with_reference(traj, reference)
            run.log(gain=traj.advantage[:, 0].mean(), length=traj.lengths.float().mean())
            run.log(**actor.update(traj, objective))
            if average is not None:
                average.follow(actor, 1 - self.ema)
        if average is not None:
            average.save(run.folder / "average")

    def answers(
        self, prompts: list[str], seeds: Tensor, actor: Role, reference: Role, average: Role | None
    ) -> Trajectories:
        """What the opponent says. A mixture is drawn token by token: logits of policy and reference with weights
        ``1 - mixture`` and ``mixture`` (the policy's sampler must know how; language models do)."""
        if average is not None:
            return average.sample(prompts, seeds)
        if self.mixture in (0, 1):
            return (reference if self.mixture else actor).sample(prompts, seeds)
        return actor.sample(prompts, seeds, reference=reference, mixture=self.mixture)

    def gain(self, traj: Trajectories, other: Trajectories, seeds: Tensor, feedback: Feedback) -> Tensor:
        """``[B]``: the win rate minus 1/2, or by how much the score is above the opponent's."""
        if self.judge == "scores":
            return feedback.score(traj) - feedback.score(other)
        win = compare(feedback, traj, other)
        if self.choices:
            draw = uniform(seeds + 1, (1,), win.device)[:, 0]
            win = (draw < win).to(win.dtype)
        return win - 0.5
