"""RLOO: REINFORCE with a leave-one-out baseline (Ahmadian et al., 2024, arXiv 2402.14740; Kool et al., 2019).

A whole answer is one action, its reward includes the KL from the reference, and the baseline of an answer is the mean
reward of the other answers to its prompt. No critic, no clipping.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from guerdon.credit import leave_one_out
from guerdon.errors import UsageError
from guerdon.experience.base import Grouped
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import Reinforce
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class RLOO:
    """REINFORCE with a leave-one-out baseline. Defaults are the paper's for summarisation, where they are printed."""

    judged: ClassVar[bool] = True

    rounds: int = 100  # rounds of sampling and learning
    prompts_per_round: int = 128  # different prompts that are answered
    group_size: int = 4  # answers to each prompt (the paper's k: 2 or 4)
    epochs: int = 1  # passes over each round's answers
    minibatch: int = 256  # answers an optimiser step
    kl: float = 0.03  # what a nat of log-ratio to the untrained policy costs in units of reward
    lr: float = 1e-6  # of AdamW
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # answers a forward and backward pass

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise UsageError(
                f"group_size is {self.group_size}; an answer is compared with others: at least 2"
            )

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        return {"actor": RoleSettings(AdamW(self.lr), self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, experience: Grouped, feedback: Feedback) -> None:
        """Answer each prompt several times, score, subtract the KL and the others' mean, step; repeat."""
        reference = actor.copy(frozen=True)
        objective = Reinforce(reduction="sum")  # the log-probability of an answer is the sum over its tokens
        for _ in run.steps(self.rounds):
            traj = experience.collect(
                actor, self.prompts_per_round * self.group_size, group_size=self.group_size
            )
            traj = traj.judged(feedback.score(traj))
            reward = traj.score()
            if self.kl:
                log_ratio = (traj.log_prob - reference.log_prob(traj)).sum(1)
                reward = reward - self.kl * log_ratio
                run.log(kl=log_ratio.mean())
            traj.advantage = traj.per_step(leave_one_out(reward, traj.group))
            run.log(**actor.fit(traj, objective, self.epochs, self.minibatch, run.generator))
            run.log(reward=traj.score().mean())
