"""Other data, seen in another way: some of their rows, by prompt, with other rewards, with a reference's log-probabilities."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from guerdon.batch import Batch, Preferences, Trajectories
from guerdon.errors import DataError, UsageError
from guerdon.experience.datasets import Data
from guerdon.experience.tokenised import Ragged
from guerdon.objectives.sides import with_reference
from guerdon.randomness import mix


class Subset:
    """Some rows of other data.

    Args:
        data: any `Data`.
        rows: int64 ``[M]``, their numbers.
    """

    def __init__(self, data: Data, rows: Tensor) -> None:
        if not len(rows):
            raise DataError("there are no rows left to learn from")
        self.data, self.rows = data, rows
        self.lengths = None if data.lengths is None else data.lengths[rows]
        group = getattr(data, "group", None)
        self.group = None if group is None else group[rows]
        self.notes: list[str] = getattr(data, "notes", [])

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Batch:
        return self.data.take(self.rows[rows])


def train_test_split(data: Data, test: float | int = 0.1, seed: int = 0) -> tuple[Data, Data]:
    """Rows to train on and rows to measure on; a random split that ``seed`` decides.

    Rows with one prompt (``data.group``, where there is one) stay together, so that no prompt is trained and measured on;
    the second part may therefore hold a few rows more than asked for.

    Args:
        test: a share below 1, or a number of rows.

    Raises `UsageError` when one part would be empty.
    """
    n = len(data)
    wanted = round(test * n) if isinstance(test, float) and test < 1 else int(test)
    if not 1 <= wanted < n:
        raise UsageError(f"cannot keep {test} of {n} rows to measure on; both parts need at least one")
    found = getattr(data, "group", None)
    group = torch.arange(n) if found is None else found.unique(return_inverse=True)[1]
    count = group.bincount()
    generator = torch.Generator().manual_seed(mix(seed, 0x7E57))
    order = torch.randperm(len(count), generator=generator)
    last = int((count[order].cumsum(0) < wanted).sum()) + 1
    held_out = torch.zeros(len(count), dtype=torch.bool)
    held_out[order[:last]] = True
    if last == len(count):
        raise UsageError(
            f"cannot keep {test} of {n} rows to measure on: the rest has the same prompts ({last} prompts in all)"
        )
    rows = torch.arange(n)
    return Subset(data, rows[~held_out[group]]), Subset(data, rows[held_out[group]])


def split_rows(count: int, parts: int, held_out: int, seed: int) -> list[Tensor]:
    """Numbers of ``count`` rows in ``parts`` parts of nearly equal size, and last those of ``held_out`` rows: a random split
    that ``seed`` decides. Raises `UsageError` when a part would be empty."""
    if count < held_out + parts:
        raise UsageError(f"{count} rows cannot be split into {parts} parts with {held_out} rows held out")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return [*order[held_out:].tensor_split(parts), order[:held_out]]


class _View:
    """What views of all rows of other data have in common with them."""

    def __init__(self, data: Data) -> None:
        self.data, self.lengths = data, data.lengths
        self.group = getattr(data, "group", None)
        self.notes: list[str] = getattr(data, "notes", [])

    def __len__(self) -> int:
        return len(self.data)


class Rescored(_View):
    """Rated answers with other rewards.

    Args:
        data: rows with rewards; rows without any stay as they are.
        change: ``[B] -> [B]``, of the scores of whole answers (``torch.sigmoid`` for those of a reward model, say).
    """

    def __init__(self, data: Data, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__(data)
        self.change = change

    def take(self, rows: Tensor) -> Batch:
        batch: Any = self.data.take(rows)
        return batch if batch.reward is None else batch.judged(self.change(batch.score()))


class Groups:
    """Rated answers by prompt: a row is ``size`` answers to one prompt, which lie side by side in a batch.

    Prompts with more answers give several rows; what is left over, and prompts with fewer, is left out (``notes`` say
    how much).

    Args:
        data: rows with ``group``, such as `TextCompletions`.
        size: answers, at least 2.
    """

    def __init__(self, data: Data, size: int) -> None:
        if size < 2:
            raise UsageError(f"a group holds at least two answers, not {size}")
        group = getattr(data, "group", None)
        if group is None:
            raise UsageError("these rows have no prompt numbers (group), so they cannot be grouped")
        order = group.argsort(stable=True)
        parts = order.split(group[order].unique_consecutive(return_counts=True)[1].tolist())
        whole = [part[: len(part) // size * size].view(-1, size) for part in parts]
        self.data, self.rows = data, torch.cat(whole)
        if not len(self.rows):
            raise DataError(f"no prompt has {size} answers; use smaller groups")
        self.group = group[self.rows[:, 0]]
        self.lengths = None if data.lengths is None else data.lengths[self.rows].amax(1)
        self.notes: list[str] = list(getattr(data, "notes", []))
        if (left := len(data) - self.rows.numel()) > 0:
            self.notes.append(
                f"{left} of {len(data)} answers are left out: they do not fill a group of {size}"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Tensor) -> Batch:
        """``len(rows) * size`` answers, group by group."""
        return self.data.take(self.rows[rows].reshape(-1))


class WithReference(_View):
    """Data whose batches carry ``reference_log_prob``. Made by `cached_reference`."""

    def __init__(self, data: Data, sides: list[Ragged]) -> None:
        super().__init__(data)
        self.sides = sides

    def take(self, rows: Tensor) -> Batch:
        """The rows, with the reference's log-probabilities on all sides."""
        batch: Any = self.data.take(rows)
        numbers = rows.tolist()
        filled = [
            traj.with_(reference_log_prob=values.fill(numbers, traj.mask))
            for traj, values in zip(_sides(batch), self.sides, strict=True)
        ]
        if isinstance(batch, Trajectories):
            return filled[0]
        batch = batch.clone(False)
        batch.chosen, batch.rejected = filled
        return cast(Batch, batch)


def cached_reference(data: Data, reference: Any, batch: int = 16) -> WithReference:
    """``data`` with the log-probabilities of a reference computed once for all rows, not again in every pass.

    They are kept per token, without padding, four bytes each, and equal those computed on the way but for the rounding
    of other batches. Worth it from the second pass on, or when the reference does not fit beside the actor.

    Args:
        reference: a role (or policy) that does not learn.
        batch: rows at a time; similar lengths together.
    """
    n = len(data)
    order = torch.arange(n) if data.lengths is None else data.lengths.argsort(stable=True)
    found: list[list[Tensor]] = []  # for each side, the values of each row in the order of computing
    for rows in order.split(batch):
        sides = _sides(with_reference(cast(Any, data.take(rows)), reference))
        found = found or [[] for _ in sides]
        for kept, traj in zip(found, sides, strict=True):
            flat = traj.reference_log_prob[traj.mask].float().cpu()  # type: ignore[index]
            kept += flat.split(traj.lengths.tolist())
    back = order.argsort().tolist()
    ragged = []
    for kept in found:
        values = [kept[i] for i in back]
        starts = torch.tensor([0, *(len(v) for v in values)]).cumsum(0)
        ragged.append(Ragged(torch.cat(values), starts))
    return WithReference(data, ragged)


def _sides(batch: Any) -> list[Trajectories]:
    return [batch.chosen, batch.rejected] if isinstance(batch, Preferences) else [batch]
