"""REINFORCE with a moving baseline (Williams, 1992)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from guerdon.credit import returns_to_go
from guerdon.experience.base import Experience
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import Reinforce as ReinforceObjective
from guerdon.optim import Adam
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class Reinforce:
    """One policy-gradient step a round, on rewards minus their moving average."""

    rounds: int = 200  # rounds of sampling and learning
    samples: int = 64  # trajectories a round
    lr: float = 1e-3  # of Adam
    baseline_decay: float = 0.9  # of the moving average of rewards that is subtracted
    entropy: float = 0.0  # weight of an entropy bonus
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # trajectories a forward and backward pass
    environments: int = 8  # environments side by side (controllers)

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        return {"actor": RoleSettings(Adam(self.lr), self.max_grad_norm, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, experience: Experience, feedback: Feedback) -> None:
        """Sample, score, step along the score-weighted gradient of the log-probability; repeat."""
        objective = ReinforceObjective(entropy=self.entropy)
        for _ in run.steps(self.rounds):
            traj = experience.collect(actor, self.samples)
            traj = traj.judged(feedback.score(traj))
            ended = None if traj.truncated is None else traj.terminated | traj.truncated
            gain = returns_to_go(
                traj.reward, traj.mask, ended=ended
            )  # of whole trajectories: the score, at each step
            mean = float(gain[traj.mask].mean())
            baseline = run.state.get("baseline", mean)
            traj.advantage = torch.where(traj.mask, gain - baseline, 0.0)
            run.state["baseline"] = self.baseline_decay * baseline + (1 - self.baseline_decay) * mean
            run.log(**actor.update(traj, objective), **experience.statistics(traj))
