"""The controller that is its own critic: greedy over the action values it learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.critics.heads import ValueHead
from guerdon.objectives import divergence
from guerdon.policies.control import Controller
from guerdon.policies.features import Features


class Greedy(Controller):
    """The action of the highest value, or with probability `epsilon` any: the actor of DQN (Mnih et al., 2015).

    It is its own critic: ``q_raw`` gives what the head puts out, ``q`` the values ``[N, A]``.

    Args:
        actions: their number.
        head: kind of value head (`ValueHead`), with ``head_options`` for it.

    Attributes:
        epsilon: set by the method as training goes on; 0 where nothing explores.
    """

    name: ClassVar[str] = "greedy"
    kind: ClassVar[str] = "categorical"

    def __init__(
        self,
        features: Features,
        actions: int,
        head: str = "mse",
        head_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(features)
        self.actions, self.head_kind, self.head_options = actions, head, dict(head_options or {})
        self.head = ValueHead(features.width, actions, head, **self.head_options)  # type: ignore[arg-type]
        self.epsilon = 0.0
        self.noise = ("uniform", 2)

    def q_raw(self, observation: Any) -> Tensor:
        """What the head puts out: ``[N, A]``, or ``[N, A, bins]``."""
        return self.head(self.features(observation))

    def q(self, observation: Any) -> Tensor:
        """``[N, A]``, the value of each action."""
        return self.head.mean(self.q_raw(observation))

    def distribution(self, traj: Trajectories) -> TensorDict:
        """The epsilon-greedy probabilities, as logits."""
        q = self.q(traj.inputs["step", "observation"])
        best = F.one_hot(q.argmax(-1), self.actions).to(q.dtype)
        share = best * (1.0 - self.epsilon) + self.epsilon / self.actions
        return TensorDict({"logits": share.log()}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        p = self.distribution(traj) if distribution is None else distribution
        return divergence.log_prob(p, traj.inputs["step", "action"], mask=traj.mask)

    def mode(self, observation: Any) -> Tensor:
        return self.q(observation).argmax(-1)

    def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
        best = self.mode(observation)
        if noise is None:
            return {"action": best}
        any_action = (noise[:, 1] * self.actions).long()
        return {"action": torch.where(noise[:, 0] < self.epsilon, any_action, best)}

    def _heads(self) -> list[tuple[Tensor, Tensor]]:
        return [(self.head.weight[0], self.head.bias[0, 0])]

    def _numpy(self, forward: Any) -> Any:
        centres, shape = self.head.centres.numpy(), (-1, self.actions, self.head.bins)

        def best(observation: Any) -> np.ndarray:
            raw = forward(observation)[0]
            if self.head.categorical:
                share = raw.reshape(shape)
                share = np.exp(share - share.max(-1, keepdims=True))
                raw = (share @ centres) / share.sum(-1)
            return raw.argmax(1)

        def act(observation: Any, noise: np.ndarray | None) -> dict[str, np.ndarray]:
            if noise is None:
                return {"action": best(observation)}
            explores = noise[:, 0] < self.epsilon
            if len(noise) == 1 and not explores[0]:  # one environment: what follows would cost as much again
                return {"action": best(observation)}
            if explores.all():  # a random action needs no network
                return {"action": (noise[:, 1] * self.actions).astype(np.int64)}
            chosen = best(observation)
            if explores.any():
                chosen = np.where(explores, (noise[:, 1] * self.actions).astype(np.int64), chosen)
            return {"action": chosen}

        return act

    def settings(self) -> dict[str, Any]:
        return {"actions": self.actions, "head": self.head_kind, "head_options": self.head_options}
