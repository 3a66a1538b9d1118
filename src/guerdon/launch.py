"""From names to a run: brings a method, a task and an engine together, trains, measures, reports.

`train` is what ``guerdon train`` calls, `resume` continues an interrupted run, `load` gives back a trained
policy.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from guerdon import catalog, tasks
from guerdon.batch import Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.errors import (
    CheckpointError,
    GuerdonError,
    NonFiniteError,
    StorageError,
    UsageError,
    nearest,
)
from guerdon.experience.base import wants_groups
from guerdon.experience.recomputed import Recomputed
from guerdon.feedback.base import Feedback, compare
from guerdon.feedback.functions import MixedReward
from guerdon.policies.language import is_language_model
from guerdon.roles import Role
from guerdon.run import Run
from guerdon.run.checkpoint import load_newest
from guerdon.run.config import read_config
from guerdon.tasks.base import Measured, Pieces, Task
from guerdon.tasks.control import Control

ENGINES = ("local", "ray")


class Engine(Protocol):
    """Where roles run."""

    def role(
        self, name: str, model: Any, optimiser: Any = None, settings: Any = None, **changes: Any
    ) -> Role: ...

    def describe(self) -> dict[str, Any]: ...

    def close(self) -> None: ...


@runtime_checkable
class RemoteEngine(Protocol):
    """One whose workers have something to say: each in a file of its own, the engine in the run's display."""

    note: Callable[[str], None]

    def log_to(self, folder: str | Path) -> None: ...


@dataclass
class Result:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        before, after: figures on the same prompts and noise, ``reward`` among them.
        pictures: what was drawn, the most telling first.
        actor: the trained role.
        seconds: training time, measuring excluded.
    """

    folder: Path
    before: dict[str, float]
    after: dict[str, float]
    pictures: list[str]
    actor: Role = field(repr=False)
    seconds: float = 0.0


# --- resolving names --------------------------------------------------------------------------------------


def method_class(slug: str) -> type:
    """The class of a method in the catalog. Raises `UsageError` for an unknown or a planned one."""
    system = catalog.find(slug)
    if system.family == "study":
        raise UsageError(
            f"'{system.slug}' is no method of its own ({system.summary}); see guerdon reproduce {system.slug}"
        )
    if system.family == "engine":
        raise UsageError(
            f"'{system.slug}' is a way to run methods, not one of them: guerdon train METHOD --engine ray"
        )
    if system.status != "ready" or system.method is None or system.cls is None:
        ready = ", ".join(s.slug for s in catalog.systems(status="ready") if s.cls is not None)
        raise UsageError(f"'{system.slug}' is planned, not built yet; ready: {ready}")
    return getattr(importlib.import_module(system.method), system.cls)


def default_task(slug: str) -> str:
    """The task that ``guerdon train METHOD`` uses when none is named: the one that the method calls its ``home``, or the
    first that fits its policies and supplies what it learns from."""
    home = getattr(method_class(slug), "home", None)
    if home is not None:
        return str(home)
    fitting = tasks.with_kind(catalog.find(slug).policies)
    if not fitting:
        raise UsageError(f"no task fits '{slug}' yet")
    wanted = learns_from(method_class(slug))
    return next((name for name in fitting if wanted <= set(tasks.find(name).supplies)), fitting[0])


RECORDED = ("preferences", "demonstrations", "rated")
"""Parameters of a method's ``train`` that ask for recorded data."""


def learns_from(method: Any) -> set[str]:
    """What a task must supply for a method: parameters of its ``train`` without a default, roles left out."""
    parameters = inspect.signature(method.train).parameters.values()
    return {p.name for p in parameters if p.name in RECORDED and p.default is p.empty}


def task_for(slug: str, pieces: Pieces) -> str:
    """The task for these pieces when none is named."""
    if pieces.env is not None:
        return "control"
    kinds = catalog.find(slug).policies
    own = pieces.data is not None or (pieces.model is not None and is_language_model(pieces.model))
    if "language" in kinds and (own or (pieces.model is not None and set(kinds) <= _OF_TEXT)):
        return "text"
    return default_task(slug)


_OF_TEXT = {"language", "reward_model", "tabular"}


