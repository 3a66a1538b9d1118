"""The runtime: PPO's six calls in processes, by plans that put them on different ranks in different layouts."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import time
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from guerdon.engine import workers
from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, Offload, ParamRealloc
from guerdon.engine.host import WorkerError
from guerdon.engine.meshes import DeviceMesh, ExecutionPlan
from guerdon.engine.model_worker import Rows, Work
from guerdon.engine.pipelines import ModelPart, generate
from guerdon.engine.ppo_calls import PPOCalls
from guerdon.engine.protocols import Layout
from guerdon.engine.runtime import Done, Runtime, homes_of, measured, meshes_of
from guerdon.engine.sharded import Blueprint
from guerdon.engine.shards import Mesh
from guerdon.errors import GuerdonError, UsageError
from guerdon.reproductions.realhf import ALL, plans_of_four

BATCH, STEPS = 12, 3
CALLS = PPOCalls(minibatches=2, max_new_tokens=10)
NAMES = [call.name for call in CALLS.graph().calls]


def gpt(outputs: int | None, seed: int) -> Blueprint:
    return Blueprint.gpt(2, 32, 4, 37, 64, outputs, seed, scale=0.2)


MODELS = {
    "actor": partial(gpt, None, 1),
    "reference": partial(gpt, None, 1),
    "critic": partial(gpt, 1, 2),
    "reward": partial(gpt, 1, 3),
}


def prompts(row: int, most: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(row)
    length = int(torch.randint(2, most, (1,), generator=generator))
    return {"prompt": torch.randint(1, 37, (length,), generator=generator)}


EVERYWHERE, MIXED, APART = plans_of_four().values()


@pytest.fixture(scope="module", autouse=True)
def preloaded() -> None:
    """Workers are forked from a process that has imported what they need, once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["guerdon.engine.workers", "guerdon.engine.ppo_calls", "torch._dynamo"])
    multiprocessing.forkserver.ensure_running()


def start(plan: Any, calls: PPOCalls = CALLS, **options: Any) -> Runtime:
    graph = options.pop("graph", None) or calls.graph()
    return Runtime(graph, plan, MODELS, calls, options.pop("data", prompts), BATCH, timeout=60.0, **options)


def weights(runtime: Runtime, role: str, folder: Path) -> dict[str, Tensor]:
    path = folder / f"{role}.safetensors"
    runtime.save(role, str(path))
    return load_file(path)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


class Course:
    """Three steps under one plan."""

    def __init__(self, plan: Any, folder: Path, **options: Any) -> None:
        with start(plan, **options) as runtime:
            workers.reset_traffic()
            self.done = runtime.run(STEPS)
            self.to_master = workers.traffic()["materialised_bytes"]
            self.weights = {role: weights(runtime, role, folder) for role in ("actor", "critic", "reference")}
            self.memory = runtime.memory()
            self.buffered = len(runtime._buffer)

    def metric(self, name: str) -> list[float]:
        found = sorted((d.iteration, d.call, d.metrics[name]) for d in self.done if name in d.metrics)
        return [value for *_, value in found]


@pytest.fixture(scope="module")
def courses(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Course]:
    folder = tmp_path_factory.mktemp("runtime")
    graph = CALLS.graph()
    pieces = [replace(c, sequences=5) if c.name in ("rew_inf", "ref_inf") else c for c in graph.calls]
    return {
        "everywhere": Course(EVERYWHERE, folder / "1"),
        "mixed": Course(MIXED, folder / "2"),
        "apart": Course(APART, folder / "3", graph=DataflowGraph(pieces), offload=["reference", "reward"]),
    }


