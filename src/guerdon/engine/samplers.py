"""Environments that step in worker processes, behind the interface of `Rollouts`.

Each sampler is a process with a share of the environments and a copy of the controller, which acts for as many steps as
a round has without asking anybody. The weights come with the call: by reference from the workers that train the actor,
or from this process where the actor lives here. What the samplers bring back is put together in the order of their
numbers, so it depends on the seed and on how many there are, and not on who was first.

    experience = RemoteRollouts(partial(make, "CartPole-v1"), n=8, samplers=2, seed=0, backend="ray")
    traj = experience.collect(actor, 512)

A sampler that dies is replaced, and its share of the round is done again: steps count when the whole share is here.
What belongs to all environments together stays in this process: statistics of observations and returns, the replay, and
the count of steps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.engine.pools import ResourcePool
from guerdon.engine.remote import RemoteRole
from guerdon.engine.role_worker import whole_state
from guerdon.engine.rows import even_sizes
from guerdon.engine.workers import Future, Worker, WorkerError, WorkerGroup, register
from guerdon.errors import CheckpointError, UsageError
from guerdon.experience.base import wants_groups
from guerdon.experience.environments import Environments, make
from guerdon.experience.replay import Replay
from guerdon.experience.rollouts import Rollouts, at
from guerdon.randomness import mix
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.control import Control

MakeEnvironments = Callable[[int, int], Environments]  # (how many, seed)


# --- in the samplers --------------------------------------------------------------------------------------


@dataclass
class Share:
    """What one sampler has to say after its part of a round.

    Attributes:
        value: what was asked for: trajectories, or arrays of transitions, or observations.
        observation: of its environments, to act on next.
        finished: (return, length) of the episodes that ended.
        state: `Rollouts.state_dict` after the round; from it another process can go on.
    """

    value: Any
    observation: Any
    finished: list[tuple[float, int]]
    state: dict[str, Any]


class SamplerWorker(Worker):
    """A process that acts in ``n`` environments of its own.

    Args:
        environments: makes them, from their number and a seed.
        n: how many.
        seed: of the environments and of the actions.
        threads: CPU threads for tensor work.
    """

    def __init__(self, environments: MakeEnvironments, n: int, seed: int, threads: int = 1) -> None:
        if self.context.backend != "inline":
            torch.set_num_threads(threads)
        self._make = lambda: Rollouts(environments(n, seed), seed=seed, warm_up=0)
        self.rollouts = self._make()
        self.actor: Role | None = None

    @register(execute="rank_zero")
    def describe(self) -> dict[str, Any]:
        """What the environments are."""
        env = self.rollouts.environments
        names = ("id", "backend", "observation_space", "action_space", "saveable")
        return {name: getattr(env, name) for name in names}

    @register()
    def take(self, model: nn.Module, settings: RoleSettings) -> None:
        """Take over a controller; its weights come with each call."""
        self.actor = Role("actor", model, settings)

    @register()
    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on where ``state`` was reported; None begins anew."""
        if state is None:
            self.rollouts.environments.close()
            self.rollouts = self._make()
        else:
            self.rollouts.load_state_dict(self._apart(state))

    @register(execute="rank_zero", blocking=False)
    def warm_up(self, steps: int) -> Share:
        """``steps`` random steps in each environment, for statistics; then new episodes. The value: observations."""
        return self._share(self.rollouts.random_observations(steps))

    @register(execute="rank_zero", blocking=False)
    def collect(self, steps: int, weights: Any, version: int, knobs: dict[str, Any]) -> Share:
        """``steps`` steps in each environment, as trajectories with the rewards as they came."""
        actor = self._newest(weights, version, knobs)
        traj = self.rollouts.collect(actor, steps * self.rollouts.environments.n)
        self.rollouts._fresh = None  # statistics are taken where all trajectories are
        return self._share(traj)

    @register(execute="rank_zero", blocking=False)
    def advance(self, steps: int, weights: Any, version: int | None, knobs: dict[str, Any]) -> Share:
        """``steps`` steps in each environment (random ones without a ``version``), as arrays ``[steps, n, ...]``."""
        actor = None if version is None else self._newest(weights, version, knobs)
        kept: Any = _Kept()
        self.rollouts.advance(actor, steps, into=kept)
        return self._share(tuple(_stack(values) for values in zip(*kept.rows, strict=True)))

    def _newest(self, weights: Any, version: int, knobs: dict[str, Any]) -> Role:
        assert self.actor is not None
        state = weights[0] if isinstance(weights, list) else weights  # of several workers, the first has them
        self.actor.load_state_dict({**state, "optimiser": None})
        self.actor.updates = version
        for name, value in knobs.items():
            setattr(self.actor.model, name, value)
        return self.actor

    def _share(self, value: Any) -> Share:
        env = self.rollouts.environments
        finished = env.finished()
        return Share(value, self._apart(env.observation), finished, self._apart(self.rollouts.state_dict()))

    def _apart(self, value: Any) -> Any:
        """In memory of its own, also where nothing is sent."""
        return copy.deepcopy(value) if self.context.backend == "inline" else value


