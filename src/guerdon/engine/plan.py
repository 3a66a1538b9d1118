"""The search for an execution plan: for every call of an iteration the GPUs and the layout that make the whole fastest.

`search_plan` walks over plans by the rule of Metropolis and Hastings, as ReaLHF does (Mei et al. 2024, section 5.2): one call
gets another place, and the plan is kept with probability min(1, exp(-beta (cost' - cost))), so that plans are visited in
proportion to exp(-beta cost). Chains start from each call's fastest place and, if that does not fit, from a plan with little
memory; the second half of a search starts from the best plan of the first, and in the end every single change is tried.
`exhaustive` tries everything on tiny clusters. `symmetric`, `megatron_heuristic` and `disjoint` are what one would do without
a search. All are priced by the same `Estimator`, and its seconds are simulated, not measured.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

from guerdon.engine.baselines import BASELINES, baseline
from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import CostModel
from guerdon.engine.estimate import Candidate, Estimate, Estimator, Found
from guerdon.engine.graph import DataflowGraph
from guerdon.engine.meshes import DeviceMesh, ExecutionPlan, meshes
from guerdon.engine.shapes import ModelShape, Workload
from guerdon.errors import UsageError

__all__ = [
    "BASELINES",
    "BETAS",
    "DeviceMesh",
    "Estimator",
    "ExecutionPlan",
    "Found",
    "baseline",
    "exhaustive",
    "meshes",
    "search",
    "search_plan",
]

BETAS = (10.0, 20.0, 50.0)
"""Chains of a search: beta in units of one over the seconds of a plan to start from. Small ones wander, large ones descend."""

Progress = Callable[[float, float | None], None]
"""Called with the share of the search that is done and the seconds of the best plan so far (None: none fits yet)."""


def search_plan(
    graph: DataflowGraph,
    cluster: ClusterSpec,
    workload: Workload | None,
    shapes: Mapping[str, ModelShape],
    seconds: float | None = None,
    seed: int = 0,
    *,
    costs: CostModel | None = None,
    least: int | None = None,
    offload: bool = False,
    chains: Sequence[float] = BETAS,
    evaluations: int = 60_000,
    progress: Progress | None = None,
) -> Found:
    """The best plan found for ``graph`` on ``cluster``.

    Args:
        graph, cluster, workload, shapes, costs, least, offload: see `Estimator`.
        seconds: stop after so long; None: after ``evaluations``, which gives the same plan every time.
        seed: of the walks.
        chains: a beta for each; they take turns of equal length.
        progress: told now and then how far the search is.

    Raises `UsageError` that says with figures why nothing fits.
    """
    estimator = Estimator(graph, shapes, cluster, workload, costs, least=least, offload=offload)
    return search(estimator, seconds, seed, chains=chains, evaluations=evaluations, progress=progress)


def search(
    estimator: Estimator,
    seconds: float | None = None,
    seed: int = 0,
    *,
    chains: Sequence[float] = BETAS,
    evaluations: int = 60_000,
    keep: int = 1000,
    progress: Progress | None = None,
) -> Found:
    """As `search_plan`, with an estimator that is there already; ``keep``: places that a call may have, its fastest."""
    if not chains or min(chains) <= 0 or evaluations < 1 or (seconds is not None and seconds <= 0):
        raise UsageError("a search needs chains with beta above 0, and some evaluations or seconds to take")
    began = time.monotonic()
    options = _options(estimator, keep)
    start = [places[0] for places in options]
    first = estimator.evaluate(start)
    walk = _Walk(estimator, options, first)

    def share() -> float:
        return (time.monotonic() - began) / seconds if seconds is not None else walk.evaluations / evaluations

    def tell() -> None:
        if progress is not None:
            progress(min(share(), 1.0), walk.best_cost if walk.best else None)

    walk.tell = tell
    tell()
    walk.note(start, first)
    starts = [(start, first)]
    if not first.fits:
        roomy = walk.shrink(start)
        starts.append((roomy, estimator.evaluate(roomy)))
        walk.scale = min(one.seconds for _, one in starts)
    clocked, again = False, False
    walks = walk.chains(starts, chains, f"{seed}")
    while True:
        # the chains take turns of a hundred steps, so that the clock is as fair as the count
        for steps in walks:
            for _ in range(100):
                next(steps)
        if (used := share()) >= 1:
            clocked = seconds is not None
            break
        if used >= 0.5 and not again and walk.best is not None:
            again = True  # the second half starts from the best plan of the first
            walks = walk.chains([(walk.best, estimator.evaluate(walk.best))], chains, f"{seed} again")
    if walk.best is None:
        raise UsageError(estimator.refusal([walk.nearest]))
    walk.polish()
    tell()
    plan = estimator.plan(walk.best, plan="searched", seed=seed, evaluations=walk.evaluations)
    return Found(
        plan,
        estimator.evaluate(walk.best),
        first,
        walk.evaluations,
        walk.accepted,
        walk.worse,
        tuple(walk.trace),
        tuple(map(len, options)),
        clocked,
    )


class _Walk:
    """Chains over plans that share their best."""

    def __init__(self, estimator: Estimator, options: Sequence[Sequence[Candidate]], first: Estimate) -> None:
        self.estimator, self.options = estimator, options
        self.best: list[Candidate] | None = None
        self.best_cost = math.inf
        self.scale = first.seconds
        self.nearest = first  # the estimate with the least memory, for a refusal
        self.evaluations = self.accepted = self.worse = 0
        self.trace: list[tuple[int, float]] = []
        self.tell: Callable[[], None] = lambda: None
        self.beside: list[dict[DeviceMesh, list[Candidate]]] = [{} for _ in options]
        for groups, places in zip(self.beside, options, strict=True):
            for place in places:
                groups.setdefault(place.mesh, []).append(place)

    def chains(
        self, starts: Sequence[tuple[Sequence[Candidate], Estimate]], betas: Sequence[float], seed: str
    ) -> list[Iterator[None]]:
        """A walk from each start with each beta."""
        every = enumerate(itertools.product(starts, betas))
        return [self.chain(*start, beta, random.Random(f"{seed} {i}")) for i, (start, beta) in every]

    def note(self, chosen: Sequence[Candidate], found: Estimate) -> None:
        self.evaluations += 1
        if self.evaluations % 500 == 0:
            self.tell()
        if found.peak < self.nearest.peak:
            self.nearest = found
        if found.fits and found.cost < self.best_cost:
            self.best, self.best_cost = list(chosen), found.cost
            self.trace.append((self.evaluations, found.cost))

    def chain(
        self, start: Sequence[Candidate], first: Estimate, beta: float, dice: random.Random
    ) -> Iterator[None]:
        """One walk, a step at a time. A step gives one call any other place, or another layout on its mesh, or two calls any
        other places, or all calls of a role that are in one place another one in common. Each proposal is as likely as its
        way back, so the rule of acceptance is that of the docstring above."""
        now, cost = list(start), first.cost
        movable = [i for i, places in enumerate(self.options) if len(places) > 1]
        shared = [(slots, places) for slots, places in self._near if len(slots) > 1 and places]
        while True:
            if not movable:
                self.evaluations += 1
                yield
                continue
            kept, kind = list(now), dice.random()
            if kind < 0.1 and shared:
                slots, together = shared[int(dice.random() * len(shared))]
                if len({now[slot].place for slot in slots}) == 1:
                    chosen = together[int(dice.random() * len(together))]
                    for slot, place in zip(slots, chosen, strict=True):
                        now[slot] = place
            else:
                for _ in range(2 if kind < 0.35 else 1):
                    slot = movable[int(dice.random() * len(movable))]
                    places = self.options[slot] if kind < 0.75 else self.beside[slot][now[slot].mesh]
                    now[slot] = places[int(dice.random() * len(places))]
            found = self.estimator.evaluate(now)
            self.note(now, found)
            rise = found.cost - cost
            if rise <= 0 or dice.random() < math.exp(-beta * rise / self.scale):
                self.accepted += 1
                self.worse += rise > 0
                cost = found.cost
            else:
                now = kept
            yield

    def shrink(self, start: Sequence[Candidate]) -> list[Candidate]:
        """The plan with the least memory that steps of `_near` lead to: a place to start from that fits, if there is one."""
        now, found = list(start), self.estimator.evaluate(start)
        least = (found.peak, math.inf)
        better = True
        while better and not found.fits:
            before = least
            for slots, places in self._near:
                for made in places:
                    trial = list(now)
                    for slot, place in zip(slots, made, strict=True):
                        trial[slot] = place
                    tried = self.estimator.evaluate(trial)
                    self.note(trial, tried)
                    size = tried.peak, sum(one.static * one.mesh.size for one in trial)
                    if size < least:
                        now, found, least = trial, tried, size
            better = least < before
        return now

    def polish(self) -> None:
        """Every step of `_near` from the best plan, until none helps."""
        better = True
        while better and self.best is not None:
            before = self.best_cost
            for slots, places in self._near:
                trial = list(self.best)
                for made in places:
                    for slot, place in zip(slots, made, strict=True):
                        trial[slot] = place
                    self.note(trial, self.estimator.evaluate(trial))
            better = self.best_cost < before

    @cached_property
    def _near(self) -> list[tuple[tuple[int, ...], list[tuple[Candidate, ...]]]]:
        """Steps to try in turn: another place for one slot, or the same one for all slots of a role, which spares copies."""
        found: list[tuple[tuple[int, ...], list[tuple[Candidate, ...]]]] = []
        for slot, places in enumerate(self.options):
            found.append(((slot,), [(place,) for place in places]))
        roles = [slot.role for slot in self.estimator.slots]
        for role in dict.fromkeys(roles):
            mine = tuple(i for i, other in enumerate(roles) if other == role)
            if len(mine) > 1:
                tables = [{made.place: made for made in self.options[slot]} for slot in mine]
                shared = [place for place in tables[0] if all(place in table for table in tables)]
                found.append((mine, [tuple(table[place] for table in tables) for place in shared]))
        return found


def _options(estimator: Estimator, keep: int) -> list[list[Candidate]]:
    """The places that each slot may have. Raises `UsageError` where one has none."""
    options = [estimator.candidates(slot, keep) for slot in range(len(estimator.slots))]
    without = [slot for slot, places in enumerate(options) if not places]
    if without:
        raise UsageError(estimator.refusal(without=without))
    return options


def exhaustive(estimator: Estimator, keep: int = 6) -> Found:
    """The best of all plans in which each call has one of its ``keep`` fastest places. Raises `UsageError` where none fits."""
    options = _options(estimator, keep)
    first = estimator.evaluate([places[0] for places in options])
    walk = _Walk(estimator, options, first)
    for chosen in itertools.product(*options):
        walk.note(chosen, estimator.evaluate(chosen))
    if walk.best is None:
        raise UsageError(estimator.refusal([walk.nearest]))
    plan = estimator.plan(walk.best, plan="exhaustive")
    sizes = tuple(map(len, options))
    return Found(plan, estimator.evaluate(walk.best), first, walk.evaluations, candidates=sizes)
