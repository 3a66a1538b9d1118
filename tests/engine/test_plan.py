"""Meshes, plans, their memory, the search for the best one, and plans without a search: all on a simulated cluster."""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import CostModel
from guerdon.engine.estimate import Estimator, Found
from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, Offload
from guerdon.engine.mapping import Placement
from guerdon.engine.meshes import DeviceMesh, ExecutionPlan, meshes, read_placement
from guerdon.engine.plan import BASELINES, baseline, exhaustive, search, search_plan
from guerdon.engine.protocols import Layout
from guerdon.engine.published import PublishedRules
from guerdon.engine.shapes import GiB, ModelShape, Workload
from guerdon.errors import DataError, UsageError

Call = ModelFunctionCall
SEVEN = ModelShape.named("7B")
WORK = Workload(512, 1024, 1024, 4)
TRAIN = ("tokens", "logprobs", "ref_logprobs", "rewards", "values")


def ppo(**changes: dict[str, object]) -> DataflowGraph:
    """The six calls of PPO on language models; ``changes`` to calls by name."""
    calls = [
        Call("actor_gen", "actor", "generate", ("prompts",), ("tokens", "logprobs")),
        Call("rew_inf", "reward", "inference", ("tokens",), ("rewards",)),
        Call("ref_inf", "reference", "inference", ("tokens",), ("logprobs",), {"logprobs": "ref_logprobs"}),
        Call("critic_inf", "critic", "inference", ("tokens",), ("values",)),
        Call("actor_train", "actor", "train", TRAIN, (), minibatches=4),
        Call("critic_train", "critic", "train", TRAIN, (), minibatches=4),
    ]
    return DataflowGraph([replace(call, **changes.get(call.name, {})) for call in calls], "ppo")  # type: ignore[arg-type]


def shapes_of(actor: ModelShape, critic: ModelShape = SEVEN) -> dict[str, ModelShape]:
    judge = critic.as_scalar()
    return {"actor": actor, "reference": actor, "critic": judge, "reward": judge}


@cache
def estimator(gpus: int, actor: str = "7B", published: bool = False, offload: bool = False) -> Estimator:
    cluster = ClusterSpec.load("h100-flat").with_gpus(gpus)
    costs = PublishedRules(cluster) if published else None
    return Estimator(ppo(), shapes_of(ModelShape.named(actor)), cluster, WORK, costs, offload=offload)


# --- meshes -----------------------------------------------------------------------------------------------


def test_two_nodes_of_eight_have_seven_meshes_of_at_least_four() -> None:
    found = meshes(ClusterSpec.load("2x8xH100"), least=4)
    sizes = sorted(mesh.size for mesh in found)
    assert sizes == [4, 4, 4, 4, 8, 8, 16]
    assert len(meshes(ClusterSpec.load("2x8xH100"))) == 7 + 8 + 16  # and pairs and single GPUs
    assert len({str(mesh) for mesh in found}) == 7


@pytest.mark.parametrize("name", ["1x8xH100", "3x8xH100", "2x4xA100", "4x6xA100"])
def test_every_mesh_is_legal_and_there_are_no_others(name: str) -> None:
    cluster = ClusterSpec.load(name)
    nodes, n = cluster.nodes, cluster.gpus_per_node
    found = meshes(cluster)
    assert len(set(found)) == len(found)
    for mesh in found:
        assert mesh.fault(nodes, n) == ""
        ranks = list(mesh.ranks(n))
        assert ranks == [
            node * n + gpu
            for node in range(mesh.first_node, mesh.first_node + mesh.nodes)
            for gpu in range(mesh.first_gpu, mesh.first_gpu + mesh.gpus)
        ]
    every = itertools.product(range(nodes), range(1, nodes + 1), range(n), range(1, n + 1))
    legal = {mesh for mesh in itertools.starmap(DeviceMesh, every) if not mesh.fault(nodes, n)}
    assert legal == set(found)


def test_overlap_and_containment_are_those_of_the_gpus() -> None:
    found = meshes(ClusterSpec.load("3x4xA100"))
    for one, other in itertools.product(found, found):
        mine, theirs = set(one.ranks(4)), set(other.ranks(4))
        assert one.overlaps(other) == bool(mine & theirs)
        assert one.contains(other) == (theirs <= mine)


