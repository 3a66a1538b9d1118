"""What a master knows of data that it never sees: how long each sequence is, who has it, who still wants it.

Sequences are dealt out to replicas by their lengths (`balanced_partition`), and sent where they are wanted from where they
were made (`MetadataBuffer`).
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from guerdon.engine.graph import DataflowGraph
from guerdon.engine.model_worker import Parcel, Size
from guerdon.errors import GuerdonError, UsageError

# --- equal shares -------------------------------------------------------------------------------------------


def balanced_partition(lengths: Sequence[int], parts: int) -> list[tuple[int, int]]:
    """Consecutive parts of sequences of these ``lengths``, as equally long as possible: (start, end) of each.

    By dynamic programming: of all cuts whose longest part is shortest, one whose shortest part is longest. Where that lies
    further apart than parts of equally many sequences do, those are taken. With at least as many sequences as parts none is
    empty; with fewer the last ones are.

    Raises `UsageError` for fewer than one part.
    """
    if parts < 1:
        raise UsageError(f"sequences cannot be dealt out to {parts} ranks; at least 1")
    n, some = len(lengths), min(parts, len(lengths))
    if some == 0:
        return [(0, 0)] * parts
    ends = np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))])
    equal = [n * i // some for i in range(some + 1)]
    # longest[k, j]: of the best cut of the first j sequences into k + 1 parts, the longest part
    longest = _cut(ends, some, np.maximum, np.min, np.iinfo(np.int64).max)
    bound = longest[-1][0][n]
    shortest = _cut(ends, some, np.minimum, np.max, -1, bound)
    found = [n]
    for _, choice in reversed(shortest[1:]):
        found.append(int(choice[found[-1]]))
    found = [*found, 0][::-1]

    def spread(cuts: Sequence[int]) -> tuple[int, int]:
        sizes = ends[list(cuts[1:])] - ends[list(cuts[:-1])]
        return int(sizes.max() - sizes.min()), int(sizes.max())

    best = min(found, equal, key=spread)
    return [*pairwise(best), *[(n, n)] * (parts - some)]


def _cut(
    ends: Any, parts: int, worse: Any, best: Any, never: int, bound: int | None = None
) -> list[tuple[Any, Any]]:
    """For each number of parts, the value of the best cut of the first ``j`` sequences and where its last part begins. Parts
    are not empty and (with ``bound``) not longer than it."""
    n = len(ends) - 1
    size = ends[None, :] - ends[:, None]  # of a part from row to column
    legal = size > -1 if bound is None else size <= bound
    legal = legal & (np.arange(n + 1)[None, :] > np.arange(n + 1)[:, None])
    pick = np.argmin if best is np.min else np.argmax
    value = np.where(legal[0], size[0], never)
    found = [(value, np.zeros(n + 1, dtype=np.int64))]
    for _ in range(parts - 1):
        possible = legal & (value != never)[:, None]
        table = np.where(possible, worse(value[:, None], size), never)
        choice = pick(table, axis=0)
        value = table[choice, np.arange(n + 1)]
        found.append((value, choice))
    return found


# --- what is where ------------------------------------------------------------------------------------------


@dataclass
class _Entry:
    size: Size
    dtype: str
    holders: set[int]
    wanted: int  # by so many calls still


class MetadataBuffer:
    """Which sequences have which keys, how large they are and which ranks hold them; nothing of what is in them.

    Args:
        graph: the calls; an entry goes when all calls that read its key have had it.
    """

    def __init__(self, graph: DataflowGraph) -> None:
        self._readers = Counter(key for call in graph.calls for key in call.reads)
        self._entries: dict[tuple[str, int], _Entry] = {}
        self._changed = asyncio.Condition()

    def __len__(self) -> int:
        return len(self._entries)

    def size(self, key: str, row: int) -> Size:
        """Of one sequence's tensor; () where there is none."""
        entry = self._entries.get((key, row))
        return () if entry is None else entry.size

    def put(self, key: str, found: Mapping[int, tuple[Size, str]], holders: Iterable[int]) -> None:
        """Note what was made, and where; `announce` it when all is noted."""
        for row, (size, dtype) in found.items():
            self._entries[key, row] = _Entry(tuple(size), dtype, set(holders), self._readers[key])

    async def announce(self) -> None:
        """Let those look again who wait."""
        async with self._changed:
            self._changed.notify_all()

    def ready(self, keys: Sequence[str], rows: Sequence[int]) -> bool:
        """Whether all of them are there."""
        return all((key, row) in self._entries for key in keys for row in rows)

    async def wait(self, keys: Sequence[str], rows: Sequence[int]) -> None:
        """Until all of them are there."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.ready(keys, rows))

    def parcels(
        self, key: str, rows: Sequence[int], ranks: Sequence[int], ranks_per_node: int
    ) -> list[Parcel]:
        """What has to be sent so that all of ``ranks`` have these sequences, and note that they will: from a rank on a
        receiver's node where one has it, one parcel for the rows that go the same way."""
        together: dict[tuple[int, tuple[int, ...], str], list[int]] = defaultdict(list)
        for row in rows:
            entry = self._entries[key, row]
            missing = tuple(rank for rank in ranks if rank not in entry.holders)
            if missing:
                node = missing[0] // ranks_per_node
                sender = min(entry.holders, key=lambda r: (r // ranks_per_node != node, r))
                together[sender, missing, entry.dtype].append(row)
                entry.holders.update(missing)
        return [
            Parcel(key, sender, missing, tuple(some), tuple(self.size(key, row) for row in some), dtype)
            for (sender, missing, dtype), some in together.items()
        ]

    def consumed(self, keys: Sequence[str], rows: Sequence[int]) -> dict[int, list[tuple[str, int]]]:
        """One call has had them: by rank, what nobody will ask for again."""
        gone: dict[int, list[tuple[str, int]]] = defaultdict(list)
        for key in keys:
            for row in rows:
                entry = self._entries[key, row]
                entry.wanted -= 1
                if entry.wanted <= 0:
                    for rank in entry.holders:
                        gone[rank].append((key, row))
                    del self._entries[key, row]
        return gone


def check_metadata(value: Any, where: str = "a worker") -> None:
    """Raise `GuerdonError` for anything but names, numbers and containers of them: what has as many numbers as a text has
    tokens does not belong in the master."""
    if is_dataclass(value):
        value = [getattr(value, item.name) for item in fields(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return
    if isinstance(value, (list, tuple)):
        for item in value:
            check_metadata(item, where)
    elif isinstance(value, dict):
        check_metadata([*value.keys(), *value.values()], where)
    else:
        raise GuerdonError(
            f"{where} sent a {type(value).__name__} to the master, which is for names and sizes; leave it where it is"
        )
