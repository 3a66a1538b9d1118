"""Roles that live in worker processes, behind the verbs of `guerdon.roles.Role`.

A `RemoteRole` has a copy of its model, with optimiser, in every worker of its group. Verbs that answer (``sample``,
``log_prob``, ``value``, ...) split the rows over the workers; ``update`` and ``fit`` make one data-parallel update of all
of them, the same as one process would make. Answers come back as `Pending` tensors: passed on to another role, they travel
from worker to worker, and a call that does not need them does not wait for them.

The process that runs the method keeps a mirror of the model, for what is done with a model by hand: acting in
environments, saving, statistics. It is brought up to date when somebody asks for it, and what was changed in it is sent to
the workers before their next call.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Batch, Trajectories
from guerdon.engine.packing import (
    Named,
    Source,
    form_of,
    pack,
    pack_prompts,
    pending_metrics,
    structured,
    unpack,
    widen,
)
from guerdon.engine.pending import Pending, resolve
from guerdon.engine.role_worker import RoleWorker
from guerdon.engine.workers import Future, WorkerError, WorkerGroup
from guerdon.objectives.base import Metrics, Objective
from guerdon.role_parts import add_metrics, mean_metrics, minibatch_rows
from guerdon.roles import Role, RoleSettings

if TYPE_CHECKING:
    from guerdon.engine.ray import RayEngine

__all__ = ["RemoteRole", "RoleWorker", "pack", "unpack", "widen"]


class RemoteRole(Role):
    """A role whose weights are in the workers of ``group``. Made by the engine.

    Args:
        engine: whose role it is.
        group: the workers that hold it.
        key: its name among them.
        mirror: the same role in this process, or a function that makes it when it is needed.
    """

    # what `Role` looks at in its own process
    group = None
    _whole = None
    _shards = None

    def __init__(
        self, engine: RayEngine, group: WorkerGroup, key: str, mirror: Role | Callable[[], Role]
    ) -> None:  # not Role's: nothing is built here
        self.engine, self.workers, self.key = engine, group, key
        self.name = key.partition("#")[0]
        self._made = mirror if isinstance(mirror, Role) else None
        self._make_mirror = mirror
        self._updates = 0
        self.moves = 0  # how often the weights in the workers changed
        self._mirrored = 0  # the `moves` that the mirror holds
        self._read: list[tuple[Tensor, int]] | None = None  # the mirror's tensors as they were last in step
        self._here = False  # the method works on the weights by hand: they live in this process from now on
        self._forms: dict[Any, Any] = {}
        weakref.finalize(self, engine.forget, group, key)

    # -- the mirror ----------------------------------------------------------------------------------------

    @property
    def mirror(self) -> Role:
        """The role in this process, with the newest weights."""
        mirror = self._mirror_made()
        if not self._here and self._mirrored != self.moves:
            self._pushed()
            state = self.workers.call("state", self.key, False, True, blocking=True)[0]
            mirror.load_state_dict(state)
            self._mirrored = self.moves
            self._read = None
        if not self._here:
            mirror.updates = self._updates
        return mirror

    def _mirror_made(self) -> Role:
        """The mirror, whatever weights it has."""
        if self._made is None:
            self._made, self._mirrored = self._make_mirror(), -1  # type: ignore[operator]
        return self._made

    @property
    def updates(self) -> int:  # type: ignore[override]
        """How many updates the role has made."""
        return self._made.updates if self._here and self._made is not None else self._updates

    @updates.setter
    def updates(self, value: int) -> None:
        self._updates = value

    def _watched(self) -> Role:
        """The mirror, for those who may change it by hand."""
        mirror = self.mirror
        if not self._here and self._read is None:
            tensors = [*mirror.model.parameters(), *mirror.model.buffers()]
            self._read = [(tensor, tensor._version) for tensor in tensors]
        return mirror

    def _pushed(self) -> None:
        """Send the workers what was changed in the mirror by hand."""
        if self._read is None or self._here:
            return
        if all(tensor._version == version for tensor, version in self._read):
            return
        assert self._made is not None
        self._made._changed = True
        state = {**self._made.state_dict(), "optimiser": None}
        self.workers.call("load", self.key, state)
        self.moves += 1
        self._mirrored = self.moves
        self._read = [(tensor, tensor._version) for tensor, _ in self._read]

    def _come_here(self) -> Role:
        """From now on the weights live in this process: the method changes them by hand in every step."""
        if not self._here:
            mirror = self.mirror
            state = self.workers.call("state", self.key, True, blocking=True)[0]
            mirror.load_state_dict(state)
            self._here = True
        return self.mirror

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        """The mirror's model, with the newest weights."""
        return self._watched().model

    @property
    def settings(self) -> RoleSettings:  # type: ignore[override]
        """As the role was made."""
        return self._mirror_made().settings

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """Where batches are handed over: in this process."""
        return torch.device("cpu")

    def __repr__(self) -> str:
        return f"RemoteRole({self.name}: {self.workers.world_size} workers of {self.workers.name})"

    def flat_weights(self) -> Any:
        """The weights as one flat tensor; with it they move to this process for good."""
        return self._come_here().flat_weights()

    # -- calls of the workers ------------------------------------------------------------------------------

    def _call(
        self,
        verb: str,
        batch: Any,
        *arguments: Any,
        others: Mapping[str, Role] | None = None,
        protocol: str | None = None,
    ) -> Any:
        """What the workers give (or a future of it) for ``verb`` on a batch, these arguments and other roles."""
        self._pushed()
        if others is not None:
            arguments += (self._there_all(others, self.workers),)
        own, holes, futures = pack(batch)
        return self.workers.call(verb, self.key, own, holes, *arguments, *futures, protocol=protocol)

    def _there(self, role: Role, group: WorkerGroup) -> str:
        """The name of ``role``, with its newest weights, in ``group``."""
        if isinstance(role, RemoteRole) and not role._here:
            role._pushed()
            if role.workers is group:
                return role.key
        return self.engine.visitor(role, group)

    def _there_all(self, options: Mapping[str, Any], group: WorkerGroup) -> dict[str, Any]:
        return {k: Named(self._there(v, group)) if isinstance(v, Role) else v for k, v in options.items()}

    # -- answers -------------------------------------------------------------------------------------------

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: Any
    ) -> Trajectories:
        if self._here or not len(prompts):
            return self.mirror.sample(prompts, seeds, group, **_locals(options))
        self._pushed()
        batch, plain = pack_prompts(prompts, seeds, group, options)
        restarts = 0
        while True:
            workers = self.engine.generators(self)
            try:
                future = workers.call(
                    "sample", self._there(self, workers), batch, self._there_all(plain, workers)
                )
                return cast(Trajectories, structured(future, len(prompts), Trajectories, workers))
            except WorkerError as error:
                # seeds belong to rows: other workers make the very same answers
                restarts += 1
                if workers is self.workers or restarts > self.engine.restarts:
                    raise
                self.engine.replace(workers, error)

    def answerer(self) -> Any:
        return self.mirror.answerer()

    def acting(self) -> Any:
        act = self.mirror.acting()
        known = self.moves

        def newest(*args: Any) -> Any:
            nonlocal act, known
            if known != self.moves:  # weights have moved: the mirror fetches them, once
                act, known = self.mirror.acting(), self.moves
            return act(*args)

        return newest

    def observe(self, observation: Any) -> None:
        if self._here:
            return self.mirror.observe(observation)
        mirror = self.mirror
        before = mirror.model.features.scaler  # type: ignore[union-attr]
        mirror.observe(observation)
        self._read = None  # the workers see the same
        if before is not None:
            for group, key in self.engine.sharers(self):
                group.call("observe", key, observation)

    def evaluate(self, function: Callable[..., Any], batch: Any, **others: Role) -> Any:
        if self._here:
            return self.mirror.evaluate(function, resolve(batch), **_locals(others))
        return self._call("evaluate", batch, function, others=others)[0]

    def log_prob(self, traj: Trajectories) -> Tensor:
        return self._answer("log_prob", traj, per_step=True)

    def distribution(self, traj: Trajectories) -> TensorDict:
        return cast(TensorDict, self._answer("distribution", traj))

    def value(self, traj: Trajectories) -> Tensor:
        return self._answer("value", traj, per_step=True)

    def next_value(self, traj: Trajectories) -> Tensor | None:
        return None if traj.truncated is None else self._answer("next_value", traj, per_step=True)

    def score(self, traj: Trajectories) -> Tensor:
        return self._answer("score", traj)

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        if self._here:
            return self.mirror.compare(a, b)
        self._pushed()
        own, holes, futures = pack(a)
        other, more, further = pack(b)
        shifted = tuple(replace(hole, future=hole.future + len(futures)) for hole in more)
        future = self.workers.call("compare", self.key, own, holes, other, shifted, *futures, *further)
        return Pending(future.get, (a.batch_size[0],), torch.float32, Source(future, ()))

    def _answer(self, verb: str, traj: Trajectories, per_step: bool = False) -> Any:
        if self._here:
            return getattr(self.mirror, verb)(traj)
        future = self._call("answer", traj, verb)
        if per_step and (dtype := self._forms.get(verb)) is not None:
            return Pending(future.get, tuple(traj.mask.shape), dtype, Source(future, ()))
        answer = structured(future, traj.batch_size[0], TensorDict, self.workers)
        if per_step and answer.shape == traj.mask.shape:
            self._forms[verb] = answer.dtype  # from now on nobody needs to ask for its form
        return answer

    # -- learning ------------------------------------------------------------------------------------------

    def update(self, batch: Any, objective: Objective, *, whole: Any = None, **others: Role) -> Metrics:
        if self._here:
            return self.mirror.update(batch, objective, whole=whole, **_locals(others))
        self._trains()
        # what has no rows to share out, or compares its rows, every worker takes whole: all make the same update
        way = None if self._divides(batch, objective) else "one_to_all"
        future = self._call("update", batch, objective, others=others, protocol=way)
        return self._learned(future, "update", objective)

    def fit(
        self,
        data: Batch,
        objective: Objective,
        epochs: int = 1,
        minibatch: int | None = None,
        generator: torch.Generator | None = None,
        stop: Callable[[Metrics], bool] | None = None,
        *,
        orders: Sequence[Tensor] | None = None,
        **others: Role,
    ) -> Metrics:
        if self._here:
            return self.mirror.fit(
                data, objective, epochs, minibatch, generator, stop, orders=orders, **_locals(others)
            )
        rows = data.batch_size[0]
        size = minibatch_rows(rows, minibatch, epochs, generator, orders)
        if not self._divides(data, objective):  # every worker learns from all rows of each minibatch
            return super().fit(data, objective, epochs, minibatch, generator, stop, orders=orders, **others)
        self._trains()
        a_pass = -(-rows // size)
        shuffled = generator is not None and size < rows

        def some(start: int, passes: int) -> Metrics:
            if orders is not None:
                order: Sequence[Tensor] | None = orders[start : start + passes]
            else:
                order = (
                    [torch.randperm(rows, generator=generator) for _ in range(passes)] if shuffled else None
                )
            settings = {"epochs": passes, "minibatch": minibatch, "orders": order}
            future = self._call("fit", data, objective, settings, others=others)
            return self._learned(future, "fit", objective, a_pass * passes)

        if stop is None:
            return some(0, epochs)
        sums: Metrics = {}
        for done in range(1, epochs + 1):
            found = some(done - 1, 1)
            add_metrics(sums, found)
            if stop(found):
                break
        return mean_metrics(sums, done)

    def natural_step(self, batch: Batch, objective: Objective, **settings: Any) -> Metrics:
        if self._here:
            return self.mirror.natural_step(batch, objective, **settings)
        future = self._call("natural_step", batch, objective, settings)
        return self._learned(future, "natural_step", objective)

    def expect(self, updates: int) -> None:
        self.mirror.expect(updates)
        if not self._here:
            self.workers.call("expect", self.key, updates)

    def _divides(self, batch: Any, objective: Objective) -> bool:
        """Whether shares of the rows can be learned from apart: the weights of two halves add up. Asked once for each form
        of the objective."""
        if not isinstance(batch, Batch):
            return False
        form = ("divides", form_of(objective))
        if form not in self._forms:
            rows = batch.batch_size[0]
            half = max(1, rows // 2)
            parts = sum(
                float(objective.weight(cast(Any, batch)[part])) for part in (slice(half), slice(half, rows))
            )
            self._forms[form] = math.isclose(parts, float(objective.weight(batch)), rel_tol=1e-4)
        return bool(self._forms[form])

    def _trains(self) -> None:
        if self.settings.optimiser is None:
            raise self._only_answers()

    def _learned(self, future: Future, verb: str, objective: Objective, updates: int = 1) -> Metrics:
        """Count so many ``updates`` more. Their metrics come when they are read: the names are asked for once for each form
        of the objective; from then on the call does not wait."""
        self.updates += updates
        self.moves += 1
        form = (verb, form_of(objective))
        if form not in self._forms:
            found = future.get()[0]
            self._forms[form] = {name: (tuple(v.shape), v.dtype) for name, v in found.items()}
            return dict(found)

        self.engine.owes(future)
        return pending_metrics(future, self._forms[form])

    # -- relatives -----------------------------------------------------------------------------------------

    def copy(self, frozen: bool = True, name: str | None = None) -> Role:
        if self._here:
            return self.mirror.copy(frozen, name)
        name = name or self._name_of_copy(frozen)
        self._pushed()
        group = self.engine.group_of(name, like=self)
        if group is not self.workers:
            return self.engine.adopt_role(self.mirror.copy(frozen, name), group)
        key = self.engine.key(name)
        group.call("copy", self.key, key, frozen)
        original = self._made
        twin = RemoteRole(self.engine, group, key, lambda: (original or self.mirror).copy(frozen, name))
        self.engine.remember(twin)
        return twin

    def follow(self, other: Role, tau: float) -> None:
        if self._here:
            return self.mirror.follow(_local(other), tau)
        self._pushed()
        self.workers.call("follow", self.key, self._there(other, self.workers), tau)
        self.moves += 1

    # -- files ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        if self._here:
            return self.mirror.state_dict()
        self._pushed()
        return cast(dict[str, Any], self.workers.call("state", self.key, True, blocking=True)[0])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._here:
            return self.mirror.load_state_dict(state)
        self.updates = state["updates"]
        self._read = None
        self.workers.call("load", self.key, state, blocking=True)
        self.moves += 1

    def save(self, folder: Any) -> None:
        self.mirror.save(folder)


def _local(role: Role) -> Role:
    return role.mirror if isinstance(role, RemoteRole) else role


def _locals(options: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _local(v) if isinstance(v, Role) else v for k, v in options.items()}
