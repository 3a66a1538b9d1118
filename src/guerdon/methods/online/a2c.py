"""A2C: synchronous advantage actor-critic (Mnih et al., 2016, arXiv 1602.01783): one update on each short rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from guerdon.credit import advantages, normalise
from guerdon.experience.base import Experience
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import Reinforce
from guerdon.objectives.value import ValueRegression
from guerdon.optim import Adam, Schedule
from guerdon.policies.features import Activation
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class A2C:
    """Advantage actor-critic."""

    rounds: int = 10_000  # rounds of sampling and learning
    samples: int = 40  # trajectories a round (of environments: steps)
    gamma: float = 0.99  # discount of later rewards
    lam: float = 1.0  # lambda of generalised advantage estimation (1: n-step returns, as published)
    lr: float = 7e-4  # of the actor's Adam
    critic_lr: float = 7e-4  # of the critic's Adam
    schedule: Schedule = "constant"  # of both learning rates
    entropy: float = 0.0  # weight of an entropy bonus
    normalise_advantage: bool = False  # to mean 0 and deviation 1
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this
    environments: int = 8  # environments side by side (controllers)
    hidden: tuple[int, ...] = (64, 64)  # widths of a controller's networks
    activation: Activation = "tanh"  # of a controller's networks
    normalise_observation: bool = False  # by running statistics, saved with the controller
    scale_reward: bool = False  # divide rewards by the running deviation of the return
    head: Literal["mse", "hl_gauss", "two_hot", "mse_softmax"] = (
        "mse"  # how a controller's critic holds values
    )

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        rates = {"actor": self.lr, "critic": self.critic_lr}
        return {
            name: RoleSettings(Adam(lr, self.schedule, total=self.rounds, eps=1e-5), self.max_grad_norm)
            for name, lr in rates.items()
        }

    def train(self, run: Run, actor: Role, experience: Experience, feedback: Feedback, critic: Role) -> None:
        """Sample a little, estimate advantages, take one step; repeat."""
        objective, regression = Reinforce(entropy=self.entropy), ValueRegression()
        for _ in run.steps(self.rounds):
            traj = experience.collect(actor, self.samples)
            traj = traj.judged(feedback.score(traj))
            traj.value = critic.value(traj)
            advantage, traj.target = advantages(traj, critic.next_value(traj), gamma=self.gamma, lam=self.lam)
            traj.advantage = normalise(advantage, traj.mask) if self.normalise_advantage else advantage
            data = traj.as_rows() if experience.unit == "step" else traj
            run.log(**actor.update(data, objective))
            run.log(value_loss=critic.update(data, regression)["loss"], **experience.statistics(traj))