def method_for(slug: str, task: str, pieces: Pieces | None = None, **options: Any) -> Any:
    """A method with its published defaults, the task's recipe over them, and ``options`` over both. A recipe
    suits the model that the task ships; with a model of the user's (in ``pieces``) the published defaults stand.

    Raises `UsageError` for an option that the method does not have, with the nearest name.
    """
    cls = method_class(slug)
    names = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in names:
            raise UsageError(f"'{slug}' has no option '{option}'; {nearest(option, names)}")
    pieces = pieces or Pieces()
    recipe = {} if pieces.model is not None else tasks.find(task).recipe(catalog.find(slug).slug, pieces)
    return cls(**{**recipe, **options})


def policy_kind(slug: str, task: str | Task) -> str:
    """The kind of policy that method and task (by name, or made already) agree on. Raises `UsageError` when there
    is none."""
    wanted = catalog.find(slug).policies
    if isinstance(task, Task):
        offered, task = task.policy_kinds(), task.name
    else:
        offered = tasks.TASKS[task][2] if task in tasks.TASKS else tasks.find(task).kinds
    for kind in offered:
        if kind in wanted:
            return kind
    fitting = ", ".join(tasks.with_kind(wanted)) or "none yet"
    raise UsageError(
        f"'{slug}' trains a {' or '.join(wanted)} policy, but task '{task}' has {' and '.join(offered)}; "
        f"tasks that fit: {fitting}"
    )


# --- putting the pieces together --------------------------------------------------------------------------


class _Monitored:
    """A judge that also logs what the task watches beside the reward."""

    def __init__(self, feedback: Feedback, task: Task, log: Callable[..., None]) -> None:
        self.feedback, self.task, self.log = feedback, task, log
        self.name = feedback.name

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        return compare(self.feedback, a, b)

    def score(self, traj: Trajectories) -> Tensor:
        score = self.feedback.score(traj)
        watched: dict[str, Any] = dict(self.task.monitor(traj))
        if isinstance(self.feedback, MixedReward):
            watched |= {f"reward_{name}": value for name, value in self.feedback.parts.items()}
        self.log(**watched)
        return score


@dataclass
class Assembly:
    """A method, a task and the roles, ready to train or to answer."""

    method: Any
    task: Task
    engine: Engine
    roles: dict[str, Role]
    feedback: Feedback
    kind: str
    data: dict[str, Any]
    cost: Feedback | None = None

    @property
    def trained(self) -> Role:
        """The role that the run is about: the actor, or of methods that only judge or predict, the reward model or
        the critic."""
        return next(self.roles[name] for name in ("actor", "reward", "critic") if name in self.roles)

    def measure(self) -> Measured:
        """What the task measures of the actor, or of a judge; nothing without either."""
        if "actor" not in self.roles:
            judge = self.roles.get("reward")
            return Measured({}, None) if judge is None else self.task.measure_judge(judge)
        found = self.task.measure(self.roles["actor"], self.feedback, **self.sampling)
        if self.cost is not None and found.samples is not None:
            found.figures.setdefault("cost", self.cost.score(found.samples).mean().item())
        return found

    @property
    def sampling(self) -> dict[str, Any]:
        return self.task.sampling(self.method)


def _engine(config: dict[str, Any], roles: Sequence[str], overrides: dict[str, Any]) -> Engine:
    name, device, threads = config["engine"], config["device"], config["threads"]
    if name == "ray":
        from guerdon.engine.ray import RayEngine

        return RayEngine(
            device,
            threads,
            workers=config["workers"],
            placement=config["placement"],
            roles=roles,
            address=config["address"],
            shard=config["shard"],
            others=config["samplers"],
            **overrides,
        )
    if name != "local":
        raise UsageError(f"unknown engine '{name}'; {nearest(name, ENGINES)}")
    return LocalEngine(device, threads, **overrides)


