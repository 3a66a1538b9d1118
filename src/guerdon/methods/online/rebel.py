"""REBEL: reinforcement learning by regressing relative rewards (Gao et al., 2024, arXiv 2404.16767).

Two answers to each prompt; the difference of their log-probability ratios is regressed on the difference of
their rewards. No clipping, no critic.
"""

from __future__ import annotations

from dataclasses import dataclass

from guerdon.experience.base import Grouped
from guerdon.feedback.base import Feedback
from guerdon.objectives.reward_difference import RewardDifference, pairs
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class REBEL:
    """Regression to relative rewards."""

    rounds: int = 100  # rounds of sampling and learning
    prompts_per_round: int = 32  # different prompts, two answers each
    epochs: int = 1  # passes over each round's pairs
    eta: float = 1.0  # scale of the log-ratios against the reward differences
    lr: float = 3e-4  # of AdamW
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    minibatch: int = 16  # pairs an optimiser step
    micro_batch: int | None = None  # pairs a forward and backward pass

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        return {"actor": RoleSettings(AdamW(self.lr), self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, experience: Grouped, feedback: Feedback) -> None:
        """Answer each prompt twice, score, regress the differences; repeat."""
        objective = RewardDifference(eta=self.eta)
        for _ in run.steps(self.rounds):
            traj = experience.collect(actor, 2 * self.prompts_per_round, group_size=2)
            traj = traj.judged(feedback.score(traj))
            for _ in range(self.epochs):
                for batch in pairs(traj, "adjacent").minibatches(self.minibatch, run.generator):
                    run.log(**actor.update(batch, objective))
            run.log(reward=traj.score().mean())
