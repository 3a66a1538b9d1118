"""Graphs read off methods: one iteration of each, watched."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guerdon import catalog
from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, ParamRealloc
from guerdon.errors import UsageError
from guerdon.launch import method_for
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.optim import AdamW
from guerdon.planning import for_batch, trace
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.tasks import topics

METHODS = [system.slug for system in catalog.systems(status="ready") if system.cls is not None]
RECORDED = ("prompts", "preferences.", "demonstrations.", "rated.")
UNTRAINED = {"best_of_n"}  # answers and judges only, unless asked to distil


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model that need not be pre-trained first: a graph depends on no weights."""
    monkeypatch.setattr(topics, "base_policy", topics.fresh_policy)


def edges(graph: DataflowGraph) -> dict[tuple[str, str], set[str]]:
    """Fields that go from call to call, masks and the like left out."""
    dull = ("mask", "prompt_mask", "temperature", "prompt_token", "prompt")
    short = {}
    for edge in graph.edges:
        short[edge.source, edge.target] = {key.rpartition(".")[2] for key in edge.keys} - set(dull)
    return short


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_graph(method: str, tmp_path: Path) -> None:
    graph = trace(method)
    assert graph.name == method
    names = [call.name for call in graph.calls]
    assert all(call.name.startswith(f"{call.role}.") for call in graph.calls)
    assert bool(graph.trained_roles) == (method not in UNTRAINED)
    for call in graph.calls:
        assert call.sequences is None or call.sequences >= 1
        assert call.reads or call.kind in ("experience", "inference", "feedback"), call
        if call.kind == "train":
            assert f"{call.name}.weights" in call.writes
    for key in graph.data_keys:  # what is recorded, or was made before the loop
        assert key.startswith(RECORDED) or key.partition(".")[0] in ("reference", "actor"), key
    for role in graph.trained_roles:  # its first reader waits for its training
        last = graph.last_of(role)
        assert any(e.source == last.name and role in e.keys for e in graph.version_edges), role
    assert graph.unroll(2).nodes[len(names)].iteration == 1
    said = graph.draw(tmp_path / "graph.svg").read_text(encoding="utf-8")
    assert all(role.replace("_", " ") in said for role in graph.roles())


def test_ppo_on_text_makes_the_six_calls_of_the_paper() -> None:
    graph = trace("ppo", policy="language")
    kinds = {call.name: call.kind for call in graph.calls}
    assert kinds == {
        "actor.sample": "generate",
        "reward.score": "feedback",
        "critic.value": "inference",
        "reference.distribution": "inference",
        "actor.fit": "train",
        "critic.fit": "train",
    }
    found = edges(graph)
    assert found["actor.sample", "reward.score"] == {"text"}
    assert found["actor.sample", "critic.value"] == {"token"}
    assert found["actor.sample", "actor.fit"] == {"token", "log_prob"}
    assert found["actor.sample", "critic.fit"] == {"token"}  # the batch it is handed has log_prob too
    for judge in ("reward.score", "critic.value"):  # advantages are made of both
        assert (judge, "actor.fit") in found
        assert (judge, "critic.fit") in found
    assert ("reference.distribution", "critic.fit") not in found
    assert {(e.source, e.target) for e in graph.version_edges} == {
        ("actor.fit", "actor.sample"),
        ("critic.fit", "critic.value"),
    }
    assert trace("ppo", policy="language") == graph


def test_options_change_the_graph_as_they_change_the_method() -> None:
    def calls(method: str, **options: Any) -> set[str]:
        return {call.name for call in trace(method, **options).calls}

    assert calls("grpo", policy="language", kl=0.0) == {"actor.sample", "reward.score", "actor.update"}
    assert "reference.log_prob" in calls("grpo", policy="language", kl=0.1)
    assert "critic.value" not in calls("ppo", policy="language", critic=False)
    assert calls("dpo") == {"reference.log_prob", "actor.update"}
    assert calls("dpo", reference_free=True) == {"actor.update"}
    assert "actor.evaluate" in calls("dqn", prioritised=True)
    cached = trace("dpo", cache_reference=True)
    assert [call.name for call in cached.calls] == ["actor.update"]
    assert "reference.log_prob.log_prob" in cached.data_keys  # made before the loop


def test_a_greedy_baseline_needs_nothing_of_the_sampled_answers() -> None:
    graph = trace("remax")
    generating = [call for call in graph.calls if call.kind == "generate"]
    assert [call.name for call in generating] == ["actor.sample", "actor.sample#2"]
    assert graph.parents("actor.sample#2") == ()
    assert {"reward.score", "reward.score#2"} <= set(graph.parents("actor.fit"))


def test_experience_of_whole_episodes_is_one_call() -> None:
    graph = trace("rloo", policy="categorical")
    found = edges(graph)
    assert graph["environment.collect"].uses == ("actor",)
    assert found["environment.collect", "reward.score"] == {"reward"}
    assert {"observation", "action", "log_prob"} <= found["environment.collect", "actor.fit"]


def test_roles_that_follow_are_hooks() -> None:
    graph = trace("sac")
    assert graph["critic.update"].post == (ParamRealloc("critic", "target", 0.005),)
    assert set(graph["critic.update"].uses) == {"actor", "target"}
    assert edges(graph)["critic.update", "actor.update"] == {
        "weights"
    }  # it improves by the critic as it is now
    assert ("critic.update", "critic.update", ("critic", "target")) in graph.version_edges
    (average,) = trace("nash_md", opponent="ema")["actor.update"].post
    assert average == ParamRealloc("actor", "average", average.eta)  # type: ignore[union-attr]
    assert average.eta == pytest.approx(0.001)  # type: ignore[union-attr]
    assert trace("nash_md")["actor.sample#2"].uses == ("reference",)


