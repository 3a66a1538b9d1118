"""The dataflow graph of any method, read off the method itself: one iteration runs, small, on roles that are watched.

`trace` puts method and task together as `guerdon train` does, lets the method train for one iteration on recording roles
(`guerdon.engine.recording`) and gives back the calls that it made, as a `DataflowGraph`. There is no second description of
a method that could differ from the first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from guerdon import catalog, launch, tasks
from guerdon.engine.graph import DataflowGraph
from guerdon.engine.recorded import graph_of
from guerdon.engine.recording import EnoughError, Recorder, RecordingEngine
from guerdon.engine.watching import Watched, WatchedData, WatchedExperience, WatchedLearner, WatchedStream
from guerdon.errors import GuerdonError, UsageError, nearest
from guerdon.experience.stream import Stream
from guerdon.experience.views import Subset
from guerdon.feedback.base import Feedback
from guerdon.roles import Role
from guerdon.run import Run
from guerdon.run.random_state import random_states, restore_random_states
from guerdon.streaming import Learner
from guerdon.tasks.base import Pieces

if TYPE_CHECKING:
    from rich.table import Table

ROWS = (
    *("samples", "prompts_per_round", "prompts_per_iteration", "validation"),
    *("minibatch", "value_minibatch", "batch_size", "update_batch", "reward_batch", "ptx_batch"),
)
"""Options that count rows: divided by one number they leave a method's calls and minibatches as many as they were."""

WAITING: Mapping[str, Mapping[str, Any]] = {
    "": {"start": 0, "warm_up": 64, "parts": 1, "iterations": 1},
    "a_lol": {"value_epochs": 1, "value_answers": 32, "shown": 0},
    "mdpo_off": {"m": 4},
}
"""Options that only put off or repeat what an iteration does, of all methods ("") and of one, with their values in a trace."""

LEAST, MANY, FEW = 2, 16, 16
"""Rows that a minibatch keeps; how many samples are those of a round, not of a prompt; recorded rows that are kept."""


class TracedRun(Run):
    """A run that makes one step of each loop, in a folder that nobody keeps, and tells the recorder who is who."""

    def __init__(self, folder: Path, recorder: Recorder, engine: Any, seed: int) -> None:
        super().__init__(folder, engine=engine, seed=seed, progress=False)
        self.recorder = recorder

    def steps(self, total: int, what: str = "step") -> Iterator[int]:
        """One step; of a loop over the parts of an iteration, all of them."""
        for step in super().steps(total if what == "part" else min(total, 1), what):
            self.recorder.looping = True
            try:
                yield step
            finally:
                self.recorder.looping = False

    def track(self, name: str, obj: Any) -> Any:
        """As `Run.track`; roles get the name, and what learns and acts outside of roles is watched."""
        if isinstance(obj, Role):
            self.recorder.names[id(obj)] = name
        if isinstance(obj, Stream):
            obj = WatchedStream(self.recorder, obj)
        if isinstance(obj, Learner) and self.recorder.flattened:
            obj = WatchedLearner(self.recorder, obj, self.recorder.flattened[-1])
        return super().track(name, obj)

    def _checkpoint(self) -> None:
        """Nobody resumes a trace."""


def task_of(method: str, policy: str | None = None) -> str:
    """The task on which a method is traced: its default one, or the first that has ``policy`` (a kind: "language").

    Raises `UsageError` for a policy that the method does not train, with those that it does.
    """
    system = catalog.find(method)
    if policy is None:
        return launch.default_task(method)
    if policy not in system.policies:
        raise UsageError(f"'{system.slug}' trains no {policy} policy; {nearest(policy, system.policies)}")
    default = launch.default_task(method)
    if policy in tasks.find(default).kinds:
        return default
    for name in tasks.with_kind((policy,)):
        if launch.learns_from(launch.method_class(method)) <= set(tasks.find(name).supplies):
            return name
    raise UsageError(f"no task traces '{system.slug}' with a {policy} policy")


