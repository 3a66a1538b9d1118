"""Groups of workers that are called like one object.

The controller is one ordinary process. It calls a method of a `WorkerGroup`; the group sends each of its workers what
the method's transfer protocol says, they work at the same time (with collectives among themselves if they like), and
the group puts their answers together (Sheng et al., HybridFlow, EuroSys 2025: one controller of groups, many inside).

    class Scorer(Worker):
        @register(protocol="dp")
        def score(self, batch): ...

    group = WorkerGroup(ResourcePool([2]), Scorer, backend="ray")
    scores = group.score(batch)                                # split, scored by two processes, joined
    later = group.call("score", batch, blocking=False)         # a Future: other groups may work meanwhile
    critic.update(batch, later)                                # goes from worker to worker
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from guerdon.engine.backends import Backend, find_backend
from guerdon.engine.host import (
    Context,
    Elsewhere,
    Place,
    WorkerDiedError,
    WorkerError,
    WorkerFailedError,
    make_worker,
    rows_of,
)
from guerdon.engine.pools import ResourcePool
from guerdon.engine.protocols import (
    Call,
    GroupInfo,
    HowRows,
    Layout,
    Padded,
    Protocol,
    Share,
    find_protocol,
)
from guerdon.engine.rows import take_cut
from guerdon.engine.wire import Remote
from guerdon.errors import UsageError, nearest

__all__ = [
    "Future",
    "RoleHandle",
    "Worker",
    "WorkerError",
    "WorkerGroup",
    "colocated",
    "register",
    "reset_traffic",
    "traffic",
]

Execute = Literal["all", "rank_zero"]
F = TypeVar("F", bound=Callable[..., Any])

_TRAFFIC = {"materialised_bytes": 0, "references": 0}


def traffic() -> dict[str, int]:
    """What came through this process: bytes of results that were materialised here, and references passed on."""
    return dict(_TRAFFIC)


def reset_traffic() -> None:
    """Count from zero again."""
    _TRAFFIC.update(materialised_bytes=0, references=0)


# --- workers ----------------------------------------------------------------------------------------------


class Worker:
    """A process of a group, seen from inside. Subclass it and `register` methods.

    ``context`` (rank, world size, where the first worker is) is there before ``__init__`` runs.
    """

    context: Context = Context()
    meshes: dict[str, tuple[int, bool]]

    @property
    def rank(self) -> int:
        """Of this worker in its group."""
        return self.context.rank

    @property
    def world_size(self) -> int:
        """Number of workers of the group."""
        return self.context.world_size

    @property
    def local_rank(self) -> int:
        """Number of this worker on its node."""
        return self.context.local_rank

    @property
    def name(self) -> str:
        """Of the group, or of the role in a colocated process."""
        return self.context.name

    @property
    def master_address(self) -> str:
        """Where the first worker of the group is."""
        return self.context.master_address

    @property
    def master_port(self) -> int:
        """A port that was free there when the group started."""
        return self.context.master_port

    def report_mesh(self, name: str, dp_rank: int, is_collector: bool) -> None:
        """Say where this worker stands in the mesh ``name`` of the protocol "mesh:NAME" (call it in ``__init__``).

        Args:
            dp_rank: which chunk of the rows it gets.
            is_collector: whether its answer is one of those that are joined.
        """
        self.meshes[name] = (dp_rank, is_collector)


@dataclass(frozen=True)
class Registration:
    """How a method of a worker is called from outside; the arguments of `register`."""

    protocol: str = "one_to_all"
    execute: Execute = "all"
    blocking: bool = True
    materialise: bool = True
    rows: HowRows | None = None


def register(
    protocol: str = "one_to_all",
    execute: Execute = "all",
    blocking: bool = True,
    materialise: bool = True,
    rows: HowRows | None = None,
) -> Callable[[F], F]:
    """Mark a method of a `Worker` subclass: groups of it get a method of the same name.

    Args:
        protocol: how arguments and answers travel, see `guerdon.engine.protocols`.
        execute: on "all" workers, or on "rank_zero" alone, whose answer is the result.
        blocking: wait for the answers; otherwise the call gives a `Future`.
        materialise: a `Future` among the arguments is read before the method runs; otherwise the method gets an
            object with ``get()``.
        rows: what to do with rows that do not divide: "pad" (inference only: padding is taken off the answers, but it
            would count in an update), "even" (refuse them) or "uneven" (one row more for some, none for others). None
            is the protocol's own choice.
    """
    if execute not in ("all", "rank_zero"):
        raise UsageError(f"execute is '{execute}'; {nearest(execute, ('all', 'rank_zero'))}")

    def mark(method: F) -> F:
        cast(Any, method).__registration__ = Registration(protocol, execute, blocking, materialise, rows)
        return method

    return mark


def registered(cls: type) -> dict[str, Registration]:
    """The registered methods of a worker class. One that is overridden keeps its registration unless it has its own."""
    found: dict[str, Registration] = {}
    for base in reversed(cls.__mro__):
        for name, method in vars(base).items():
            mark = getattr(method, "__registration__", None)
            if mark is not None:
                found[name] = mark
    return found


# --- results to come --------------------------------------------------------------------------------------


class Future(Remote):
    """The answers of a call that was not waited for; they stay with the workers that made them.

    Given to a call of another group it is a reference: the workers there read what they need of it straight from the
    workers here. `get` brings the value to this process.
    """

    def __init__(
        self,
        group: WorkerGroup,
        info: GroupInfo,
        protocol: Protocol,
        tickets: dict[int, Any],
        ranks: list[int],
        steps: tuple[Callable[[Any], Any], ...] = (),
    ) -> None:
        self._group, self._info, self._protocol = group, info, protocol
        self._all, self._ranks, self._steps = tickets, ranks, steps
        self._value: Any = None
        self._known = False

    @property
    def method(self) -> str:
        """What was called."""
        return self._info.method

    @property
    def backend(self) -> str:
        """Where the answers are; a group of another backend gets them by way of this process."""
        return self._group.backend

    @property
    def has_rows(self) -> bool:
        """Whether the answers are rows that can be split among workers again."""
        return self._protocol.joins

    @property
    def tickets(self) -> list[Any]:
        """One reference for each worker whose answer counts."""
        return [self._all[rank] for rank in self._ranks]

    def done(self) -> bool:
        """Whether all workers have answered (or failed)."""
        return self._known or all(self._group._backend.done(ticket) for ticket in self._all.values())

    def get(self, timeout: float | None = None) -> Any:
        """The value, here. The second time it is at hand.

        Raises:
            TimeoutError: it took longer than ``timeout`` seconds; the work goes on.
            WorkerError: a worker died.
        """
        if not self._known:
            answers = self._group._fetch(self._all, self._info.method, timeout)
            for rank in self._ranks:
                for step in self._steps:
                    answers[rank] = step(answers[rank])
            self._value = self._group._result(self._info, self._protocol, answers)
            self._known = True
        return self._value

    def then(self, step: Callable[[Any], Any]) -> Future:
        """The same answers with ``step`` applied to each, where they are read: a field of a batch, say.

        A function that keeps the rows; it travels to other workers, so make it a small one.
        """
        steps = (*self._steps, step)
        return Future(self._group, self._info, self._protocol, self._all, self._ranks, steps)

    def describe(self, share: Share | None) -> Elsewhere:
        """What workers are told about it; the backend adds how to read the parts."""
        plain = self._protocol.joins
        return Elsewhere(
            share=replace(share, future=None) if share is not None else None,
            protocol=None if plain else self._protocol,
            info=None if plain else self._info,
            ranks=tuple(self._ranks),
            source=f"'{self._info.name}.{self._info.method}'",
            steps=self._steps,
        )

    def here(self, share: Share | None) -> Any:
        """What a worker would read, read in this process."""
        if share is None:
            return self.get()
        value = self.get()
        cut = share.cut(rows_of(value) or 0)
        chunk = take_cut(value, cut)
        return chunk if cut.real == cut.size else Padded(chunk, cut.real, cut.size)

    def __reduce__(self) -> Any:
        raise UsageError("a Future cannot be pickled or saved; get() its value, or pass it to a group's call")


def _first_answer(info: GroupInfo, answers: list[Any]) -> Any:
    return answers[0]


def _first_rank(info: GroupInfo) -> list[int]:
    return [0]


# --- groups -----------------------------------------------------------------------------------------------


class WorkerGroup:
    """Workers of one class in a pool, called as one.

    Every registered method of the class is a method of the group. Arguments after the class are its constructor's.

    Args:
        pool: where the workers live; one a process.
        worker: a subclass of `Worker`, or what `colocated` made.
        backend: "inline" (no processes, one worker after the other: for debugging), "process" or "ray".
        name: for messages and log files; the class's name if left out.
        layout: how the ranks are arranged; all data parallel if left out.

    Attributes:
        call_limit: seconds that a call may take before its workers are taken for hung; None for any.

    Raises:
        UsageError: a layout of another size, or a method whose name the group needs for itself.
        WorkerError: a worker that could not be started; what its constructor raised is raised as it is.
    """

    call_limit: float | None = None

    def __init__(
        self,
        pool: ResourcePool,
        worker: type,
        *args: Any,
        backend: str = "inline",
        name: str = "",
        layout: Layout | None = None,
        **kwargs: Any,
    ) -> None:
        self.pool, self.worker, self.backend = pool, worker, backend
        self.name = name or worker.__name__
        self.world_size = pool.world_size
        self.layout = layout or Layout(self.world_size)
        if self.layout.world_size != self.world_size:
            raise UsageError(
                f"group '{self.name}': the layout has {self.layout.world_size} ranks, the pool {self.world_size} processes"
            )
        self._methods = registered(worker)
        for method, mark in self._methods.items():
            if hasattr(WorkerGroup, method):
                raise UsageError(
                    f"group '{self.name}': a method cannot be called '{method}'; groups have their own"
                )
            find_protocol(mark.protocol)
            setattr(self, method, self._bound(method))
        self._infos: dict[Any, tuple[Protocol, GroupInfo, list[int]]] = {}
        self._meshes: list[dict[str, tuple[int, bool]]] | None = None
        self._broken: WorkerError | None = None
        self._closed = False
        self._watching: threading.Event | None = None
        self._lock = threading.Lock()
        self._working: dict[int, str] = {}
        self._futures: weakref.WeakSet[Future] = weakref.WeakSet()
        self._backend: Backend = find_backend(backend)(pool, self.name)
        try:
            self._backend.open()
            first = self._backend.places[0]
            local = self._backend.local_ranks
            contexts = [
                Context(rank, self.world_size, local[rank], self.name, first.address, first.port, backend)
                for rank in range(self.world_size)
            ]
            self._command("build", lambda rank: (contexts[rank],), (worker, args, kwargs))
        except BaseException:
            self.close()
            raise
        if not _GROUPS:
            atexit.register(close_all)  # now: after those of multiprocessing and Ray, hence run before them
        _GROUPS.add(self)

    @property
    def places(self) -> list[Place]:
        """Of each rank: process id, machine, address."""
        return list(self._backend.places)

    # -- calling -------------------------------------------------------------------------------------------

    def _bound(self, method: str) -> Callable[..., Any]:
        def bound(*args: Any, **kwargs: Any) -> Any:
            return self._call(method, args, kwargs)

        bound.__name__, bound.__doc__ = method, getattr(self.worker, method).__doc__
        return bound

    def call(
        self,
        method: str,
        *args: Any,
        blocking: bool | None = None,
        protocol: str | None = None,
        rows: HowRows | None = None,
        ranks: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Call ``method`` of the workers; what is None is as it was registered. Any method may be named, registered or not.

        Args:
            ranks: the workers that are called, where not all are; the others' answers are None.

        Raises:
            UsageError: no such method, or arguments that do not fit the protocol.
            WorkerError: a worker died, stopped answering, or took longer than ``call_limit``.
            Exception: what the method raised in a worker, with a note that says which and where.
        """
        return self._call(method, args, kwargs, blocking, protocol, rows, ranks)

    def _call(
        self,
        method: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        blocking: bool | None = None,
        protocol: str | None = None,
        rows: HowRows | None = None,
        only: Sequence[int] | None = None,
    ) -> Any:
        self._check_usable()
        mark = self._methods.get(method)
        if mark is None:
            if method.startswith("_") or not hasattr(self.worker, method):
                raise UsageError(
                    f"group '{self.name}' has no method '{method}'; {nearest(method, self._methods)}"
                )
            mark = Registration()
        key = (method, protocol, rows)
        if key not in self._infos:
            self._infos[key] = self._plan(method, protocol or mark.protocol, rows or mark.rows, mark.execute)
        found, info, ranks = self._infos[key]
        calls = found.distribute(info, *args, **kwargs)
        if len(calls) != self.world_size:
            raise UsageError(
                f"the protocol '{found.name}' made arguments for {len(calls)} of {self.world_size} workers of '{self.name}'"
            )
        waits = mark.blocking if blocking is None else blocking
        active = range(self.world_size) if mark.execute == "all" else [0]
        if only is not None:
            active, ranks = sorted(set(only) & set(active)), [rank for rank in ranks if rank in only]
        tickets = self._submit(method, calls, ranks, mark, not waits, active)
        if not waits:
            future = Future(self, info, found, tickets, ranks)
            self._futures.add(future)
            return future
        answers = self._fetch(tickets, method, None)
        return self._result(info, found, answers)

    def _plan(
        self, method: str, protocol: str, rows: HowRows | None, execute: Execute
    ) -> tuple[Protocol, GroupInfo, list[int]]:
        found = find_protocol(protocol)
        if execute == "rank_zero":
            found = replace(found, collect=_first_answer, collectors=_first_rank)
        mesh: tuple[tuple[int, bool], ...] = ()
        if found.name == "mesh":
            mesh = self._mesh(protocol.partition(":")[2])
        info = GroupInfo(self.name, self.world_size, self.layout, method, rows or found.rows, mesh)
        return found, info, found.collectors(info) if found.collectors else list(range(self.world_size))

    def _mesh(self, name: str) -> tuple[tuple[int, bool], ...]:
        if self._meshes is None:
            self._meshes = self._command("meshes")
        known = set.intersection(*(set(mesh) for mesh in self._meshes))
        if name not in known:
            raise UsageError(
                f"not every worker of '{self.name}' reported its place in the mesh '{name}'; {nearest(name, known)}"
            )
        return tuple(mesh[name] for mesh in self._meshes)

    def _submit(
        self,
        method: str,
        calls: Any,
        ranks: list[int],
        mark: Registration,
        keep: bool,
        active: Sequence[int],
    ) -> dict[int, Any]:
        if not active:
            return {}
        named: list[dict[Any, Any]] = []
        for rank, before in zip(active, [-1, *active], strict=False):
            same = named and calls[rank] is calls[before]
            named.append(named[-1] if same else self._named(calls[rank]))
        first = named[0]
        if all(other is first for other in named):
            shared = first
            own: list[dict[Any, Any]] = [{}] * len(named)
        else:
            keys = [k for k, v in first.items() if all(k in other and other[k] is v for other in named)]
            shared = {key: first[key] for key in keys}
            own = [{k: v for k, v in other.items() if k not in shared} for other in named]
        ready = self._backend.prepare(shared, len(named))
        return {
            rank: self._backend.submit(rank, method, ready, mine, rank in ranks, keep, mark.materialise)
            for rank, mine in zip(active, own, strict=True)
        }

    def _named(self, call: Call) -> dict[Any, Any]:
        return {key: self._passable(value) for key, value in (*enumerate(call[0]), *call[1].items())}

    def _passable(self, value: Any) -> Any:
        """References are counted; those into another backend are read here."""
        if isinstance(value, Remote):
            future, share = (value.future, value) if isinstance(value, Share) else (value, None)
            if isinstance(future, Future):
                if future.backend != self.backend:
                    return future.here(share)
                _TRAFFIC["references"] += len(future._ranks)
        return value

    def _fetch(self, tickets: dict[int, Any], method: str, timeout: float | None) -> dict[int, Any]:
        limit = self.call_limit
        wait = limit if timeout is None else timeout if limit is None else min(limit, timeout)
        for rank in tickets:
            self._working[rank] = method
        try:
            answers, size = self._backend.fetch(list(tickets.values()), wait)
        except WorkerFailedError as failure:
            raise failure.error() from None
        except WorkerDiedError as death:
            raise self._break(death.rank, f"died {self._doing(death.rank)}", death.why) from None
        except TimeoutError:
            if timeout is not None and (limit is None or timeout <= limit):
                raise TimeoutError(
                    f"'{self.name}.{method}' has not finished within {timeout:g} seconds"
                ) from None
            rank = next((r for r, ticket in tickets.items() if not self._backend.done(ticket)), 0)
            why = f"has not finished '{method}' within the limit of {limit:g} seconds"
            raise self._break(rank, why) from None
        finally:
            for rank in tickets:
                self._working.pop(rank, None)
        _TRAFFIC["materialised_bytes"] += size
        return dict(zip(tickets, answers, strict=True))

    def _result(self, info: GroupInfo, protocol: Protocol, answers: dict[int, Any]) -> Any:
        return protocol.collect(info, [answers.get(rank) for rank in range(self.world_size)])

    def _command(self, command: str, own: Any = None, shared: tuple[Any, ...] = ()) -> list[Any]:
        """One of the host's own methods on every worker; ``own(rank)`` gives the first arguments."""
        first = len(own(0)) if own else 0
        ready = self._backend.prepare({first + i: value for i, value in enumerate(shared)}, self.world_size)
        tickets = {
            rank: self._backend.submit(
                rank, "/" + command, ready, dict(enumerate(own(rank))) if own else {}, True, False, True
            )
            for rank in range(self.world_size)
        }
        answers = self._fetch(tickets, "__init__" if command == "build" else command, None)
        return list(answers.values())

    # -- whether they live ---------------------------------------------------------------------------------

    def alive(self) -> list[bool]:
        """Of each rank, whether its process exists."""
        return [False] * self.world_size if self._closed else self._backend.alive()

    def watch(self, seconds: float = 10.0) -> None:
        """Look after the workers from a thread: one that is gone, or has not answered for ``seconds`` whatever it does
        (stopped, or hanging where no thread of it can run), breaks the group: the call that waits and the next ones
        raise `WorkerError`, and the other workers are ended."""
        if self._watching is not None or self.backend == "inline":
            return
        self._watching = threading.Event()
        arguments = (weakref.ref(self), self._watching, seconds)
        threading.Thread(target=_watch, args=arguments, name=f"watch-{self.name}", daemon=True).start()

    def _look(self, seconds: float) -> None:
        alive = self._backend.alive()
        answered = self._backend.ping(seconds) if all(alive) else alive
        for rank, (lives, answers) in enumerate(zip(alive, answered, strict=True)):
            if self._closed or self._broken:
                return
            if not lives:
                self._break(rank, f"died {self._doing(rank)}")
                return
            if not answers:
                gone = not self._backend.alive()[rank]  # it may have died while it was asked
                what = "died" if gone else f"has not answered for {seconds:g} seconds"
                self._break(rank, f"{what} {self._doing(rank)}")
                return

    def _doing(self, rank: int) -> str:
        waiting = self._working.get(rank)
        if waiting is None:
            unfinished = [f for f in self._futures if rank in f._all and not f.done()]
            waiting = unfinished[0].method if unfinished else None
        return f"during '{waiting}'" if waiting else "while idle"

    def _who(self, rank: int, doing: str = "") -> str:
        places = self._backend.places
        where = f" (process {places[rank].pid} on {places[rank].host})" if rank < len(places) else ""
        return f"worker {rank} of '{self.name}'{where}{' ' + doing if doing else ''}"

    def _break(self, rank: int, what: str, why: str = "") -> WorkerError:
        """Note that the group cannot go on, end its workers, and return the error to raise."""
        with self._lock:
            if self._broken is None:
                detail = f" ({why})" if why else ""
                self._broken = WorkerError(f"{self._who(rank)} {what}{detail}; the group was ended")
                for other in range(self.world_size):
                    with contextlib.suppress(Exception):
                        self._backend.kill(other)
            return self._broken

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise self._broken
        if self._closed:
            raise UsageError(f"group '{self.name}' is closed")

    def log_to(self, folder: str | Path) -> None:
        """Write what the workers print to ``folder/NAME-RANK.log``."""
        if self.backend != "inline":
            paths = [
                str(Path(folder).absolute() / f"{self.name}-{rank}.log") for rank in range(self.world_size)
            ]
            self._command("log", lambda rank: (paths[rank],))

    def spawn(self) -> dict[str, RoleHandle]:
        """One handle for each role of a `colocated` group. Raises `UsageError` for another group."""
        roles = getattr(self.worker, "roles", None)
        if roles is None:
            raise UsageError(
                f"group '{self.name}' holds one role; make its class with colocated(...) to hold several"
            )
        return {role: RoleHandle(self, role) for role in roles}

    def close(self) -> None:
        """End the workers and wait until they are gone; again does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._watching is not None:
            self._watching.set()
        self._backend.close()

    def __enter__(self) -> WorkerGroup:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


_GROUPS: weakref.WeakSet[WorkerGroup] = weakref.WeakSet()


def close_all() -> None:
    """Close every group that is open."""
    for group in list(_GROUPS):
        group.close()


def _watch(reference: weakref.ref[WorkerGroup], stop: threading.Event, seconds: float) -> None:
    while not stop.wait(min(1.0, seconds / 4)):
        group = reference()
        if group is None or group._broken is not None:
            return
        with contextlib.suppress(Exception):  # the group is being closed, or the interpreter
            group._look(seconds)
        del group


# --- several roles in one process -------------------------------------------------------------------------


def colocated(classes: Mapping[str, tuple[type, tuple[Any, ...], dict[str, Any]]]) -> type:
    """A worker class that holds a worker of each role in one process.

    Its methods carry the role's name (``actor_update``); `WorkerGroup.spawn` gives a handle for each role without it. The
    workers inside share the context, so torch.distributed is initialised once for the process.

    Args:
        classes: from a role to (class, positional, keyword arguments).
    """

    def __init__(self: Any) -> None:  # noqa: N807
        self.inside = {}
        for role, (cls, args, kwargs) in classes.items():
            worker = make_worker(cls, replace(self.context, name=role), args, kwargs)
            self.inside[role] = worker
            self.meshes.update({f"{role}/{mesh}": place for mesh, place in worker.meshes.items()})

    roles: dict[str, dict[str, str]] = {role: {} for role in classes}
    body: dict[str, Any] = {"__init__": __init__, "roles": roles, "__module__": "__colocated__"}
    for role, (cls, _, _) in classes.items():
        for method, mark in registered(cls).items():
            if f"{role}_{method}" in body:
                raise UsageError(
                    f"colocated roles: two methods would be called '{role}_{method}'; rename a role"
                )
            if mark.protocol.partition(":")[0] == "mesh":
                mark = replace(mark, protocol=f"mesh:{role}/{mark.protocol.partition(':')[2]}")
            roles[role][method] = f"{role}_{method}"
            body[f"{role}_{method}"] = _forward(role, method, mark, getattr(cls, method).__doc__)
    return type("Colocated" + "".join(role.title() for role in classes), (Worker,), body)


def _forward(role: str, method: str, mark: Registration, doc: str | None) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.inside[role], method)(*args, **kwargs)

    forward.__name__, forward.__doc__ = f"{role}_{method}", doc
    forward.__registration__ = mark  # type: ignore[attr-defined]
    return forward


class RoleHandle:
    """One role of a colocated group: its methods, under their own names, and no others."""

    def __init__(self, group: WorkerGroup, role: str) -> None:
        self.group, self.role = group, role
        self.world_size, self.layout, self.backend = group.world_size, group.layout, group.backend
        self._methods: dict[str, str] = cast(Any, group.worker).roles[role]
        for method, name in self._methods.items():
            setattr(self, method, getattr(group, name))

    @property
    def name(self) -> str:
        """The role."""
        return self.role

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """See `WorkerGroup.call`."""
        if method not in self._methods:
            raise UsageError(f"role '{self.role}' has no method '{method}'; {nearest(method, self._methods)}")
        return self.group.call(self._methods[method], *args, **kwargs)

    def alive(self) -> list[bool]:
        """Of each rank, whether its process exists."""
        return self.group.alive()
