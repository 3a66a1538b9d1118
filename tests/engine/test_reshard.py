"""Resharding: the cuts, the bytes on paper, and the same transitions in four processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from four_processes import Answers, run
from small_models import QKV, SIZE, even_model, numbers, real_model, size_of
from torch import Tensor

from guerdon.engine.protocols import Layout
from guerdon.engine.reshard import GenerationLayout, HybridEngine, account, formula
from guerdon.engine.shards import (
    WHOLE,
    Groups,
    Parameter,
    Share,
    Store,
    holding,
    join,
    layers_of,
    put,
    stage_of,
    take,
)
from guerdon.errors import ShapeError, UsageError

MODELS = {"even": even_model, "real": real_model}
CASES = [  # training layout, generation's pp and tp
    (Layout(dp=1, tp=4), 1, 4),
    (Layout(dp=1, tp=4), 1, 2),
    (Layout(dp=1, tp=4), 1, 1),
    (Layout(dp=1, pp=2, tp=2), 1, 1),
    (Layout(dp=1, pp=2, tp=2), 1, 2),
    (Layout(dp=1, pp=2, tp=2), 2, 1),
    (Layout(dp=2, tp=2), 1, 1),
    (Layout(dp=2, pp=2), 1, 1),
]
ENGINES = ["hybridflow", "vanilla", "zero"]
# --- in four processes --------------------------------------------------------------------------------------


GROUPS = Groups()  # of this process: making a group takes longer than all that is done with it


def transition(model: str, engine: str, train: Layout, pp: int, tp: int) -> dict[str, Any]:
    parameters = MODELS[model]()
    weights = numbers(parameters)
    rank = dist.get_rank()
    cut = Store.cut(parameters, weights, train, rank)
    store = Store.zero(parameters, weights, 4, rank) if engine == "zero" else cut
    before = store.flat.clone()
    hybrid = HybridEngine(parameters, train, pp, tp, engine, GROUPS)
    with hybrid.gather(store) as gathered:
        live = gathered.live()
        right = all(
            torch.equal(gathered.assemble(name), take(weights[name], p, share))
            for name, (p, share) in hybrid.held.items()
        )
        names = sorted(gathered.blocks)
    kept, end = 0 if engine == "zero" else store.flat.nbytes, time.monotonic() + 5
    while (left := gathered.live()) != kept and time.monotonic() < end:
        time.sleep(0.001)  # gloo's threads let go of a tensor a little after its broadcast
    untouched = torch.equal(before, store.flat)
    return {
        "traffic": astuple(gathered.traffic),
        "right": right,
        "names": names,
        "live": live,
        "left": left,
        "untouched": untouched,
        "own": store.flat.nbytes,
    }


def groups_in_order() -> list[tuple[int, ...]]:
    made, original = [], dist.new_group

    def watched(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        made.append(tuple(ranks))
        return original(ranks, *args, **kwargs)

    dist.new_group = watched
    try:
        groups = Groups()
        own = [(dist.get_rank(), (dist.get_rank() + 1) % 4)]  # each rank would begin with another one
        groups.make([*own, (0, 1), (1, 2), (2, 3), (3, 0), (2,), (0, 2)])
        groups.make([(1, 0), (3, 1)])
        groups.close()
    finally:
        dist.new_group = original
    return made


def answers_come_back(train: Layout, pp: int, tp: int) -> dict[str, Any]:
    hybrid = HybridEngine(even_model(), train, pp, tp, groups=GROUPS)
    rows = hybrid.rows(7)
    numbers = torch.arange(7)[rows]
    length = 2 + hybrid.layout.coordinates(hybrid.rank)[1]  # micro replicas stop at different lengths
    answers = numbers[:, None] * 10 + torch.arange(length)
    found = {
        "rows": numbers,
        "answers": hybrid.gather_rows(answers, 7, fill=-1),
        "mask": hybrid.gather_rows(torch.ones(len(numbers), length, dtype=torch.bool), 7),
        "reward": hybrid.gather_rows(numbers.float(), 7),
    }
    try:
        hybrid.gather_rows(answers[1:], 7)
    except ShapeError:
        found["refused"] = torch.ones(())
    return found


def checks() -> dict[str, Callable[[], Any]]:
    found: dict[str, Callable[[], Any]] = {
        f"{model} {engine} {case}": partial(transition, model, engine, *CASES[case])
        for model, engine, case in product(MODELS, ENGINES, range(len(CASES)))
    }
    return found | {
        "groups": groups_in_order,
        "answers t4": lambda: answers_come_back(Layout(dp=1, tp=4), 1, 2),
        "answers d2": lambda: answers_come_back(Layout(dp=2, tp=2), 1, 1),
        "answers p2": lambda: answers_come_back(Layout(dp=1, pp=2, tp=2), 1, 1),
    }


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    return run(checks, tmp_path_factory.mktemp("reshard"))


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", MODELS)
def test_transition_gathers_slices_of_the_full_model_and_moves_the_bytes_foretold(
    answers: Answers, model: str, engine: str, case: int
) -> None:
    parameters, (train, pp, tp) = MODELS[model](), CASES[case]
    for rank, found in enumerate(answers[f"{model} {engine} {case}"]):
        assert found["right"]  # fused projections included
        assert found["traffic"] == astuple(account(parameters, train, pp, tp, engine, rank))
        assert found["untouched"]  # bit for bit
        # what was gathered is gone, the own shard is not
        assert found["left"] == (0 if engine == "zero" else found["own"])
        if engine == "hybridflow":
            assert found["live"] == found["traffic"][1]
            assert found["traffic"][2] == 0
    # together the ranks of a generation replica hold every weight
    layout = GenerationLayout(train, pp, tp, engine == "hybridflow")
    replica = [r for r in range(4) if layout.coordinates(r)[:2] == (0, 0)]
    names = {name for r in replica for name in answers[f"{model} {engine} {case}"][r]["names"]}
    assert names == {p.name for p in parameters}


@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("engine", ENGINES)
def test_bytes_equal_the_formulas(answers: Answers, engine: str, case: int) -> None:
    parameters, (train, pp, tp) = even_model(), CASES[case]
    expected = formula(engine, size_of(parameters), train, pp, tp)
    measured = [found["traffic"] for found in answers[f"even {engine} {case}"]]
    assert {m[0] for m in measured} == {expected.received}
    assert {m[1] for m in measured} == {expected.peak}
    if engine == "vanilla":  # the formula is the worst rank's, where there is one that is left out
        assert {m[2] for m in measured} <= {0, expected.redundant}
    else:
        assert {m[2] for m in measured} == {expected.redundant}


def test_vanilla_groups_leave_ranks_1_and_2_with_a_quarter_of_the_model(answers: Answers) -> None:
    quarter = size_of(even_model()) // 4
    assert [found["traffic"][2] for found in answers["even vanilla 1"]] == [0, quarter, quarter, 0]
    assert [found["traffic"][2] for found in answers["even hybridflow 1"]] == [0] * 4


def test_groups_are_made_in_the_same_order_on_all_ranks(answers: Answers) -> None:
    made = answers["groups"]
    assert made == [made[0]] * 4
    assert len(set(made[0])) == len(made[0])
    assert all(len(ranks) > 1 for ranks in made[0])


def test_responses_come_back_to_every_rank_of_a_training_replica(answers: Answers) -> None:
    def expected(rows: range, lengths: dict[int, int]) -> Tensor:
        longest = max(lengths.values())
        row = [[10 * r + t if t < lengths[r] else -1 for t in range(longest)] for r in rows]
        return torch.tensor(row)

    t4 = answers["answers t4"]  # micro replicas {0, 2} and {1, 3}
    assert [a["rows"].tolist() for a in t4] == [[0, 1, 2], [3, 4, 5, 6], [0, 1, 2], [3, 4, 5, 6]]
    lengths = {r: 2 if r < 3 else 3 for r in range(7)}
    for found in t4:
        assert torch.equal(found["answers"], expected(range(7), lengths))
        assert torch.equal(found["mask"], found["answers"] >= 0)
        assert found["reward"].tolist() == list(range(7))
        assert "refused" in found
    d2 = answers["answers d2"]  # a batch of 7 over four replicas, of which two make a training replica
    assert [a["rows"].tolist() for a in d2] == [[0], [1, 2], [3, 4], [5, 6]]
    assert [a["reward"].tolist() for a in d2] == [[0, 1, 2], [0, 1, 2], [3, 4, 5, 6], [3, 4, 5, 6]]
    assert [a["reward"].tolist() for a in answers["answers p2"]] == [list(range(7))] * 4


# --- on paper -----------------------------------------------------------------------------------------------


def test_fused_projections_are_cut_part_by_part() -> None:
    qkv = Parameter("qkv", (sum(QKV), 3), 0, 0, QKV, SIZE)
    whole = torch.arange(sum(QKV) * 3.0).view(-1, 3)
    shards = [take(whole, qkv, Share(i, 4)) for i in range(4)]
    for i, shard in enumerate(shards):
        q, k, v = whole.split(QKV)
        assert torch.equal(shard, torch.cat([part.chunk(4)[i] for part in (q, k, v)]))
    assert not torch.equal(torch.cat(shards[:2]), take(whole, qkv, Share(0, 2)))  # side by side is not it
    pieces = [(Share(i, 4), shard) for i, shard in enumerate(shards)]
    assert torch.equal(join(pieces[2:], qkv, Share(1, 2)), take(whole, qkv, Share(1, 2)))
    assert torch.equal(join(pieces, qkv), whole)
    half = take(whole, qkv, Share(1, 2))
    assert torch.equal(take(half, qkv, Share(3, 4), held=Share(1, 2)), shards[3])


def test_put_is_the_other_way_of_take_and_averages() -> None:
    gate_up = Parameter("gate_up", (3, 8), 0, 1, (4, 4))
    target, value = torch.zeros(3, 8), torch.ones(3, 4)
    put(target, gate_up, Share(1, 2), value)
    assert target[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    put(target, gate_up, Share(1, 2), 3 * value, eta=0.25)
    assert target[0].tolist() == [0, 0, 1.5, 1.5, 0, 0, 1.5, 1.5]
    scale = torch.tensor(1.0)
    put(scale, Parameter("scale", (), 0), WHOLE, torch.tensor(3.0), eta=0.5)
    assert scale.item() == 2


@pytest.mark.parametrize("size", [1, 7, 37, 64])
def test_cuts_of_unequal_things_nest_and_cover(size: int) -> None:
    for of in (1, 2, 4, 8):
        cuts = [Share(i, of).cut(size) for i in range(of)]
        assert cuts[0][0] == 0
        assert cuts[-1][1] == size
        assert all(a[1] == b[0] for a, b in pairwise(cuts))
        for i in range(8):
            coarse, fine = Share(i * of // 8, of), Share(i, 8)
            assert fine in coarse
            assert coarse.cut(size)[0] <= fine.cut(size)[0] <= fine.cut(size)[1] <= coarse.cut(size)[1]


def test_generation_groups_are_those_of_the_paper() -> None:
    train = Layout(dp=1, tp=4)
    strided, vanilla = GenerationLayout(train, tp=2), GenerationLayout(train, tp=2, strided=False)
    assert strided.groups("tp") == [(0, 2), (1, 3)]
    assert strided.groups("micro_dp") == [(0, 1), (2, 3)]
    assert vanilla.groups("tp") == [(0, 1), (2, 3)]
    assert vanilla.groups("micro_dp") == [(0, 2), (1, 3)]


@pytest.mark.parametrize(
    ("p", "t", "d"), [(1, 4, 1), (1, 8, 2), (2, 4, 2), (4, 2, 1), (4, 4, 3), (2, 2, 1), (3, 4, 1)]
)
def test_strided_groups_are_a_layout_without_redundancy_and_equal_the_formula(p: int, t: int, d: int) -> None:
    model = [Parameter(f"{n}.up", (48, 2), n, 0, (16, 32), 2) for n in range(p * 2)]
    size, train = size_of(model), Layout(pp=p, tp=t, dp=d)
    for pg, tg in product(
        [x for x in range(1, p + 1) if p % x == 0], [x for x in (1, 2, 4, 8) if t % x == 0]
    ):
        generation = GenerationLayout(train, pg, tg)
        assert len({generation.coordinates(r) for r in range(p * t * d)}) == p * t * d
        for kind, n in (("tp", tg), ("pp", pg), ("micro_dp", generation.micro)):
            assert {len(g) for g in generation.groups(kind)} == {n}
        expected = formula("hybridflow", size, train, pg, tg)
        vanilla = [account(model, train, pg, tg, "vanilla", r) for r in range(p * t * d)]
        for rank in range(p * t * d):
            assert account(model, train, pg, tg, "hybridflow", rank) == expected
            assert vanilla[rank].redundant in (0, formula("vanilla", size, train, pg, tg).redundant)
        rows = [generation.rows(31, r) for r in range(p * t * d)]
        starts = {(s.start, s.stop) for s in rows}
        assert sum(b - a for a, b in starts) == 31
        for group in generation.groups("tp") + generation.groups("pp"):
            assert len({(rows[r].start, rows[r].stop) for r in group}) == 1


def test_only_the_strided_choice_keeps_every_shard_inside() -> None:
    model, train = even_model(), Layout(dp=1, tp=4)
    for strided in (True, False):
        layout = GenerationLayout(train, tp=2, strided=strided)
        inside = [Share(r, 4) in Share(layout.coordinates(r)[3], 2) for r in range(4)]
        assert inside == ([True] * 4 if strided else [True, False, False, True])
    assert [account(model, train, 1, 2, "vanilla", r).redundant * 4 for r in range(4)] == [
        0,
        size_of(model),
        size_of(model),
        0,
    ]


def test_stages_hold_every_weight_once_and_coarser_ones_consist_of_finer_ones() -> None:
    model = real_model()
    layers = layers_of(model)
    assert layers == 3
    for pp in (1, 2, 3):
        names = [name for stage in range(pp) for name in holding(model, pp, 1, stage, 0)]
        assert sorted(names) == sorted(p.name for p in model)
    four = even_model()
    assert all(stage_of(p, 4, 4) // 2 == stage_of(p, 4, 2) for p in four)


def test_what_cannot_be_split_is_refused() -> None:
    with pytest.raises(UsageError, match="divides 4"):
        account(even_model(), Layout(dp=1, tp=8), 1, 1, "hybridflow", 0)
    with pytest.raises(UsageError, match="untie"):
        holding([Parameter("embed", (4, 4), "both", 0), *even_model()], 2, 1, 0, 0)
    with pytest.raises(UsageError, match="4 blocks"):
        holding(even_model(), 8, 1, 0, 0)
    with pytest.raises(UsageError, match="does not divide"):
        GenerationLayout(Layout(dp=1, tp=4), tp=3)
    with pytest.raises(UsageError, match="hybridflow"):
        formula("hybridflw", 4, Layout(dp=1), 1, 1)
    with pytest.raises(ShapeError, match="do not add up"):
        Parameter("qkv", (9, 2), 0, 0, (4, 4)).widths(WHOLE)
    mixed = [Parameter("a", (2,), 0), Parameter("b", (2,), 0, dtype=torch.float16)]
    with pytest.raises(UsageError, match="one type"):
        Store.cut(mixed, {"a": torch.zeros(2), "b": torch.zeros(2).half()}, Layout(dp=1), 0)
