"""From a method's graph and sizes in words to a plan, its tables and its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from guerdon.engine.graph import DataflowGraph, ModelFunctionCall
from guerdon.engine.mapping import Placement
from guerdon.engine.meshes import ExecutionPlan, read_placement
from guerdon.engine.planning_report import make_plan, model_shape, plan_command, resized, shapes_for
from guerdon.engine.shapes import ModelShape
from guerdon.errors import DataError, UsageError

Call = ModelFunctionCall


def grpo() -> DataflowGraph:
    """As a trace of the method gives it: rows and optimiser steps are those of a small task, two passes over 64 answers."""
    return DataflowGraph(
        [
            Call("actor.sample", "actor", "generate", ("prompts",), ("text",), sequences=64),
            Call("reward.score", "reward", "feedback", ("text",), ("score",), sequences=64),
            Call("reference.log_prob", "reference", "inference", ("text",), ("log_prob",), sequences=64),
            Call(
                "actor.fit", "actor", "train", ("text", "score", "log_prob"), (), sequences=128, minibatches=8
            ),
        ],
        "grpo",
    )


def rows(graph: DataflowGraph) -> list[tuple[int | None, int]]:
    return [(call.sequences, call.minibatches) for call in graph.calls]


def test_a_graph_takes_the_size_that_is_asked_for() -> None:
    assert rows(resized(grpo(), 512)) == [(512, 1), (512, 1), (512, 1), (1024, 8)]
    assert rows(resized(grpo(), 512, minibatches=2))[-1] == (1024, 4)
    assert rows(resized(grpo(), 512, minibatches=2, epochs=1))[-1] == (512, 2)
    assert rows(resized(grpo(), 512, epochs=3))[-1] == (1536, 12)
    with pytest.raises(UsageError, match=r"7 minibatches do not divide the 512 sequences of 'actor\.fit'"):
        resized(grpo(), 512, minibatches=7)
    pairs = DataflowGraph(
        [
            Call("ref", "reference", "inference", ("pairs",), ("x",), sequences=64),
            Call("fit", "actor", "train", ("pairs", "x"), (), sequences=64),
        ]
    )
    assert rows(resized(pairs, 512)) == [(512, 1), (512, 1)]
    by_hand = DataflowGraph([Call("fit", "actor", "train", ("data",), (), minibatches=4)])
    assert rows(resized(by_hand, 512)) == [(512, 4)]


def test_roles_have_the_sizes_that_are_given() -> None:
    graph = DataflowGraph(
        [
            Call("a", "actor", "generate", ("x",), ("y",)),
            Call("b", "reward", "inference", ("y",), ("z",)),
            Call("c", "critic", "inference", ("y",), ("v",)),
        ]
    )
    big, small, other = (ModelShape.named(n) for n in ("70B", "7B", "13B"))
    found = shapes_for(graph, big, small)
    assert found == {"actor": big, "reward": small.as_scalar(), "critic": small.as_scalar()}
    assert shapes_for(graph, big, small, other)["reward"] == other.as_scalar()
    with pytest.raises(UsageError, match="the method has a role 'reward' whose size is not the actor's"):
        shapes_for(graph, big)


def test_sizes_come_by_name_or_from_a_config(tmp_path: Path) -> None:
    assert model_shape("70b") == ModelShape.named("70B")
    config = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert model_shape(str(tmp_path)).layers == 2
    assert model_shape(str(tmp_path / "config.json")).hidden == 64
    with pytest.raises(UsageError, match="no model shape is called '8b'"):
        model_shape("8b")
    with pytest.raises(DataError, match="cannot read the model's config"):
        model_shape(str(tmp_path / "other.json"))


def test_a_plan_is_printed_and_written(tmp_path: Path) -> None:
    console = Console(width=140, record=True, file=(tmp_path / "out.txt").open("w"))
    picture, file = tmp_path / "timeline.png", tmp_path / "plan.json"
    report = plan_command(
        grpo(),
        console,
        actor="7b",
        cluster="1x8xH100",
        batch=128,
        timeline_path=picture,
        out=file,
        seconds=0.5,
    )
    text = console.export_text()
    assert f"grpo: {report.found.seconds:.1f} s an iteration, simulated, on 1 x 8 H100-80GB" in text
    for said in (
        "actor.sample",
        "symmetric",
        "megatron heuristic",
        "disjoint",
        "GPUs",
        "of 72.0",
        "not measured",
    ):
        assert said.split()[-1] in text
    assert "128 sequences of 1024 + 1024 tokens, actor.fit 8 steps" in text
    assert "The clock ended the search" in text
    assert "reward.score" not in text  # a program takes no GPU
    assert picture.stat().st_size > 2000
    plan = ExecutionPlan.from_json(file)
    assert plan == report.found.plan
    assert set(plan.assignments) == {"actor.sample", "reference.log_prob", "actor.fit"}
    assert isinstance(read_placement(file), Placement)
    assert report.estimator.estimate(plan).seconds == pytest.approx(report.found.seconds)


def test_what_does_not_fit_or_has_no_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no plan fits 8 GPUs .* use at least \d+ GPUs"):
        make_plan(grpo(), actor="70b", cluster="1x8xH100")
    stepping = DataflowGraph([Call("play", "actor", "experience", (), ("steps",))], "control")
    with pytest.raises(UsageError, match="graph 'control' has no call on a model"):
        make_plan(stepping, actor="7b")