def trace(
    method: str | Any,
    task: str | None = None,
    *,
    like: str | None = None,
    policy: str | None = None,
    judge: Literal["any", "model"] = "any",
    env: str | None = None,
    reward: str | None = None,
    cost: str | None = None,
    seed: int = 0,
    shrink: bool = True,
    **options: Any,
) -> DataflowGraph:
    """The calls of one iteration of ``method``, what each reads and gives, and how many rows.

    Args:
        method: slug of a ready method, with ``options`` of its own; or a method object, of the catalog or not.
        task: on which it is traced; by default the method's own, or one with a ``policy`` of the kind asked for. Only its
            form counts: the graph of a language model is the same for a tiny one.
        like: the slug of a method whose task and policies suit a method that is not in the catalog.
        judge: "model" draws the judge as a reward model, which takes a place on GPUs; "any" does so where it is one.
        env, reward, cost: as for `guerdon.launch.train`.
        shrink: run with fewer rows (see `ROWS`); the graph says the real numbers.

    Raises `UsageError` for an unknown method, task, policy or option, and whatever the method itself refuses.
    """
    named = isinstance(method, str)
    slug = catalog.find(method).slug if named else like or launch.slug_of(method)
    task = task or (task_of(slug, policy) if env is None else "control")
    pieces = Pieces(reward=reward, env=env, cost=cost)
    if options and not named:
        raise UsageError("options go into the method object when one is given")
    made = launch.method_for(slug, task, pieces, **options) if named else method
    name = slug if named or like is None else type(method).__name__
    if shrink and dataclasses.is_dataclass(made):
        small, factor = _smaller(slug, made, set(options))
        with contextlib.suppress(GuerdonError):  # too small to learn anything from, perhaps
            share = factor * getattr(made, "iterations", 1)
            return graph_of(_record(slug, small, task, pieces, seed, share), name, factor, judge)
    return graph_of(_record(slug, made, task, pieces, seed), name, 1, judge)