def test_the_graph_has_the_method_s_own_numbers() -> None:
    settings: dict[str, Any] = {"policy": "language", "prompts_per_round": 8, "group_size": 4, "minibatch": 8}
    small, whole = trace("rloo", **settings), trace("rloo", **settings, shrink=False)
    assert small == whole
    assert small["actor.sample"].sequences == 32
    assert small["actor.fit"].minibatches == 4 * method_for("rloo", "reviews").epochs
    pairs = trace("rebel", prompts_per_round=8, minibatch=4)
    assert pairs == trace("rebel", prompts_per_round=8, minibatch=4, shrink=False)
    assert pairs["actor.update"].minibatches == 2
    assert trace("ppo", env="CartPole-v1", samples=256, minibatch=64, epochs=3)["actor.fit"].minibatches == 12
    dqn = trace("dqn", update_every=4, updates=2)
    assert (dqn["environment.advance"].sequences, dqn["actor.update"].minibatches) == (4, 2)


def test_a_judge_can_be_planned_as_a_model() -> None:
    assert trace("rebel")["reward.score"].kind == "feedback"
    graph = trace("rebel", judge="model")
    assert graph["reward.score"].on_model
    assert "reward" in graph.roles()


def test_a_method_of_one_s_own_needs_no_catalog() -> None:
    graph = trace(_BestAgainstWorst(), like="grpo", policy="language")
    assert graph.name == "_BestAgainstWorst"
    assert [call.name for call in graph.order()] == ["actor.sample", "reward.score", "actor.update"]
    assert edges(graph)["actor.sample", "actor.update"] == {"token", "log_prob"}
    assert graph["actor.sample"].sequences == 24
    with pytest.raises(UsageError, match="not in the catalog"):
        trace(_BestAgainstWorst())


class _BestAgainstWorst:
    """Raise the best answer to a prompt, lower the worst."""

    def roles(self) -> dict[str, RoleSettings]:
        return {"actor": RoleSettings(AdamW(1e-4))}

    def train(self, run: Run, actor: Role, experience: Any, feedback: Any) -> None:
        for _ in run.steps(100):
            traj = experience.collect(actor, 24, group_size=4)
            score = feedback.score(traj).view(-1, 4)
            sign = (score == score.amax(1, keepdim=True)).float() - (
                score == score.amin(1, keepdim=True)
            ).float()
            traj = traj.with_(advantage=traj.per_step(sign.flatten()))
            run.log(**actor.update(traj, ClippedSurrogate()))


def test_a_trace_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = (
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
        torch.get_num_threads(),
    )
    trace("rebel")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.array_equal(np.random.get_state()[1], before[2])
    assert torch.get_num_threads() == before[3]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_said() -> None:
    with pytest.raises(UsageError, match="'sac' trains no language policy"):
        trace("sac", policy="language")
    with pytest.raises(UsageError, match="no option 'groupsize'; did you mean 'group_size'"):
        trace("grpo", groupsize=4)
    with pytest.raises(UsageError, match="r_to_qstar"):
        trace("r_to_qstar")
    with pytest.raises(UsageError, match="did you mean 'grpo'"):
        trace("grppo")


def test_a_graph_for_another_batch() -> None:
    graph = for_batch(trace("ppo", policy="language"), 500)
    rows = {call.name: call.sequences for call in graph.calls}
    assert rows["actor.sample"] == rows["critic.value"] == 500
    assert rows["actor.fit"] == 1000  # two passes
    assert rows["reward.score"] == 500
    odd = for_batch(trace("ppo", policy="language"), 7)
    assert odd["actor.fit"].sequences == 16  # four minibatches of equal size
    plain = DataflowGraph([ModelFunctionCall("a", "x", "train", ("b",), ())])
    assert for_batch(plain, 8) == plain
    with pytest.raises(UsageError, match="at least one row"):
        for_batch(plain, 0)


# --- guerdon plan -------------------------------------------------------------------------------------------------


def test_the_command_draws_and_lists(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from guerdon.cli import main

    picture = tmp_path / "graph.png"
    assert main(["plan", "rebel", "--draw", str(picture)]) == 0
    assert picture.stat().st_size < 60_000
    said = capsys.readouterr().out
    assert all(word in said for word in ("actor.sample", "reward.score", "actor.update", "generate"))


def test_the_command_plans_and_its_plan_is_a_placement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from guerdon.cli import main
    from guerdon.engine.meshes import read_placement

    files = ["--out", str(tmp_path / "plan.json"), "--timeline", str(tmp_path / "timeline.png")]
    sizes = ["--actor", "7b", "--critic", "7b", "--cluster", "2x8xH100", "--batch", "128", "--seconds", "2"]
    assert main(["plan", "ppo", "--policy", "language", *sizes, *files]) == 0
    said = capsys.readouterr().out
    assert "megatron" in said
    assert "reward.score" in said
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    placement = read_placement(tmp_path / "plan.json")
    assert {"actor", "critic", "reference"} <= set(placement.mapping)


def test_a_plan_that_fits_nowhere_is_refused_with_figures(capsys: pytest.CaptureFixture[str]) -> None:
    from guerdon.cli import main

    assert main(["plan", "ppo", "--actor", "70b", "--critic", "70b", "--cluster", "1x8xH100"]) == 2
    said = capsys.readouterr().err
    assert "GiB" in said


def test_a_controller_has_no_plan_for_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    from guerdon.cli import main

    assert main(["plan", "sac", "--actor", "7b"]) == 2
    assert "--actor" in capsys.readouterr().err
