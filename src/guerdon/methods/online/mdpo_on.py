"""MDPO, on policy: mirror descent policy optimisation (Tomar et al., 2022, arXiv 2005.09814).

Several full-batch steps on advantage minus KL to the policy that acted: no clipping, no line search, no entropy bonus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from guerdon.credit import advantages, normalise
from guerdon.experience.base import Experience
from guerdon.feedback.base import Feedback
from guerdon.objectives.mirror_descent import MirrorDescent
from guerdon.objectives.value import ValueRegression
from guerdon.optim import Adam
from guerdon.policies.features import Activation
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class MDPOOn:
    """Mirror descent policy optimisation on its own experience."""

    rounds: int = 500  # rounds of sampling and learning (K)
    samples: int = 2048  # trajectories a round (of environments: steps)
    m: int = 10  # steps of Adam a round, each on all samples
    t: float = 1.0  # step size t_k of the first round: 1/t_k weighs the KL (inf: no KL)
    schedule: Literal["linear", "constant"] = "linear"  # of t_k: to 0.01 over the rounds, or none
    reverse: bool = False  # KL(old || new), as TRPO and PPO have it, instead of KL(new || old)
    gamma: float = 0.99  # discount of later rewards
    lam: float = 0.95  # lambda of generalised advantage estimation
    lr: float = 3e-4  # of the actor's Adam
    critic_lr: float = 3e-4  # of the critic's Adam
    value_epochs: int = 5  # passes of the critic over each round's samples
    value_minibatch: int = 128  # trajectories (of environments: steps) a step of the critic
    value_clip: float | None = 0.2  # how far a value may move in one round (none: free)
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this
    environments: int = 1  # environments side by side (controllers)
    hidden: tuple[int, ...] = (64, 64)  # widths of a controller's networks
    activation: Activation = "tanh"  # of a controller's networks
    normalise_observation: bool = True  # by running statistics, saved with the controller
    scale_reward: bool = True  # divide rewards by the running deviation of the return

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        rates = {"actor": self.lr, "critic": self.critic_lr}
        return {name: RoleSettings(Adam(lr, eps=1e-5), self.max_grad_norm) for name, lr in rates.items()}

    def step_size(self, k: int) -> float:
        """``t_k``: by the linear schedule ``t (1 - k / K)``, and never below 0.01, since it divides."""
        share = 1.0 - k / self.rounds if self.schedule == "linear" else 1.0
        return max(self.t * share, 0.01)

    def train(self, run: Run, actor: Role, experience: Experience, feedback: Feedback, critic: Role) -> None:
        """Sample, estimate advantages, take m steps from where the policy acted, fit the critic; repeat."""
        objective, regression = MirrorDescent(reverse=self.reverse), ValueRegression(clip=self.value_clip)
        for k in run.steps(self.rounds):
            traj = experience.collect(actor, self.samples)
            traj = traj.judged(feedback.score(traj))
            traj.value = critic.value(traj)
            advantage, traj.target = advantages(traj, critic.next_value(traj), gamma=self.gamma, lam=self.lam)
            traj.advantage = normalise(advantage, traj.mask)  # this gives t_k its meaning
            traj.reference = actor.distribution(traj)  # pi_k, which stays while the actor moves
            data = traj.as_rows() if experience.unit == "step" else traj
            objective.kl = torch.tensor(1.0 / self.step_size(k))
            actor.fit(data, objective, epochs=self.m)
            _, moved = actor.evaluate(objective, data)
            fitted = critic.fit(data, regression, self.value_epochs, self.value_minibatch, run.generator)
            run.log(**moved, value_loss=fitted["loss"], **experience.statistics(traj))
