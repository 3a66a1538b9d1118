"""Profiled layers: interpolation by hand, calls put together from them, and measurements of small real models."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.estimate import Estimator
from guerdon.engine.graph import DataflowGraph, ModelFunctionCall
from guerdon.engine.plan import search
from guerdon.engine.profile import OPS, PARTS, LayerProfile, Point, ProfiledCost
from guerdon.engine.protocols import Layout
from guerdon.engine.shapes import ModelShape, Workload
from guerdon.engine.sharded import Blueprint
from guerdon.errors import DataError, UsageError

SHAPE = ModelShape("tiny", 64, 256, 3, 128, 4, 4, 16, gated=False)
CPUS = ClusterSpec(
    "two", 1, 2, 4.0, 0.03, 0.01, 1.0, 1.0, memory_usable=1.0, collective_us=100.0, small_collective_us=50.0
)


def made_up() -> LayerProfile:
    """Times that are easy to reckon with: a microsecond a token in a block, more in longer texts."""
    points = [
        Point(
            part,
            op,
            tp,
            batch,
            length,
            scale * (batch * length if op != "decode" else batch) * (1 + length / 100) / tp,
        )
        for part, scale in (("block", 1e-6), ("ends", 5e-7))
        for op, scale in (("forward", scale), ("backward", 2 * scale), ("decode", scale))
        for tp in (1, 2)
        for batch in (1, 4)
        for length in (10, 20)
    ]
    return LayerProfile(SHAPE, tuple(points), optimiser=1e-9)


# --- between and beyond the points --------------------------------------------------------------------------


def test_times_between_the_points_lie_on_lines() -> None:
    one = made_up()
    assert one.seconds("block", "forward", 1, 40, 10) == pytest.approx(40e-6 * 1.1)  # measured
    assert one.seconds("block", "forward", 1, 25, 10) == pytest.approx(25e-6 * 1.1)
    assert one.seconds("block", "forward", 1, 40, 15) == pytest.approx(40e-6 * 1.15)
    assert one.seconds("block", "backward", 2, 40, 20) == pytest.approx(40e-6 * 1.2)
    assert one.seconds("ends", "decode", 1, 3, 20) == pytest.approx(1.5e-6 * 1.2)


def test_beyond_the_largest_batch_times_are_in_proportion() -> None:
    one = made_up()
    assert one.seconds("block", "forward", 1, 4000, 10) == pytest.approx(4000e-6 * 1.1)
    assert one.seconds("block", "forward", 1, 40, 30) == pytest.approx(40e-6 * 1.3)
    kinked = replace(
        one, points=(Point("block", "forward", 1, 1, 10, 3e-3), Point("block", "forward", 1, 4, 10, 6e-3))
    )
    assert kinked.seconds("block", "forward", 1, 80, 10) == pytest.approx(12e-3)
    assert kinked.seconds("block", "forward", 1, 0, 10) == pytest.approx(2e-3)  # what starting costs
    falling = replace(
        one, points=(Point("block", "forward", 1, 1, 10, 3e-3), Point("block", "forward", 1, 4, 10, 2e-3))
    )
    assert falling.seconds("block", "forward", 1, 40, 10) == 3e-3  # more work never takes less


def test_what_was_not_measured_is_refused() -> None:
    with pytest.raises(UsageError, match="the profile of 'tiny' has no block forward with tp=4"):
        made_up().seconds("block", "forward", 4, 10, 10)
    with pytest.raises(UsageError, match="no profile is of the shape of '7B'"):
        ProfiledCost(CPUS, [made_up()]).profile(ModelShape.named("7B"))


def test_a_profile_goes_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    made_up().to_json(path)
    assert LayerProfile.from_json(path) == made_up()
    path.write_text('{"shape": {}}')
    with pytest.raises(DataError, match=r"profile\.json is no profile of layers"):
        LayerProfile.from_json(path)
    with pytest.raises(DataError, match="cannot read the profile"):
        LayerProfile.from_json(tmp_path / "nothing.json")


# --- calls put together ---------------------------------------------------------------------------------------


def test_a_pass_is_its_layers_and_its_ends() -> None:
    costs = ProfiledCost(CPUS, [made_up()], checkpointing=False, activation_bytes=4)
    work = Workload(4, 10, 10, 1)
    one = costs.inference(SHAPE, Layout(1), work, 1)
    assert one.seconds == pytest.approx(80e-6 * 1.2 * (3 + 0.5))
    split = costs.inference(SHAPE, Layout(1, 1, 2), work, 1)
    reduce = 2 * 1 / 2 * 4 * 80 * 64 / 1e9 + 100e-6  # of two ranks
    gather = 1 / 2 * 4 * 80 * 128 / 1e9 + 100e-6
    assert split.seconds == pytest.approx(40e-6 * 1.2 * 3.5 + (2 * 3 + 1) * reduce + gather)
    train = costs.training(SHAPE, Layout(2), work, 1)
    gradients = 2 * 1 / 2 * 2 * SHAPE.parameters / 1e9 + 100e-6
    assert train.seconds == pytest.approx(40e-6 * 1.2 * 3.5 * 3 + gradients + 1e-9 * SHAPE.parameters / 2)
    alone = ProfiledCost(CPUS, [made_up()], sharded_optimiser=False)
    assert alone.optimise(SHAPE, Layout(2)) == pytest.approx(1e-9 * SHAPE.parameters)
    assert alone.resident(SHAPE, Layout(2), True) == alone.resident(SHAPE, Layout(1), True)


def test_an_answer_is_a_prefill_and_its_steps() -> None:
    costs = ProfiledCost(CPUS, [made_up()])
    made = costs.generation(SHAPE, Layout(1), Workload(4, 10, 10, 1), 1)
    prefill, context = 40e-6 * (1.1 * 3 + 1.2 * 0.5), 15
    step = 4e-6 * ((1 + context / 100) * 3 + 1.2 * 0.5)
    assert made.seconds == pytest.approx(prefill + 9 * step)


def test_a_search_on_profiled_layers() -> None:
    graph = DataflowGraph(
        [
            ModelFunctionCall("gen", "actor", "generate", ("prompts",), ("text",)),
            ModelFunctionCall("ref", "reference", "inference", ("text",), ("log_prob",)),
            ModelFunctionCall("train", "actor", "train", ("text", "log_prob"), ()),
        ]
    )
    shapes = {"actor": replace(SHAPE, name="mine"), "reference": SHAPE}
    costs = ProfiledCost(CPUS, [made_up()])
    found = search(Estimator(graph, shapes, CPUS, Workload(64, 10, 10, 1), costs), evaluations=500)
    # linear times and slow links: replicas on both processes are best everywhere
    assert {layout for _, layout in found.plan.assignments.values()} == {Layout(2)}


# --- measured ---------------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_layers_of_a_small_gpt_are_timed() -> None:
    told: list[float] = []
    blueprint = Blueprint.gpt(layers=2, width=64, heads=4, vocabulary=128, longest=64)
    found = LayerProfile.measure(blueprint, (1, 2, 3), (1, 8), (16, 64, 128), repeats=3, progress=told.append)
    assert found.shape == blueprint.shape("profiled")
    assert told[-1] == 1.0
    made = {(p.part, p.op, p.tp, p.batch, p.length): p.seconds for p in found.points}
    assert len(made) == len(PARTS) * len(OPS) * 2 * 2 * 2  # tp 3 divides no 4 heads, 128 tokens are too long
    assert all(0 < seconds < 1 for seconds in made.values())
    assert 0 < found.optimiser < 1e-4
    assert made["block", "forward", 1, 8, 64] > made["block", "forward", 1, 1, 16]
    assert made["block", "backward", 1, 8, 64] > made["block", "decode", 1, 8, 64]
    with pytest.raises(UsageError, match="there is nothing to profile"):
        LayerProfile.measure(blueprint, (3,), (1,), (16,))


@pytest.mark.usefixtures("one_thread")
def test_layers_of_a_transformers_model_are_timed() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    found = LayerProfile.measure(LlamaForCausalLM(config).eval(), (1, 2, 4), (2,), (8,), repeats=2)
    assert found.shape == replace(ModelShape.from_config(config), name="profiled", head_width=8)
    assert {p.tp for p in found.points} == {1, 2}  # two heads of keys and values
    costs = ProfiledCost(CPUS, [found])
    call = costs.train(found.shape, Layout(1, 1, 2), Workload(4, 4, 4, 1))
    assert call is not None
    assert 0 < call.seconds < 10


def test_this_machine_is_measured() -> None:
    found = ClusterSpec.measure(2)
    assert (found.nodes, found.gpus_per_node, found.compute_efficiency) == (1, 2, 1.0)
    assert 1e9 < found.flops < 1e13
    assert 1e8 < found.memory_bandwidth < 1e12
    assert 1e6 < found.bandwidth(2) < 1e12
    assert 1 < found.collective_us < 1e6
    assert found.memory_gib > 0.1
    assert math.isfinite(found.all_reduce(1e6, 2))
    with pytest.raises(UsageError, match="cannot measure 0 processes"):
        ClusterSpec.measure(0)