class _Kept:
    """Stands where `Rollouts.advance` has a replay: keeps what it is given."""

    def __init__(self) -> None:
        self.rows: list[tuple[Any, ...]] = []

    def add(self, *row: Any) -> None:
        self.rows.append(tuple(copy.deepcopy(value) for value in row))  # environments may use arrays again


def _stack(values: tuple[Any, ...]) -> Any:
    if isinstance(values[0], dict):
        return {name: np.stack([value[name] for value in values]) for name in values[0]}
    return np.stack(values)


# --- in the process of the method -------------------------------------------------------------------------


@dataclass
class _Sampler:
    """One of them, as this process knows it: the environments ``first`` to ``stop`` are its share."""

    index: int
    first: int
    stop: int
    pool: ResourcePool
    group: WorkerGroup
    state: dict[str, Any] | None = None  # as last reported
    in_step: bool = True  # whether it stands there
    has_actor: bool = False

    @property
    def rows(self) -> slice:
        return slice(self.first, self.stop)


class RemoteEnvironments:
    """The environments of all samplers, as far as they can be seen from here: their number, spaces, present
    observations and finished episodes. They are not stepped from here. Made by `RemoteRollouts`.

    Attributes:
        observation: the present ones ``[n, ...]``; None before the first round, and after a checkpoint was loaded.
        saveable: whether a resumed run (or a sampler that takes the place of another) goes on in the middle of its
            episodes.
        deaths: samplers that were replaced.
        notes: what happened to samplers.
        note: who is told at once.
    """

    def __init__(
        self,
        environments: MakeEnvironments,
        n: int,
        samplers: int,
        seed: int,
        backend: str,
        restarts: int,
        patience: float,
        threads: int,
        cpus: float,
    ) -> None:
        if samplers < 1:
            raise UsageError(f"samplers is {samplers}; it must be at least 1")
        if n < samplers:
            raise UsageError(
                f"{n} environments cannot be shared among {samplers} samplers; take --environments {samplers} or more"
            )
        self.n, self.seed = n, seed
        self.restarts, self.patience = restarts, patience
        self.observation: Any = None
        self.deaths = 0
        self.notes: list[str] = []
        self.note: Callable[[str], None] = lambda text: None  # a run takes it over
        self._environments, self._backend, self._threads = environments, backend, threads
        self._finished: list[tuple[float, int]] = []
        self._broken_off: list[slice] = []  # rows whose episodes ended with their sampler
        self._actor: weakref.ref[Role] | None = None
        self._twin: tuple[nn.Module, RoleSettings] | None = None
        self._logs: Path | None = None
        self._samplers: list[_Sampler] = []
        try:
            self._start_all(even_sizes(n, samplers), cpus)
            said = self._samplers[0].group.call("describe")
        except BaseException:
            self.close()
            raise
        self.id, self.backend, self.saveable = said["id"], said["backend"], said["saveable"]
        self.observation_space, self.action_space = said["observation_space"], said["action_space"]

    def _start_all(self, sizes: list[int], cpus: float) -> None:
        # Ray takes seconds for each, and can start all at once
        with ThreadPoolExecutor(len(sizes) if self._backend == "ray" else 1) as starters:
            pools = [ResourcePool([1], cpus=cpus, name=f"sampler-{index}") for index in range(len(sizes))]
            started = [
                starters.submit(self._start, index, size, pools[index]) for index, size in enumerate(sizes)
            ]
        errors, first = [], 0
        for index, (size, future) in enumerate(zip(sizes, started, strict=True)):
            if (error := future.exception()) is None:
                self._samplers.append(_Sampler(index, first, first + size, pools[index], future.result()))
            else:
                errors.append(error)
            first += size
        if errors:
            raise errors[0]

    def _start(self, index: int, size: int, pool: ResourcePool) -> WorkerGroup:
        # the first has the seed itself: alone it does what a process without samplers does
        seed = self.seed if index == 0 else mix(self.seed, 0x5A3, index)
        arguments = (self._environments, size, seed, self._threads)
        group = WorkerGroup(pool, SamplerWorker, *arguments, backend=self._backend, name=pool.name)
        group.watch(self.patience)
        if self._logs is not None:
            group.log_to(self._logs)
        return group

    # -- rounds --------------------------------------------------------------------------------------------

    def ask(self, verb: str, actor: Role | None, *arguments: Any) -> list[Any]:
        """Have every sampler do ``verb`` (with the newest weights of ``actor``, if there is one) and return what they
        bring, in the order of their numbers. All of it counts, or nothing.

        Raises:
            WorkerError: more samplers died than are replaced, or the workers that have the weights did.
            Exception: what an environment raised.
        """
        weights = None
        if actor is not None:
            self._introduce(actor)
            weights = _weights(actor)
            arguments = (*arguments, weights, actor.updates, _knobs(_mirror(actor).model))
        call = (verb, *arguments)
        try:
            asked = [self._asked(sampler, call) for sampler in self._samplers]
            shares = [
                self._answer(sampler, call, future, weights)
                for sampler, future in zip(self._samplers, asked, strict=True)
            ]
        except BaseException:
            for sampler in self._samplers:  # some may have gone on: the next round begins where this one did
                sampler.in_step = False
            raise
        for sampler, share in zip(self._samplers, shares, strict=True):
            sampler.state = share.state
            self._finished += share.finished
        self.observation = _beside([share.observation for share in shares])
        return [share.value for share in shares]

    def _asked(self, sampler: _Sampler, call: tuple[Any, ...]) -> Future | None:
        """The answer to come; None where the sampler is dead."""
        try:
            if not sampler.in_step:
                sampler.group.call("restore", sampler.state)
                sampler.in_step = True
            if not sampler.has_actor and self._twin is not None:
                sampler.group.call("take", *self._twin)
                sampler.has_actor = True
            return sampler.group.call(*call)
        except WorkerError:
            if sampler.group._broken is None:
                raise
            return None

    def _answer(self, sampler: _Sampler, call: tuple[Any, ...], future: Future | None, weights: Any) -> Share:
        while True:
            try:
                if future is not None:
                    return future.get()
            except WorkerError:
                if sampler.group._broken is None:  # it lives: what it was asked to do failed
                    raise
            if isinstance(weights, Future):
                weights.get()  # if those who train died, that is what is wrong
            self._replace(sampler)
            future = self._asked(sampler, call)

    def _replace(self, sampler: _Sampler) -> None:
        """A fresh process in place of a dead sampler. Raises `WorkerError` when that was done too often."""
        dead = sampler.group
        error: WorkerError | None = dead._broken
        while True:
            self.deaths += 1
            what = str(error).removesuffix("; the group was ended")
            if self.deaths > self.restarts:
                raise WorkerError(
                    f"{what}; {self.deaths} samplers have died, and no more than {self.restarts} are replaced"
                ) from error
            try:
                # before the old one is closed, so that nobody else takes its place on the cluster
                sampler.group = self._start(sampler.index, sampler.stop - sampler.first, sampler.pool)
                break
            except WorkerError as another:
                error = another
        dead.close()
        sampler.has_actor = False
        sampler.in_step = sampler.state is None
        how = "from where it stood before the round"
        if sampler.state is not None and not self.saveable:
            how = "in new episodes"
            self._broken_off.append(sampler.rows)
        self._tell(f"{what}; a new process does its share of the round again, {how}")

    def _tell(self, text: str) -> None:
        self.notes.append(text)
        self.note(text)

    def _introduce(self, actor: Role) -> None:
        """See that the samplers have a copy of this controller, or will have one before they act."""
        if self._actor is not None and self._actor() is actor:
            return
        mirror = _mirror(actor)
        model: Any = copy.deepcopy(mirror.model)
        if hasattr(model, "_acting"):
            model._acting = None  # functions on the memory of the original
        self._twin = model.cpu(), replace(mirror.settings, optimiser=None, compile=False)
        self._actor = weakref.ref(actor)
        for sampler in self._samplers:
            sampler.has_actor = False

    # -- what `Environments` has too -----------------------------------------------------------------------

    def broken_off(self) -> list[slice]:
        """Rows whose episodes were lost with their sampler since this was last asked."""
        rows, self._broken_off = self._broken_off, []
        return rows

    def finished(self) -> list[tuple[float, int]]:
        """``(return, length)`` of every episode that ended since this was last asked, sampler by sampler."""
        finished, self._finished = self._finished, []
        return finished

    @property
    def env(self) -> Any:
        """Not here. Raises `UsageError`."""
        raise UsageError(
            f"{self.id} steps in samplers, but this method steps environments itself; leave out --samplers"
        )

    def reset(self) -> Any:
        """Not from here. Raises `UsageError`."""
        return self.env

    def step(self, action: Any) -> Any:
        """Not from here. Raises `UsageError`."""
        return self.env

    def log_to(self, folder: str | Path) -> None:
        """Write what the samplers print to ``folder/sampler-I-0.log``."""
        self._logs = Path(folder)
        for sampler in self._samplers:
            sampler.group.log_to(folder)

    def close(self) -> None:
        """End the samplers."""
        for sampler in self._samplers:
            sampler.group.close()

    def state_dict(self) -> dict[str, Any]:
        """Where each sampler stands after the last whole round."""
        return {
            "id": self.id,
            "n": self.n,
            "samplers": [sampler.state for sampler in self._samplers],
            "finished": [list(episode) for episode in self._finished],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; the samplers hear of it with the next round.

        Raises:
            CheckpointError: the state is of other environments, or of another number of samplers.
        """
        samplers = state.get("samplers")
        here = (self.id, self.n, len(self._samplers))
        if samplers is None or (state["id"], state["n"], len(samplers)) != here:
            there = f"{state['n']} x {state['id']} in {len(samplers) if samplers is not None else 0} samplers"
            raise CheckpointError(
                f"The checkpoint holds {there}, and this run has {here[1]} x {here[0]} in {here[2]}; resume it with the "
                "same environments and samplers."
            )
        self._finished = [(value, length) for value, length in state["finished"]]
        self.observation = None
        for sampler, held in zip(self._samplers, samplers, strict=True):
            sampler.state, sampler.in_step = held, False


class RemoteRollouts(Rollouts):
    """`Rollouts` in worker processes: the same verbs and figures, so that a method cannot tell the difference.

    With one sampler the steps are those of `Rollouts` with the same seed. With more, each draws from a seed of its own,
    and what several environments share (running statistics) is still shared by all of them.

    Args:
        environments: makes environments, from their number and a seed; it is sent to the samplers.
        n: environments in all.
        samplers: processes; each gets as many environments, or one more.
        seed, scale_reward, reward_clip, warm_up: as for `Rollouts`.
        backend: of the samplers: "inline", "process" or "ray".
        restarts: samplers that are replaced when they die, in the whole run; the next death ends it.
        patience: seconds after which a sampler that does not answer counts as dead.
        threads: CPU threads of each for tensor work.
        cpus: what Ray sets aside for each.

    Raises:
        UsageError: fewer environments than samplers, or environments that cannot be made.
    """

    environments: Any

    def __init__(
        self,
        environments: MakeEnvironments,
        n: int,
        samplers: int = 2,
        seed: int = 0,
        scale_reward: float | None = None,
        reward_clip: float | None = 10.0,
        warm_up: int = 1000,
        *,
        backend: str = "process",
        restarts: int = 3,
        patience: float = 30.0,
        threads: int = 1,
        cpus: float = 1.0,
    ) -> None:
        there: Any = RemoteEnvironments(
            environments, n, samplers, seed, backend, restarts, patience, threads, cpus
        )
        super().__init__(there, seed, scale_reward, reward_clip, warm_up)

    def collect(self, actor: Role, n: int, group_size: int | None = None) -> Trajectories:
        """See `Rollouts.collect`. Log-probabilities are those that the samplers' copies give, and ``version`` says whose
        they are."""
        steps = self._steps_each(n, group_size)
        self._take_statistics(actor)
        traj = _joined(self.environments.ask("collect", actor, steps))
        self.taken += n
        self._begin_again()
        if self.scaler is not None:  # by one deviation for all, as it was at each step
            assert traj.reward is not None
            assert traj.terminated is not None
            assert traj.truncated is not None
            ended = (traj.terminated | traj.truncated).numpy().T
            traj.reward = torch.from_numpy(self._scaled(traj.reward.numpy().T, ended)).transpose(0, 1)
        if self._normalises(actor):
            self._fresh = traj.inputs["step", "observation"]
        return traj.to(actor.device)

    def advance(self, actor: Role | None, steps: int, into: Replay) -> None:
        """See `Rollouts.advance`."""
        env = self.environments
        plain: tuple[Any, ...] = () if actor is not None else (None, None, {})
        parts = env.ask("advance", actor, steps, *plain)
        fields = [_beside(field, axis=1) for field in zip(*parts, strict=True)]
        self._begin_again(into)
        for t in range(steps):
            observation, action, reward, following, terminated, truncated = (at(f, t) for f in fields)
            if self.scaler is not None:
                reward = self.scaler(reward, terminated | truncated)
            into.add(observation, action, reward, following, terminated, truncated)
        self.taken += steps * env.n

    @property
    def note(self) -> Callable[[str], None]:
        """Who is told when a sampler is replaced."""
        return self.environments.note

    @note.setter
    def note(self, tell: Callable[[str], None]) -> None:
        self.environments.note = tell

    def log_to(self, folder: str | Path) -> None:
        """Write what the samplers print to files in ``folder``."""
        self.environments.log_to(folder)

    def close(self) -> None:
        """End the samplers."""
        self.environments.close()

    def random_observations(self, steps: int) -> Any:
        """See `Rollouts.random_observations`; sampler by sampler."""
        return torch.cat(self.environments.ask("warm_up", None, steps))

    def _normalises(self, actor: Role) -> bool:
        return super()._normalises(_mirror(actor))

    def _begin_again(self, into: Replay | None = None) -> None:
        """Where new episodes had to begin with a new sampler, nothing that came before runs on into them."""
        for rows in self.environments.broken_off():
            if self.scaler is not None:
                self.scaler.sum[rows] = 0.0
            if into is not None and into.added:
                last = (into.added - 1) % into.length
                ended = into._data["terminated"][last, rows]
                into._data["truncated"][last, rows] = ~ended


# --- weights, and parts put together ----------------------------------------------------------------------


def _mirror(actor: Role) -> Role:
    """The role in this process, whatever weights it has."""
    return (actor._made or actor.mirror) if isinstance(actor, RemoteRole) else actor


def _weights(actor: Role) -> Any:
    """The newest, as `Role.state_dict` gives them; a `Future` where they are elsewhere."""
    if isinstance(actor, RemoteRole):
        if not actor._here:
            actor._pushed()
            return cast(WorkerGroup, actor.workers).call("state", actor.key, False, True)
        actor = actor.mirror
    return {**whole_state(actor), "optimiser": None}


def _knobs(model: nn.Module) -> dict[str, Any]:
    """Plain numbers that a method may turn as it goes (DQN's epsilon)."""
    return {
        name: value
        for name, value in vars(model).items()
        if isinstance(value, (bool, int, float)) and not name.startswith("_") and name != "training"
    }


def _beside(parts: Any, axis: int = 0) -> Any:
    """Arrays, or dictionaries of arrays, one after the other along the environments."""
    if isinstance(parts[0], dict):
        return {name: _beside([part[name] for part in parts], axis) for name in parts[0]}
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis)


def _joined(parts: list[Trajectories]) -> Trajectories:
    """Rows one after the other. Shares differ in how often a row was cut, so there are places to fill."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.inputs["final", "step"].shape[1] for part in parts)
    for part in parts:
        final = part.inputs["final"]
        gap = width - final["step"].shape[1]
        if gap:
            step = nn.functional.pad(final["step"], (0, gap), value=-1)
            filled = {"step": step, "observation": _widened(final["observation"], gap)}
            part.inputs["final"] = TensorDict(filled, batch_size=final.batch_size)
    return torch.cat(parts, dim=0)  # type: ignore[arg-type,return-value]


def _widened(value: Any, gap: int) -> Any:
    """``[B, K, ...]`` with ``gap`` more places of zeros."""
    if isinstance(value, TensorDictBase):
        parts = {name: _widened(part, gap) for name, part in value.items()}
        return TensorDict(parts, batch_size=[value.shape[0], value.shape[1] + gap])
    more: Tensor = value.new_zeros((value.shape[0], gap, *value.shape[2:]))
    return torch.cat([value, more], dim=1)


# --- from a task ------------------------------------------------------------------------------------------


def _make(env_id: str, options: dict[str, Any], n: int, seed: int) -> Environments:
    return make(env_id, n, mix(seed, 0xE17) % 2**31, **options)


def remote_rollouts(
    task: Any, samplers: int, seed: int = 0, engine: Any = None, **settings: Any
) -> RemoteRollouts:
    """What ``task.experience(seed)`` is, in ``samplers`` processes; one of them gives the same steps.

    Args:
        task: a `Control`.
        engine: where the roles run. The samplers are started as its workers are; beside a local engine, and where no
            engine is given, they are plain processes of this machine.
        settings: as for `RemoteRollouts`.

    Raises:
        UsageError: a task without environments, or too few of them.
    """
    if not isinstance(task, Control):
        raise UsageError(
            f"samplers step environments, and the task '{task.name}' has none; leave out --samplers"
        )
    if task.method is not None and wants_groups(task.method):
        raise UsageError(
            f"{type(task.method).__name__} compares whole episodes, which samplers would cut into rows of steps; leave out "
            "--samplers"
        )
    placement = getattr(engine, "placement", None)
    if placement is not None and not placement.inline:
        settings = {"backend": engine.backend, "patience": engine.patience, **settings}

    def option(name: str, default: Any) -> Any:
        return getattr(task.method, name, default)

    return RemoteRollouts(
        partial(_make, task.env_id, task.env_options),
        int(option("environments", 1)),
        samplers,
        seed,
        option("gamma", 0.99) if option("scale_reward", False) else None,
        **settings,
    )