def test_illegal_meshes_are_refused_by_name() -> None:
    for mesh, said in (
        (DeviceMesh(0, 1, 2, 4), r"mesh of 'x' begins at GPU 2, which is no multiple of its 4 GPUs"),
        (DeviceMesh(0, 1, 0, 3), "has 3 GPUs of a node; take a power of two that divides 8"),
        (DeviceMesh(0, 2, 0, 4), "has parts of several nodes"),
        (DeviceMesh(1, 2, 0, 8), "is not inside 2 nodes of 8 GPUs"),
        (DeviceMesh(0, 0, 0, 8), "needs at least one GPU"),
    ):
        with pytest.raises(UsageError, match=said):
            ExecutionPlan(2, 8, {"x": (mesh, Layout(max(1, mesh.size)))})
    with pytest.raises(UsageError, match=r"'x' has pp x tp x dp = 4 on a mesh of 8 GPUs"):
        ExecutionPlan(2, 8, {"x": (DeviceMesh(0, 1, 0, 8), Layout(4))})
    with pytest.raises(UsageError, match="no mesh of 8 GPUs has 9"):
        meshes(ClusterSpec.load("1x8xH100"), least=9)


def test_layouts_fill_their_mesh_and_ranks_go_there_and_back() -> None:
    one = estimator(32, "34B")
    seen = set()
    for slot in range(len(one.slots)):
        for made in one.candidates(slot):
            assert made.layout.world_size == made.mesh.size == made.high - made.low
            seen.add(made.layout)
    assert len(seen) > 20
    for layout in seen:
        for rank in range(layout.world_size):
            at = layout.coordinates(rank)
            assert layout.rank(at.dp, at.pp, at.tp) == rank


# --- plans as data ------------------------------------------------------------------------------------------

LEFT, RIGHT, BOTH = DeviceMesh(0, 1, 0, 8), DeviceMesh(1, 1, 0, 8), DeviceMesh(0, 2, 0, 8)
SPLIT = {
    "actor_gen": (BOTH, Layout(4, 1, 4)),
    "rew_inf": (RIGHT, Layout(8)),
    "ref_inf": (LEFT, Layout(8)),
    "critic_inf": (RIGHT, Layout(8)),
    "actor_train": (LEFT, Layout(8)),
    "critic_train": (RIGHT, Layout(8)),
}
ROLES = {call.name: (call.role, call.kind) for call in ppo().calls}


def test_a_plan_goes_through_a_file(tmp_path: Path) -> None:
    plan = ExecutionPlan(2, 8, SPLIT, {"actor_gen": 2}, frozenset({"reference"}), ROLES, {"seconds": 41.5})
    path = tmp_path / "plan.json"
    assert plan.to_json(path) == path.read_text()
    assert ExecutionPlan.from_json(path) == plan
    json.loads(path.read_text())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nodes": 0}, "'nodes' is 0; expected a whole number"),
        ({"calls": {}}, "'calls' must be an object with at least one call"),
        ({"call": {}}, "'call' is no key of a plan; did you mean 'calls'"),
        (
            {"calls": {"x": {"mesh": {}, "layout": {}}}},
            r"'calls.x.mesh' is \{\}; expected whole numbers first_node",
        ),
        (
            {"calls": {"x": {"mesh": vars(LEFT), "layout": {"dp": 8}}}},
            r"'calls.x.layout' is .*; expected whole numbers dp, pp, tp",
        ),
        (
            {"calls": {"x": {"mesh": vars(LEFT), "layout": vars(Layout(4))}}},
            "plan.json: plan: 'x' has pp x tp x dp = 4 on a mesh of 8 GPUs",
        ),
        (
            {"calls": {"x": {"mesh": vars(LEFT), "layout": vars(Layout(8)), "role": "actor"}}},
            "'calls.x' needs a role and a kind",
        ),
    ],
)
def test_files_that_are_no_plans(tmp_path: Path, change: dict[str, object], said: str) -> None:
    values = {"nodes": 2, "gpus_per_node": 8, "calls": {"x": {"mesh": vars(LEFT), "layout": vars(Layout(8))}}}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**values, **change}))
    with pytest.raises(DataError, match=said):
        ExecutionPlan.from_json(path)


def test_a_plan_is_taken_as_a_placement(tmp_path: Path) -> None:
    plan = ExecutionPlan(2, 8, SPLIT, roles=ROLES)
    placed = plan.placement()
    assert placed.pools == {"actor+reference": 8, "reward+critic": 8}
    assert placed.pool_of("reward") == "reward+critic"
    path = tmp_path / "plan.json"
    plan.to_json(path)
    assert read_placement(path) == placed
    said = plan.not_followed()
    assert "actor_gen runs on the 8 processes of 'actor+reference', not on 16" in said
    assert "actor_gen is data parallel, not pp1 tp4 dp4" in said
    assert len(said) == 2
    other = tmp_path / "placement.json"
    Placement({"all": 2}, {"actor": "all"}).to_json(other)
    assert read_placement(other) == Placement({"all": 2}, {"actor": "all"})
    from guerdon.engine.ray import find_placement

    assert find_placement(path, [], 2) == placed


