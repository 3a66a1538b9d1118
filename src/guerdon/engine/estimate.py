"""What a plan costs: seconds of an iteration and bytes a GPU, for any assignment of meshes and layouts to calls.

The estimator of ReaLHF (Mei et al. 2024, section 5) on the closed formulas of `guerdon.engine.cost`, or on profiled layers
(`guerdon.engine.profile`), with communication counted everywhere. What can be worked out before is: the cost of every layout
of every call in every number of micro-batches is kept, and a plan is put together from them.

Memory of a GPU is the sum of what stays there (weights, gradients and optimiser states of the roles that live on it) and the
most that any of its calls adds (caches, activations, weights that came for that call alone). A trained role lives where it
trains, a frozen one where its first call is; its calls elsewhere bring a copy of the weights and drop it afterwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import Call, CostModel
from guerdon.engine.graph import DataflowGraph, ParamRealloc
from guerdon.engine.meshes import ExecutionPlan
from guerdon.engine.places import Candidate, Places
from guerdon.engine.schedule import Event, Schedule
from guerdon.engine.shapes import GiB, ModelShape, Workload
from guerdon.errors import UsageError

_TOKEN = 4  # bytes of a number that goes with each token from call to call


class Estimate(NamedTuple):
    """Of a plan: ``seconds`` an iteration, ``peak`` bytes of the fullest GPU, whether that fits, the ``cost`` for a search."""

    seconds: float
    peak: float
    fits: bool
    cost: float


@dataclass(frozen=True)
class Found:
    """A plan that fits, its price, and how it was found.

    Args:
        plan: the best plan.
        estimate: its seconds and peak memory.
        start: of the plan that the walk began with: each call's fastest place. Often it does not fit.
        evaluations: plans priced.
        accepted, worse: moves made, and those of them to a plan that costs more.
        trace: (evaluations, cost of the best fitting plan) at each improvement.
        candidates: places that each call may have.
        clocked: whether the clock ended the search: then it is not to be repeated exactly.
    """

    plan: ExecutionPlan
    estimate: Estimate
    start: Estimate | None = None
    evaluations: int = 0
    accepted: int = 0
    worse: int = 0
    trace: tuple[tuple[int, float], ...] = ()
    candidates: tuple[int, ...] = ()
    clocked: bool = False

    @property
    def seconds(self) -> float:
        """Seconds of an iteration."""
        return self.estimate.seconds

    @property
    def space(self) -> int:
        """How many plans there are."""
        return math.prod(self.candidates)


class Estimator(Places):
    """Prices plans of one graph on one cluster.

    Args:
        graph, shapes, cluster, workload, costs, least, offload: see `Places`.
        iterations: in a row, over whose length the mean is taken.
        penalty: factor on the time of a plan that does not fit.

    Raises `UsageError` as `Places`.
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
        iterations: int = 5,
        penalty: float = 3.0,
    ) -> None:
        super().__init__(graph, shapes, cluster, workload, costs, least=least, offload=offload)
        self.iterations, self.penalty = iterations, penalty
        self._prepare()

    def _prepare(self) -> None:
        """Where in each plan to look for weights, and the schedule."""
        cluster, names = self.cluster, [call.name for call in self.graph.order()]
        self._calls = [self.graph[name] for name in names]
        sources: dict[str, list[int]] = {}
        self._needs: list[
            tuple[tuple[str, int], ...]
        ] = []  # of each call: roles whose weights come from a slot
        self._follows: list[tuple[tuple[str, int, int], ...]] = []  # of each call: hooks between roles
        for call in self._calls:
            wanted: list[tuple[str, int]] = []
            if call.on_model:
                roles = dict.fromkeys((call.role, *call.uses))
                moved = [h for h in call.pre if isinstance(h, ParamRealloc) and h.source != h.target]
                roles |= dict.fromkeys(hook.source for hook in moved)
                slot = self.slot_of[call.name]
                wanted = [(r, self.home[r]) for r in roles if r in self.home and self.home[r] != slot]
            self._needs.append(tuple(wanted))
            sources[call.name] = [source for _, source in wanted]
            follows = [h for h in call.post if isinstance(h, ParamRealloc) and h.source != h.target]
            self._follows.append(
                tuple(
                    (h.target, self.home[h.source], self.home[h.target])
                    for h in follows
                    if h.source in self.home and h.target in self.home
                )
            )
        self._part = [
            self.slots[self.slot_of[c.name]].calls.index(c) if c.on_model else -1 for c in self._calls
        ]
        size = _TOKEN * self.workload.batch * self.workload.length / (cluster.inter_node_gb_s * 1e9)
        delays = {
            (edge.source, edge.target): len(edge.keys) * size + cluster.collective_us * 1e-6
            for edge in self.graph.edges
        }
        hooks = {
            name: [slot for _, *pair in follows for slot in pair]
            for name, follows in zip(names, self._follows, strict=True)
        }
        self.schedule = Schedule(self.graph, self.slot_of, self.iterations, delays, sources, hooks)

    # --- one plan ---------------------------------------------------------------------------------------

    def fill(self, chosen: Sequence[Candidate]) -> tuple[list[Call | None], list[float], list[float], float]:
        """(way of each call, seconds before it, seconds of its hook, peak bytes of the fullest GPU) when the slots have these
        places: each call is made in the fastest way that fits beside what stays."""
        here = []
        for made in chosen:
            low = made.low
            here.append(sum([c.static for c in chosen if c.low <= low < c.high]))
        # of the GPUs of a mesh, the fullest is where it or another of the meshes begins
        stays = [
            max([held for held, other in zip(here, chosen, strict=True) if made.low <= other.low < made.high])
            for made in chosen
        ]
        found: list[Call | None] = []
        before, after, peak = [], [], max(here)
        for i, call in enumerate(self._calls):
            part = self._part[i]
            if part < 0:
                found.append(None)
                before.append(0.0)
                after.append(0.0)
                continue
            slot = self.slot_of[call.name]
            made = chosen[slot]
            held, moving = stays[slot], made.load
            if made.offload:
                held += made.weights
            for role, source in self._needs[i]:
                if chosen[source].place != made.place:
                    moving += self.move(role, chosen[source].place, made.place)
                    held += made.weights
            free = self.capacity - held
            for way in made.ways[part]:
                if way.active <= free:
                    break
            if held + way.active > peak:
                peak = held + way.active
            found.append(way)
            before.append(moving)
            follows = self._follows[i]
            after.append(sum(self.move(r, chosen[a].place, chosen[b].place) for r, a, b in follows))
        return found, before, after, peak

    def evaluate(self, chosen: Sequence[Candidate], events: list[Event] | None = None) -> Estimate:
        """The plan in which each slot has its place in ``chosen``."""
        ways, before, after, peak = self.fill(chosen)
        total = self.schedule.run(
            [(made.low, made.high) for made in chosen],
            [made.place for made in chosen],
            [0.0 if way is None else way.seconds for way in ways],
            before,
            after,
            events,
        )
        seconds = total / self.iterations
        fits = peak <= self.capacity
        return Estimate(seconds, peak, fits, seconds if fits else self.penalty * seconds)

    def memory(self, chosen: Sequence[Candidate]) -> tuple[tuple[int, int, float], ...]:
        """(first GPU, GPU after the last, most bytes) of each stretch of GPUs that hold the same."""
        ways, *_ = self.fill(chosen)
        edges = sorted({0, self.cluster.gpus} | {rank for made in chosen for rank in (made.low, made.high)})
        found: list[tuple[int, int, float]] = []
        for low, high in itertools.pairwise(edges):
            static = sum(made.static for made in chosen if made.low <= low < made.high)
            active = 0.0
            for i, (call, way) in enumerate(zip(self._calls, ways, strict=True)):
                made = chosen[self.slot_of[call.name]] if way is not None else None
                if made is None or way is None or not made.low <= low < made.high:
                    continue
                copies = (
                    sum(chosen[source].place != made.place for _, source in self._needs[i]) + made.offload
                )
                active = max(active, way.active + copies * made.weights)
            if found and found[-1][2] == static + active:
                found[-1] = (found[-1][0], high, static + active)
            else:
                found.append((low, high, static + active))
        return tuple(found)

    # --- plans as data ----------------------------------------------------------------------------------

    def chosen(self, plan: ExecutionPlan) -> list[Candidate]:
        """The places of a plan, slot by slot. Raises `UsageError` for a plan of another graph or cluster, calls that train a
        role in different places, and a layout that leaves replicas without sequences."""
        plan.check(self.graph)
        if (plan.nodes, plan.gpus_per_node) != (self.cluster.nodes, self.cluster.gpus_per_node):
            raise UsageError(
                f"the plan is for {plan.nodes} nodes of {plan.gpus_per_node} GPUs, not for {self.cluster.nodes} of "
                f"{self.cluster.gpus_per_node}"
            )
        found = []
        for i, slot in enumerate(self.slots):
            places = {plan.assignments[call.name] for call in slot.calls}
            if len(places) > 1:
                names = ", ".join(call.name for call in slot.calls)
                raise UsageError(f"{names} train the same role and need the same mesh and layout")
            made = self.candidate(i, *places.pop(), slot.role in plan.offload)
            if made is None:
                raise UsageError(
                    f"'{slot.calls[0].name}' has more replicas than sequences, or too few for its micro-batches"
                )
            asked = [plan.micro_batches.get(call.name) for call in slot.calls]
            ways = tuple(
                tuple(w for w in every if w.parts == n) or every if n else every
                for n, every in zip(asked, made.ways, strict=True)
            )
            found.append(made._replace(ways=ways))
        return found

    def plan(self, chosen: Sequence[Candidate], **prediction: object) -> ExecutionPlan:
        """The places in ``chosen`` as a plan, with what is expected of it."""
        ways, *_ = self.fill(chosen)
        estimate = self.evaluate(chosen)
        assignments, micro, roles = {}, {}, {}
        for call, way in zip(self._calls, ways, strict=True):
            if way is not None:
                made = chosen[self.slot_of[call.name]]
                assignments[call.name] = made.mesh, made.layout
                micro[call.name] = way.parts
                roles[call.name] = call.role, call.kind
        offload = {slot.role for slot, made in zip(self.slots, chosen, strict=True) if made.offload}
        expected = {
            "cluster": self.cluster.name,
            "seconds": round(estimate.seconds, 4),
            "peak_gib": round(estimate.peak / GiB, 3),
            "calls": {
                c.name: round(w.seconds, 4) for c, w in zip(self._calls, ways, strict=True) if w is not None
            },
            **prediction,
        }
        cluster = self.cluster
        return ExecutionPlan(
            cluster.nodes, cluster.gpus_per_node, assignments, micro, frozenset(offload), roles, expected
        )

    def estimate(self, plan: ExecutionPlan) -> Estimate:
        """What ``plan`` costs; see `chosen` for what is refused."""
        return self.evaluate(self.chosen(plan))

    # --- refusals ---------------------------------------------------------------------------------------

    def least_bytes(self) -> dict[str, float]:
        """The least that each role holds on all GPUs together, while nothing is computed."""
        return {
            slot.role: self.costs.total(self.shapes[slot.role], slot.trains)
            for slot in self.slots
            if slot.home
        }

    def refusal(self, tightest: Iterable[Estimate] = (), without: Collection[int] = ()) -> str:
        """Why nothing fits, with figures: the plan that came nearest, and the slots ``without`` any place."""
        have, need = self.cluster.gpus * self.capacity, self.least_bytes()
        parts = ", ".join(f"{role} {bytes_ / GiB:.0f}" for role, bytes_ in need.items())
        text = (
            f"no plan fits {self.cluster.gpus} GPUs with {self.capacity / GiB:.1f} GiB each ({have / GiB:.0f} GiB together): "
            f"weights, gradients and optimiser states take {sum(need.values()) / GiB:.0f} GiB ({parts})"
        )
        if sum(need.values()) > have:
            return (
                f"{text}; use at least {math.ceil(sum(need.values()) / self.capacity)} GPUs or smaller models"
            )
        if without:
            names = ", ".join(call.name for i in without for call in self.slots[i].calls)
            text += f", and {names} fits no mesh even alone"
        else:
            peak = min((estimate.peak for estimate in tightest), default=math.inf)
            if peak < math.inf:
                text += f", and the plan that comes nearest needs {peak / GiB:.1f} GiB a GPU with its caches and activations"
        more = ["use more GPUs", "fewer or shorter sequences"]
        if not self.may_offload:
            more.append("offload the frozen models")
        return f"{text}; {', '.join(more[:-1])} or {more[-1]}"
