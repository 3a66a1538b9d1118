"""Regression of values on targets, for critics: per-step losses ``[B, T]`` and the objective around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.reduction import Reduction, reduce, reduction_weight

Loss = Literal["mse", "huber"]


def mse(
    value: Float[Tensor, "batch step"], target: Float[Tensor, "batch step"]
) -> Float[Tensor, "batch step"]:
    """``(value - target)^2``, without a factor of one half."""
    return (value - target).square()


def huber(
    value: Float[Tensor, "batch step"], target: Float[Tensor, "batch step"], delta: float = 1.0
) -> Float[Tensor, "batch step"]:
    """Half the square of the error up to ``delta``, linear beyond (Huber, 1964)."""
    return F.huber_loss(value, target, reduction="none", delta=delta)


def clipped_value(
    value: Float[Tensor, "batch step"], old_value: Float[Tensor, "batch step"], clip: float
) -> Float[Tensor, "batch step"]:
    """``value``, kept within ``clip`` of what it was when the batch was collected."""
    return old_value + (value - old_value).clamp(-clip, clip)


def explained_variance(
    value: Float[Tensor, "batch step"], target: Float[Tensor, "batch step"], mask: Bool[Tensor, "batch step"]
) -> Float[Tensor, ""]:
    """``1 - Var(target - value) / Var(target)`` over real steps: 1 is perfect, 0 no better than a constant.
    Zero where the target does not vary."""
    value, target = value[mask].double(), target[mask].double()
    if len(target) == 0:
        return torch.zeros((), device=mask.device)
    variance = target.var(correction=0)
    explained = 1.0 - (target - value).var(correction=0) / variance
    return torch.where(variance > 0, explained, 0.0).float()


@dataclass
class ValueRegression:
    """Fit ``critic.value(batch) -> [B, T]`` to ``batch.target``.

    Attributes:
        clip: PPO's clipped value loss (Schulman et al., 2017, as in the published code): the larger of the
            losses of the value and of the value kept within ``clip`` of ``batch.value``.
        loss: ``"mse"`` (no factor of one half) or ``"huber"``; delta: where Huber's becomes linear. A critic
            whose head is categorical brings its own, and cannot be clipped.
        reduction: see `reduction.reduce`.
        coefficient: what the loss is multiplied by (0.5 where a paper writes half the square).

    Metrics: ``loss``, and ``clip_fraction`` with ``clip``.
    Raises `UsageError` on an unknown option, `ShapeError` on a batch that lacks a field.
    """

    clip: float | None = None
    loss: Loss = "mse"
    delta: float = 1.0
    reduction: Reduction = "step"
    coefficient: float = 1.0

    def __post_init__(self) -> None:
        check_choices(self, loss=get_args(Loss), reduction=get_args(Reduction))
        if self.clip is not None and self.clip <= 0:
            raise UsageError(
                f"ValueRegression: clip is {self.clip}; it must be positive (None for no clipping)"
            )

    def weight(self, batch: Trajectories) -> Tensor:
        """How much the loss counted (see `reduction.reduction_weight`)."""
        return reduction_weight(batch.mask, self.reduction)

    def _losses(self, value: Tensor, target: Tensor) -> Tensor:
        return mse(value, target) if self.loss == "mse" else huber(value, target, self.delta)

    def __call__(self, critic: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        target = required(self, batch, "target")
        metrics: Metrics = {}
        head = getattr(critic, "head", None)
        if getattr(head, "categorical", False):
            return self._by_classification(critic, batch, target)
        value = critic.value(batch)
        losses = self._losses(value, target)
        if self.clip is not None:
            near = clipped_value(value, required(self, batch, "value", "with a clip"), self.clip)
            losses = torch.maximum(losses, self._losses(near, target))
            with torch.no_grad():
                metrics["clip_fraction"] = reduce((near != value).to(value.dtype), batch.mask)
        loss = reduce(losses, batch.mask, self.reduction)
        if self.coefficient != 1.0:
            loss = loss * self.coefficient
        metrics["loss"] = loss.detach()
        return loss, metrics

    def _by_classification(self, critic: Any, batch: Trajectories, target: Tensor) -> tuple[Tensor, Metrics]:
        if self.clip is not None:
            raise UsageError(
                "ValueRegression: a categorical value head has no clipped loss; leave out the clip"
            )
        loss = reduce(critic.losses(batch, target), batch.mask, self.reduction) * self.coefficient
        return loss, {"loss": loss.detach(), "border_share": critic.head.border_share(target)}
