"""How ``[B, T]`` per-step values become one number, and how much that number counted.

Published losses differ here more often than anywhere else: the mean over all steps (PPO, DAPO's "token
mean"), the mean over trajectories of their means (GRPO), of their sums (DPO-like likelihoods, GFlowNets), or
a sum divided by a constant (Dr. GRPO, so that length earns nothing). Each is written once, with the weight
that makes a batch split into micro-batches give exactly the gradient of the whole.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from guerdon.errors import UsageError, nearest

Reduction = Literal["step", "trajectory", "sum", "constant"]


def reduce(
    values: Float[Tensor, "batch step"], mask: Bool[Tensor, "batch step"], how: Reduction = "step"
) -> Float[Tensor, ""]:
    """One number from per-step ``values [B, T]``; masked steps do not count, whatever they hold (even NaN).

    Args:
        how: ``"step"``, the mean over all real steps; ``"trajectory"``, the mean over trajectories of the
            mean over their steps; ``"sum"``, the mean over trajectories of the sum over their steps;
            ``"constant"``, the sum over all real steps divided by ``B * T`` (Dr. GRPO, Liu et al., 2025).

    A row without real steps is no trajectory and counts nowhere, except that ``"constant"`` divides by the
    slots, real or not. With nothing to count the result is zero (with a zero gradient).
    Raises `UsageError` if ``how`` is none of these.
    """
    real = torch.where(mask, values, 0.0)
    if how == "step":
        return real.sum() / mask.count_nonzero().clamp(min=1)
    if how == "trajectory":
        lengths = mask.count_nonzero(1)
        return (real.sum(1) / lengths.clamp(min=1)).sum() / lengths.count_nonzero().clamp(min=1)
    if how == "sum":
        return real.sum() / mask.any(1).count_nonzero().clamp(min=1)
    if how == "constant":
        return real.sum() / max(mask.numel(), 1)
    raise _unknown(how)


def reduction_weight(mask: Bool[Tensor, "batch step"], how: Reduction = "step") -> Shaped[Tensor, ""]:
    """How much `reduce` counted, a 0-d tensor: real steps, trajectories with a real step, or slots.

    ``sum_i weight_i * reduce_i / sum_i weight_i`` over parts of a batch equals ``reduce`` of the whole: for
    parts that are whole rows always; for parts along the steps with ``"step"`` and ``"constant"`` only.
    Raises `UsageError` if ``how`` is no reduction.
    """
    if how == "step":
        return mask.count_nonzero()
    if how in ("trajectory", "sum"):
        return mask.any(1).count_nonzero()
    if how == "constant":
        return torch.full((), mask.numel(), device=mask.device)
    raise _unknown(how)


def _unknown(how: str) -> UsageError:
    return UsageError(f"there is no reduction '{how}': {nearest(how, get_args(Reduction))}")


def to_go(values: Tensor) -> Tensor:
    """``[B, T]``: the sum of each row from a step to the end."""
    return values.flip(1).cumsum(1).flip(1)
