"""Action values: ensembles of ``Q(s, a)`` for continuous actions and of ``Q(s, .)`` for discrete ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guerdon.critics.heads import ValueHead
from guerdon.policies.features import ACTIVATIONS, Activation, Features


class EnsembleLinear(nn.Module):
    """``members`` linear layers side by side: ``[members, N, inputs] -> [members, N, outputs]``, each initialised as
    `torch.nn.Linear` is."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(members, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, outputs).uniform_(-bound, bound))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, hidden, self.weight)


class ActionCritic(nn.Module):
    """An ensemble of action values (twins, by default): what SAC, TD3 and their kin learn.

    Args:
        features: from observations to a vector; a plain vector passes through (``hidden=()``), images are
            convolved once for all members.
        action: size of a continuous action, which is joined to the vector; 0 for discrete actions.
        actions: number of discrete actions; one value for each. 1 with continuous actions.
        hidden: widths of each member's perceptron.
        members: how many.
        head: kind of value head (`ValueHead`), with ``options`` for it.
        scale: of the head's initial weights relative to PyTorch's (1: as the published code of SAC and TD3).
    """

    def __init__(
        self,
        features: Features,
        action: int = 0,
        actions: int = 1,
        hidden: Sequence[int] = (256, 256),
        activation: Activation = "relu",
        members: int = 2,
        head: str = "mse",
        **options: Any,
    ) -> None:
        super().__init__()
        self.features, self.members, self.actions = features, members, actions
        width = features.width + action
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [EnsembleLinear(members, width, size), ACTIVATIONS[activation]()]
            width = size
        self.layers = nn.Sequential(*layers)
        if head == "mse":
            options = {"scale": 1.0, **options}
        self.head = ValueHead(width, actions, head, members=members, **options)  # type: ignore[arg-type]

    def raw(self, observation: Any, action: Tensor | None = None) -> Tensor:
        """What the heads put out: ``[members, N]`` with an action ``[N, A]`` (a further axis of bins where the head is
        categorical), ``[members, N, actions]`` without."""
        vector = self.features(observation)
        if action is not None:
            vector = torch.cat([vector, action], -1)
        hidden = self.layers(vector.expand(self.members, *vector.shape))
        raw = self.head(hidden)
        return raw if action is None else self.head.select(raw, 0)

    def q(self, observation: Any, action: Tensor | None = None) -> Tensor:
        """``[members, N]`` with an action, ``[members, N, actions]`` without."""
        return self.head.mean(self.raw(observation, action))

    def first_q(self, observation: Any, action: Tensor) -> Tensor:
        """``[N]``: the first member's values alone, without the work of the others (TD3's actor climbs these)."""
        hidden = torch.cat([self.features(observation), action], -1)
        for layer in self.layers:
            linear = isinstance(layer, EnsembleLinear)
            hidden = torch.addmm(layer.bias[0], hidden, layer.weight[0]) if linear else layer(hidden)  # type: ignore[index]
        raw = torch.addmm(self.head.bias[0], hidden, self.head.weight[0])
        if self.head.categorical:
            raw = raw.unflatten(-1, (self.actions, self.head.bins))
        return self.head.mean(raw)[..., 0]