def test_results_do_not_depend_on_the_plan(courses: dict[str, Course]) -> None:
    first = courses["everywhere"]
    for role in ("actor", "critic"):
        untrained = {p.name: MODELS[role]().weights(p) for p in MODELS[role]().parameters}
        assert apart(first.weights[role], untrained) > 1e-3
        for other in ("mixed", "apart"):
            assert apart(first.weights[role], courses[other].weights[role]) < 1e-5
    for other in ("mixed", "apart"):
        for name in ("loss", "ratio", "length", "ended") + (("score",) if other == "mixed" else ()):
            pairs = zip(first.metric(name), courses[other].metric(name), strict=True)
            assert max(abs(a - b) for a, b in pairs) < 1e-5
    assert len(first.metric("loss")) == 2 * STEPS
    assert set(first.metric("skipped")) == {0.0}


def test_calls_wait_for_their_data_and_for_the_weights_of_their_iteration(courses: dict[str, Course]) -> None:
    graph = CALLS.graph()
    for course in courses.values():
        at: dict[tuple[int, str], list[Done]] = {}
        for done in course.done:
            at.setdefault((done.iteration, done.call), []).append(done)
        assert len(at) == STEPS * len(NAMES)
        for wait in graph.unroll(STEPS).waits:
            if len(at[wait.source]) == len(at[wait.target]) == 1:
                assert at[wait.source][0].end <= at[wait.target][0].start
        assert all(d.start <= d.ready <= d.end for d in course.done)


def test_a_call_of_fewer_sequences_is_made_in_pieces(courses: dict[str, Course]) -> None:
    pieces = [d for d in courses["apart"].done if d.call == "rew_inf" and d.iteration == 0]
    assert len(pieces) == 3


def test_bytes_moved_are_those_planned(courses: dict[str, Course]) -> None:
    for course in courses.values():
        planned = sum(done.planned_bytes for done in course.done)
        assert sum(done.data_bytes for done in course.done) == planned > 0
    assert sum(done.weight_bytes for done in courses["everywhere"].done) == 0
    assert sum(done.weight_bytes for done in courses["mixed"].done) > 0


def test_nothing_is_left_when_all_consumers_are_done(courses: dict[str, Course]) -> None:
    for course in courses.values():
        assert course.buffered == 0
        assert [rank["data"] for rank in course.memory] == [0] * 4


def test_weights_of_judges_are_on_the_device_for_their_calls_alone(courses: dict[str, Course]) -> None:
    size = {role: sum(p.bytes_of(p_share) for p, p_share in held(role, "apart")) for role in ("reference",)}
    away = courses["apart"].memory[3]
    assert away["offloaded"] >= size["reference"]
    seen = [d.memory[3] for d in courses["apart"].done if d.call == "ref_inf"]
    assert all(memory["offloaded"] == away["offloaded"] for memory in seen)
    kept = courses["everywhere"].memory[3]
    assert kept["offloaded"] == 0
    assert kept["weights"] > away["weights"]


def held(role: str, plan: str) -> list[Any]:
    graph, parameters = CALLS.graph(), MODELS[role]().parameters
    mesh = homes_of(graph, meshes_of(graph, APART))[role]
    return list(mesh.holding(parameters, 3).values())


def test_the_master_receives_metadata_only() -> None:
    sizes = []
    for most in (8, 50):  # prompts up to six times as long
        calls = replace(CALLS, end=-1, max_new_tokens=4 if most == 8 else 12)
        with start(EVERYWHERE, calls, data=partial(prompts, most=most)) as runtime:
            workers.reset_traffic()
            done = runtime.run(1)
            sizes.append((workers.traffic()["materialised_bytes"], sum(sum(d.tokens) for d in done)))
    (short, few), (long, many) = sizes
    assert many > 2.5 * few
    assert long < 1.05 * short  # sizes and names, however long the texts are


class Leaks(PPOCalls):
    def __call__(self, work: Work) -> Any:
        made, _ = super().__call__(work)
        return made, {"tokens": made["token"][0]}


def test_an_answer_with_data_in_it_is_refused() -> None:
    runtime = start({name: Mesh(Layout(1), (0,)) for name in NAMES}, Leaks())
    with pytest.raises(GuerdonError, match="leave it where it is"):
        runtime.run(1)
    with pytest.raises(UsageError, match="closed"):
        runtime.run(1)


