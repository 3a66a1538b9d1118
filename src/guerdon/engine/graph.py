"""What a method does in one iteration, as a graph of calls on models: which call needs what another gave.

After ReaLHF (Mei et al. 2024, section 4): edges are derived from the names of the data that calls read and write, and from
nothing else. The graph says what depends on what; where and how each call runs is a plan (`guerdon.engine.plan`). Pure data:
nothing here computes with tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from guerdon.errors import UsageError, nearest

Kind = Literal["generate", "inference", "train", "experience", "feedback"]
"""What a call does. The first three are work of a model; "experience" (steps of an environment, a replay buffer) and
"feedback" (a judge without weights to place) take no part in a plan."""

MODEL_KINDS = ("generate", "inference", "train")


@dataclass(frozen=True)
class ParamRealloc:
    """Before or after a call: weights of ``target`` <- eta * weights of ``source`` + (1 - eta) * its own.

    ``eta=1`` is a copy (to another layout, of the same role or another); less makes a moving average, so a reference or a
    target network that follows needs no call of its own. Raises `UsageError` for an eta outside (0, 1].
    """

    source: str
    target: str
    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise UsageError(f"'{self.source}' to '{self.target}': eta is {self.eta}, not in (0, 1]")


@dataclass(frozen=True)
class Offload:
    """After a call: the weights of ``role`` go to the host's memory until they are needed again."""

    role: str


Hook = ParamRealloc | Offload


@dataclass(frozen=True)
class ModelFunctionCall:
    """One call on one role in each iteration.

    Args:
        name: of this call, unique in its graph ("actor_gen").
        role: whose weights it uses (for "experience" and "feedback": who acts or judges).
        kind: see `Kind`.
        inputs, outputs: what it reads and writes, in the words of the role's verb.
        rename: the verb's word -> the graph's key, where they differ: a reference's "log_prob" is not the actor's.
        sequences: rows a call; None for as many as the workload has.
        micro_batches: parts in which a pass is made; None for the planner's choice.
        minibatches: optimiser steps of a "train" call.
        pre, post: hooks. `Offload` is allowed as post only: a call cannot begin by sending its weights away.
        uses: further roles whose weights it reads: the critic by which an actor improves, a reference that is mixed in.

    Raises `UsageError` for an unknown kind, a name twice among inputs or outputs, a rename of something that is neither,
    counts below 1, and an `Offload` before the call.
    """

    name: str
    role: str
    kind: Kind
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    rename: Mapping[str, str] = field(default_factory=dict, hash=False)
    sequences: int | None = None
    micro_batches: int | None = None
    minibatches: int = 1
    pre: tuple[Hook, ...] = ()
    post: tuple[Hook, ...] = ()
    uses: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if problem := self._fault():
            raise UsageError(f"call '{self.name}' {problem}")

    def _fault(self) -> str:
        kinds, words = get_args(Kind), (*self.inputs, *self.outputs)
        if self.kind not in kinds:
            return f"is of kind '{self.kind}'; {nearest(self.kind, kinds)}"
        for what, keys in (("reads", self.reads), ("writes", self.writes)):
            for key in keys:
                if keys.count(key) > 1:
                    return f"{what} '{key}' twice; name it once"
        for word in self.rename:
            if word not in words:
                return f"renames '{word}', which it neither reads nor writes; {nearest(word, words)}"
        for count in ("sequences", "micro_batches", "minibatches"):
            if (value := getattr(self, count)) is not None and value < 1:
                return f"has {count} {value}; it must be at least 1"
        if any(isinstance(hook, Offload) for hook in self.pre):
            return "would lose its weights to an Offload before it; put that into post"
        return ""

    @property
    def reads(self) -> tuple[str, ...]:
        """The graph's keys that it needs."""
        return tuple(self.rename.get(word, word) for word in self.inputs)

    @property
    def writes(self) -> tuple[str, ...]:
        """The graph's keys that it gives."""
        return tuple(self.rename.get(word, word) for word in self.outputs)

    @property
    def on_model(self) -> bool:
        """Whether a plan places it: work of a model, not of an environment or a judge without weights."""
        return self.kind in MODEL_KINDS

    @property
    def weights_read(self) -> tuple[str, ...]:
        """The roles whose weights it needs, its own first; sources of its hooks are among them."""
        own = (self.role,) if self.on_model else ()
        return tuple(dict.fromkeys((*own, *self.uses, *(move.source for move in self.moves))))

    @property
    def weights_changed(self) -> tuple[str, ...]:
        """The roles whose weights are others after it: its own if it trains, and those that follow in its hooks."""
        own = (self.role,) if self.kind == "train" else ()
        return tuple(dict.fromkeys((*own, *(m.target for m in self.moves if m.source != m.target))))

    @property
    def weights(self) -> tuple[str, ...]:
        """The roles whose weights it reads or changes."""
        return tuple(dict.fromkeys((*self.weights_read, *self.weights_changed)))

    @property
    def moves(self) -> tuple[ParamRealloc, ...]:
        """Its hooks that move weights, in their order."""
        return tuple(hook for hook in (*self.pre, *self.post) if isinstance(hook, ParamRealloc))


