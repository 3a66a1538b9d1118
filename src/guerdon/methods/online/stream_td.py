"""Stream TD(lambda): predicts the discounted sum of what is still to come, from each step once, as it arrives
(Elsayed et al., 2024, arXiv 2410.14606, algorithm 3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from guerdon.experience.environments import Environments
from guerdon.experience.rollouts import Rollouts
from guerdon.experience.stream import Stream
from guerdon.optim import SGD
from guerdon.policies.small import SmallNetwork, differentiable
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.streaming import Learner, RuleName, make_rule


@dataclass
class StreamTD:
    """Prediction from a stream; the environment goes its own way, whatever the action."""

    default_env: ClassVar[str] = "guerdon/Series-v0"

    steps: int = 68_000  # steps of the series, and of the optimiser
    gamma: float = 0.99  # discount of what comes later
    lam: float = 0.8  # decay of the eligibility trace beside gamma (0: no traces)
    optimiser: RuleName = "obgd"  # bounded steps, bounded and adaptive, or plain
    alpha: float = 1.0  # the largest step size; with "sgd" the step size
    kappa: float = 2.0  # caution of the bound
    hidden: tuple[int, ...] = (128, 128)  # units of the fully connected layers
    layer_norm: bool = True  # normalise each layer before its non-linearity
    sparsity: float = 0.9  # share of initial weights that are 0
    normalise: bool = True  # normalise observations
    scale_reward: bool = True  # scale what is predicted
    bootstrap_truncated: bool = False  # a cut episode goes on in its value
    log_every: int = 1000  # steps a record

    def models(
        self, environments: Environments, generator: torch.Generator | None = None
    ) -> dict[str, SmallNetwork]:
        """The network of the paper for a series, its weights drawn by ``generator`` (torch's own if None)."""
        shape = environments.observation_space.shape
        return {"critic": SmallNetwork(shape, 1, self.hidden, self.layer_norm, self.sparsity, generator)}

    def roles(self) -> dict[str, RoleSettings]:
        """How the network is held: the steps are the learner's, the role only keeps its weights."""
        return {"critic": RoleSettings(SGD(self.alpha))}

    @np.errstate(over="ignore", invalid="ignore")  # the TD error tells
    def train(
        self,
        run: Run,
        critic: Role,
        experience: Rollouts,
        predicted: Callable[[float], None] | None = None,
    ) -> None:
        """See what follows, step once along the trace, forget; repeat.

        Args:
            predicted: called after every step with the prediction of the discounted sum of all rewards still
                to come, in the environment's own units.
        """
        environments = experience.environments
        stream = run.track("stream", Stream(environments, self.gamma, self.normalise, self.scale_reward))
        network = differentiable(critic.model, critic.flat_weights())
        rule = make_rule(self.optimiser, self.alpha, self.kappa)
        learner = run.track("learner", Learner(network, rule, self.gamma * self.lam))
        one = np.ones(1, dtype=np.float32)
        anything = np.zeros_like(environments.action_space.sample())

        for record in run.steps(-(-self.steps // self.log_every)):
            count = min(self.log_every, self.steps - record * self.log_every)
            if stream.fresh:  # also where a resumed run had to leave an episode
                learner.reset()
            errors = 0.0
            for _ in range(count):
                v, tape = learner.forward(stream.observation)
                move = stream.step(anything)
                over = move.terminated or (move.truncated and not self.bootstrap_truncated)
                bootstrap = 0.0 if over else self.gamma * float(learner.predict(move.observation)[0])
                delta = move.reward + bootstrap - float(v[0])
                learner.accumulate(tape, one)
                learner.step(delta)
                if move.terminated or move.truncated:
                    learner.reset()
                errors += abs(delta)
                if predicted is not None:
                    predicted(float(learner.predict(stream.observation)[0]) * stream.reward_scale)
            critic.updates += count
            experience.taken += count
            run.log(steps=experience.taken, td_error=errors / count)