class Dies(PPOCalls):
    def __call__(self, work: Work) -> Any:
        if work.call.name == "critic_inf":
            os._exit(3)
        return super().__call__(work)


def test_a_dataset_without_what_is_read_is_refused() -> None:
    with pytest.raises(UsageError, match="gave no 'prompt' for sequence 0; did you mean 'prompts'"):
        start(
            {name: Mesh(Layout(1), (0,)) for name in NAMES}, data=lambda row: {"prompts": torch.ones(2)}
        ).run(1)


def test_a_worker_that_dies_ends_the_run_with_its_name() -> None:
    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"worker [01] of 'runtime' .* died during 'execute'"):
        start({name: Mesh(Layout(dp=2), (0, 1)) for name in NAMES}, Dies()).run(1)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_ray_gives_the_same_numbers(courses: dict[str, Course], ray_cluster: None, tmp_path: Path) -> None:
    with start(MIXED, backend="ray") as runtime:
        runtime.run(STEPS)
        for role in ("actor", "critic"):
            assert apart(weights(runtime, role, tmp_path), courses["mixed"].weights[role]) < 1e-6


def test_what_was_done_is_a_timeline_like_a_simulated_one(courses: dict[str, Course], tmp_path: Path) -> None:
    graph, places = CALLS.graph(), {}
    for name, mesh in MIXED.items():
        ranks = mesh.members()
        places[name] = DeviceMesh(0, 1, ranks[0], len(ranks)), mesh.layout
    done = courses["mixed"].done
    seen = measured(graph, ExecutionPlan(1, 4, places), done)
    assert seen.total == max(d.end for d in done)
    assert seen.iterations == STEPS
    assert {row.kind for row in seen.rows} == {"generate", "inference", "train", "weights"}
    moves = [row for row in seen.rows if row.kind == "weights" and row.call == "actor_gen"]
    assert len(moves) == 4 * STEPS  # on each rank
    for rank in range(4):  # one thing at a time
        mine = sorted((row.start, row.end) for row in seen.rows if row.meshes[0].first_gpu == rank)
        assert all(before[1] <= after[0] for before, after in pairwise(mine))
    assert seen.peak > 0
    assert seen.draw(tmp_path / "seen.png").stat().st_size > 5000


def test_a_reference_that_follows_is_the_average_of_direct_computation(tmp_path: Path) -> None:
    eta = 0.25
    plan = MIXED | {"ref_inf": Mesh(Layout(dp=1, tp=2), (1, 2))}
    with start(plan, graph=CALLS.graph(average=eta)) as runtime:
        expected = {p.name: MODELS["reference"]().weights(p) for p in MODELS["reference"]().parameters}
        for _ in range(2):
            runtime.run(1)
            actor = weights(runtime, "actor", tmp_path)
            expected = {name: eta * actor[name] + (1 - eta) * expected[name] for name in expected}
        assert apart(weights(runtime, "reference", tmp_path), expected) == 0
        assert apart(actor, expected) > 1e-4


class Naps:
    """Calls that take their time."""

    def optimiser(self, role: str, weights: Any) -> Any: ...

    def __call__(self, work: Work) -> Any:
        time.sleep(0.3)
        return {work.call.outputs[0]: work.rows.columns[work.call.inputs[0]]}, {}


def test_calls_on_disjoint_ranks_run_at_the_same_time_and_others_do_not() -> None:
    graph = DataflowGraph(
        [ModelFunctionCall(name, name, "inference", ("x",), (name + "_y",)) for name in "ab"]
    )
    one = {name: Mesh(Layout(1), (0,)) for name in "ab"}
    models = dict.fromkeys("ab", MODELS["critic"])
    spans = []
    for plan in (one, one | {"b": Mesh(Layout(1), (1,))}):
        with Runtime(graph, plan, models, Naps(), lambda row: {"x": torch.ones(2)}, 2) as runtime:
            a, b = sorted(runtime.run(1), key=lambda done: done.call)
            spans.append((a.start, a.end, b.start, b.end))
    (_, a_end, b_start, _), _ = spans
    assert b_start >= a_end
    _, (a_start, a_end, b_start, b_end) = spans
    assert min(a_end, b_end) - max(a_start, b_start) > 0.15


