"""SAC: soft actor-critic (Haarnoja et al., 2018, arXiv 1801.01290 and 1812.05905), continuous and discrete.

With discrete actions every expectation over actions is exact (Christodoulou, 2019, arXiv 1910.07207).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from guerdon.experience.rollouts import Rollouts
from guerdon.objectives.action_value import SoftBellman, SoftImprovement
from guerdon.optim import Adam
from guerdon.policies.features import Activation
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class SAC:
    """Soft actor-critic: maximum-entropy control with twin critics and replay."""

    controllers: ClassVar[Mapping[str, str]] = {"gaussian": "squashed"}
    critic_kind: ClassVar[str] = "action"
    default_env: ClassVar[str] = "Pendulum-v1"

    steps: int = 1_000_000  # environment steps
    start: int = 10_000  # steps of random actions before learning
    every: int = 1  # steps of each environment between updates
    updates: int = 1  # updates each time
    batch_size: int = 256  # rows an update
    buffer_size: int = 1_000_000  # steps remembered
    gamma: float = 0.99  # discount
    n_step: int = 1  # rewards summed before the bootstrap
    tau: float = 0.005  # share by which the target critic follows, each update
    lr: float = 3e-4  # of actor, critic and temperature
    learn_temperature: bool = True  # adjust the temperature to a target entropy
    alpha: float = 1.0  # temperature, or where it starts
    target_entropy: float | None = None  # nats; -dim(A) if none (discrete: 0.98 log A, as published)
    critics: int = 2  # members of the ensemble whose minimum counts
    hidden: tuple[int, ...] = (256, 256)  # widths of the networks
    activation: Activation = "relu"  # of the networks
    environments: int = 1  # environments side by side
    head: Literal["mse", "hl_gauss", "two_hot", "c51", "mse_softmax"] = "mse"  # how the critic holds values

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        return {name: RoleSettings(Adam(self.lr), max_grad_norm=None) for name in ("actor", "critic")}

    def train(self, run: Run, actor: Role, experience: Rollouts, critic: Role) -> None:
        """Act, remember, and for each step make one update of critic, actor, temperature and target."""
        target = run.adopt("target", critic.copy(frozen=True))
        replay = run.track(
            "replay", experience.replay(self.buffer_size, gamma=self.gamma, n_step=self.n_step)
        )
        bellman = SoftBellman(alpha=self.alpha)
        improvement = SoftImprovement(self._entropy(actor), alpha=self.alpha)
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
                    run.log(value_loss=critic.update(batch, bellman, target=target, actor=actor)["loss"])
                    run.log(**actor.update(batch, improvement, critic=critic))
                    target.follow(critic, self.tau)
            run.log(**experience.statistics())

    def _entropy(self, actor: Role) -> float:
        if self.target_entropy is not None:
            return self.target_entropy
        return actor.model.default_target_entropy  # type: ignore[return-value]
