"""The answers of the last rounds, in groups: a replay for methods that learn from anybody's answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from guerdon.batch import Trajectories, concatenate
from guerdon.errors import ShapeError, UsageError


class Recent:
    """What the last ``rounds`` calls of `add` brought. A row is a group: ``size`` answers to one prompt, side by side.

    Args:
        rounds: how many are kept; 1 keeps the newest alone.
        size: answers in a group.

    It is `Data` (`guerdon.experience.datasets`) over the groups it holds.
    """

    lengths: Tensor | None = None

    def __init__(self, rounds: int, size: int) -> None:
        if rounds < 1 or size < 2:
            raise UsageError(f"rounds is {rounds} and size {size}; keep at least one round of groups of two")
        self.rounds, self.size = rounds, size
        self._kept: list[Trajectories] = []

    def add(self, traj: Trajectories) -> None:
        """Keep a round, and forget the oldest when there are more than ``rounds``. Answers of a group lie side by side.

        Raises `ShapeError` for a round that does not consist of whole groups.
        """
        if len(traj.mask) % self.size:
            raise ShapeError(f"a round of {len(traj.mask)} answers does not consist of groups of {self.size}")
        self._kept = [*self._kept, traj][-self.rounds :]

    def __len__(self) -> int:
        """Groups."""
        return sum(len(traj.mask) for traj in self._kept) // self.size

    def take(self, rows: Tensor) -> Trajectories:
        """These groups, ``len(rows) * size`` answers; ``group`` numbers them within the batch."""
        return regrouped(self._joined()[self._answers(rows)], self.size)

    def minibatches(self, groups: int, generator: torch.Generator | None = None) -> Iterator[Trajectories]:
        """One pass over all groups, ``groups`` at a time; in random order with a ``generator``."""
        whole, count = self._joined(), len(self)
        order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
        for rows in order.split(groups):
            yield regrouped(whole[self._answers(rows)], self.size)

    def _answers(self, rows: Tensor) -> Tensor:
        return (rows[:, None] * self.size + torch.arange(self.size)).flatten()

    def _joined(self) -> Trajectories:
        if not self._kept:
            raise UsageError("there is nothing to learn from yet: no round was added")
        return concatenate(self._kept)

    def state_dict(self) -> dict[str, Any]:
        """The rounds that the next `add` will not push out."""
        return {"rounds": [_plain(traj) for traj in self._kept[max(0, len(self._kept) - self.rounds + 1) :]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        if self.rounds > 1:
            self._kept = [_restored(saved) for saved in state["rounds"]]


def regrouped(traj: Trajectories, size: int) -> Trajectories:
    """The same with ``group`` counting every ``size`` rows: groups by place, so that two draws of one prompt stay two
    groups. Raises `ShapeError` when the rows do not come out even."""
    if len(traj.mask) % size:
        raise ShapeError(f"{len(traj.mask)} rows are not groups of {size}")
    return traj.with_(group=torch.arange(len(traj.mask), device=traj.mask.device) // size)


def distinct(traj: Trajectories, size: int) -> Tensor:
    """``[B / size]`` bool: groups whose answers are not all the same. Equal answers say nothing of one another."""
    differs = torch.zeros(len(traj.mask) // size, dtype=torch.bool, device=traj.mask.device)
    for _, value in traj.inputs["step"].items():
        mask = traj.mask.reshape(*traj.mask.shape, *[1] * (value.ndim - 2))
        rows = torch.where(mask, value, torch.zeros((), dtype=value.dtype, device=value.device))
        rows = rows.reshape(len(differs), size, -1)
        differs |= (rows != rows[:, :1]).flatten(1).any(1)
    lengths = traj.lengths.view(-1, size)
    return differs | (lengths != lengths[:, :1]).any(1)


def _plain(traj: Trajectories) -> dict[str, Any]:
    """Tensors by dotted name, and the batch sizes they belong to."""
    tensors: dict[str, Tensor] = {}
    sizes: dict[str, list[int]] = {}

    def walk(prefix: str, node: TensorDictBase) -> None:
        sizes[prefix] = list(node.batch_size)
        for name, value in node.items():
            key = f"{prefix}.{name}" if prefix else str(name)
            if isinstance(value, TensorDictBase):
                walk(key, value)
            elif isinstance(value, Tensor):
                tensors[key] = value

    walk("", traj.to_tensordict())
    return {"tensors": tensors, "sizes": sizes}


def _restored(saved: dict[str, Any]) -> Trajectories:
    root = TensorDict({}, batch_size=saved["sizes"][""])
    for name, size in saved["sizes"].items():
        if name:
            root[tuple(name.split("."))] = TensorDict({}, batch_size=size)
    for name, tensor in saved["tensors"].items():
        root[tuple(name.split("."))] = tensor
    return Trajectories.from_tensordict(root)  # type: ignore[no-any-return]
