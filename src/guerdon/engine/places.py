"""The places that calls of a graph may have on a cluster, and what each call costs there.

A `Candidate` is a mesh with a layout for one call (or for all calls that train a role), with its costs in every number of
micro-batches worth having. `guerdon.engine.estimate` puts them together to plans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import Call, CostModel
from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, Offload
from guerdon.engine.meshes import DeviceMesh, meshes
from guerdon.engine.protocols import Layout
from guerdon.engine.shapes import ModelShape, Workload, layouts_of
from guerdon.errors import UsageError


class Candidate(NamedTuple):
    """A place for one or several calls: GPUs ``low .. high``, bytes that stay there and that come with a call from elsewhere,
    seconds to bring offloaded weights back, and for each call its ways, fastest first."""

    mesh: DeviceMesh
    layout: Layout
    offload: bool
    low: int
    high: int
    place: int
    static: float
    weights: float
    load: float
    ways: tuple[tuple[Call, ...], ...]


class Slot(NamedTuple):
    """Calls that have one place together: a call alone, or all that train a role. ``home``: the role's weights stay here."""

    role: str
    calls: tuple[ModelFunctionCall, ...]
    home: bool
    trains: bool


class Places:
    """Everything about single calls on one cluster, worked out once.

    Args:
        graph: the calls of an iteration.
        shapes: role -> sizes of its model, for every role of ``graph.roles()``.
        cluster: the machines.
        workload: batch, lengths, minibatches.
        costs: seconds and bytes of single calls; by default the closed formulas for ``cluster``.
        least: GPUs of the smallest mesh; None: 4, or 1 on at most 8 GPUs.
        offload: whether frozen models may stay in the host's memory between calls. Roles that the graph's own hooks offload
            always do.

    Raises `UsageError` for a role without a shape and a graph without calls on models.
    """

    def __init__(
        self,
        graph: DataflowGraph,
        shapes: Mapping[str, ModelShape],
        cluster: ClusterSpec,
        workload: Workload | None = None,
        costs: CostModel | None = None,
        *,
        least: int | None = None,
        offload: bool = False,
    ) -> None:
        self.graph, self.cluster, self.shapes = graph, cluster, dict(shapes)
        self.workload = workload or Workload()
        self.costs = costs or CostModel(cluster)
        self.may_offload = offload
        self.capacity = cluster.memory
        self.least = (1 if cluster.gpus <= 8 else 4) if least is None else least
        self.meshes = meshes(cluster, self.least)
        for role in graph.roles():
            if role not in self.shapes:
                raise UsageError(f"no model shape is given for role '{role}' of graph '{graph.name}'")
        hooks = [hook for call in graph.calls for hook in call.post]
        self.offloaded = {hook.role for hook in hooks if isinstance(hook, Offload)} - set(graph.trained_roles)
        self.slots = self._slots()
        if not self.slots:
            raise UsageError(f"graph '{graph.name}' has no call on a model, so there is nothing to place")
        self.slot_of = {call.name: i for i, slot in enumerate(self.slots) for call in slot.calls}
        self.home = {slot.role: i for i, slot in enumerate(self.slots) if slot.home}
        self._places: dict[tuple[DeviceMesh, Layout], int] = {}
        self._ways: dict[tuple[str, Layout], tuple[Call, ...]] = {}
        self._moves: dict[tuple[str, int, int], float] = {}
        self._where: list[tuple[DeviceMesh, Layout]] = []

    # --- structure --------------------------------------------------------------------------------------

    def _slots(self) -> list[Slot]:
        found: list[Slot] = []
        trained = self.graph.trained_roles
        seen: set[str] = set()
        for call in self.graph.order():
            if not call.on_model:
                continue
            if call.kind == "train":
                if call.role not in seen:
                    calls = tuple(c for c in self.graph.calls_of(call.role) if c.kind == "train")
                    found.append(Slot(call.role, calls, True, True))
                    seen.add(call.role)
            else:
                home = call.role not in trained and call.role not in seen
                found.append(Slot(call.role, (call,), home, False))
                if home:
                    seen.add(call.role)
        return found

    # --- candidates -------------------------------------------------------------------------------------

    def work(self, call: ModelFunctionCall) -> Workload:
        """The workload of one call: the graph's own numbers where it has them."""
        minibatches = call.minibatches if call.minibatches > 1 else self.workload.minibatches
        return replace(self.workload, batch=call.sequences or self.workload.batch, minibatches=minibatches)

    def ways(self, call: ModelFunctionCall, layout: Layout) -> tuple[Call, ...]:
        """What ``call`` costs with ``layout``, in every number of micro-batches worth having; fastest first."""
        key = (call.name, layout)
        if key not in self._ways:
            shape, work = self.shapes[call.role], self.work(call)
            found = self.costs.ways(call.kind, shape, layout, work, call.micro_batches)
            self._ways[key] = tuple(found)
        return self._ways[key]

    def candidate(
        self, slot: int, mesh: DeviceMesh, layout: Layout, offload: bool = False
    ) -> Candidate | None:
        """Calls of ``slot`` on ``mesh`` with ``layout``; None where a replica would have nothing to do."""
        what = self.slots[slot]
        ways = tuple(self.ways(call, layout) for call in what.calls)
        if not all(ways):
            return None
        shape, costs = self.shapes[what.role], self.costs
        place = self._places.setdefault((mesh, layout), len(self._places))
        if place == len(self._where):
            self._where.append((mesh, layout))
        low, high = mesh.span(self.cluster.gpus_per_node)
        weights, static, load = costs.weights(shape, layout), 0.0, 0.0
        if what.home and not offload:
            static = costs.resident(shape, layout, what.trains)
        if offload:
            load = costs.load(shape, layout)
        return Candidate(mesh, layout, offload, low, high, place, static, weights, load, ways)

    def layouts(self, role: str, gpus: int) -> list[Layout]:
        """Layouts of ``role`` on ``gpus``: tp inside a node and at most 8, pp at most 8 or as many as there are nodes."""
        deepest = max(self.cluster.nodes, 8)
        found = layouts_of(self.shapes[role], gpus, self.cluster.gpus_per_node)
        return [layout for layout in found if layout.pp <= deepest]

    def choices(self, slot: int) -> list[bool]:
        """Whether the weights of ``slot``'s role may be offloaded, must be, or cannot."""
        role = self.slots[slot].role
        if role in self.offloaded:
            return [True]
        frozen = role not in self.graph.trained_roles
        alone = sum(other.role == role for other in self.slots) == 1
        return [False, True] if self.may_offload and frozen and alone else [False]

    def candidates(self, slot: int, keep: int = 1000) -> list[Candidate]:
        """Every place for ``slot`` that fits by itself, the fastest ``keep`` first.

        Left out are layouts that another on the same mesh beats in memory and in time, whatever memory is left. Where weights
        travel it has to win by more than their way takes and with their copy beside it; where a role trains, every place stays
        that its other calls might share.
        """
        found: list[tuple[float, Candidate]] = []
        what = self.slots[slot]
        travels = sum(other.role == what.role for other in self.slots) > 1
        shared: set[int] = set()
        for other, sibling in enumerate(self.slots) if travels and what.home else ():
            if sibling.role == what.role and not sibling.home:
                shared |= {made.place for made in self.candidates(other, keep)}
        for mesh in self.meshes:
            here = []
            for layout in self.layouts(what.role, mesh.size):
                for offload in self.choices(slot):
                    made = self.candidate(slot, mesh, layout, offload)
                    times = self._times(made) if made else [math.inf]
                    if made is not None and times[0] < math.inf:
                        here.append((times, made))
            kept: list[tuple[list[float], Candidate]] = []
            for times, made in sorted(here, key=lambda one: (one[0], one[1].static)):
                if made.place not in shared and any(
                    other.static <= made.static and all(map(float.__le__, theirs, times))
                    for theirs, other in kept
                ):
                    continue
                slack = self._slack(made)
                kept.append(
                    ([t + slack for t in self._times(made, made.weights)] if travels else times, made)
                )
                found.append((times[0], made))
        found.sort(key=lambda one: (one[0], one[1].mesh.size, one[1].place, one[1].offload))
        return [made for _, made in found[:keep]]

    def _times(self, made: Candidate, held: float = 0.0) -> list[float]:
        """Seconds with all of the memory that is left, 15/16 of it, 14/16 and so on, less ``held`` bytes each time."""
        free = self.capacity - made.static - (made.weights if made.offload else 0.0)
        found = []
        for parts in range(16, 0, -1):
            total = made.load * len(made.ways)
            for ways in made.ways:
                total += next(
                    (way.seconds for way in ways if way.active <= free * parts / 16 - held), math.inf
                )
            found.append(total)
        return found

    def _slack(self, made: Candidate) -> float:
        """The most that bringing the weights here may take."""
        rate = min(self.cluster.inter_node_gb_s, self.cluster.intra_node_gb_s) * 1e9
        return made.weights / rate + self.cluster.reallocation_ms * 1e-3

    def move(self, role: str, source: int, target: int) -> float:
        """Seconds to bring ``role``'s weights from one place to another (numbers of places).

        They come from inside the nodes where each node of the target holds the whole model already.
        """
        key = (role, source, target)
        if key not in self._moves:
            (old, before), (new, after) = self._where[source], self._where[target]
            inside = old.first_node <= new.first_node and (
                new.first_node + new.nodes <= old.first_node + old.nodes
            )
            whole = inside and (before.pp == 1 or old.nodes == 1)
            self._moves[key] = self.costs.reallocate(
                self.shapes[role], before, after, same_gpus=old == new, across_nodes=not whole
            )
        return self._moves[key]
