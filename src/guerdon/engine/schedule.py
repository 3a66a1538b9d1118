"""List scheduling of a graph's calls over several iterations: who runs when, if calls that share GPUs take turns.

The inner loop of the planner (Mei et al. 2024, section 5): of the calls whose data are made, the one whose were made first
starts as soon as they have arrived and all its GPUs are free. Meshes are intervals of ranks, so that overlap is two
comparisons; numbers only, no objects, because a search runs this some ten thousand times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from guerdon.engine.graph import DataflowGraph


class Event(NamedTuple):
    """Something that takes time: ``phase`` "before" (weights arrive), "call" or "after" (weights follow in a hook)."""

    iteration: int
    call: int
    phase: str
    slots: tuple[int, ...]
    start: float
    end: float


class Schedule:
    """The order of calls, prepared for one graph and run for many plans.

    Args:
        graph: of one iteration.
        slots: name of a call on a model -> which of the plan's places it has; other calls take neither time nor GPUs.
        iterations: so many in a row.
        delays: (name, name) of an edge -> seconds that the data are on their way between different places. They keep nobody
            busy.
        sources: name of a call -> the places that its weights come from, busy while they do.
        hooks: name of a call -> the places that are busy after it while weights of another role follow.
    """

    def __init__(
        self,
        graph: DataflowGraph,
        slots: Mapping[str, int],
        iterations: int,
        delays: Mapping[tuple[str, str], float] | None = None,
        sources: Mapping[str, Sequence[int]] | None = None,
        hooks: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self.calls = [call.name for call in graph.order()]
        self.iterations = iterations
        self.slot = [slots.get(name, -1) for name in self.calls]
        self.sources = [tuple((sources or {}).get(name, ())) for name in self.calls]
        self.hooks = [tuple((hooks or {}).get(name, ())) for name in self.calls]
        number = {name: i for i, name in enumerate(self.calls)}
        n = len(self.calls)
        following: list[list[tuple[int, float]]] = [[] for _ in range(n * iterations)]
        waits = [0] * (n * iterations)
        for i in range(iterations):
            for edge in graph.edges:
                delay = (delays or {}).get((edge.source, edge.target), 0.0)
                following[i * n + number[edge.source]].append((i * n + number[edge.target], delay))
                waits[i * n + number[edge.target]] += 1
            for edge in graph.version_edges if i else ():
                following[(i - 1) * n + number[edge.source]].append((i * n + number[edge.target], 0.0))
                waits[i * n + number[edge.target]] += 1
            # a call that needs nothing of the iteration before still follows itself, and no iteration overtakes the one
            # before the last
            for root in (number[name] for name in self.calls if i and not graph.parents(name)):
                before = [(i - 1) * n + root, *((i - 2) * n + call for call in range(n) if i > 1)]
                for node in before:
                    following[node].append((i * n + root, 0.0))
                waits[i * n + root] += len(before)
        self.following = [tuple(nodes) for nodes in following]
        self.waits = waits
        self.first = [(0.0, node) for node, count in enumerate(waits) if not count]
        heapify(self.first)

    def run(
        self,
        spans: Sequence[tuple[int, int]],
        places: Sequence[int],
        seconds: Sequence[float],
        before: Sequence[float],
        after: Sequence[float],
        events: list[Event] | None = None,
    ) -> float:
        """Seconds until everything has ended.

        Args:
            spans: (first rank, rank after the last) of each place.
            places: a number for each place, the same for the same mesh and layout: between those no data travel.
            seconds: of each call, in the order of ``calls``.
            before: seconds until its weights are there, with the places in ``sources`` busy as well.
            after: seconds of its hook.
            events: filled with what happens, if given.
        """
        n, count = len(self.calls), len(spans)
        meeting: list[list[int]] = [[] for _ in range(count)]
        for i in range(count):
            low, high = spans[i]
            for j in range(i + 1):
                if spans[j][0] < high and low < spans[j][1]:
                    meeting[i].append(j)
                    if i != j:
                        meeting[j].append(i)
        busy = [0.0] * count  # until when the last task on each place runs
        waits, ready, order = self.waits.copy(), [0.0] * len(self.waits), [0.0] * len(self.waits)
        queue = self.first.copy()
        slots, following, sources, hooks = self.slot, self.following, self.sources, self.hooks
        last = 0.0
        while queue:
            _, node = heappop(queue)
            start = ready[node]
            call = node % n
            slot = slots[call]
            end = start
            if slot >= 0:
                for other in meeting[slot]:
                    if busy[other] > start:
                        start = busy[other]
                if before[call]:
                    for source in sources[call]:
                        for other in meeting[source]:
                            if busy[other] > start:
                                start = busy[other]
                    begin, start = start, start + before[call]
                    for source in sources[call]:
                        if start > busy[source]:
                            busy[source] = start
                    if events is not None:
                        used = (*dict.fromkeys((*sources[call], slot)),)
                        events.append(Event(node // n, call, "before", used, begin, start))
                end = start + seconds[call]
                busy[slot] = end
                if events is not None:
                    events.append(Event(node // n, call, "call", (slot,), start, end))
                if after[call]:
                    start = end
                    for place in hooks[call]:
                        for other in meeting[place]:
                            if busy[other] > start:
                                start = busy[other]
                    end = start + after[call]
                    for place in hooks[call]:
                        busy[place] = end
                    if events is not None:
                        events.append(Event(node // n, call, "after", hooks[call], start, end))
                if end > last:
                    last = end
            for child, delay in following[node]:
                when = end
                if when > order[child]:
                    order[child] = when
                if delay:
                    other = slots[child % n]
                    if other >= 0 and slot >= 0 and places[other] != places[slot]:
                        when += delay
                if when > ready[child]:
                    ready[child] = when
                waits[child] -= 1
                if not waits[child]:
                    heappush(queue, (order[child], child))
        return last
