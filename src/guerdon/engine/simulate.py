"""What happens when under a plan: every call of some iterations with its GPUs, its beginning and its end, and a picture of it.

Simulated from an estimator's times, never measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import CostModel
from guerdon.engine.estimate import Estimator
from guerdon.engine.graph import DataflowGraph
from guerdon.engine.meshes import DeviceMesh, ExecutionPlan
from guerdon.engine.schedule import Event
from guerdon.engine.shapes import ModelShape, Workload


@dataclass(frozen=True)
class Row:
    """Something that keeps GPUs busy from ``start`` to ``end`` seconds.

    ``kind`` is the call's ("generate", "inference", "train"), or "weights" while weights move for it or, by a hook, after it.
    ``meshes`` are all busy.
    """

    call: str
    role: str
    kind: str
    iteration: int
    meshes: tuple[DeviceMesh, ...]
    start: float
    end: float

    def overlaps(self, other: Row) -> bool:
        """Whether both need the same GPU."""
        return any(mine.overlaps(theirs) for mine in self.meshes for theirs in other.meshes)


@dataclass(frozen=True)
class Timeline:
    """Rows in the order in which they start, for a cluster of ``nodes`` with ``gpus_per_node`` GPUs.

    ``memory`` is (first GPU, GPU after the last, bytes) of each stretch of GPUs that hold the same at most; ``capacity`` what
    one may hold.
    """

    rows: tuple[Row, ...]
    nodes: int
    gpus_per_node: int
    iterations: int
    memory: tuple[tuple[int, int, float], ...]
    capacity: float
    measured: bool = False  # by a clock; else simulated

    @property
    def total(self) -> float:
        """Seconds of all iterations."""
        return max(row.end for row in self.rows)

    @property
    def seconds(self) -> float:
        """Seconds of an iteration, on average."""
        return self.total / self.iterations

    @property
    def peak(self) -> float:
        """Bytes of the fullest GPU."""
        return max(bytes_ for *_, bytes_ in self.memory)

    @property
    def busy(self) -> float:
        """The share of all GPUs' time in which something runs on them."""
        used = 0.0
        for row in self.rows:
            ranks = {rank for mesh in row.meshes for rank in mesh.ranks(self.gpus_per_node)}
            used += len(ranks) * (row.end - row.start)
        return used / (self.total * self.nodes * self.gpus_per_node)

    def seconds_of(self, kind: str) -> float:
        """Seconds of all rows of a kind, side by side or not, in one iteration on average."""
        return sum(row.end - row.start for row in self.rows if row.kind == kind) / self.iterations

    def draw(self, path: str | Path, title: str = "", iterations: int = 2) -> Path:
        """Draw the first ``iterations`` to ``path`` (.png, .svg or .pdf): GPUs from top to bottom, time from left to right."""
        from guerdon.engine.drawing_timeline import draw_timeline

        return draw_timeline(self, Path(path), title, iterations)


def timeline(estimator: Estimator, plan: ExecutionPlan) -> Timeline:
    """What happens when under ``plan``, by an estimator that is there already. Raises `UsageError` as `Estimator.chosen`."""
    chosen = estimator.chosen(plan)
    events: list[Event] = []
    estimator.evaluate(chosen, events)
    calls = estimator.graph.order()
    rows = []
    for event in events:
        call = calls[event.call]
        rows.append(
            Row(
                call.name,
                call.role,
                call.kind if event.phase == "call" else "weights",
                event.iteration,
                tuple(dict.fromkeys(chosen[slot].mesh for slot in event.slots)),
                event.start,
                event.end,
            )
        )
    rows.sort(key=lambda row: (row.start, row.end))
    cluster = estimator.cluster
    return Timeline(
        tuple(rows),
        cluster.nodes,
        cluster.gpus_per_node,
        estimator.iterations,
        estimator.memory(chosen),
        estimator.capacity,
    )


def simulate(
    graph: DataflowGraph,
    plan: ExecutionPlan,
    cluster: ClusterSpec,
    workload: Workload | None,
    shapes: Mapping[str, ModelShape],
    *,
    costs: CostModel | None = None,
    iterations: int = 5,
) -> Timeline:
    """The timeline of ``plan`` for some iterations of ``graph``; arguments as for `Estimator`.

    Raises `UsageError` for a plan of another graph or cluster.
    """
    offload = bool(plan.offload)
    estimator = Estimator(
        graph, shapes, cluster, workload, costs, least=1, offload=offload, iterations=iterations
    )
    return timeline(estimator, plan)