def test_data_are_sent_before_those_who_have_them_go_on_to_something_else() -> None:
    """Two calls read what a third made on rank 0; the one on rank 1 does not wait for the one on rank 0."""
    graph = DataflowGraph(
        [
            ModelFunctionCall("make", "a", "inference", ("x",), ("y",)),
            ModelFunctionCall("here", "a", "inference", ("y",), ("z",)),
            ModelFunctionCall("there", "b", "inference", ("y",), ("w",)),
        ]
    )
    plan = {name: Mesh(Layout(1), (int(name == "there"),)) for name in ("make", "here", "there")}
    models = dict.fromkeys("ab", MODELS["critic"])
    with Runtime(graph, plan, models, Naps(), lambda row: {"x": torch.ones(2)}, 2) as runtime:
        done = {one.call: one for one in runtime.run(1)}
    assert done["there"].start - done["make"].end < 0.15
    assert min(d.end for d in (done["here"], done["there"])) - done["there"].ready > 0.15
    assert done["there"].data_bytes == done["there"].planned_bytes == 2 * 8


class Likes(PPOCalls):
    """The judge likes small tokens, and judges every answer."""

    def __call__(self, work: Work) -> Any:
        made, told = super().__call__(work)
        if work.call.kind == "generate":
            made["ended"] = [torch.ones(1, dtype=torch.bool) for _ in made["ended"]]
        if work.call.name == "rew_inf":
            pairs = zip(work.rows.columns["token"], work.rows.columns["answer"], strict=True)
            made["score"] = [(token[answer] < 12).float().mean().reshape(1) for token, answer in pairs]
            told = {"score": float(torch.cat(made["score"]).mean())}
        return made, told


def test_the_six_calls_learn() -> None:
    calls = Likes(kl=0.0, minibatches=2, end=-1, max_new_tokens=4, lr=3e-3, critic_lr=3e-3)
    with start({name: Mesh(Layout(1), (0,)) for name in NAMES}, calls) as runtime:
        score = [done.metrics["score"] for done in runtime.run(30) if done.call == "rew_inf"]
    assert sum(score[:5]) / 5 < 0.65
    assert sum(score[-5:]) / 5 > 0.9


# --- without processes --------------------------------------------------------------------------------------


def test_plans_become_ranks_and_homes() -> None:
    graph = CALLS.graph()
    whole, half = (DeviceMesh(0, 1, 0, 4), Layout(2, 1, 2)), (DeviceMesh(0, 1, 2, 2), Layout(1, 2))
    places = {name: half if name in ("ref_inf", "critic_train") else whole for name in NAMES}
    meshes = meshes_of(graph, ExecutionPlan(1, 4, places))
    assert meshes["ref_inf"] == Mesh(Layout(1, 2), (2, 3))
    homes = homes_of(graph, meshes)
    assert homes["critic"] == Mesh(Layout(1, 2), (2, 3))
    assert homes["actor"] == Mesh(Layout(2, 1, 2), ALL)
    assert homes["reference"] == meshes["ref_inf"]


