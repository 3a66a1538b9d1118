"""The engine whose roles live in worker processes, on this machine or on a cluster.

    engine = RayEngine(workers=2)
    with Run("runs/first", engine=engine) as run: ...

Methods are the same files as under the local engine. Where a role lives is said by a `Placement` and nowhere else.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from guerdon.engine.local import LocalEngine, merged
from guerdon.engine.mapping import Placement
from guerdon.engine.meshes import read_placement
from guerdon.engine.pools import ResourcePool
from guerdon.engine.remote import RemoteRole, RoleWorker
from guerdon.engine.workers import Future, WorkerGroup
from guerdon.errors import UsageError
from guerdon.optim import Optimiser
from guerdon.roles import Role, RoleSettings

Backend = Literal["ray", "process"]


class RayEngine:
    """Hands out roles that live in groups of workers.

    Args:
        device: of the workers: "cpu", "cuda" (a GPU for each), or "auto".
        threads: CPU threads a worker; None shares the cores out.
        workers: processes in all, where ``placement`` is a preset.
        placement: the name of a preset (colocate, split, standalone, inline), a `Placement`, or the path of one as JSON.
        roles: names of the method's roles, which a preset shares out.
        address: of a Ray cluster that is running; None starts one here, for this run alone.
        shard: keep a part of the weights and of the optimiser's state in each worker (FSDP2) instead of all of them.
        backend: "ray", or "process" for plain processes of this machine.
        patience: seconds after which a worker that does not answer counts as dead.
        memory: bytes of Ray's object store, where it is started here.
        restarts: how often workers that only sample (role "generator" of a placement) are replaced when one of them dies;
            the answers that were lost are made again, from the same seeds.
        others: processes of the run that hold no roles (samplers of environments), for which there must be room.
        overrides: settings that win over what a method asks for (precision, micro_batch, ...).

    Raises:
        UsageError: a placement that does not fit, or Ray is not installed.
    """

    name = "ray"

    def __init__(
        self,
        device: str = "auto",
        threads: int | None = None,
        *,
        workers: int = 2,
        placement: str | Path | Placement = "colocate",
        roles: Sequence[str] = ("actor", "critic", "reference", "reward"),
        address: str | None = None,
        shard: bool = False,
        backend: Backend = "ray",
        patience: float = 30.0,
        memory: int | None = None,
        restarts: int = 3,
        others: int = 0,
        **overrides: Any,
    ) -> None:
        if workers < 1:
            raise UsageError(f"workers is {workers}; it must be at least 1")
        self.placement = find_placement(placement, roles, workers)
        self.backend: Backend = backend
        self.address, self.shard, self.patience, self.restarts = address, shard, patience, restarts
        self.note: Callable[[str], None] = lambda text: None  # a run takes it over
        self.overrides = {key: value for key, value in overrides.items() if value is not None}
        self._local = LocalEngine(device, threads, **overrides) if self.placement.inline else None
        self.device = "cpu" if device == "auto" and not torch.cuda.is_available() else device
        self.device = "cuda" if self.device == "auto" else self.device
        count = max(1, self.placement.workers)
        self.threads = threads or max(1, (os.cpu_count() or 1) // count)
        self._groups: dict[str, WorkerGroup] = {}
        self._known: list[weakref.ref[RemoteRole]] = []
        self._visitors: dict[tuple[int, str], tuple[str, Any]] = {}
        self._dropped: list[tuple[WorkerGroup, str]] = []
        self._owed: list[Future] = []
        self._numbers = 0
        self._logs: Path | None = None
        self._started = False
        self._closed = False
        if backend == "ray" and self._local is None:
            from guerdon.engine.backends.ray import start_ray

            self._started = not _ray_runs()
            start_ray(count + others, address=address, object_store_memory=memory)

    # -- roles ---------------------------------------------------------------------------------------------

    def role(
        self,
        name: str,
        model: nn.Module,
        optimiser: Optimiser | None = None,
        settings: RoleSettings | None = None,
        **changes: Any,
    ) -> Role:
        """A role for ``model`` in the workers that the placement gives it; arguments as for `LocalEngine.role`."""
        if self._local is not None:
            return self._local.role(name, model, optimiser, settings, **changes)
        settings = merged(settings, optimiser, changes, self.overrides)
        return self.adopt_role(Role(name, model, settings, "cpu"), self.group_of(name))

    def adopt_role(self, mirror: Role, group: WorkerGroup) -> RemoteRole:
        """A role of this process, taken over by the workers of ``group``."""
        self._forget_dropped()
        key = self.key(mirror.name)
        group.call("make", key, mirror, self._in_common(mirror, group), self.shard, blocking=True)
        role = RemoteRole(self, group, key, mirror)
        role.updates = mirror.updates
        self.remember(role)
        return role

    def key(self, name: str) -> str:
        """A name among the workers that no other role has."""
        self._numbers += 1
        return f"{name}#{self._numbers}"

    def remember(self, role: RemoteRole) -> None:
        self._known.append(weakref.ref(role))

    def _roles(self) -> list[RemoteRole]:
        self._known = [known for known in self._known if known() is not None]
        return [role for known in self._known if (role := known()) is not None]

    def _in_common(self, mirror: Role, group: WorkerGroup) -> list[tuple[str, str, str]]:
        """Modules of ``mirror`` that a role in ``group`` has too (running statistics, an encoder): the workers must share
        them as this process does. ``(path, key of the other role, path there)``."""
        there: dict[int, tuple[str, str]] = {}
        for role in self._roles():
            if role.workers is group and role._made is not None:
                for path, module in role._made.model.named_modules():
                    there.setdefault(id(module), (role.key, path))
        common: list[tuple[str, str, str]] = []
        for path, module in mirror.model.named_modules():
            inside = any(path.startswith(f"{above}.") for above, _, _ in common)
            if path and not inside and id(module) in there and any(True for _ in _tensors(module)):
                common.append((path, *there[id(module)]))
        return common

    def sharers(self, role: RemoteRole) -> list[tuple[WorkerGroup, str]]:
        """A role in each group that normalises observations by the statistics that ``role`` has."""
        scaler = role.mirror.model.features.scaler  # type: ignore[union-attr]
        found: dict[int, tuple[WorkerGroup, str]] = {id(role.workers): (role.workers, role.key)}
        for other in self._roles():
            if other._made is not None and any(scaler is m for m in other._made.model.modules()):
                found.setdefault(id(other.workers), (other.workers, other.key))
        return list(found.values())

    def visitor(self, other: Role, group: WorkerGroup) -> str:
        """The name of a copy of ``other``, which lives elsewhere, among the workers of ``group``; with the newest
        weights."""
        remote = isinstance(other, RemoteRole) and not other._here
        local = other.mirror if isinstance(other, RemoteRole) else other
        place = (id(other), group.name)
        known = self._visitors.get(place)
        version = other.moves if remote else sum(t._version for t in _tensors(local.model))  # type: ignore[attr-defined]
        if known is None:
            key = self.key(other.name)
            group.call("make", key, local, self._in_common(local, group), False, blocking=True)
            weakref.finalize(other, self._visitors.pop, place, None)
            weakref.finalize(other, self.forget, group, key)
        else:
            key, seen = known
            if seen == version:
                return key
            if remote:
                state = other.workers.call("state", other.key, False, True)  # type: ignore[attr-defined]
            else:
                core = getattr(local.model, "core", local.model)
                state = {"updates": local.updates, "weights": core.state_dict(), "optimiser": None}
            group.call("load", key, state)
        self._visitors[place] = key, version
        return key

    def forget(self, group: WorkerGroup, key: str) -> None:
        """Nobody has a handle of this role any more; its workers hear of it when they are called next. (May be called by
        the garbage collector at any time.)"""
        self._dropped.append((group, key))

    def _forget_dropped(self) -> None:
        dropped, self._dropped = self._dropped, []
        for group in self._groups.values():
            if all(there is not group for there, _ in dropped):
                continue
            group.call("drop", [key for there, key in dropped if there is group])

    def owes(self, future: Future) -> None:
        """Metrics of a call that was not waited for: should it have failed, the error comes up here, soon."""
        still = []
        for owed in self._owed:
            if owed.done():
                owed.get()
            else:
                still.append(owed)
        self._owed = [*still, future]

    # -- groups --------------------------------------------------------------------------------------------

    def pool_of(self, name: str) -> str | None:
        """The pool of the placement for a role: by its name, by its kind (``actor_reference`` is a reference), or None."""
        mapping = self.placement.mapping
        if name in mapping:
            return mapping[name]
        kind = name.rpartition("_")[2]
        if kind in mapping:
            return mapping[kind]
        return next((pool for role, pool in mapping.items() if name.startswith(f"{role}_")), None)

    def group_of(self, name: str, like: RemoteRole | None = None) -> WorkerGroup:
        """The workers for a role; those of ``like`` where the placement does not say. They are started when they are first
        needed."""
        pool = self.pool_of(name)
        if like is not None and (pool is None or (like.settings.lora is not None and like.updates == 0)):
            return like.workers  # the reference of an adapted actor is the actor with its adapter off
        return self._group(pool or next(iter(self.placement.pools)))

    def _group(self, pool: str) -> WorkerGroup:
        if pool not in self._groups:
            gpus = 1.0 if self.device == "cuda" else 0.0
            # on a machine that is the run's own nobody else asks for CPUs
            cpus = 1.0 if self.address is None else float(self.threads)
            resources = ResourcePool(self.placement.processes(pool), gpus=gpus, cpus=cpus, name=pool)
            group = WorkerGroup(
                resources, RoleWorker, self.device, self.threads, backend=self.backend, name=pool
            )
            group.call("join")
            group.watch(self.patience)
            if self._logs is not None:
                group.log_to(self._logs)
            self._groups[pool] = group
        return self._groups[pool]

    def generators(self, role: RemoteRole) -> WorkerGroup:
        """The workers that sample for ``role``: those of the "generator", where the placement has one, or its own."""
        pool = self.placement.mapping.get("generator")
        return role.workers if pool is None else self._group(pool)

    def replace(self, group: WorkerGroup, error: Exception) -> None:
        """Put new workers in the place of a group that lost one."""
        self.note(f"{error}; its workers are replaced")
        pool = next(pool for pool, known in self._groups.items() if known is group)
        group.close()
        del self._groups[pool]
        for place in [place for place in self._visitors if place[1] == group.name]:
            del self._visitors[place]

    def log_to(self, folder: str | Path) -> None:
        """Write what the workers print to ``folder/POOL-RANK.log``."""
        self._logs = Path(folder)
        for group in self._groups.values():
            group.log_to(self._logs)

    # -- the end -------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Where the work happens, for the log and config.json."""
        if self._local is not None:
            return {**self._local.describe(), "engine": self.name, "placement": "inline"}
        return {
            "engine": self.name,
            "device": self.device,
            "threads": self.threads,
            "pools": self.placement.pools,
            "mapping": self.placement.mapping,
            "shard": self.shard,
        }

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        if self._closed:
            return
        self._closed = True
        if self._local is not None:
            self._local.close()
        for group in self._groups.values():
            group.close()
        if self._started:
            from guerdon.engine.backends.ray import stop_ray

            stop_ray()


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def find_placement(placement: str | Path | Placement, roles: Sequence[str], workers: int) -> Placement:
    """The placement of that name, or in that file, which may be an execution plan's (`guerdon.engine.meshes`)."""
    if isinstance(placement, Placement):
        return placement
    if str(placement).endswith(".json"):
        return read_placement(placement)
    return Placement.preset(str(placement), list(roles), workers)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]
