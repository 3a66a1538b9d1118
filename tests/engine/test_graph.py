"""Dataflow graphs of model function calls (Mei et al., 2024, ReaLHF, section 4)."""

from __future__ import annotations

import itertools
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, Offload, ParamRealloc
from guerdon.errors import UsageError

Call = ModelFunctionCall
TRAIN = ("tokens", "log_prob", "reward", "ref_log_prob", "value")


def ppo() -> list[Call]:
    """PPO's six calls."""
    return [
        Call("actor_train", "actor", "train", TRAIN, (), minibatches=4),
        Call("critic_train", "critic", "train", TRAIN, (), minibatches=4),
        Call("actor_gen", "actor", "generate", ("prompts",), ("tokens", "log_prob")),
        Call("rew_inf", "reward", "inference", ("tokens",), ("reward",)),
        Call("ref_inf", "reference", "inference", ("tokens",), ("log_prob",), {"log_prob": "ref_log_prob"}),
        Call("critic_inf", "critic", "inference", ("tokens",), ("value",)),
    ]


def pairs(graph: DataflowGraph) -> set[tuple[str, str]]:
    return {(edge.source, edge.target) for edge in graph.edges}


def test_edges_follow_from_keys_alone() -> None:
    graph = DataflowGraph(ppo(), "ppo")
    judges = {"rew_inf", "ref_inf", "critic_inf"}
    expected = {("actor_gen", other) for other in (*judges, "actor_train", "critic_train")}
    expected |= {(judge, train) for judge in judges for train in ("actor_train", "critic_train")}
    assert pairs(graph) == expected
    assert graph.data_keys == ("prompts",)
    by_ends = {(edge.source, edge.target): edge.keys for edge in graph.edges}
    assert by_ends["actor_gen", "actor_train"] == ("tokens", "log_prob")
    assert by_ends["ref_inf", "actor_train"] == ("ref_log_prob",)  # renamed: not the actor's own
    assert set(graph.parents("critic_inf")) == {"actor_gen"}
    assert set(graph.children("rew_inf")) == {"actor_train", "critic_train"}
    assert graph.ancestors("actor_train") == {"actor_gen", *judges}


def test_the_order_respects_every_edge_and_otherwise_stays() -> None:
    names = [call.name for call in DataflowGraph(ppo()).order()]
    assert all(names.index(a) < names.index(b) for a, b in pairs(DataflowGraph(ppo())))
    assert names.index("actor_train") < names.index("critic_train")
    shuffled = DataflowGraph(ppo()[::-1])
    assert shuffled == DataflowGraph(ppo())
    assert hash(shuffled) == hash(DataflowGraph(ppo()))
    assert shuffled != DataflowGraph(ppo()[1:])


def test_a_cycle_is_refused_and_shown() -> None:
    a = Call("a", "x", "inference", ("z",), ("y",))
    b = Call("b", "x", "inference", ("y",), ("z",))
    with pytest.raises(UsageError, match=r"cycle: (a -> b -> a|b -> a -> b)"):
        DataflowGraph([a, b])
    with pytest.raises(UsageError, match="cycle: a -> a"):
        DataflowGraph([Call("a", "x", "inference", ("y",), ("y",))])


def test_two_producers_and_two_names_are_refused() -> None:
    calls = ppo()
    with pytest.raises(UsageError, match="'actor_gen' and 'ref_inf' both write 'log_prob'"):
        DataflowGraph([replace(call, rename={}) if call.name == "ref_inf" else call for call in calls])
    with pytest.raises(UsageError, match="two calls named 'rew_inf'"):
        DataflowGraph([*calls, replace(calls[3], outputs=("cost",))])
    with pytest.raises(UsageError, match="no calls"):
        DataflowGraph([])


def test_a_key_that_nobody_gives_is_refused_where_the_data_are_known() -> None:
    assert DataflowGraph(ppo(), data=["prompts"]).data_keys == ("prompts",)
    with pytest.raises(UsageError, match=r"'actor_gen' reads 'prompts', .* did you mean 'prompt'"):
        DataflowGraph(ppo(), data=["prompt"])
    with pytest.raises(UsageError, match="no call 'actor_trian'; did you mean 'actor_train'"):
        DataflowGraph(ppo())["actor_trian"]
    with pytest.raises(UsageError, match="no role 'referense'; did you mean 'reference'"):
        DataflowGraph(ppo()).last_of("referense")


def test_roles_and_what_is_trained() -> None:
    graph = DataflowGraph(ppo())
    assert set(graph.roles()) == {"actor", "critic", "reward", "reference"}
    assert graph.trained_roles == ("actor", "critic")
    assert graph.last_of("actor").name == "actor_train"
    assert graph.last_of("reference").name == "ref_inf"
    assert [call.name for call in graph.calls_of("critic")] == ["critic_inf", "critic_train"]


