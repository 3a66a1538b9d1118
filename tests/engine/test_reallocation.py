"""Weights from any layout to any other one, in four processes: the numbers, the bytes, who sends what."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from four_processes import Answers, run
from small_models import LAYOUTS, even_model, numbers, real_model, size_of

from guerdon.engine.protocols import Layout
from guerdon.engine.reallocation import Reallocation, plan_broadcasts, received
from guerdon.engine.shards import Groups, Mesh, take
from guerdon.errors import UsageError

GROUPS = Groups()  # of this process: making a group takes longer than all that is done with it


def reallocations() -> list[dict[str, Any]]:
    parameters, rank = real_model(), dist.get_rank()
    parameters = [*parameters, *even_model(4)[-4:]]  # four blocks, for four stages
    weights, found = numbers(parameters), []
    pairs = [(Mesh(a), Mesh(b)) for a, b in product(LAYOUTS, LAYOUTS)]
    pairs += [  # other ranks, some of them, in another order
        (Mesh(Layout(dp=1, tp=2), (0, 1)), Mesh(Layout(dp=2), (2, 3))),
        (Mesh(Layout(dp=2), (3, 1)), Mesh(Layout(dp=1, pp=2), (1, 0))),
        (Mesh(Layout(dp=1), (2,)), Mesh(Layout(dp=4))),
    ]
    for source, target in pairs:
        held = source.holding(parameters, rank)
        shards = {name: take(weights[name], p, s).clone() for name, (p, s) in held.items()}
        move = Reallocation(parameters, source, target, ranks_per_node=2, groups=GROUPS)
        new = move.run(shards)
        lent = move.run(shards, lend=True)
        wanted = target.holding(parameters, rank)
        right = new.keys() == wanted.keys() and all(
            torch.equal(new[name], take(weights[name], p, s)) for name, (p, s) in wanted.items()
        )
        right &= all(torch.equal(new[name], lent[name]) for name in new) and len(lent) == len(new)
        handed_on = [name for name in new if name in shards and lent[name] is shards[name]]
        same = all(torch.equal(shards[name], take(weights[name], p, s)) for name, (p, s) in held.items())
        missing = sum(
            p.bytes_of(s) - p.common(s, held[name][1] if name in held else None)
            for name, (p, s) in wanted.items()
        )
        found.append(
            {
                "right": right and same,
                "bytes": (move.received, received(move.plan, rank), missing),
                "lent": len(handed_on),
                "plan": [(m.sender, m.receivers, m.bytes) for m in move.plan],
            }
        )
    return found


def moving_average(eta: float) -> bool:
    parameters, rank = even_model(), dist.get_rank()
    new, old = numbers(parameters, 1), numbers(parameters, 2)
    source, target = Mesh(Layout(dp=1, pp=2, tp=2)), Mesh(Layout(dp=2, tp=2))
    shards = {n: take(new[n], p, s).clone() for n, (p, s) in source.holding(parameters, rank).items()}
    wanted = target.holding(parameters, rank)
    reference = {n: take(old[n], p, s).clone() for n, (p, s) in wanted.items()}
    Reallocation(parameters, source, target, groups=GROUPS).run(shards, reference, eta)
    direct = {n: eta * new[n] + (1 - eta) * old[n] for n in new}
    return all(torch.equal(reference[n], take(direct[n], p, s)) for n, (p, s) in wanted.items())


def checks() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {"reallocations": reallocations}
    return found | {f"average {eta}": partial(moving_average, eta) for eta in (0.3, 0.001, 1.0)}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return run(checks, tmp_path_factory.mktemp("reallocation"))


def test_any_layout_to_any_other_one_bit_for_bit_with_the_bytes_foretold(answers: Answers) -> None:
    found = answers["reallocations"]
    assert len(found[0]) == 36 + 3
    for pair in range(len(found[0])):
        for rank in range(4):
            assert found[rank][pair]["right"]
            measured, foretold, missing = found[rank][pair]["bytes"]
            assert measured == foretold == missing  # no more than what is not there yet
            assert found[rank][pair]["plan"] == found[0][pair]["plan"]
    assert any(sum(row) > 0 for row in zip(*(pair["bytes"] for pair in found[0]), strict=True))


def test_no_rank_sends_to_itself(answers: Answers) -> None:
    messages = [message for pair in answers["reallocations"][0] for message in pair["plan"]]
    assert len(messages) > 100
    assert all(sender not in receivers for sender, receivers, _ in messages)


def test_what_stays_where_it_is_is_handed_on_without_a_copy(answers: Answers) -> None:
    same = answers["reallocations"][0][0]  # dp 4 to dp 4
    assert same["lent"] == len(real_model()) + 4
    assert same["bytes"] == (0, 0, 0)


@pytest.mark.parametrize("eta", [0.3, 0.001, 1.0])
def test_a_moving_average_is_that_of_direct_computation(answers: Answers, eta: float) -> None:
    assert all(answers[f"average {eta}"])


def test_plan_keeps_to_the_node_where_it_can_and_spreads_the_work() -> None:
    model = even_model()
    size = size_of(model)
    # tp 2 twice, on two nodes of two; now whole on every rank
    plan = plan_broadcasts(model, Mesh(Layout(dp=2, tp=2)), Mesh(Layout(dp=4)), ranks_per_node=2)
    assert all(m.sender // 2 == receiver // 2 for m in plan for receiver in m.receivers)
    assert [received(plan, r) for r in range(4)] == [size // 2] * 4
    # on another node: one message a piece, and both holders send
    away = plan_broadcasts(
        model, Mesh(Layout(dp=2, pp=2), (0, 2, 1, 3)), Mesh(Layout(dp=2), (4, 5)), ranks_per_node=2
    )
    assert {m.receivers for m in away} == {(4, 5)}
    assert len({m.sender // 2 for m in away}) == 2
    assert [received(away, r) for r in (4, 5)] == [size, size]
    # a rank that goes on holding its piece sends it
    stay = plan_broadcasts(model, Mesh(Layout(dp=2), (0, 1)), Mesh(Layout(dp=3), (1, 2, 3)))
    assert {m.sender for m in stay} == {1}
    assert not plan_broadcasts(model, Mesh(Layout(dp=4)), Mesh(Layout(dp=1, tp=4)))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="one must divide the other"):
        plan_broadcasts(even_model(), Mesh(Layout(dp=1, tp=2)), Mesh(Layout(dp=1, tp=3)))
    with pytest.raises(UsageError, match="different ranks"):
        Mesh(Layout(dp=2), (1, 1))


def test_places_of_a_mesh() -> None:
    mesh = Mesh(Layout(dp=2, pp=2, tp=2), tuple(range(8, 16)))
    place = mesh.place(13)
    assert (place.stage, place.index) == (1, 1)
    assert (place.tensor, place.pipeline, place.data) == ((12, 13), (9, 13), (13, 15))
    assert mesh.replica(0) == (8, 9, 12, 13)
    for kind in ("tensor", "pipeline", "data"):
        assert sorted(rank for group in mesh.groups(kind) for rank in group) == list(range(8, 16))