def _smaller(slug: str, method: Any, asked: set[str]) -> tuple[Any, int]:
    """The method with fewer rows and no waiting, and by what its rows were divided."""
    names = {f.name for f in dataclasses.fields(method)}
    waiting = {**WAITING[""], **WAITING.get(slug, {})}
    changes = {name: value for name, value in waiting.items() if name in names - asked}
    rows = {name: getattr(method, name) for name in ROWS if getattr(method, name, None)}
    if rows.get("samples", MANY) < MANY:  # of one prompt
        del rows["samples"]
    together = math.gcd(*rows.values()) if rows else 1
    factor = 1
    while together % (factor * 2) == 0 and together // (factor * 2) >= LEAST:
        factor *= 2
    side_by_side = getattr(method, "environments", 1)
    while factor > 1 and "samples" in rows and (rows["samples"] // factor) % side_by_side:
        factor //= 2
    changes |= {name: value // factor for name, value in rows.items()}
    return dataclasses.replace(method, **changes), factor


def _record(slug: str, method: Any, task: str, pieces: Pieces, seed: int, share: int = 1) -> Recorder:
    """Let ``method`` train for an iteration, watched, on one ``share``-th of the recorded data."""
    recorder = Recorder()
    engine = RecordingEngine(recorder)
    spare = torch.Generator()
    states = random_states(spare)
    try:
        with tempfile.TemporaryDirectory(prefix="guerdon-trace-") as folder:
            torch.manual_seed(seed)
            parts = launch.assemble(slug, method, task, pieces, engine, seed)
            asked = inspect.signature(method.train).parameters
            available: dict[str, Any] = dict(parts.roles)
            for name, data in parts.data.items():
                few = Subset(data, torch.arange(min(len(data), max(FEW, len(data) // share))))
                available[name] = WatchedData(recorder, few, name)
            for name, judge in (("feedback", parts.feedback), ("cost", parts.cost)):
                if judge is not None:
                    called = "reward" if name == "feedback" else name
                    available[name] = Watched(recorder, judge, called, _kind_of(judge), _JUDGING)
            if "experience" in asked and launch.is_given(method, parts.task, asked["experience"]):
                experience = parts.task.experience(seed)
                recorder.unit = experience.unit
                if not hasattr(experience, "prompts"):  # answers to prompts are the work of a model
                    actors = [role for name, role in parts.roles.items() if name == "actor"]
                    experience = WatchedExperience(recorder, experience, actors)
                available["experience"] = experience
            with TracedRun(Path(folder) / "run", recorder, engine, seed) as run:
                for name, role in parts.roles.items():
                    run.adopt(name, role)
                with recorder, contextlib.suppress(EnoughError):
                    method.train(run, **{name: available[name] for name in asked if name in available})
    finally:
        restore_random_states(states, spare)
        engine.close()
    return recorder


_JUDGING = {"score": "score", "compare": "preference"}


def _kind_of(judge: Feedback) -> Literal["inference", "feedback"]:
    """A judge with weights takes a place on GPUs; a function does not."""
    held = [judge, *vars(judge).values()] if hasattr(judge, "__dict__") else [judge]
    return "inference" if any(isinstance(part, (nn.Module, Role)) for part in held) else "feedback"


# --- what ``guerdon plan`` says -----------------------------------------------------------------------------


def for_batch(graph: DataflowGraph, rows: int) -> DataflowGraph:
    """``graph`` with ``rows`` answers an iteration: all calls grow as the first that generates does (or, where none does, the
    first that trains). Rows stay multiples of a call's minibatches. Raises `UsageError` for fewer than one row."""
    if rows < 1:
        raise UsageError(f"an iteration has at least one row, not {rows}")
    first = [
        call
        for kind in ("generate", "train")
        for call in graph.order()
        if call.kind == kind and call.sequences
    ]
    if not first:
        return graph
    scale = rows / (first[0].sequences or 1)
    calls = []
    for call in graph.calls:
        if call.sequences and call.kind != "experience":
            updates = call.minibatches
            call = dataclasses.replace(
                call, sequences=max(1, round(call.sequences * scale / updates)) * updates
            )
        calls.append(call)
    return DataflowGraph(calls, graph.name)


def table(graph: DataflowGraph) -> Table:
    """A row a call: what it does, how much, what it waits for, and whose weights it changes."""
    from rich.table import Table

    found = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in ("call", "kind", "rows", "updates", "waits for", "changes"):
        found.add_column(column, justify="right" if column in ("rows", "updates") else "left")
    for call in graph.order():
        waits = [
            *graph.parents(call.name),
            *(e.source + " (before)" for e in graph.version_edges if e.target == call.name),
        ]
        found.add_row(
            call.name,
            call.kind,
            f"{call.sequences:,}" if call.sequences else "",
            str(call.minibatches) if call.kind == "train" else "",
            ", ".join(waits) or "nothing",
            ", ".join(call.weights_changed),
        )
    return found


def main(method: str, options: Any) -> int:
    """``guerdon plan METHOD``: the calls of an iteration as a table; ``--draw FILE``, the picture; ``--actor SIZE``, a plan for
    them on a cluster (`guerdon.engine.planning_report`)."""
    from rich.console import Console

    console = Console()
    given = {name: getattr(options, name) for name in ("task", "policy", "env", "reward", "cost")}
    if options.actor is not None and given["policy"] is None and "language" in catalog.find(method).policies:
        given["policy"] = "language"
    reward = None
    if options.actor is not None:
        reward = options.critic if options.reward_model is None else options.reward_model
        reward = None if reward == "none" else reward
        given["judge"] = "any" if reward is None else "model"
    graph = trace(method, **given)
    if options.draw:
        console.print(f"graph: {graph.draw(options.draw)}", highlight=False)
    if options.actor is None:
        console.print(table(graph))
        return 0
    if any(call.kind == "experience" for call in graph.calls):
        raise UsageError(
            f"'{graph.name}' acts in environments here, and a plan is for calls on language models; leave out --actor"
        )
    from guerdon.engine.planning_report import plan_command

    names = ("actor", "critic", "cluster", "batch", "prompt", "response", "seconds", "seed", "offload", "out")
    settings = {name: getattr(options, name) for name in names}
    settings |= {
        "reward": None if reward == "none" else reward,
        "timeline_path": options.timeline,
        "minibatches": 1,
    }
    plan_command(for_batch(graph, options.batch), console, **settings)
    return 0