def test_an_actor_that_answers_where_nobody_lives_is_a_generator() -> None:
    calls = {
        name: ((LEFT, layout) if name != "actor_gen" else (RIGHT, Layout(8)))
        for name, (_, layout) in SPLIT.items()
    }
    calls = {name: (mesh, Layout(8)) for name, (mesh, _) in calls.items()}
    placed = ExecutionPlan(2, 8, calls, roles=ROLES).placement()
    assert placed.pool_of("generator") == "generator"
    assert placed.size("generator") == 8
    assert placed.roles_of(placed.pool_of("actor")) == ["actor", "reward", "reference", "critic"]
    with pytest.raises(UsageError, match="does not say whose call 'actor_gen' is"):
        ExecutionPlan(2, 8, calls).placement()


def test_plans_of_other_graphs_and_clusters_are_refused() -> None:
    one = estimator(16)
    with pytest.raises(UsageError, match="no place for the call 'critic_train'"):
        one.chosen(ExecutionPlan(2, 8, {k: v for k, v in SPLIT.items() if k != "critic_train"}))
    with pytest.raises(UsageError, match="'critic_inff', which is no call; did you mean 'critic_inf'"):
        one.chosen(ExecutionPlan(2, 8, {**SPLIT, "critic_inff": SPLIT["critic_inf"]}))
    with pytest.raises(UsageError, match="the plan is for 4 nodes of 8 GPUs, not for 2 of 8"):
        one.chosen(ExecutionPlan(4, 8, SPLIT))
    with pytest.raises(UsageError, match="no model shape is given for role 'critic'"):
        Estimator(ppo(), {"actor": SEVEN, "reward": SEVEN, "reference": SEVEN}, one.cluster)


# --- memory -------------------------------------------------------------------------------------------------


def test_static_bytes_add_up_and_of_active_ones_the_most_counts() -> None:
    one, p, s = estimator(16), SEVEN.parameters, SEVEN.as_scalar().parameters
    chosen = one.chosen(ExecutionPlan(2, 8, SPLIT))
    ways, before, _, peak = one.fill(chosen)
    actor, reference = 4 * p + 12 * p / 8, 2 * p  # dp 8: weights and gradients whole, a share of the states
    left = actor + reference
    right = 4 * s + 12 * s / 8 + 2 * s  # the critic's and the reward model's
    names = [call.name for call in one.graph.order()]
    active = {name: way.active for name, way in zip(names, ways, strict=True) if way is not None}
    active["actor_gen"] += 2 * p / 4  # the weights that come for the answers, in four shards
    on_left = max(active[n] for n in ("actor_gen", "ref_inf", "actor_train"))
    on_right = max(active[n] for n in ("actor_gen", "rew_inf", "critic_inf", "critic_train"))
    assert [b for *_, b in one.memory(chosen)] == pytest.approx([left + on_left, right + on_right])
    assert peak == pytest.approx(max(left + on_left, right + on_right))
    assert [name for name, seconds in zip(names, before, strict=True) if seconds > 0] == ["actor_gen"]


def test_the_peak_is_that_of_the_fullest_gpu_in_any_plan() -> None:
    one, dice = estimator(32, "34B", offload=True), random.Random(0)
    options = [one.candidates(slot) for slot in range(len(one.slots))]
    fitted = 0
    for _ in range(200):
        chosen = [dice.choice(places) for places in options]
        estimate = one.evaluate(chosen)
        table = one.memory(chosen)
        assert (table[0][0], table[-1][1]) == (0, 32)
        assert estimate.peak == pytest.approx(max(bytes_ for *_, bytes_ in table), rel=1e-12)
        fitted += estimate.fits
    assert 0 < fitted < 200


def test_calls_are_cut_into_as_many_parts_as_the_memory_asks_for() -> None:
    roomy, tight = (
        estimator(16),
        Estimator(ppo(), shapes_of(SEVEN), replace(ClusterSpec.load("2x8xh100-flat"), memory_gib=60.0), WORK),
    )
    plan = ExecutionPlan(2, 8, SPLIT)
    parts = [next(w for w in e.fill(e.chosen(plan))[0] if w is not None).parts for e in (roomy, tight)]
    assert parts[1] > parts[0]
    assert tight.estimate(plan).seconds > roomy.estimate(plan).seconds
    assert tight.estimate(plan).peak <= 60 * GiB