class Edge(NamedTuple):
    """``target`` waits for ``source`` because it reads ``keys``."""

    source: str
    target: str
    keys: tuple[str, ...]


class Node(NamedTuple):
    """A call in one iteration."""

    iteration: int
    call: ModelFunctionCall


class Wait(NamedTuple):
    """``target`` waits for ``source``: for data ``keys`` of the same iteration, or (``kind`` "parameters") for the weights of
    the roles in ``keys`` that the iteration before has made."""

    source: tuple[int, str]
    target: tuple[int, str]
    kind: Literal["data", "parameters"]
    keys: tuple[str, ...]


class Unrolled(NamedTuple):
    """Some iterations in a row. Nodes stand in an order in which they can run; waits name them by (iteration, call name)."""

    nodes: list[Node]
    waits: list[Wait]

    def before(self, node: tuple[int, str]) -> list[tuple[int, str]]:
        """What ``node`` waits for."""
        return [wait.source for wait in self.waits if wait.target == node]


class DataflowGraph:
    """The calls of one iteration. An edge exists where a call reads a key that another writes.

    Args:
        calls: in any order; where data leave the order open, it stays.
        name: for pictures and messages.
        data: the keys that the dataset gives; None for whatever nobody produces.

    Raises `UsageError` for no calls, two calls of one name, two producers of a key, a cycle, and (where ``data`` is given) a
    key that neither a call nor the dataset gives.
    """

    def __init__(
        self, calls: Iterable[ModelFunctionCall], name: str = "", data: Collection[str] | None = None
    ) -> None:
        self.name = name
        self.calls: tuple[ModelFunctionCall, ...] = tuple(calls)
        if not self.calls:
            raise UsageError(f"graph '{name}' has no calls; a graph needs at least one")
        self._by_name: dict[str, ModelFunctionCall] = {}
        self._producer: dict[str, str] = {}
        for call in self.calls:
            if call.name in self._by_name:
                raise UsageError(f"graph '{name}' has two calls named '{call.name}'; give each its own name")
            self._by_name[call.name] = call
            for key in call.writes:
                if (other := self._producer.setdefault(key, call.name)) != call.name:
                    raise UsageError(
                        f"graph '{name}': '{other}' and '{call.name}' both write '{key}'; rename one"
                    )
        self._order = self._sorted()
        for key in self.data_keys if data is not None else ():
            if key not in (data or ()):
                reader = next(call.name for call in self.calls if key in call.reads)
                hint = nearest(key, (*(data or ()), *self._producer))
                raise UsageError(
                    f"graph '{name}': '{reader}' reads '{key}', which neither a call nor the dataset gives; {hint}"
                )

    def _sorted(self) -> tuple[str, ...]:
        """Names in an order in which the calls can run: of those that could come next, the first as given."""
        left = {call.name: set(self.parents(call.name)) for call in self.calls}
        try:
            TopologicalSorter(left).prepare()
        except CycleError as error:
            raise UsageError(f"graph '{self.name}' has a cycle: {' -> '.join(error.args[1])}") from None
        self._before: dict[str, frozenset[str]] = {}
        while len(self._before) < len(left):
            ready = next(
                n for n, waits in left.items() if n not in self._before and waits <= self._before.keys()
            )
            self._before[ready] = frozenset(left[ready]).union(*(self._before[n] for n in left[ready]))
        return tuple(self._before)

    def __repr__(self) -> str:
        return f"DataflowGraph({self.name}: {', '.join(self._order)})"

    def __len__(self) -> int:
        return len(self.calls)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DataflowGraph) and self._by_name == other._by_name

    def __hash__(self) -> int:
        return hash(frozenset(self.calls))

    # --- reading ----------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> ModelFunctionCall:
        """The call named ``name``. Raises `UsageError` for an unknown one, with the nearest."""
        if name not in self._by_name:
            raise UsageError(f"graph '{self.name}' has no call '{name}'; {nearest(name, self._by_name)}")
        return self._by_name[name]

    @cached_property
    def data_keys(self) -> tuple[str, ...]:
        """Keys that are read and that no call writes: they come from the dataset."""
        read = (key for call in self.calls for key in call.reads)
        return tuple(dict.fromkeys(key for key in read if key not in self._producer))

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """One for each pair of calls between which data go, with all the keys."""
        found = []
        for call in self.calls:
            sources: dict[str, list[str]] = {}
            for key in call.reads:
                if key in self._producer:
                    sources.setdefault(self._producer[key], []).append(key)
            found += [Edge(source, call.name, tuple(keys)) for source, keys in sources.items()]
        return tuple(found)

    def producer(self, key: str) -> str | None:
        """The name of the call that writes ``key``; None for the dataset."""
        return self._producer.get(key)

    def parents(self, name: str) -> tuple[str, ...]:
        """Calls whose data ``name`` reads."""
        return tuple(edge.source for edge in self.edges if edge.target == self[name].name)

    def children(self, name: str) -> tuple[str, ...]:
        """Calls that read data of ``name``."""
        return tuple(edge.target for edge in self.edges if edge.source == self[name].name)

    def order(self) -> list[ModelFunctionCall]:
        """The calls in an order in which they can run."""
        return [self._by_name[name] for name in self._order]

    def roles(self) -> tuple[str, ...]:
        """The roles of calls on models, in the order in which they are called first, then roles that calls only use."""
        own = [call.role for call in self.order() if call.on_model]
        return tuple(dict.fromkeys((*own, *(role for call in self.order() for role in call.weights))))

    @cached_property
    def trained_roles(self) -> tuple[str, ...]:
        """The roles that an iteration trains."""
        trained = {call.role for call in self.calls if call.kind == "train"}
        return tuple(role for role in self.roles() if role in trained)

    def calls_of(self, role: str) -> list[ModelFunctionCall]:
        """The calls on ``role``, in the order in which they can run."""
        return [call for call in self.order() if call.role == role]

    def last_of(self, role: str) -> ModelFunctionCall:
        """The call after which ``role`` has the weights of the next iteration: the last that trains it or lets it follow; for a
        role that never changes, the last that reads it. Raises `UsageError` for an unknown role."""
        read = [call for call in self.order() if role in (call.role, *call.weights_read)]
        changed = [call for call in self.order() if role in call.weights_changed]
        if not read and not changed:
            raise UsageError(f"graph '{self.name}' has no role '{role}'; {nearest(role, self.roles())}")
        return (changed or read)[-1]

    def ancestors(self, name: str) -> frozenset[str]:
        """Everything that ``name`` waits for in its iteration, directly or not."""
        return self._before[self[name].name]

    @cached_property
    def version_edges(self) -> tuple[Edge, ...]:
        """Across two iterations: the first calls that read the weights of a role (``target``, of the next iteration) wait for
        the last that changes them (``source``). ``keys`` are the roles. A call is among the first when no other call that
        reads the same weights comes before it by way of data."""
        found: dict[tuple[str, str], list[str]] = {}
        for role in self.roles():
            changing = [call.name for call in self.calls if role in call.weights_changed]
            last = [name for name in changing if not any(name in self.ancestors(other) for other in changing)]
            reading = [call.name for call in self.calls if role in call.weights]
            first = [name for name in reading if not self.ancestors(name) & set(reading)]
            for source in last:
                for target in first:
                    found.setdefault((source, target), []).append(role)
        return tuple(Edge(source, target, tuple(roles)) for (source, target), roles in found.items())

    def unroll(self, iterations: int) -> Unrolled:
        """``iterations`` in a row: each call once an iteration, data edges within, and between one iteration and the next the
        edges of weights (`version_edges`). Raises `UsageError` for fewer than one."""
        if iterations < 1:
            raise UsageError(f"graph '{self.name}': {iterations} iterations cannot be unrolled; at least 1")
        waits = []
        for i in range(iterations):
            waits += [Wait((i, e.source), (i, e.target), "data", e.keys) for e in self.edges]
            across = self.version_edges if i else ()
            waits += [Wait((i - 1, e.source), (i, e.target), "parameters", e.keys) for e in across]
        return Unrolled([Node(i, call) for i in range(iterations) for call in self.order()], waits)

    def draw(self, path: str | Path, title: str | None = None) -> Path:
        """Draw to ``path`` (.svg, .png or .pdf); returns it. Boxes are calls, coloured by kind, arrows carry keys, and dashed
        arrows are weights for which the next iteration waits. Raises `UsageError` for another suffix."""
        from guerdon.engine.drawing import draw_graph

        return draw_graph(self, Path(path), title)
