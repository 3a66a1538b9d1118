"""TRPO: trust region policy optimisation (Schulman et al., 2015, arXiv 1502.05477), with generalised advantages."""

from __future__ import annotations

from dataclasses import dataclass

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
class TRPO:
    """Trust region policy optimisation: one natural-gradient step a round, as long as the KL allows."""

    rounds: int = 500  # rounds of sampling and learning
    samples: int = 2048  # trajectories a round (of environments: steps)
    max_kl: float = 0.01  # mean KL(old || new) that one step may cause
    cg_iterations: int = 10  # of the conjugate gradient
    damping: float = 0.1  # added to the Fisher matrix's diagonal
    backtracks: int = 10  # lengths tried by the line search (0: the full step, unseen)
    shrink: float = 0.8  # each of them relative to the one before
    gamma: float = 0.99  # discount of later rewards
    lam: float = 0.95  # lambda of generalised advantage estimation
    critic_lr: float = 3e-4  # of the critic's Adam
    value_epochs: int = 5  # passes of the critic over each round's samples
    value_minibatch: int = 128  # trajectories (of environments: steps) a step of the critic
    value_clip: float | None = None  # how far a value may move in one round (none: free)
    max_grad_norm: float = 0.5  # longer gradients of the critic are scaled down to this
    environments: int = 1  # environments side by side (controllers)
    hidden: tuple[int, ...] = (64, 64)  # widths of a controller's networks
    activation: Activation = "tanh"  # of a controller's networks
    normalise_observation: bool = True  # by running statistics, saved with the controller
    scale_reward: bool = False  # divide rewards by the running deviation of the return

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        return {
            "actor": RoleSettings(),  # the natural step needs no optimiser
            "critic": RoleSettings(Adam(self.critic_lr, eps=1e-5), self.max_grad_norm),
        }

    def train(self, run: Run, actor: Role, experience: Experience, feedback: Feedback, critic: Role) -> None:
        """Sample, estimate advantages, take one step inside the trust region, fit the critic; repeat."""
        surrogate, regression = MirrorDescent(kl=0.0, reverse=True), ValueRegression(clip=self.value_clip)
        for _ in run.steps(self.rounds):
            traj = experience.collect(actor, self.samples)
            traj = traj.judged(feedback.score(traj))
            traj.value = critic.value(traj)
            advantage, traj.target = advantages(traj, critic.next_value(traj), gamma=self.gamma, lam=self.lam)
            traj.advantage = normalise(advantage, traj.mask)
            traj.reference = actor.distribution(traj)
            data = traj.as_rows() if experience.unit == "step" else traj
            step = actor.natural_step(
                data,
                surrogate,
                max_kl=self.max_kl,
                iterations=self.cg_iterations,
                damping=self.damping,
                backtracks=self.backtracks,
                shrink=self.shrink,
            )
            fitted = critic.fit(data, regression, self.value_epochs, self.value_minibatch, run.generator)
            run.log(**step, value_loss=fitted["loss"], **experience.statistics(traj))
