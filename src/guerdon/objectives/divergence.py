"""Distances between step distributions: exact KL, entropy, log-densities, f-divergences, and KL estimated from samples.

A distribution is a TensorDict ``[B, T]`` as `Policy.distribution` returns it:

    * categorical: ``logits [B, T, ..., A]``, unnormalised; ``-inf`` marks a forbidden action;
    * Gaussian with diagonal covariance: ``mean [B, T, ...]`` and ``std``, which broadcasts against ``mean``.

The axes after ``[B, T]`` (and before ``A``) are one step's components: action dimensions, pixels. Their
terms are joined by ``event``: summed, or averaged as image generators publish it. With a ``mask``, masked
steps give zero and pass no gradient, whatever they hold: padding writes zeros there, also into ``std``.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from tensordict import TensorDictBase
from torch import Tensor

from guerdon.errors import ShapeError, UsageError, nearest

Event = Literal["sum", "mean"]
Estimator = Literal["k1", "k2", "k3"]
FDivergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
_LARGEST_EXPONENT = 80.0  # exp of it is a finite float32, also times a few thousand


def kl(
    p: TensorDictBase, q: TensorDictBase, event: Event = "sum", mask: Bool[Tensor, "batch step"] | None = None
) -> Float[Tensor, "batch step"]:
    """Exact ``KL(p || q)`` of each step, ``[B, T]``, differentiable in both.

    An action that ``p`` allows and ``q`` forbids costs a huge but finite number rather than infinity.
    Raises `ShapeError` when the two are not of the same kind and shape.
    """
    kind = _kind(p, "p")
    if _kind(q, "q") != kind:
        raise ShapeError(f"kl: p is {kind} and q is {_kind(q, 'q')}; they must be of one kind")
    name = "logits" if kind == "categorical" else "mean"
    if p[name].shape != q[name].shape:
        raise ShapeError(f"kl: p's {name} have shape {list(p[name].shape)}, q's {list(q[name].shape)}")
    if kind == "categorical":
        log_p, log_q = _log_softmax(p, mask), _log_softmax(q, mask)
        return _join((log_p.exp() * (log_p - log_q)).sum(-1), event, mask)
    mean_p, std_p = _gaussian(p, mask)
    mean_q, std_q = _gaussian(q, mask)
    # written in the ratio of the deviations, so that equal ones (every denoiser) cost exactly nothing
    ratio = std_p / std_q
    terms = 0.5 * (ratio.square() - 1.0) - ratio.log() + 0.5 * ((mean_p - mean_q) / std_q).square()
    return _join(terms, event, mask)


def entropy(
    p: TensorDictBase, event: Event = "sum", mask: Bool[Tensor, "batch step"] | None = None
) -> Float[Tensor, "batch step"]:
    """Exact entropy of each step in nats, ``[B, T]`` (differential entropy for Gaussians)."""
    if _kind(p, "p") == "categorical":
        log_p = _log_softmax(p, mask)
        return _join(-(log_p.exp() * log_p).sum(-1), event, mask)
    mean, std = _gaussian(p, mask)
    return _join((std.log() + (0.5 + _HALF_LOG_TAU)).expand(mean.shape), event, mask)


def log_prob(
    p: TensorDictBase,
    action: Shaped[Tensor, "batch step ..."],
    event: Event = "sum",
    mask: Bool[Tensor, "batch step"] | None = None,
) -> Float[Tensor, "batch step"]:
    """Log-probability (density) of ``action`` at each step, ``[B, T]``.

    Args:
        action: categorical: integers, ``[B, T]`` or ``[B, T, ...]`` as ``logits`` without ``A``; Gaussian:
            as ``mean``.

    Raises `ShapeError` when ``action`` does not fit the distribution.
    """
    if _kind(p, "p") == "categorical":
        if action.shape != p["logits"].shape[:-1] or action.dtype.is_floating_point:
            raise ShapeError(
                f"log_prob: action is {action.dtype} {list(action.shape)}, "
                f"expected integers {list(p['logits'].shape[:-1])}"
            )
        logits = _masked(p["logits"], mask, 0.0)
        index = action.long()
        if mask is not None:
            index = torch.where(_wide(mask, index), index, 0)
        chosen = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        return _join(chosen - logits.logsumexp(-1), event, mask)
    if action.shape != p["mean"].shape:
        raise ShapeError(f"log_prob: action has shape {list(action.shape)}, expected {list(p['mean'].shape)}")
    mean, std = _gaussian(p, mask)
    distance = (_masked(action, mask, 0.0) - mean) / std
    return _join(-0.5 * distance.square() - std.log() - _HALF_LOG_TAU, event, mask)


def k1(log_p: Float[Tensor, "batch step"], log_q: Float[Tensor, "batch step"]) -> Float[Tensor, "batch step"]:
    """``log p - log q``: unbiased for KL(p || q) on samples of p, large variance, can be negative. As a loss
    its expected gradient is zero: subtract it from the reward instead."""
    return log_p - log_q


def k2(log_p: Float[Tensor, "batch step"], log_q: Float[Tensor, "batch step"]) -> Float[Tensor, "batch step"]:
    """``(log p - log q)^2 / 2``: biased, small variance. As a loss on samples of p it has the expected
    gradient of the exact KL(p || q)."""
    return 0.5 * (log_p - log_q).square()


def k3(log_p: Float[Tensor, "batch step"], log_q: Float[Tensor, "batch step"]) -> Float[Tensor, "batch step"]:
    """``q/p - 1 - log(q/p)`` (Schulman, 2020, "Approximating KL divergence"): unbiased, small variance, never
    negative. GRPO (Shao et al., 2024) has it as a loss; its expected gradient there is that of KL(q || p)."""
    difference = log_q - log_p
    return difference.expm1() - difference  # expm1: near p = q the two terms cancel to many digits


def estimate_kl(
    log_p: Float[Tensor, "batch step"], log_q: Float[Tensor, "batch step"], estimator: Estimator
) -> Float[Tensor, "batch step"]:
    """KL(p || q) of each step from the log-probabilities of samples of p, by `k1`, `k2` or `k3`.

    Raises `UsageError` if ``estimator`` is none of these.
    """
    if estimator == "k1":
        return k1(log_p, log_q)
    if estimator == "k2":
        return k2(log_p, log_q)
    if estimator == "k3":
        return k3(log_p, log_q)
    raise UsageError(f"there is no KL estimator '{estimator}': {nearest(estimator, get_args(Estimator))}")


def sequence_kl(
    p: TensorDictBase, q: TensorDictBase, mask: Bool[Tensor, "batch step"], event: Event = "sum"
) -> Float[Tensor, " batch"]:
    """``[B]``: the exact `kl` of every real step, summed along each trajectory.

    Its mean over trajectories that ``p``'s policy drew is unbiased for the KL between whole trajectories (the
    chain rule of the KL) and varies less than the sum of `k1`, because at each step the expectation over the
    next action is taken exactly and only the states are sampled. Raises as `kl` does.
    """
    return kl(p, q, event, mask).sum(1)


# --- f-divergences ----------------------------------------------------------------------------------------


def f_divergence(
    p: TensorDictBase,
    q: TensorDictBase,
    how: FDivergence = "reverse_kl",
    alpha: float = 0.5,
    mask: Bool[Tensor, "batch step"] | None = None,
) -> Float[Tensor, "batch step"]:
    """Exact ``sum_a q(a) f(p(a) / q(a))`` of each step, ``[B, T]``, for categorical steps of one component.

    Args:
        how: with ``u = p/q``: ``"reverse_kl"``, KL(p || q), ``f = u log u``; ``"forward_kl"``, KL(q || p),
            ``f = -log u``; ``"js"``, KL(p || m) + KL(q || m) with m the mean of both, ``f = u log u -
            (u + 1) log((u + 1) / 2)``; ``"alpha"``, ``f = (u^(1 - alpha) - (1 - alpha) u - alpha) /
            (alpha (alpha - 1))``, which tends to the reverse KL for alpha to 0 and to the forward KL for alpha to 1
            (Wang et al., 2024, "Beyond reverse KL").

    Raises `UsageError` on an unknown divergence or an ``alpha`` outside (0, 1), `ShapeError` on other steps.
    """
    if how == "reverse_kl":
        return kl(p, q, "sum", mask)
    if how == "forward_kl":
        return kl(q, p, "sum", mask)
    for name, one in (("p", p), ("q", q)):
        if _kind(one, name) != "categorical" or one["logits"].ndim != 3:
            raise ShapeError(f"f_divergence '{how}' needs logits [B, T, A]; {name} has another form")
    log_p, log_q = _log_softmax(p, mask), _log_softmax(q, mask)
    if how == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        terms = log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)
        return _join(terms.sum(-1), "sum", mask)
    _check_divergence(how, alpha)
    overlap = ((1 - alpha) * log_p + alpha * log_q).exp().sum(-1)
    return _join((1 - overlap) / (alpha * (1 - alpha)), "sum", mask)


def f_score(
    log_ratio: Float[Tensor, " *batch"], how: FDivergence = "reverse_kl", alpha: float = 0.5
) -> Float[Tensor, " *batch"]:
    """``f'(u)`` at ``u = exp(log_ratio)``, shifted to be 0 at ``u = 1``: what an f-divergence makes of the log-ratio.

    A policy that maximises reward minus ``beta`` times that divergence from a reference has reward ``beta f'(u)``
    up to a number that depends on the prompt alone, so that preference losses stay as they are and read
    this instead of the log-ratio (Wang et al., 2024, "Beyond reverse KL"). Exponents above 80 are cut off
    (with no gradient beyond).

    Args:
        log_ratio: of any shape, policy over reference.
        how, alpha: as for `f_divergence`: log u; 1 - 1/u; log(2u / (u + 1)); (1 - u^-alpha) / alpha.

    Raises `UsageError` on an unknown divergence or an ``alpha`` outside (0, 1).
    """
    if how == "reverse_kl":
        return log_ratio
    if how == "forward_kl":
        return -(-log_ratio).clamp(max=_LARGEST_EXPONENT).expm1()
    if how == "js":
        return torch.nn.functional.logsigmoid(log_ratio) + math.log(2)
    _check_divergence(how, alpha)
    return -(-alpha * log_ratio).clamp(max=_LARGEST_EXPONENT).expm1() / alpha


def _check_divergence(how: str, alpha: float) -> None:
    if how not in get_args(FDivergence):
        raise UsageError(f"there is no divergence '{how}': {nearest(how, get_args(FDivergence))}")
    if how == "alpha" and not 0 < alpha < 1:
        raise UsageError(f"the alpha-divergence needs alpha between 0 and 1, not {alpha}")


# --- inside -----------------------------------------------------------------------------------------------


def _kind(p: TensorDictBase, name: str) -> str:
    keys = p.keys()
    if "logits" in keys:
        return "categorical"
    if "mean" in keys and "std" in keys:
        return "Gaussian"
    raise ShapeError(f"{name} holds {sorted(keys)}; a distribution holds 'logits', or 'mean' and 'std'")


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """``values`` with axes of length one appended until it broadcasts against ``like``."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def _masked(values: Tensor, mask: Tensor | None, filler: float) -> Tensor:
    # filled before any arithmetic: 0 * inf in a backward pass would reach the weights as NaN
    return values if mask is None else torch.where(_wide(mask, values), values, filler)


def _log_softmax(p: TensorDictBase, mask: Tensor | None) -> Tensor:
    """Log-probabilities, with a finite number in place of ``-inf`` so that ``0 * log 0`` is 0."""
    log_p = _masked(p["logits"], mask, 0.0).log_softmax(-1)
    return log_p.clamp(min=torch.finfo(log_p.dtype).min / 4)


def _gaussian(p: TensorDictBase, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    mean, std = p["mean"], p["std"]
    return _masked(mean, mask, 0.0), _masked(_wide(std, mean), mask, 1.0)


def _join(terms: Tensor, event: str, mask: Tensor | None) -> Tensor:
    """Sum or average over the axes after ``[B, T]``; zero where masked."""
    if event not in ("sum", "mean"):
        raise UsageError(f"there is no event reduction '{event}': {nearest(event, get_args(Event))}")
    if terms.ndim > 2:
        flat = terms.flatten(2)
        terms = flat.sum(2) if event == "sum" else flat.mean(2)
    return terms if mask is None else torch.where(mask, terms, 0.0)
