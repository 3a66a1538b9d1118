"""Plans that one would make without a search, priced by the same estimator as those that a search finds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from guerdon.engine.estimate import Estimate, Estimator, Found
from guerdon.engine.mapping import pool_sizes
from guerdon.engine.meshes import DeviceMesh
from guerdon.engine.places import Candidate
from guerdon.engine.protocols import Layout
from guerdon.errors import UsageError, nearest

BASELINES = ("symmetric", "megatron_heuristic", "disjoint")
"""Plans without a search."""


def baseline(estimator: Estimator, name: str) -> Found | None:
    """A plan without a search, by the same estimator; None where it does not fit.

    "symmetric": every call on all GPUs with the same layout, the best one. "megatron_heuristic": every call on all GPUs, tensor
    parallel inside a node, as large as may be, pipeline stages across the nodes, replicas with what is left. "disjoint": each
    role on GPUs of its own, the best way to share them out and the best layouts.

    Raises `UsageError` for another name.
    """
    if name not in BASELINES:
        raise UsageError(f"no baseline is called '{name}'; {nearest(name, BASELINES)}")
    if name == "disjoint":
        plans: Iterator[Sequence[Candidate]] = _disjoint(estimator)
    else:
        plans = _symmetric(estimator, name == "megatron_heuristic")
    best: tuple[Estimate, Sequence[Candidate]] | None = None
    tried = 0
    for chosen in plans:
        tried += 1
        found = estimator.evaluate(chosen)
        if found.fits and (best is None or found.seconds < best[0].seconds):
            best = found, chosen
    if best is None:
        return None
    return Found(estimator.plan(best[1], plan=name), best[0], evaluations=tried)


def _symmetric(estimator: Estimator, heuristic: bool) -> Iterator[list[Candidate]]:
    cluster = estimator.cluster
    mesh = DeviceMesh(0, cluster.nodes, 0, cluster.gpus_per_node)
    roles = {slot.role for slot in estimator.slots}
    shared = [set(estimator.layouts(role, cluster.gpus)) for role in roles]
    layouts = sorted(set.intersection(*shared), key=lambda one: (one.pp, one.tp))
    if heuristic:
        widest = max((one.tp for one in layouts), default=1)
        inside = [one for one in layouts if one.tp == widest and one.pp <= cluster.nodes]
        layouts = inside[-1:]
    for layout in layouts:
        chosen = _complete(estimator, [(mesh, layout)] * len(estimator.slots))
        if chosen is not None:
            yield chosen


def _complete(estimator: Estimator, places: Sequence[tuple[DeviceMesh, Layout]]) -> list[Candidate] | None:
    """Candidates at ``places``, offloaded only where that is the rule."""
    made = [
        estimator.candidate(i, mesh, layout, estimator.choices(i)[0])
        for i, (mesh, layout) in enumerate(places)
    ]
    return None if None in made else [one for one in made if one is not None]


def _disjoint(estimator: Estimator) -> Iterator[list[Candidate]]:
    """Every way to share the GPUs out among the roles; on its own GPUs a role has the layouts that take it least time."""
    cluster = estimator.cluster
    roles = list(dict.fromkeys(slot.role for slot in estimator.slots))
    n = cluster.gpus_per_node
    sizes = [s for s in pool_sizes(cluster.gpus, n) if s >= min(estimator.least, n)]
    layouts = {(role, size): _alone(estimator, role, size) for role in roles for size in sizes}

    def share(left: int, rest: Sequence[str]) -> Iterator[tuple[int, ...]]:
        if not rest:
            yield ()
            return
        for size in sizes:
            if size <= left and layouts[rest[0], size] is not None:
                for more in share(left - size, rest[1:]):
                    yield (size, *more)

    for chosen in share(cluster.gpus, roles):
        first, at = {}, 0
        for role, size in sorted(zip(roles, chosen, strict=True), key=lambda one: -one[1]):
            first[role], at = (at, size), at + size  # the largest first: no part of a node straddles two
        places = []
        number = dict.fromkeys(roles, 0)
        for slot in estimator.slots:
            begin, size = first[slot.role]
            mesh = _mesh(begin, size, n)
            places.append((mesh, layouts[slot.role, size][number[slot.role]]))  # type: ignore[index]
            number[slot.role] += 1
        made = _complete(estimator, places)
        if made is not None:
            yield made


def _mesh(begin: int, size: int, gpus_per_node: int) -> DeviceMesh:
    node, first = divmod(begin, gpus_per_node)
    if size < gpus_per_node:
        return DeviceMesh(node, 1, first, size)
    return DeviceMesh(node, size // gpus_per_node, 0, gpus_per_node)


def _alone(estimator: Estimator, role: str, size: int) -> list[Layout] | None:
    """The layout of each of ``role``'s slots when it has ``size`` GPUs for itself; None: it does not fit."""
    mine = [i for i, slot in enumerate(estimator.slots) if slot.role == role]
    mesh = _mesh(0, size, estimator.cluster.gpus_per_node)
    best: tuple[float, list[Layout]] | None = None
    home = mine.index(estimator.home[role])
    every = estimator.layouts(role, size)
    for base in every:
        at_home = estimator.candidate(mine[home], mesh, base, estimator.choices(mine[home])[0])
        if at_home is None:
            continue
        total = 0.0
        chosen: list[Layout] = []
        for i, slot in enumerate(mine):
            found: tuple[float, Layout] | None = None
            for layout in [base] if i == home else every:
                made = estimator.candidate(slot, mesh, layout, estimator.choices(slot)[0])
                if made is None:
                    continue
                elsewhere = layout != base
                moving = estimator.move(role, at_home.place, made.place) if elsewhere else made.load
                free = (
                    estimator.capacity - at_home.static - (made.weights if elsewhere or made.offload else 0.0)
                )
                for ways in made.ways:
                    moving += next((way.seconds for way in ways if way.active <= free), math.inf)
                if moving < math.inf and (found is None or moving < found[0]):
                    found = moving, layout
            if found is None:
                break
            total, chosen = total + found[0], [*chosen, found[1]]
        if len(chosen) == len(mine) and (best is None or total < best[0]):
            best = total, chosen
    return None if best is None else best[1]
