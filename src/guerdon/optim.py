"""Optimisers as plain data: what a method asks for, built by the role that owns the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from guerdon.errors import UsageError, nearest

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Optimiser:
    """Base of the optimiser descriptions.

    Args:
        lr: learning rate.
        schedule: how it decays from ``lr`` to 0 over ``total`` updates ("constant" does not).
        warmup: updates over which it rises linearly from 0.
        total: updates until a decaying schedule reaches 0; needed for "linear" and "cosine".
    """

    lr: float = 3e-4
    schedule: Schedule = "constant"
    warmup: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise UsageError(f"the learning rate is {self.lr}; it must be a number that is not negative")
        if self.schedule not in get_args(Schedule):
            raise UsageError(
                f"unknown schedule '{self.schedule}'; {nearest(self.schedule, get_args(Schedule))}"
            )
        if self.schedule != "constant" and self.total <= 0:
            raise UsageError(f"the '{self.schedule}' schedule needs total > 0 updates")

    def factor(self, update: int) -> float:
        """What multiplies ``lr`` at the given update (the first is 0)."""
        factor = min(1.0, (update + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule == "linear":
            factor *= max(0.0, 1.0 - update / self.total)
        elif self.schedule == "cosine":
            factor *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, update / self.total)))
        return factor

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The torch optimiser over ``parameters``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Adam(Optimiser):
    """Adam (Kingma and Ba, 2015); ``weight_decay`` is added to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=True)


@dataclass(frozen=True)
class AdamW(Optimiser):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019)."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, self.lr, self.betas, self.eps, self.weight_decay, fused=True)


@dataclass(frozen=True)
class SGD(Optimiser):
    """Stochastic gradient descent."""

    momentum: float = 0.0
    weight_decay: float = 0.0

    def build(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, self.lr, self.momentum, weight_decay=self.weight_decay)
