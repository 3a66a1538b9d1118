"""List scheduling by hand, on toy graphs, and timelines of real plans."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.estimate import Estimator
from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, ParamRealloc
from guerdon.engine.meshes import DeviceMesh, ExecutionPlan
from guerdon.engine.protocols import Layout
from guerdon.engine.schedule import Event, Schedule
from guerdon.engine.shapes import ModelShape, Workload
from guerdon.engine.simulate import Timeline, simulate, timeline
from guerdon.errors import UsageError

Call = ModelFunctionCall
SEVEN = ModelShape.named("7B")


def two_judges() -> DataflowGraph:
    """An answer, judged by two models, then learned from."""
    return DataflowGraph(
        [
            Call("answer", "actor", "generate", ("prompts",), ("text",)),
            Call("left", "a", "inference", ("text",), ("x",)),
            Call("right", "b", "inference", ("text",), ("y",)),
            Call("learn", "actor", "train", ("text", "x", "y"), ()),
        ],
        "toy",
    )


SLOTS = {"answer": 0, "left": 1, "right": 2, "learn": 3}
SECONDS = [4.0, 2.0, 3.0, 5.0]  # answer, left, right, learn
NONE = [0.0] * 4


def run(spans: list[tuple[int, int]], iterations: int = 1, **options: object) -> tuple[float, list[Event]]:
    schedule = Schedule(two_judges(), SLOTS, iterations, **options)  # type: ignore[arg-type]
    assert schedule.calls == ["answer", "left", "right", "learn"]
    events: list[Event] = []
    return schedule.run(spans, range(4), SECONDS, NONE, NONE, events), events


def test_disjoint_calls_overlap_in_time_and_overlapping_ones_never_do() -> None:
    apart, _ = run([(0, 8), (0, 4), (4, 8), (0, 8)])
    assert apart == 4 + 3 + 5
    together, events = run([(0, 8), (0, 4), (2, 6), (0, 8)])
    assert together == 4 + 2 + 3 + 5
    assert [(e.start, e.end) for e in events] == [(0, 4), (4, 6), (6, 9), (9, 14)]
    contained, _ = run([(0, 8), (0, 8), (4, 5), (0, 8)])
    assert contained == together


def test_calls_on_their_own_gpus_still_wait_for_their_data() -> None:
    total, events = run([(0, 1), (1, 2), (2, 3), (3, 4)])
    assert total == 4 + 3 + 5
    assert events[-1].start == 7


def test_the_next_iteration_waits_for_the_weights() -> None:
    spans = [(0, 1), (1, 2), (2, 3), (3, 4)]  # generation and training on different GPUs
    assert run(spans, iterations=3)[0] == 3 * (4 + 3 + 5)
    frozen = DataflowGraph(
        [Call("score", "a", "inference", ("data",), ("x",)), Call("fit", "b", "train", ("x",), ())]
    )
    schedule = Schedule(frozen, {"score": 0, "fit": 1}, 3)
    # nothing but its own GPUs holds the scoring model back: it works while the other trains
    assert schedule.run([(0, 1), (1, 2)], range(2), [2.0, 5.0], [0.0] * 2, [0.0] * 2) == 2 + 3 * 5


def test_a_call_that_waits_for_nothing_does_not_run_ahead_without_end() -> None:
    graph = DataflowGraph(
        [Call("score", "a", "inference", ("data",), ("x",)), Call("fit", "b", "train", ("x",), ())]
    )
    events: list[Event] = []
    Schedule(graph, {"score": 0, "fit": 1}, 5).run(
        [(0, 1), (1, 2)], range(2), [1.0, 5.0], [0.0] * 2, [0.0] * 2, events
    )
    starts = {(graph.order()[e.call].name, e.iteration): e for e in events}
    for i in range(2, 5):
        assert starts["score", i].start >= starts["fit", i - 2].end


def test_weights_on_their_way_keep_both_meshes_busy() -> None:
    # learn (slot 3, GPU 3) is where the actor lives; answer (GPU 0) brings its weights from there in 2 s
    schedule = Schedule(two_judges(), SLOTS, 2, sources={"answer": [3]})
    spans, before, events = [(0, 1), (1, 2), (2, 3), (3, 4)], [2.0, 0.0, 0.0, 0.0], []
    total = schedule.run(spans, range(4), SECONDS, before, NONE, events)
    assert total == 2 * (2 + 4 + 3 + 5)
    moves = [e for e in events if e.phase == "before"]
    assert [(e.slots, e.start, e.end) for e in moves] == [((3, 0), 0, 2), ((3, 0), 14, 16)]
    # where something else runs on the source's GPUs, the move waits for it
    busy = Schedule(two_judges(), SLOTS, 1, sources={"right": [1]})
    events = []
    busy.run(spans, range(4), SECONDS, [0.0, 0.0, 1.0, 0.0], NONE, events)
    move = next(e for e in events if e.phase == "before")
    assert (move.start, move.end) == (6, 7)  # after "left" on GPU 1, from 4 to 6


def test_data_travel_between_different_places_only() -> None:
    delays = {("answer", "left"): 0.5, ("left", "learn"): 0.25}
    schedule = Schedule(two_judges(), SLOTS, 1, delays)
    spans = [(0, 8)] * 4
    there, same = [0, 1, 0, 0], [0, 0, 0, 0]
    assert schedule.run(spans, same, [4.0, 2.0, 0.0, 5.0], NONE, NONE) == 11
    assert schedule.run(spans, there, [4.0, 2.0, 0.0, 5.0], NONE, NONE) == 11.75


def test_a_hook_keeps_both_roles_busy() -> None:
    schedule = Schedule(two_judges(), SLOTS, 1, hooks={"left": [1, 2]})
    events: list[Event] = []
    total = schedule.run(
        [(0, 1), (1, 2), (2, 3), (3, 4)], range(4), SECONDS, NONE, [0.0, 1.0, 0.0, 0.0], events
    )
    hook = next(e for e in events if e.phase == "after")
    assert (hook.slots, hook.start, hook.end) == ((1, 2), 6, 7)
    assert total == 4 + 2 + 1 + 3 + 5  # "right" takes its turn on GPU 2 after the hook


# --- timelines of plans ---------------------------------------------------------------------------------------


def real(
    plan_of: dict[str, tuple[DeviceMesh, Layout]], graph: DataflowGraph | None = None
) -> tuple[Estimator, Timeline]:
    shapes = {"actor": SEVEN, "a": SEVEN.as_scalar(), "b": SEVEN.as_scalar()}
    cluster = ClusterSpec.load("2x8xh100-flat")
    estimator = Estimator(graph or two_judges(), shapes, cluster, Workload(128, 256, 256, 4))
    return estimator, timeline(estimator, ExecutionPlan(2, 8, plan_of))


FIRST, SECOND, BOTH = DeviceMesh(0, 1, 0, 8), DeviceMesh(1, 1, 0, 8), DeviceMesh(0, 2, 0, 8)
MIXED = {
    "answer": (BOTH, Layout(8, 1, 2)),
    "left": (FIRST, Layout(8)),
    "right": (SECOND, Layout(4, 1, 2)),
    "learn": (FIRST, Layout(2, 1, 4)),
}


def test_no_gpu_does_two_things_at_a_time() -> None:
    _, found = real(MIXED)
    assert found.iterations == 5
    assert {row.kind for row in found.rows} == {"generate", "inference", "train", "weights"}
    for one, other in itertools.combinations(found.rows, 2):
        if one.overlaps(other):
            assert one.end <= other.start + 1e-9 or other.end <= one.start + 1e-9
    left, right = (next(r for r in found.rows if r.call == name) for name in ("left", "right"))
    assert left.start < right.end
    assert right.start < left.end  # side by side


def test_any_plan_keeps_the_order_of_data_and_weights_and_no_gpu_works_twice() -> None:
    shapes = {"actor": SEVEN, "a": SEVEN.as_scalar(), "b": SEVEN.as_scalar()}
    cluster = ClusterSpec.load("4x8xh100-flat")
    estimator = Estimator(two_judges(), shapes, cluster, Workload(128, 256, 256, 4), iterations=3)
    options, dice = [estimator.candidates(slot) for slot in range(4)], random.Random(1)
    waits = estimator.graph.unroll(3).waits
    for _ in range(30):
        found = timeline(estimator, estimator.plan([dice.choice(places) for places in options]))
        calls = {(row.iteration, row.call): row for row in found.rows if row.kind != "weights"}
        assert len(calls) == 12
        for wait in waits:
            assert calls[wait.target].start >= calls[wait.source].end - 1e-9
        for one, other in itertools.combinations(found.rows, 2):
            assert not one.overlaps(other) or one.end <= other.start + 1e-9 or other.end <= one.start + 1e-9


def test_the_timeline_is_what_the_estimator_says() -> None:
    estimator, found = real(MIXED)
    estimate = estimator.estimate(ExecutionPlan(2, 8, MIXED))
    assert found.seconds == pytest.approx(estimate.seconds)
    assert found.peak == estimate.peak
    assert 0 < found.busy < 1
    moves = [row for row in found.rows if row.kind == "weights"]
    assert [row.call for row in moves] == ["answer"] * 5
    assert all(set(row.meshes) == {FIRST, BOTH} for row in moves)  # from where it trains to where it answers
    assert found.seconds_of("weights") == pytest.approx(moves[0].end - moves[0].start)
    again = simulate(
        two_judges(),
        ExecutionPlan(2, 8, MIXED),
        estimator.cluster,
        estimator.workload,
        estimator.shapes,
        iterations=1,
    )
    assert list(again.rows) == [row for row in found.rows if row.iteration == 0]


def test_equal_layouts_move_no_weights() -> None:
    same = {name: (BOTH, Layout(4, 1, 4)) for name in SLOTS}
    _, found = real(same)
    assert found.seconds_of("weights") == 0
    assert found.busy == pytest.approx(1.0)


def test_a_moving_average_costs_its_way() -> None:
    calls = [
        *two_judges().calls[:3],
        Call("learn", "actor", "train", ("text", "x", "y"), (), post=(ParamRealloc("actor", "a", 0.1),)),
    ]
    plain = real(MIXED)[1]
    followed = real(MIXED, DataflowGraph(calls, "toy"))[1]
    rows = [row for row in followed.rows if row.kind == "weights" and row.call == "learn"]
    assert len(rows) == 5
    assert followed.total > plain.total


def test_pictures(tmp_path: Path) -> None:
    _, found = real(MIXED)
    for name in ("plan.png", "plan.svg"):
        assert found.draw(tmp_path / name, "toy").stat().st_size > 2000
    assert "learn" in (tmp_path / "plan.svg").read_text()
    with pytest.raises(UsageError, match=r"drawn as \.png, \.svg or \.pdf, not as 'plan\.txt'"):
        found.draw(tmp_path / "plan.txt")
