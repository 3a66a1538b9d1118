"""Policy gradients on ``[B, T]`` log-probabilities: the clipped surrogate, REINFORCE, and what they add.

The pure functions give per-step losses; the dataclasses are `Objective`s that ask a policy for its
log-probabilities, add entropy and KL terms, and reduce. None of them knows what a step is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError, nearest
from guerdon.objectives import divergence
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.reduction import Reduction, reduce, reduction_weight

Importance = Literal["none", "step", "trajectory"]


# --- per-step losses --------------------------------------------------------------------------------------


def clipped_surrogate(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    advantage: Float[Tensor, "batch step"],
    clip: float | Tensor,
    *,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Tensor, "batch step"]:
    """``max(-A rho, -A clip(rho, 1 - clip, 1 + clip))`` with ``rho = exp(log_prob - old_log_prob)``, the
    clipped surrogate of PPO (Schulman et al., 2017, eq. 7) as a per-step loss ``[B, T]``.

    Args:
        log_prob: under the policy that learns; old_log_prob: under the one that acted.
        clip: how far the ratio may fall below 1 and, without ``clip_high``, rise above it.
        clip_high: how far it may rise ("clip higher", DAPO, Yu et al., 2025).
        dual_clip: for negative advantages the loss is at most ``-A * dual_clip``, with ``dual_clip > 1``
            (Ye et al., 2020): a step that became many times likelier cannot dominate.
    """
    # The maximum over two branches as one clamp: where A > 0 only the upper bound can bind, else only the
    # lower (and the dual clip, an upper one). Fewer nodes in the graph, and equal to the last bit.
    gains = advantage > 0
    upper = torch.where(
        gains, 1.0 + (clip if clip_high is None else clip_high), math.inf if dual_clip is None else dual_clip
    )
    lower = torch.where(gains, 0.0, 1.0 - clip)
    return -advantage * (log_prob - old_log_prob).exp().clamp(lower, upper)


def importance_weight(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    level: Importance = "step",
    cap: float | None = None,
) -> Float[Tensor, "batch step"]:
    """Weights ``[B, T]`` without gradient that correct for data which another policy drew.

    Args:
        level: ``"none"``, ones; ``"step"``, the ratio of each step; ``"trajectory"``, the product of the
            ratios over a trajectory, at each of its steps.
        cap: the weight is at most this (truncated importance sampling, Ionides, 2008).

    Raises `UsageError` if ``level`` is none of these.
    """
    log_ratio = torch.where(mask, log_prob.detach() - old_log_prob, 0.0)
    if level == "none":
        return torch.ones_like(log_ratio)
    if level == "trajectory":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    elif level != "step":
        raise UsageError(f"there is no importance level '{level}': {nearest(level, get_args(Importance))}")
    weight = log_ratio.exp()
    return weight if cap is None else weight.clamp(max=cap)


def reinforce(
    log_prob: Float[Tensor, "batch step"],
    advantage: Float[Tensor, "batch step"],
    weight: Float[Tensor, "batch step"] | None = None,
) -> Float[Tensor, "batch step"]:
    """``-A log pi`` (Williams, 1992) as a per-step loss ``[B, T]``, times an `importance_weight` if given."""
    gain = advantage if weight is None else advantage * weight
    return -gain * log_prob


def drift(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    clip: tuple[float | Tensor, float | Tensor] | None = None,
) -> Metrics:
    """How far the policy has moved from the one that acted; both log-probabilities are zero where masked.

    ``ratio_deviation_max``, the largest ``|rho - 1|`` (zero, up to rounding, before the first update);
    ``approx_kl``, the mean over steps of the `k3` estimate of KL(old || new); ``clip_fraction``, the share
    of steps whose ratio left ``[1 - clip[0], 1 + clip[1]]``, if ``clip`` is given.
    """
    steps = mask.count_nonzero().clamp(min=1)
    log_ratio = log_prob.detach() - old_log_prob
    deviation = log_ratio.expm1()  # rho - 1 to full precision, also for a clip range of 1e-4
    metrics = {
        "ratio_deviation_max": torch.linalg.vector_norm(deviation, float("inf")),
        "approx_kl": (deviation - log_ratio).sum() / steps,
    }
    if clip is not None:
        kept = deviation.clamp(-clip[0], clip[1])  # type: ignore[arg-type]
        metrics["clip_fraction"] = (kept != deviation).count_nonzero() / steps
    return metrics


# --- objectives -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Regularised:
    """What the objectives below share: one reduction, an entropy bonus and a KL cost.

    Attributes:
        reduction: see `reduction.reduce`; all terms use the same.
        entropy: what a nat of entropy is worth; needs the policy's ``distribution``.
        kl: what a nat of KL(policy || reference) costs.
        kl_estimator: ``"exact"`` reads ``batch.reference``; ``"k1"``, ``"k2"`` and ``"k3"`` read
            ``batch.reference_log_prob`` and suppose fresh samples (see `divergence` for their gradients: of
            the three only ``"k2"`` has that of this KL; ``"k3"`` is GRPO's).
    """

    reduction: Reduction = "step"
    entropy: float = 0.0
    kl: float = 0.0
    kl_estimator: Literal["exact", "k1", "k2", "k3"] = "exact"

    def __post_init__(self) -> None:
        check_choices(
            self, reduction=get_args(Reduction), kl_estimator=("exact", *get_args(divergence.Estimator))
        )

    def weight(self, batch: Trajectories) -> Tensor:
        """How much the loss counted (see `reduction.reduction_weight`)."""
        return reduction_weight(batch.mask, self.reduction)

    def _evaluate(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Any]:
        """``log_prob [B, T]`` and, if a term needs it, the distribution it came from (one forward pass)."""
        if self.entropy or (self.kl and self.kl_estimator == "exact"):
            distribution = policy.distribution(batch)
            return policy.log_prob(batch, distribution), distribution
        return policy.log_prob(batch), None

    def _finish(
        self,
        losses: Tensor,
        log_prob: Tensor,
        distribution: Any,
        policy: Any,
        batch: Trajectories,
        metrics: Metrics,
    ) -> tuple[Tensor, Metrics]:
        """Add the regularisers to the per-step ``losses``, reduce once, complete the metrics."""
        mask = batch.mask
        event: divergence.Event = getattr(policy, "event_reduction", "sum")
        if self.kl:
            if self.kl_estimator == "exact":
                reference = required(self, batch, "reference", "with an exact KL")
                kl = divergence.kl(distribution, reference, event, mask)
            else:
                other = required(
                    self, batch, "reference_log_prob", f"with kl_estimator '{self.kl_estimator}'"
                )
                kl = divergence.estimate_kl(log_prob, other, self.kl_estimator)
            losses = torch.add(losses, kl, alpha=self.kl)
            metrics["kl"] = reduce(kl.detach(), mask)
        if self.entropy:
            entropy = divergence.entropy(distribution, event)
            losses = torch.add(losses, entropy, alpha=-self.entropy)
            metrics["entropy"] = reduce(entropy.detach(), mask)
        loss = reduce(losses, mask, self.reduction)
        metrics["loss"] = loss.detach()
        return loss, metrics


@dataclass
class ClippedSurrogate(_Regularised):
    """PPO's objective (Schulman et al., 2017) on any policy's steps: `clipped_surrogate`, reduced.

    Reads ``log_prob`` and ``advantage`` of the batch, and the reference if ``kl`` is not zero.

    Attributes:
        clip, clip_high, dual_clip: see `clipped_surrogate`. A ``clip`` that changes between updates is a 0-d tensor.

    Metrics (means over real steps whatever the reduction): ``loss``, ``ratio_deviation_max``,
    ``clip_fraction``, ``approx_kl``; ``kl`` and ``entropy`` where they have a coefficient.
    Raises `UsageError` on a clip range that makes no sense, `ShapeError` on a batch that lacks a field.
    """

    clip: float | Tensor = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "clip_high"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"ClippedSurrogate: {name} is {value}; it must not be negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UsageError(f"ClippedSurrogate: dual_clip is {self.dual_clip}; it must be larger than 1")

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        advantage = required(self, batch, "advantage")
        log_prob, distribution = self._evaluate(policy, batch)
        old = batch.log_prob
        losses = clipped_surrogate(
            log_prob, old, advantage, self.clip, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
        high = self.clip if self.clip_high is None else self.clip_high
        metrics = drift(log_prob, old, batch.mask, (self.clip, high))
        return self._finish(losses, log_prob, distribution, policy, batch, metrics)


@dataclass
class Reinforce(_Regularised):
    """The score-function gradient (Williams, 1992) on any policy's steps: `reinforce`, reduced.

    Reads ``advantage`` and ``log_prob`` of the batch (the latter for the importance weight and to tell how
    stale the data are), and the reference if ``kl`` is not zero.

    Attributes:
        importance, importance_cap: see `importance_weight`.

    Metrics (means over real steps whatever the reduction): ``loss``, ``ratio_deviation_max``, ``approx_kl``;
    ``kl`` and ``entropy`` where they have a coefficient.
    Raises `UsageError` on an unknown option, `ShapeError` on a batch that lacks a field.
    """

    importance: Importance = "none"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, importance=get_args(Importance))

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        advantage = required(self, batch, "advantage")
        log_prob, distribution = self._evaluate(policy, batch)
        old, mask = batch.log_prob, batch.mask
        weight = None
        if self.importance != "none":
            weight = importance_weight(log_prob, old, mask, self.importance, self.importance_cap)
        losses = reinforce(log_prob, advantage, weight)
        metrics = drift(log_prob, old, mask)
        return self._finish(losses, log_prob, distribution, policy, batch, metrics)