def assemble(
    slug: str, method: Any, task_name: str, pieces: Pieces, engine: Engine, seed: int = 0
) -> Assembly:
    """Task, roles and data for a method, ready to train. Raises `UsageError` for pieces that cannot go together."""
    policy_kind(slug, task_name)
    task = tasks.find(task_name)(pieces, method)
    kind = policy_kind(slug, task)
    feedback = task.feedback()
    settings = method.roles()
    wants = inspect.signature(method.train).parameters
    cost = task.cost() if "cost" in wants else None
    if "reward" in settings and "actor" not in settings:  # what it trains is a judge
        policy = task.policy(kind)
        # one that trains judges of a kind of its own makes them
        make = getattr(method, "judge", task.reward_model)
        models: dict[str, Any] = {"reward": make(policy)}
    elif hasattr(method, "models"):  # it builds its own networks, to fit the environment
        if not isinstance(task, Control) or pieces.model is not None:
            raise UsageError(
                f"'{slug}' builds its own networks for an environment; use --env, without --model"
            )
        models = method.models(task.environments)
    else:
        policy = task.policy(kind)
        if policy.kind not in catalog.find(slug).policies:
            raise UsageError(
                f"'{slug}' trains a {' or '.join(catalog.find(slug).policies)} policy, but the model at "
                f"'{pieces.model}' is a {policy.kind} policy"
            )
        models = {"actor": policy}
        for name in ("critic", "cost_critic"):
            if name in settings and name in wants:
                models[name] = task.critic(policy)
        if "reward" in settings:
            models["reward"] = task.reward_model(policy)
        if getattr(method, "judged", False) and feedback.name == "none":
            raise UsageError(
                f"'{slug}' needs a judge: name one with --reward (file.py:function, or model=PATH)"
            )
    data = {
        name: getattr(task, name)(policy, seed)
        for name, parameter in wants.items()
        if name in RECORDED and is_given(method, task, parameter)
    }
    roles = {name: engine.role(name, model, settings=settings.get(name)) for name, model in models.items()}
    return Assembly(method, task, engine, roles, feedback, kind, data, cost)


def is_given(method: Any, task: Task, parameter: inspect.Parameter) -> bool:
    """Whether a parameter of ``train`` is filled: always where there is no default; else where the task has it and the
    method, as its options are, reads it (``unread`` names what it does not)."""
    if parameter.default is parameter.empty:
        return True
    return parameter.name not in getattr(method, "unread", ()) and task.offers(parameter.name)


def _absolute(pieces: Pieces) -> Pieces:
    """Paths as absolute ones, so that a run can be resumed from another folder."""

    def fix(value: str | None) -> str | None:
        return str(Path(value).resolve()) if value is not None and Path(value).exists() else value

    def judge(spec: str | None) -> str | None:
        if spec is None or ":" not in spec:
            return spec
        terms = []
        for term in spec.split("+"):
            weight, star, name = term.rpartition("*")
            path, colon, function = name.strip().rpartition(":")
            name = f"{fix(path)}{colon}{function}" if colon else name.strip()
            terms.append(f"{weight.strip()}{star}{name}")
        return " + ".join(terms)

    return dataclasses.replace(
        pieces,
        model=fix(pieces.model),
        prompts=fix(pieces.prompts),
        data=fix(pieces.data),
        reward=judge(pieces.reward),
        cost=judge(pieces.cost),
    )


def _free_name(runs: Path, slug: str) -> str:
    taken = {p.name for p in runs.iterdir()} if runs.is_dir() else set()
    return next(name for i in range(1, 100_000) if (name := f"{slug}-{i}") not in taken)