def test_weights_of_an_iteration_wait_for_the_training_before() -> None:
    graph = DataflowGraph(ppo())
    assert set(graph.version_edges) == {
        ("actor_train", "actor_gen", ("actor",)),
        ("critic_train", "critic_inf", ("critic",)),
    }
    nodes, waits = graph.unroll(3)
    assert [(node.iteration, node.call.name) for node in nodes[:6]] == [(0, c.name) for c in graph.order()]
    assert len(nodes) == 18
    across = [wait for wait in waits if wait.kind == "parameters"]
    assert len(across) == 2 * 2
    assert all(wait.target[0] == wait.source[0] + 1 for wait in across)
    assert set(graph.unroll(3).before((1, "critic_inf"))) == {(1, "actor_gen"), (0, "critic_train")}
    assert graph.unroll(1).before((0, "actor_gen")) == []
    with pytest.raises(UsageError, match="0 iterations"):
        graph.unroll(0)


def test_only_the_first_calls_on_a_role_wait_and_for_the_last_that_changes_it() -> None:
    sample = Call("sample", "actor", "generate", ("prompts",), ("tokens",))
    greedy = Call("greedy", "actor", "generate", ("prompts",), ("best",))
    again = Call("again", "actor", "inference", ("tokens", "best"), ("log_prob",))
    first = Call("first", "actor", "train", ("log_prob",), ("weights",))
    second = Call("second", "actor", "train", ("weights",), ())
    edges = DataflowGraph([sample, greedy, again, first, second]).version_edges
    assert {(edge.source, edge.target) for edge in edges} == {("second", "sample"), ("second", "greedy")}


def test_a_moving_average_is_a_hook_and_its_readers_wait_for_it() -> None:
    calls = [
        replace(call, post=(ParamRealloc("actor", "reference", 0.01),))
        if call.name == "actor_train"
        else call
        for call in ppo()
    ]
    graph = DataflowGraph(calls)
    assert graph["actor_train"].weights_changed == ("actor", "reference")
    assert ("actor_train", "ref_inf", ("reference",)) in graph.version_edges
    assert graph.last_of("reference").name == "actor_train"
    assert graph.trained_roles == ("actor", "critic")
    with pytest.raises(UsageError, match=r"eta is 1\.5"):
        ParamRealloc("actor", "reference", 1.5)


def test_a_role_that_a_call_only_uses_counts() -> None:
    act = Call("act", "environment", "experience", (), ("rows",), uses=("actor",))
    fit = Call("fit", "critic", "train", ("rows",), ("weights",), uses=("actor", "target"))
    move = Call("move", "actor", "train", ("rows", "weights"), (), uses=("critic",))
    graph = DataflowGraph([act, fit, move])
    assert set(graph.roles()) == {"critic", "actor", "target"}  # an environment has no weights
    assert not act.on_model
    assert act.weights_read == ("actor",)
    assert {(e.source, e.target, e.keys) for e in graph.version_edges} == {
        ("move", "act", ("actor",)),
        ("fit", "fit", ("critic",)),
    }


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "trian"}, "of kind 'trian'; did you mean 'train'"),
        ({"inputs": ("a", "a")}, "reads 'a' twice"),
        ({"outputs": ("a", "b"), "rename": {"b": "a"}}, "writes 'a' twice"),
        ({"rename": {"tokenz": "a"}}, "renames 'tokenz', .* did you mean 'tokens'"),
        ({"sequences": 0}, "sequences 0"),
        ({"minibatches": 0}, "minibatches 0"),
        ({"pre": (Offload("x"),)}, "put that into post"),
    ],
)
def test_a_call_that_makes_no_sense_is_refused(changes: dict, said: str) -> None:
    good = Call("it", "x", "train", ("tokens",), (), post=(Offload("x"),))
    with pytest.raises(UsageError, match=f"call 'it' .*{said}"):
        replace(good, **changes)


# --- pictures ---------------------------------------------------------------------------------------------


def test_a_picture_names_every_call_and_key(tmp_path: Path) -> None:
    path = DataflowGraph(ppo(), "ppo").draw(tmp_path / "new" / "graph.svg", title="PPO")
    said = "".join(ElementTree.parse(path).getroot().itertext())
    for text in ("PPO", "prompts", "actor", "critic", "reward", "reference", "tokens", "log-probs", "values"):
        assert text in said, text
    assert "weights of actor" in said
    assert "4 updates" in said
    again = DataflowGraph(ppo(), "ppo").draw(tmp_path / "again.svg", title="PPO")
    assert path.read_bytes() == again.read_bytes()


def test_a_picture_as_pixels(tmp_path: Path) -> None:
    path = DataflowGraph(ppo()).draw(tmp_path / "graph.png")
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(100_000) or []) > 5
    with pytest.raises(UsageError, match=r"graph\.txt is no picture"):
        DataflowGraph(ppo()).draw(tmp_path / "graph.txt")


def test_no_label_lies_on_another(tmp_path: Path) -> None:
    from guerdon.engine import drawing

    graph = DataflowGraph(ppo())
    layers, boxes, passes = drawing._layered(graph)
    drawing._ordered(layers, passes)
    drawing._placed(layers)
    for layer in layers:
        spans = sorted((place.y, place.y + place.height) for place in layer)
        assert all(low[1] < high[0] for low, high in itertools.pairwise(spans))
    for box in boxes.values():
        at = sorted(arrival.y for arrival in box.arrivals)
        assert all(b - a >= drawing._SMALL for a, b in itertools.pairwise(at))
        assert all(box.y < y < box.y + box.height for y in at)
    assert {box.layer for name, box in boxes.items() if name.endswith("train")} == {3}