def test_a_plan_that_does_not_fit_costs_its_penalty() -> None:
    small = Estimator(
        ppo(),
        shapes_of(SEVEN),
        replace(ClusterSpec.load("2x8xh100-flat"), memory_gib=40.0),
        WORK,
        penalty=3.0,
    )
    estimate = small.estimate(ExecutionPlan(2, 8, SPLIT))
    assert not estimate.fits
    assert estimate.cost == 3 * estimate.seconds
    good = estimator(16).estimate(ExecutionPlan(2, 8, SPLIT))
    assert good.fits
    assert good.cost == good.seconds


def test_offloaded_models_leave_their_memory_and_come_back_for_their_calls() -> None:
    one = estimator(16, offload=True)
    stays, goes = ExecutionPlan(2, 8, SPLIT), ExecutionPlan(2, 8, SPLIT, offload=frozenset({"reference"}))
    kept, gone = one.chosen(stays), one.chosen(goes)
    assert sum(c.static for c in kept) - sum(c.static for c in gone) == 2 * SEVEN.parameters
    _, before, _, _ = one.fill(gone)
    at = [call.name for call in one.graph.order()].index("ref_inf")
    assert before[at] == pytest.approx(2 * SEVEN.parameters / 50e9)
    hooked = ppo(ref_inf={"post": (Offload("reference"),)})
    always = Estimator(hooked, shapes_of(SEVEN), one.cluster, WORK)
    assert all(made.offload for made in always.candidates(always.slot_of["ref_inf"]))


def test_eight_gpus_hold_no_two_7b_models_by_the_published_rules() -> None:
    with pytest.raises(
        UsageError, match=r"no plan fits 8 GPUs with 80\.0 GiB each \(640 GiB together\)"
    ) as caught:
        search(estimator(8, published=True), evaluations=2000)
    text = str(caught.value)
    assert (
        "weights, gradients and optimiser states take 224 GiB (reward 12, reference 13, actor 100, critic 98)"
        in text
    )
    assert "the plan that comes nearest needs" in text
    assert "use more GPUs, fewer or shorter sequences or offload the frozen models" in text
    # in waves and smaller micro-batches they do fit
    assert search(estimator(8), evaluations=2000).estimate.fits
    with pytest.raises(UsageError, match=r"use at least \d+ GPUs or smaller models"):
        search(estimator(8, "70B"), evaluations=100)


def test_published_rules_by_hand() -> None:
    cluster = ClusterSpec.load("2x8xh100-flat")
    costs, layout = PublishedRules(cluster), Layout(2, 4, 2)
    (train,) = costs.ways("train", SEVEN, layout, WORK)
    (infer,) = costs.ways("inference", SEVEN, layout, WORK)
    (generate,) = costs.ways("generate", SEVEN, layout, WORK)
    assert (train.parts, infer.parts, generate.parts) == (8, 4, 1)
    assert train.active == 4 * 2 * (128 / 2 / 8 * 2048) * 4096 / 4  # a stage's input, of four micro-batches
    assert infer.active == 2 * (512 / 2 / 4 * 2048) * 4096
    assert PublishedRules(cluster).ways("train", SEVEN, Layout(2, 8, 1), Workload(8, 64, 64, 1)) == []
    assert [w.parts for w in costs.ways("train", SEVEN, Layout(16), WORK)] == [1]


# --- the search ---------------------------------------------------------------------------------------------


def test_the_search_repeats_itself_and_never_returns_what_does_not_fit() -> None:
    one = estimator(16, "13B")
    first, again, other = (search(one, seed=seed, evaluations=3000) for seed in (5, 5, 6))
    assert first == again
    assert first.plan.assignments != other.plan.assignments or first.trace != other.trace
    for found in (first, other):
        assert found.estimate.fits
        assert found.estimate.peak <= one.capacity
        assert one.estimate(found.plan).seconds == pytest.approx(found.seconds)
        assert found.start is not None
        assert found.seconds < found.start.cost  # every call's fastest place is no good plan
        assert not found.clocked
    assert 3000 <= first.evaluations < 6000
    assert first.space > 1e6


def test_walks_accept_worse_plans_and_the_best_only_gets_better() -> None:
    found = search(estimator(16), seed=1, evaluations=3000)
    assert 0 < found.worse < found.accepted < found.evaluations
    costs = [cost for _, cost in found.trace]
    assert costs == sorted(costs, reverse=True)
    assert len(costs) > 3
    assert costs[-1] == found.seconds