def train(
    method: str | Any,
    task: str | None = None,
    *,
    name: str | None = None,
    runs: str | Path = "runs",
    seed: int = 0,
    model: str | None = None,
    prompts: str | None = None,
    reward: str | Callable[..., Any] | None = None,
    cost: str | None = None,
    env: str | None = None,
    env_options: str | dict[str, Any] | None = None,
    data: str | None = None,
    max_length: int | None = None,
    max_prompt: int | None = None,
    max_new_tokens: int | None = None,
    device: str = "auto",
    engine: str = "local",
    workers: int = 2,
    placement: str = "colocate",
    address: str | None = None,
    shard: bool = False,
    samplers: int = 0,
    threads: int | None = None,
    precision: str | None = None,
    compile: bool | None = None,
    recompute: bool = False,
    log: Sequence[str] = (),
    checkpoint_every: float = 10.0,
    checkpoint_steps: int | None = None,
    progress: bool = True,
    max_seconds: float | None = None,
    until: float | None = None,
    **options: Any,
) -> Result:
    """Train a policy and measure it before and after.

    Args:
        method: slug of a method (``"rlcm"``) with ``options`` of its own, or a method object.
        task: name of a ready problem; the method's default one when None.
        name: the folder under ``runs``; a free one is chosen when None.
        seed: of everything random.
        model, prompts, reward, cost, data: replace the task's own pieces (see `Pieces`); ``reward`` may be a function.
        max_length, max_prompt, max_new_tokens: limits in tokens, for language models (see `Pieces`).
        env: id of a gymnasium environment to train in, with ``env_options`` for it.
        device: "auto", "cpu", "cuda", ...
        engine: where the roles run: "local", in this process, or "ray", in ``workers`` processes here or on the cluster at
            ``address``, placed by ``placement`` (a preset, or a JSON file; see `guerdon.engine.ray.RayEngine`).
        shard: under Ray, keep a part of the weights and of the optimiser's state in each worker (FSDP2).
        samplers: processes that step the environments, each with its share of them; 0 steps them in this process.
        threads: CPU threads; None chooses by the size of the model.
        precision: overrides the roles' setting.
        compile: compile models (True) or not (False). None compiles the whole updates of controllers on the CPU,
            where a C++ compiler is at hand: some twenty seconds the first time, kept on disk, many times faster.
        recompute: compute the log-probabilities of answers again by the model that trains, and log how far the sampler's
            were from them (methods over prompts; `guerdon.experience.recomputed`).
        log: further loggers: "tensorboard", "wandb", "trackio".
        checkpoint_every: seconds between checkpoints; ``checkpoint_steps`` rounds instead, if given.
        progress: show a live progress bar.
        max_seconds: stop after about this many seconds of training, at the end of a round.
        until: stop at the end of the round in which the reward (in environments: the mean return of the last 100
            episodes) reaches this.

    Raises:
        GuerdonError: whatever is wrong with the input, before anything is trained.
        KeyboardInterrupt: stopped by the user, after saving.
    """
    slug = method if isinstance(method, str) else slug_of(method)
    system = catalog.find(slug)
    function = reward if callable(reward) else None
    if isinstance(env_options, dict):
        env_options = json.dumps(env_options)
    own = None if function else reward
    pieces = _absolute(
        Pieces(model, prompts, own, env, env_options, data, max_length, max_prompt, max_new_tokens, cost)  # type: ignore[arg-type]
    )
    task = task or task_for(slug, pieces)
    if isinstance(method, str):
        method = method_for(slug, task, pieces, **options)
    elif options:
        raise UsageError("options go into the method object when one is given")
    folder = Path(runs) / (name or _free_name(Path(runs), system.slug))
    config = {
        "method": system.slug,
        "options": dataclasses.asdict(method),
        "task": task,
        "pieces": dataclasses.asdict(pieces),
        "engine": engine,
        "workers": workers,
        "placement": str(Path(placement).resolve()) if placement.endswith(".json") else placement,
        "address": address,
        "shard": shard,
        "samplers": samplers,
        "device": device,
        "threads": threads,
        "precision": precision,
        "compile": _compiles(method, task, device, engine) if compile is None else compile,
        "recompute": recompute,
        "log": list(log),
        "checkpoint_every": checkpoint_every,
        "checkpoint_steps": checkpoint_steps,
        "max_seconds": max_seconds,
        "until": until,
        "function": getattr(function, "__name__", None),
    }
    return _launch(folder, config, method, seed, progress, function, again=False)