def test_what_cannot_be_run_is_refused() -> None:
    graph = CALLS.graph()
    with pytest.raises(UsageError, match="no place for the call 'critic_train'"):
        meshes_of(graph, {name: EVERYWHERE[name] for name in NAMES[:-1]})
    judge = DataflowGraph([ModelFunctionCall("judge", "human", "feedback", ("x",), ("y",))])
    with pytest.raises(UsageError, match="not work of a model"):
        meshes_of(judge, EVERYWHERE)
    guided = DataflowGraph([ModelFunctionCall("a", "actor", "train", ("x",), (), uses=("critic",))])
    with pytest.raises(UsageError, match="also reads the weights of critic"):
        meshes_of(guided, {"a": Mesh(Layout(1), (0,))})
    twice = [ModelFunctionCall(n, "actor", "train", ("x",), ()) for n in ("first", "second")]
    meshes = {"first": Mesh(Layout(1), (0,)), "second": Mesh(Layout(1), (1,))}
    with pytest.raises(UsageError, match="different places"):
        homes_of(DataflowGraph(twice), meshes)
    away = replace(graph["actor_train"], post=(Offload("actor"),))
    with pytest.raises(UsageError, match="optimiser needs"):
        homes_of(DataflowGraph([*graph.calls[:4], away, graph.calls[5]]), EVERYWHERE)
    with pytest.raises(UsageError, match="nobody says what model 'reward' is"):
        Runtime(graph, EVERYWHERE, {k: v for k, v in MODELS.items() if k != "reward"}, CALLS, prompts, 4)
    with pytest.raises(UsageError, match="cannot be offloaded"):
        start(EVERYWHERE, offload=["critic"])


def test_a_role_that_only_follows_lives_with_the_one_it_follows() -> None:
    call = ModelFunctionCall(
        "train", "actor", "train", ("x",), (), post=(ParamRealloc("actor", "mean", 0.1),)
    )
    mesh = Mesh(Layout(1), (2,))
    assert homes_of(DataflowGraph([call]), {"train": mesh})["mean"] == mesh


def test_micro_batches_that_take_turns_give_the_same_answers() -> None:
    part = ModelPart.alone(gpt(None, 1))
    texts = [prompts(row)["prompt"].tolist() for row in range(5)]
    seeds = torch.arange(5)
    one, three = (
        generate(part.model, texts, seeds, end=0, max_new_tokens=10, micro_batches=m) for m in (1, 3)
    )
    assert torch.equal(one.mask, three.mask)
    assert torch.equal(one.token * one.mask, three.token * three.mask)
    torch.testing.assert_close(one.log_prob, three.log_prob)


def test_rewards_and_advantages_are_those_of_the_definition() -> None:
    calls = PPOCalls(kl=0.5, gamma=0.9, lam=0.8, reward_clip=2.0)
    generator = torch.Generator().manual_seed(0)

    def row(prompt: int, answer: int, score: float, ended: bool) -> dict[str, Tensor]:
        n = prompt + answer
        numbers = {
            k: torch.randn(n, generator=generator) for k in ("log_prob", "reference_log_prob", "value")
        }
        return numbers | {
            "token": torch.ones(n, dtype=torch.long),
            "answer": torch.arange(n) >= prompt,
            "score": torch.tensor([score]),
            "ended": torch.tensor([ended]),
        }

    rows = [row(3, 4, 5.0, True), row(2, 6, 1.0, False), row(1, 1, -0.5, True)]
    columns = {key: [r[key] for r in rows] for key in rows[0]}
    batch = calls._credit(Rows([0, 1, 2], columns))
    for i, r in enumerate(rows):
        first = int((~r["answer"]).sum())
        reward = [
            0.5 * float(r["reference_log_prob"][t] - r["log_prob"][t]) for t in range(first, len(r["token"]))
        ]
        if r["ended"]:  # clipped; an answer that was cut is not judged
            reward[-1] += max(-2.0, min(2.0, float(r["score"])))
        states = r["value"][first - 1 :].tolist()
        if r["ended"]:
            states[-1] = 0.0
        advantage, expected = 0.0, []
        for t in reversed(range(len(reward))):
            advantage = reward[t] + 0.9 * states[t + 1] - states[t] + 0.9 * 0.8 * advantage
            expected.append(advantage)
        found = batch["advantage"][i, first : len(r["token"])]
        torch.testing.assert_close(found, torch.tensor(expected[::-1]))
        assert not batch["advantage"][i, :first].any()
        targets = batch["target"][i, first : len(r["token"])]
        torch.testing.assert_close(targets, found + r["value"][first - 1 : -1])