@cache
def tiny() -> tuple[Estimator, Found]:
    """Four places a call on eight GPUs with little memory, and the best of all plans."""
    small = ModelShape("1B", 2048, 5504, 16, 32000, 16, 16)
    cluster = replace(ClusterSpec.load("1x8xh100-flat"), memory_gib=16.0)
    one = Estimator(ppo(), shapes_of(small, small), cluster, WORK)
    return one, exhaustive(one, keep=4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_walk_finds_the_optimum_of_a_tiny_space(seed: int) -> None:
    one, best = tiny()
    assert best.evaluations == 4**6
    assert best.start is not None
    assert best.seconds < 0.7 * best.start.cost
    found = search(one, seed=seed, evaluations=3000, keep=4)
    assert found.seconds == pytest.approx(best.seconds, rel=1e-12)


def test_128_gpus_are_answered_in_seconds_and_progress_is_told() -> None:
    cluster, told = ClusterSpec.load("16x8xH100"), []
    start = time.perf_counter()
    found = search_plan(
        ppo(),
        cluster,
        WORK,
        shapes_of(ModelShape.named("70B")),
        evaluations=4000,
        progress=lambda share, best: told.append((share, best)),
    )
    assert time.perf_counter() - start < 60
    assert found.estimate.fits
    assert found.space > 1e15
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert len(told) > 3


def test_the_clock_may_end_a_search() -> None:
    start = time.perf_counter()
    found = search(estimator(16), seconds=0.3)
    assert found.clocked
    assert time.perf_counter() - start < 10
    with pytest.raises(UsageError, match="chains with beta above 0"):
        search(estimator(16), chains=())


# --- plans without a search ---------------------------------------------------------------------------------


def test_baselines_are_priced_by_the_same_estimator() -> None:
    one = estimator(16)
    found = search(one, seed=3, evaluations=6000)
    for name in BASELINES:
        other = baseline(one, name)
        assert other is not None
        assert one.estimate(other.plan).seconds == pytest.approx(other.seconds)
        assert other.seconds > found.seconds
    with pytest.raises(UsageError, match="no baseline is called 'symetric'; did you mean 'symmetric'"):
        baseline(one, "symetric")


def test_baselines_are_what_they_are_called() -> None:
    one = estimator(32, "34B")
    symmetric, heuristic, disjoint = (baseline(one, name) for name in BASELINES)
    assert symmetric is not None
    assert heuristic is not None
    assert disjoint is not None
    assert len(set(symmetric.plan.assignments.values())) == 1
    assert set(heuristic.plan.assignments.values()) == {(DeviceMesh(0, 4, 0, 8), Layout(1, 4, 8))}
    assert symmetric.seconds <= heuristic.seconds
    gpus: dict[str, set[int]] = {}
    for call in one.graph.calls:
        gpus.setdefault(call.role, set()).update(disjoint.plan.assignments[call.name][0].ranks(8))
    assert not any(a & b for a, b in itertools.combinations(gpus.values(), 2))


def test_a_search_beats_symmetric_plans_by_5_percent_somewhere() -> None:
    one = estimator(16)
    found, fixed = search(one, evaluations=6000), baseline(one, "symmetric")
    assert fixed is not None
    assert fixed.seconds > 1.05 * found.seconds


# --- ways of a call -------------------------------------------------------------------------------------------


def test_ways_hold_the_fastest_call_for_any_memory() -> None:
    costs = CostModel(ClusterSpec.load("2x8xA100"))
    for layout in (Layout(4, 2, 2), Layout(16), Layout(1, 4, 4)):
        for kind, verb in (("train", costs.train), ("inference", costs.infer)):
            ways = costs.ways(kind, SEVEN, layout, WORK)
            for free in (2 * GiB, 8 * GiB, 30 * GiB, math.inf):
                first = next((way for way in ways if way.active <= free), None)
                assert first == verb(SEVEN, layout, WORK, free)
        ways = costs.ways("generate", SEVEN, layout, WORK)
        assert ways[0] == costs.generate(SEVEN, layout, WORK)
        assert all(a.seconds < b.seconds and a.active > b.active for a, b in itertools.pairwise(ways))
        assert [w.parts for w in costs.ways("generate", SEVEN, layout, WORK, only=3)] == [3]
    assert costs.ways("train", SEVEN, Layout(256), WORK) == []