def resume(folder: str | Path, *, progress: bool = True, reward: Callable[..., Any] | None = None) -> Result:
    """Continue the run in ``folder`` from its newest valid checkpoint.

    ``reward`` is needed only where the run was started from Python with a function.
    Raises `CheckpointError` when the folder holds no run.
    """
    content = read_config(folder)
    config = content["config"]
    try:
        method = method_class(config["method"])(**config["options"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/config.json does not describe a run that this version knows: {error}"
        ) from error
    if config.get("function") and reward is None:
        raise UsageError(f"{folder} was trained on the function '{config['function']}'; pass it as reward=")
    return _launch(Path(folder), config, method, content["seed"], progress, reward, again=True)


def slug_of(method: Any) -> str:
    """The slug of a method object. Raises `UsageError` for one that is not in the catalog."""
    for system in catalog.systems():
        if system.cls == type(method).__name__ and system.method == type(method).__module__:
            return system.slug
    raise UsageError(f"{type(method).__name__} is not in the catalog; add a row to guerdon/catalog.py")


def _launch(
    folder: Path,
    config: dict[str, Any],
    method: Any,
    seed: int,
    progress: bool,
    function: Callable[..., Any] | None,
    again: bool,
) -> Result:
    if not again and (folder / "config.json").exists():
        raise UsageError(
            f"{folder} already holds a run; continue it with 'guerdon resume {folder}', or take another --name"
        )
    local = config["engine"] == "local"
    if config.get("compile") and config["task"] == "control" and wants_groups(method):
        raise UsageError(
            f"'{config['method']}' learns from whole episodes, whose batches differ in length and cannot be compiled; leave "
            "out --compile"
        )
    whole = local and config.get("compile") is True and config["task"] == "control"
    overrides = {
        "precision": config.get("precision"),
        "compile": "update" if whole else config.get("compile"),
    }
    engine = _engine(config, [*method.roles(), "reference"], overrides)
    experience: Any = None
    try:
        pieces = Pieces(**config["pieces"])
        with torch.random.fork_rng():
            # fresh weights follow from the seed; the run seeds all else when it begins
            torch.manual_seed(seed)
            parts = assemble(config["method"], method, config["task"], pieces, engine, seed)
        if function is not None:
            from guerdon.feedback.functions import FunctionReward

            parts.feedback = FunctionReward(function)
        parameters = inspect.signature(method.train).parameters
        wants = [p for p in parameters if p != "run"]
        asked = parameters.get("experience")
        acts = asked is not None and is_given(method, parts.task, asked)
        experience = _experience(parts.task, config.get("samplers") or 0, seed, engine) if acts else None
        if config.get("recompute") and getattr(experience, "unit", None) != "trajectory":
            raise UsageError(
                f"'{config['method']}' does not learn from answers to prompts here; leave out --recompute"
            )
        # Measured before the run's folder exists: a judge that fails costs nothing and leaves nothing behind.
        new = not folder.exists()
        before = parts.measure()
        run = Run(
            folder,
            engine=engine,
            seed=seed,
            config=config,
            checkpoint_every=config.get("checkpoint_every") or 10.0,
            checkpoint_steps=config.get("checkpoint_steps"),
            log=config.get("log") or (),
            progress=progress,
            resume=again,
            max_seconds=config.get("max_seconds"),
            until=config.get("until"),
            headline=getattr(method, "headline", "reward"),
        )
        with _nothing_left(folder if new else None), run:
            for elsewhere in (engine, experience):
                if isinstance(elsewhere, RemoteEngine):
                    elsewhere.log_to(folder / "logs")
                    elsewhere.note = run.note
            for name, role in parts.roles.items():
                run.adopt(name, role)
            if experience is not None:
                run.track("experience", experience)
            for data in parts.data.values():
                for note in getattr(data, "notes", ()):
                    run.note(note)
            if again and not getattr(experience, "saveable", True):
                run.note("the environments cannot be saved: they begin new episodes")
            if config.get("recompute"):
                experience = Recomputed(experience, run.log)
            judge = _Monitored(parts.feedback, parts.task, run.log)
            available: dict[str, Any] = {**parts.roles, **parts.data, "feedback": judge, "cost": parts.cost}
            if experience is not None:
                available["experience"] = experience
            start = time.perf_counter()
            method.train(run, **{name: available[name] for name in wants if name in available})
            seconds = time.perf_counter() - start
            after = parts.measure()
            pictures = _finish(folder, parts, before, after)
        return Result(folder, before.figures, after.figures, pictures, parts.trained, seconds)
    finally:
        if hasattr(experience, "close"):
            experience.close()
        engine.close()


def _experience(task: Task, samplers: int, seed: int, engine: Engine) -> Any:
    """Where steps come from: this process, or processes that step environments."""
    if not samplers:
        return task.experience(seed)
    from guerdon.engine.samplers import remote_rollouts

    return remote_rollouts(task, samplers, seed, engine)


def _compiles(method: Any, task: str, device: str, engine: str) -> bool | None:
    """Whether a run compiles its updates when nothing was said. Decided once and written into its config, so that a
    resumed run computes the same numbers."""
    if task != "control" or engine != "local":  # a compiled update is that of one process
        return None
    if wants_groups(method):  # batches as long as their longest episode: each would be compiled anew
        return None
    from guerdon import compiled

    on_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return on_cpu and compiled.available() is None


@contextlib.contextmanager
def _nothing_left(folder: Path | None) -> Iterator[None]:
    """Remove a new run's ``folder`` when it is refused before its first step ended: there is nothing to resume."""
    try:
        yield
    except NonFiniteError:  # the batch that failed is in it
        raise
    except GuerdonError:
        if folder is not None and not read_records(folder):
            shutil.rmtree(folder, ignore_errors=True)
        raise


def _finish(folder: Path, parts: Assembly, before: Measured, after: Measured) -> list[str]:
    """Save the model and the report."""
    try:
        if hasattr(parts.trained.model, "save_pretrained"):
            parts.trained.save(folder / "model")
        records = read_records(folder)
        pictures = parts.task.report(before, after, folder, records)
        pictures += _plots(folder, records)
        summary = {"before": before.figures, "after": after.figures}
        (folder / "result.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write the results of {folder}: {error.strerror or error}") from error
    return pictures


def _plots(folder: Path, records: list[dict[str, Any]]) -> list[str]:
    """Curves of the run, and what the reward cost in prompt accuracy where that was watched."""
    from guerdon.run.plots import against_each_other, curves

    written = []
    shown = "reward" if any("reward" in r for r in records) else "loss"
    records = [r for r in records if shown in r]  # before the first episode has ended there is no reward
    keys = [key for key in (shown, "accuracy") if records and key in records[0]]
    if len(records) > 1 and keys:
        written.append(
            str(curves(records, keys, folder / "curves.png", names={"accuracy": "prompt accuracy"}))
        )
    if keys == ["reward", "accuracy"] and len(records) > 1:
        path = folder / "reward_accuracy.png"
        written.append(
            str(
                against_each_other(records, "reward", "accuracy", path, names={"accuracy": "prompt accuracy"})
            )
        )
    return written


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``; a torn last line is left out."""
    records = []
    path = Path(folder) / "metrics.jsonl"
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                records.append(json.loads(line))
    return records


# --- trained policies -------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A trained policy with the task it was trained on."""

    actor: Role
    task: Task
    feedback: Feedback
    sampling: dict[str, Any]
    step: int


def load(folder: str | Path, *, untrained: bool = False, device: str = "auto") -> Loaded:
    """The policy of the run in ``folder``, at its newest valid checkpoint.

    Args:
        folder: of the run.
        untrained: the policy as it was before training instead.

    Raises `CheckpointError` when the folder holds no run or no usable checkpoint.
    """
    config = read_config(folder)["config"]
    engine = LocalEngine(device, config.get("threads"))
    method = method_class(config["method"])(**config["options"])
    with torch.random.fork_rng():
        seed = read_config(folder)["seed"]
        torch.manual_seed(seed)
        parts = assemble(config["method"], method, config["task"], Pieces(**config["pieces"]), engine, seed)
    step = 0
    if not untrained:
        newest = load_newest(folder)
        if newest is None:
            raise CheckpointError(f"{folder} has no usable checkpoint")
        step, payload = newest
        name = next(name for name, role in parts.roles.items() if role is parts.trained)
        # only answers are wanted: the optimiser's state (compiled runs hold another kind) stays in the file
        parts.trained.load_state_dict({**payload["objects"][name], "optimiser": None})
    return Loaded(parts.trained, parts.task, parts.feedback, parts.sampling, step)


__all__ = ["GuerdonError", "Loaded", "Result", "load", "read_records", "resume", "train"]
