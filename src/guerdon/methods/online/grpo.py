"""GRPO: group-relative policy optimisation (Shao et al., 2024, arXiv 2402.03300).

Several answers to each prompt are compared with one another; no critic.
"""

from __future__ import annotations

from dataclasses import dataclass

from guerdon.credit import group_relative
from guerdon.errors import UsageError
from guerdon.experience.base import Grouped
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class GRPO:
    """Group-relative policy optimisation. Defaults are the paper's where they do not depend on scale."""

    rounds: int = 100  # rounds of sampling and learning
    prompts_per_round: int = 16  # different prompts that are answered
    group_size: int = 64  # answers to each prompt
    epochs: int = 1  # passes over each round's answers
    minibatch: int = 1024  # answers an optimiser step
    clip: float = 0.2  # how far the probability ratio may move from 1
    kl: float = 0.04  # weight of the KL estimate from the untrained policy
    scale: bool = True  # divide a group's advantages by their standard deviation
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
        """Answer each prompt several times, score, compare within the group, take clipped steps; repeat."""
        reference = actor.copy(frozen=True)
        objective = ClippedSurrogate(clip=self.clip, kl=self.kl, kl_estimator="k3", reduction="trajectory")
        for _ in run.steps(self.rounds):
            traj = experience.collect(
                actor, self.prompts_per_round * self.group_size, group_size=self.group_size
            )
            traj = traj.judged(feedback.score(traj))
            advantage = group_relative(traj.score(), traj.group, std=self.scale)
            traj.advantage = traj.per_step(advantage)
            if self.kl:
                traj.reference_log_prob = reference.log_prob(traj)
            for _ in range(self.epochs):
                for batch in traj.minibatches(self.minibatch, run.generator):
                    run.log(**actor.update(batch, objective))
            run.log(reward=traj.score().mean())
