"""TD3: twin delayed deterministic policy gradient (Fujimoto et al., 2018, arXiv 1802.09477)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from guerdon.experience.rollouts import Rollouts
from guerdon.objectives.action_value import DeterministicImprovement, TwinBellman
from guerdon.optim import Adam
from guerdon.policies.features import Activation
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class TD3:
    """Twin delayed deterministic policy gradient."""

    controllers: ClassVar[Mapping[str, str]] = {"deterministic": "deterministic"}
    critic_kind: ClassVar[str] = "action"
    default_env: ClassVar[str] = "Pendulum-v1"

    steps: int = 1_000_000  # environment steps
    start: int = 25_000  # steps of random actions before learning
    every: int = 1  # steps of each environment between updates
    updates: int = 1  # updates each time
    batch_size: int = 256  # rows an update
    buffer_size: int = 1_000_000  # steps remembered
    gamma: float = 0.99  # discount
    n_step: int = 1  # rewards summed before the bootstrap
    tau: float = 0.005  # share by which the targets follow
    delay: int = 2  # critic updates for one of the actor and the targets
    smoothing: float = 0.2  # deviation of the target action's noise
    smoothing_clip: float = 0.5  # where that noise is cut
    exploration: float = 0.1  # deviation of the noise that explores
    lr: float = 3e-4  # of actor and critic
    critics: int = 2  # members of the ensemble whose minimum counts
    hidden: tuple[int, ...] = (256, 256)  # widths of the networks
    activation: Activation = "relu"  # of the networks
    environments: int = 1  # environments side by side
    head: Literal["mse", "hl_gauss", "two_hot", "mse_softmax"] = "mse"  # how the critic holds values

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        return {name: RoleSettings(Adam(self.lr), max_grad_norm=None) for name in ("actor", "critic")}

    def train(self, run: Run, actor: Role, experience: Rollouts, critic: Role) -> None:
        """Act with noise, remember; update the critic each step, actor and targets every other."""
        target = run.adopt("target", critic.copy(frozen=True))
        target_actor = run.adopt("target_actor", actor.copy(frozen=True))
        replay = run.track(
            "replay", experience.replay(self.buffer_size, gamma=self.gamma, n_step=self.n_step)
        )
        bellman, improvement = TwinBellman(self.smoothing, self.smoothing_clip), DeterministicImprovement()
        stride = self.every * experience.environments.n
        record = stride * max(1, 1000 // stride)  # environment steps in one record of the metrics
        for _ in run.steps(-(-self.steps // record), what="thousand steps"):
            for _ in range(0, record, stride):
                warm = experience.taken < self.start
                experience.advance(None if warm else actor, self.every, into=replay)
                if warm:
                    continue
                for _ in range(self.updates):
                    batch = replay.sample(self.batch_size)
                    figures = critic.update(batch, bellman, target=target, target_actor=target_actor)
                    run.log(value_loss=figures["loss"], q=figures["q"])
                    if critic.updates % self.delay == 0:
                        run.log(**actor.update(batch, improvement, critic=critic))
                        target.follow(critic, self.tau)
                        target_actor.follow(actor, self.tau)
            run.log(**experience.statistics())
