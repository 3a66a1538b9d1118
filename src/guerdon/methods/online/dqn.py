"""DQN: deep Q-learning (Mnih et al., 2015), with double selection (van Hasselt et al., 2016, arXiv 1509.06461), n-step
returns, prioritised replay (Schaul et al., 2016, arXiv 1511.05952), and any kind of value head: scalar, HL-Gauss or
two-hot (Farebrother et al., 2024, arXiv 2403.03950), C51 (Bellemare et al., 2017, arXiv 1707.06887).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from guerdon.experience.rollouts import Rollouts
from guerdon.objectives.action_value import QLearning
from guerdon.optim import Adam
from guerdon.policies.features import Activation
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class DQN:
    """Deep Q-learning: the actor is greedy over the values it learns."""

    controllers: ClassVar[Mapping[str, str]] = {"categorical": "greedy"}

    steps: int = 1_000_000  # environment steps
    start: int = 100  # steps of random actions before learning
    update_every: int = 4  # environment steps between updates
    updates: int = 1  # updates each time
    batch_size: int = 32  # rows an update
    buffer_size: int = 1_000_000  # steps remembered
    gamma: float = 0.99  # discount
    n_step: int = 1  # rewards summed before the bootstrap
    double: bool = True  # choose the next action by the learning network
    huber: bool = True  # Huber's loss for scalar values
    target_every: int = 10_000  # environment steps between copies into the target network
    exploration: float = 0.1  # share of training over which epsilon falls
    final_epsilon: float = 0.05  # where it stays
    prioritised: bool = False  # draw rows by their errors
    priority: float = 0.6  # exponent of the errors
    correction: float = 0.4  # exponent of the importance weights
    lr: float = 1e-4  # of Adam
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this
    hidden: tuple[int, ...] = (64, 64)  # widths of the network
    activation: Activation = "relu"  # of the network
    environments: int = 1  # environments side by side
    head: Literal["mse", "hl_gauss", "two_hot", "c51", "mse_softmax"] = "mse"  # how values are held
    low: float = -10.0  # lower end of a categorical head's support
    high: float = 10.0  # its upper end
    bins: int = 51  # its bins

    @property
    def head_options(self) -> dict[str, Any]:
        """Of the value head."""
        return {} if self.head == "mse" else {"low": self.low, "high": self.high, "bins": self.bins}

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        return {"actor": RoleSettings(Adam(self.lr), self.max_grad_norm)}

    def train(self, run: Run, actor: Role, experience: Rollouts) -> None:
        """Act epsilon-greedily, remember, and regress on the target network's values."""
        target = run.adopt("target", actor.copy(frozen=True))
        replay = run.track(
            "replay",
            experience.replay(
                self.buffer_size,
                gamma=self.gamma,
                n_step=self.n_step,
                prioritised=self.prioritised,
                alpha=self.priority,
                beta=self.correction,
            ),
        )
        objective = QLearning(self.double, self.huber)
        n = experience.environments.n
        stride = max(1, self.update_every // n)
        record = stride * n * max(1, 1000 // (stride * n))  # environment steps in one record of the metrics
        run.state.setdefault("copied", 0)
        for _ in run.steps(-(-self.steps // record), what="thousand steps"):
            for _ in range(0, record, stride * n):
                warm = experience.taken < self.start
                actor.model.epsilon = self._epsilon(experience.taken)  # type: ignore[assignment]
                experience.advance(None if warm else actor, stride, into=replay)
                if warm:
                    continue
                if experience.taken // self.target_every > run.state["copied"]:
                    run.state["copied"] = experience.taken // self.target_every
                    target.follow(actor, tau=1.0)
                for _ in range(self.updates):
                    batch = replay.sample(self.batch_size)
                    if self.prioritised:
                        replay.prioritise(batch.index, actor.evaluate(objective.errors, batch, target=target))
                    run.log(**actor.update(batch, objective, target=target))
            run.log(epsilon=actor.model.epsilon, **experience.statistics())

    def _epsilon(self, taken: int) -> float:
        share = min(1.0, taken / max(1.0, self.exploration * self.steps))
        return 1.0 + share * (self.final_epsilon - 1.0)
