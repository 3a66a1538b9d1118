"""Batches of pairs: both sides as one batch, their labels, and the reference's log-probabilities."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from guerdon.batch import Preferences, Trajectories, concatenate
from guerdon.errors import UsageError

AnyBatch = TypeVar("AnyBatch", Preferences, Trajectories)

_NOT_READ = (
    "reward",
    "outputs",
    "group",
    "version",
    "terminated",
    "truncated",
    "advantage",
    "target",
    "value",
    "reference_log_prob",
    "reference",
)


def bare(traj: Trajectories, outputs: bool = False) -> Trajectories:
    """Only what a policy reads; with ``outputs`` what a judge reads as well."""
    return traj.with_(**{name: None for name in _NOT_READ if not (outputs and name == "outputs")})


def both_sides(batch: Preferences, outputs: bool = False) -> Trajectories:
    """``2 B`` rows, the chosen before the rejected, so that a model evaluates all of them at once.

    What models do not read is left behind, and so is what only one side has; ``outputs`` (texts, images) is kept on
    request, for judges.
    """
    sides = [bare(batch.chosen, outputs), bare(batch.rejected, outputs)]
    for name in ("inputs", "outputs"):
        parts = [getattr(side, name) for side in sides]
        keys = [set() if part is None else set(part.keys()) for part in parts]
        shared = keys[0] & keys[1]
        for i, part in enumerate(parts):
            if keys[i] != shared:
                sides[i] = sides[i].with_(**{name: part.select(*shared) if shared else None})
    return concatenate(sides)


def with_reference(batch: AnyBatch, reference: Any) -> AnyBatch:
    """The same batch with ``reference_log_prob [B, T]`` filled in (on both sides of `Preferences`, in one pass).

    Args:
        reference: a role, or any policy: ``reference.log_prob(traj) -> [B, T]``. Called without gradient.
    """
    with torch.no_grad():
        if isinstance(batch, Trajectories):
            log_prob = reference.log_prob(bare(batch)).to(batch.mask.device)
            return cast(AnyBatch, batch.with_(reference_log_prob=log_prob))
        chosen, rejected = batch.chosen, batch.rejected
        log_prob = reference.log_prob(both_sides(batch)).to(chosen.mask.device)
    rows = chosen.mask.shape[0]
    result = cast(Any, batch).clone(False)
    result.chosen = chosen.with_(reference_log_prob=log_prob[:rows, : chosen.steps])
    result.rejected = rejected.with_(reference_log_prob=log_prob[rows:, : rejected.steps])
    return cast(AnyBatch, result)


def pairs_in(batch: Preferences, power: int = 1) -> Tensor:
    """The number of pairs, to a ``power``, as a 0-d tensor."""
    mask = batch.chosen.mask
    return torch.full((), mask.shape[0] ** power, device=mask.device)


def label_of(batch: Preferences, smoothing: float, soft: bool) -> Tensor | float | None:
    """The probability that ``chosen`` is better; None where that is certain."""
    p = batch.strength if soft else None
    if not smoothing:
        return p
    return 1 - smoothing if p is None else smoothing + (1 - 2 * smoothing) * p


def check_smoothing(owner: object, value: float) -> None:
    """Raise `UsageError` where ``value`` is no share of wrong labels."""
    if not 0 <= value < 0.5:
        raise UsageError(
            f"{type(owner).__name__}: label_smoothing is {value}; it is the share of wrong labels, at least 0 and "
            "below one half"
        )
