"""What the master knows: equal shares by length, which rank has what, and nothing of what is in it."""

from __future__ import annotations

import asyncio
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.engine.graph import DataflowGraph, ModelFunctionCall
from guerdon.engine.metadata import MetadataBuffer, balanced_partition, check_metadata
from guerdon.engine.model_worker import Answer
from guerdon.errors import GuerdonError, UsageError


def sums(lengths: list[int], cuts: list[tuple[int, int]]) -> list[int]:
    return [sum(lengths[a:b]) for a, b in cuts]


def spread(values: list[int]) -> int:
    return max(values) - min(values)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=12), st.integers(1, 5))
def test_shares_lie_no_further_apart_than_equal_counts_do(lengths: list[int], parts: int) -> None:
    cuts = balanced_partition(lengths, parts)
    assert len(cuts) == parts
    assert cuts[0][0] == 0
    assert cuts[-1][1] == len(lengths)
    assert all(a[1] == b[0] for a, b in pairwise(cuts))
    if len(lengths) < parts:
        assert [b - a for a, b in cuts] == [1] * len(lengths) + [0] * (parts - len(lengths))
        return
    assert all(b > a for a, b in cuts)
    n = len(lengths)
    equal = [(n * i // parts, n * (i + 1) // parts) for i in range(parts)]
    assert spread(sums(lengths, cuts)) <= spread(sums(lengths, equal))
    # the longest share is as short as any cut makes it, unless equal counts lie closer together
    every = [sums(lengths, list(pairwise([0, *inner, n]))) for inner in combinations(range(1, n), parts - 1)]
    shortest = min(map(max, every))
    if sorted(cuts) != sorted(equal):
        assert max(sums(lengths, cuts)) == shortest
        widest = max(min(values) for values in every if max(values) == shortest)
        assert min(sums(lengths, cuts)) == widest


def test_shares_of_many_sequences() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 400).tolist()
    cuts = balanced_partition(lengths, 16)
    equal = [(25 * i, 25 * (i + 1)) for i in range(16)]
    assert spread(sums(lengths, cuts)) < 0.35 * spread(sums(lengths, equal))
    assert balanced_partition([], 3) == [(0, 0)] * 3
    with pytest.raises(UsageError, match="at least 1"):
        balanced_partition([1], 0)


GRAPH = DataflowGraph(
    [
        ModelFunctionCall("gen", "actor", "generate", ("prompt",), ("token",)),
        ModelFunctionCall("ref", "reference", "inference", ("token",), ("log_prob",)),
        ModelFunctionCall("train", "actor", "train", ("token", "log_prob"), ()),
    ]
)


def test_entries_go_when_all_consumers_have_had_them() -> None:
    async def course() -> None:
        buffer = MetadataBuffer(GRAPH)
        assert not buffer.ready(["token"], [0])
        buffer.put("token", {0: ((5,), "int64"), 1: ((7,), "int64")}, [0, 1])
        assert buffer.ready(["token"], [0, 1])
        assert not buffer.ready(["token", "log_prob"], [0, 1])
        assert buffer.consumed(["token"], [0]) == {}  # by ref; train still wants it
        buffer.put("log_prob", {0: ((5,), "float32")}, [2])
        gone = buffer.consumed(["token", "log_prob"], [0])
        assert gone == {0: [("token", 0)], 1: [("token", 0)], 2: [("log_prob", 0)]}
        assert len(buffer) == 1

    asyncio.run(course())


def test_parcels_go_to_those_who_lack_the_rows_from_the_same_node_where_it_can_be() -> None:
    async def course() -> None:
        buffer = MetadataBuffer(GRAPH)
        buffer.put("token", {0: ((5,), "int64"), 1: ((7,), "int64")}, [0, 2])
        assert buffer.parcels("token", [0, 1], [0, 2], 2) == []
        (parcel,) = buffer.parcels("token", [0, 1], [2, 3], 2)
        assert (parcel.sender, parcel.receivers, parcel.rows, parcel.bytes) == (2, (3,), (0, 1), 96)
        assert buffer.parcels("token", [0, 1], [2, 3], 2) == []  # they have them now
        (parcel,) = buffer.parcels("token", [1], [1], 2)
        assert (parcel.sender, parcel.bytes) == (0, 56)

    asyncio.run(course())


def test_waiting_ends_when_all_keys_of_all_rows_are_there() -> None:
    async def course() -> list[str]:
        buffer, seen = MetadataBuffer(GRAPH), []

        async def waits() -> None:
            await buffer.wait(["token"], [0, 1])
            seen.append("ready")

        task = asyncio.create_task(waits())
        for row in range(2):
            await asyncio.sleep(0)
            seen.append(f"put {row}")
            buffer.put("token", {row: ((1,), "int64")}, [0])
            await buffer.announce()
        await task
        return seen

    assert asyncio.run(course()) == ["put 0", "put 1", "ready"]


def test_the_master_refuses_data() -> None:
    check_metadata([Answer({"token": {3: ((5,), "int64")}}, {"loss": 0.5}), None, "text"])
    for data in (torch.zeros(3), np.zeros(3), b"tokens", [Answer(metrics={"loss": torch.zeros(())})]):  # type: ignore[dict-item]
        with pytest.raises(GuerdonError, match="leave it where it is"):
            check_metadata(data)
