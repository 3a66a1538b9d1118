"""Objectives that compare the answers to one prompt: who belongs to whom."""

from __future__ import annotations

from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import ShapeError


def group_sum(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """``[G]`` (or ``[G, T]``): the sum of each group's rows."""
    return values.new_zeros(len(counts), *values.shape[1:]).index_add(0, index, values)


def groups_of(batch: Trajectories, owner: object) -> tuple[Tensor, Tensor]:
    """``(index [B], counts [G])``: each row's group, numbered from 0, and the size of each.

    Raises `ShapeError`, in the name of ``owner``, for a batch without groups or a row whose group has no other.
    """
    owner = type(owner).__name__
    if batch.group is None:
        raise ShapeError(f"{owner} compares the answers to a prompt, but this batch carries no group [B]")
    _, index, counts = batch.group.unique(return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        row = int((counts < 2)[index].nonzero()[0])
        raise ShapeError(
            f"{owner}: row {row} is the only one of group {int(batch.group[row])} in this batch; give each prompt "
            "two answers or more, and keep them together when the batch is split"
        )
    return index, counts
