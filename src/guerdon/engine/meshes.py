"""Where each call of an iteration runs: a mesh of GPUs and a parallel layout for every call, as data and as a file.

A `guerdon.engine.mapping.Placement` gives a role its processes for the whole run; an `ExecutionPlan` gives every *call* its
own GPUs and layout, as ReaLHF does (Mei et al. 2024, section 4), and the weights move between calls.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.graph import MODEL_KINDS, DataflowGraph
from guerdon.engine.mapping import Placement
from guerdon.engine.protocols import Layout
from guerdon.engine.shapes import brief
from guerdon.errors import DataError, UsageError, nearest


@dataclass(frozen=True, order=True)
class DeviceMesh:
    """GPUs ``first_gpu .. first_gpu + gpus`` of each of the nodes ``first_node .. first_node + nodes``.

    Which rectangles of a cluster are legal says `fault`: whole consecutive nodes, or a part of one node whose size is a power
    of two and which begins at a multiple of that size.
    """

    first_node: int
    nodes: int
    first_gpu: int
    gpus: int

    @property
    def size(self) -> int:
        """GPUs altogether."""
        return self.nodes * self.gpus

    def overlaps(self, other: DeviceMesh) -> bool:
        """Whether the two share a GPU."""
        return (
            self.first_node < other.first_node + other.nodes
            and other.first_node < self.first_node + self.nodes
            and self.first_gpu < other.first_gpu + other.gpus
            and other.first_gpu < self.first_gpu + self.gpus
        )

    def contains(self, other: DeviceMesh) -> bool:
        """Whether every GPU of ``other`` is here."""
        return (
            self.first_node <= other.first_node
            and other.first_node + other.nodes <= self.first_node + self.nodes
            and self.first_gpu <= other.first_gpu
            and other.first_gpu + other.gpus <= self.first_gpu + self.gpus
        )

    def span(self, gpus_per_node: int) -> tuple[int, int]:
        """(first rank, rank after the last) in a cluster that counts its GPUs node by node; legal meshes are without gaps."""
        first = self.first_node * gpus_per_node + self.first_gpu
        return first, first + self.size

    def ranks(self, gpus_per_node: int) -> range:
        """The GPUs, counted node by node."""
        return range(*self.span(gpus_per_node))

    def fault(self, nodes: int, gpus_per_node: int) -> str:
        """Why this is no mesh of such a cluster; "" if it is."""
        if min(self.first_node, self.first_gpu) < 0 or min(self.nodes, self.gpus) < 1:
            return "needs at least one GPU of one node"
        if self.first_node + self.nodes > nodes or self.first_gpu + self.gpus > gpus_per_node:
            return f"is not inside {nodes} nodes of {gpus_per_node} GPUs"
        if self.gpus == gpus_per_node:
            return ""
        if self.nodes > 1:
            return "has parts of several nodes; take whole nodes or a part of one"
        if self.gpus & (self.gpus - 1) or gpus_per_node % self.gpus:
            return f"has {self.gpus} GPUs of a node; take a power of two that divides {gpus_per_node}"
        if self.first_gpu % self.gpus:
            return f"begins at GPU {self.first_gpu}, which is no multiple of its {self.gpus} GPUs"
        return ""

    def __str__(self) -> str:
        nodes = (
            f"node {self.first_node}"
            if self.nodes == 1
            else f"nodes {self.first_node}-{self.first_node + self.nodes - 1}"
        )
        last = self.first_gpu + self.gpus - 1
        return (
            f"{nodes}, GPU {self.first_gpu}" if self.gpus == 1 else f"{nodes}, GPUs {self.first_gpu}-{last}"
        )


def meshes(cluster: ClusterSpec, least: int = 1) -> list[DeviceMesh]:
    """Every legal mesh of at least ``least`` GPUs: parts of nodes, nodes, runs of nodes. 2 nodes of 8 with ``least=4``: four
    half nodes, two nodes, one pair. Raises `UsageError` where there is none."""
    n = cluster.gpus_per_node
    found = []
    size = 1
    while size < n:
        if size >= least and n % size == 0:
            found += [
                DeviceMesh(node, 1, first, size)
                for node in range(cluster.nodes)
                for first in range(0, n, size)
            ]
        size *= 2
    found += [
        DeviceMesh(first, nodes, 0, n)
        for nodes in range(1, cluster.nodes + 1)
        for first in range(cluster.nodes - nodes + 1)
        if nodes * n >= least
    ]
    if not found:
        raise UsageError(f"no mesh of {cluster.gpus} GPUs has {least}; ask for fewer")
    return found


@dataclass(frozen=True)
class ExecutionPlan:
    """A mesh and a layout for each call on a model.

    Args:
        nodes, gpus_per_node: the cluster's.
        assignments: name of a call -> (mesh, layout); the layout fills the mesh.
        micro_batches: name of a call -> in how many parts it is made (waves, where it generates); what is missing is free.
        offload: frozen roles whose weights stay in the host's memory between their calls.
        roles: name of a call -> (role, kind), so that a file is understood without the graph.
        prediction: what the planner expects; kept with the file and read by nobody else.

    Raises `UsageError` for a mesh that is not legal or a layout that does not fill it, naming the call.
    """

    nodes: int
    gpus_per_node: int
    assignments: Mapping[str, tuple[DeviceMesh, Layout]]
    micro_batches: Mapping[str, int] = field(default_factory=dict)
    offload: frozenset[str] = frozenset()
    roles: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    prediction: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.assignments:
            raise UsageError("a plan needs at least one call")
        for name, (mesh, layout) in self.assignments.items():
            problem = mesh.fault(self.nodes, self.gpus_per_node)
            if problem:
                raise UsageError(f"plan: the mesh of '{name}' {problem}")
            if layout.world_size != mesh.size:
                raise UsageError(
                    f"plan: '{name}' has pp x tp x dp = {layout.world_size} on a mesh of {mesh.size} GPUs"
                )

    def check(self, graph: DataflowGraph) -> None:
        """Raises `UsageError` where the plan's calls are not those of ``graph``, naming the call."""
        wanted = [call.name for call in graph.calls if call.on_model]
        for name in wanted:
            if name not in self.assignments:
                raise UsageError(f"the plan has no place for the call '{name}'; add it to 'calls'")
        for name in self.assignments:
            if name not in wanted:
                raise UsageError(f"the plan places '{name}', which is no call; {nearest(name, wanted)}")

    # --- files ------------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text, a call a line, also written to ``path`` if one is given."""
        lines = []
        for name, (mesh, layout) in self.assignments.items():
            entry: dict[str, Any] = dict(zip(("role", "kind"), self.roles.get(name, ()), strict=False))
            entry |= {"mesh": asdict(mesh), "layout": asdict(layout)}
            if name in self.micro_batches:
                entry["micro_batches"] = self.micro_batches[name]
            lines.append(f"    {json.dumps(name)}: {json.dumps(entry)}")
        parts = [
            f'  "nodes": {self.nodes}',
            f'  "gpus_per_node": {self.gpus_per_node}',
            '  "calls": {\n' + ",\n".join(lines) + "\n  }",
        ]
        if self.offload:
            parts.append(f'  "offload": {json.dumps(sorted(self.offload))}')
        if self.prediction:
            text = json.dumps(self.prediction, indent=2).replace("\n", "\n  ")
            parts.append(f'  "prediction": {text}')
        whole = "{\n" + ",\n".join(parts) + "\n}\n"
        if path is not None:
            Path(path).write_text(whole, encoding="utf-8")
        return whole

    @staticmethod
    def from_json(path: str | Path) -> ExecutionPlan:
        """The plan in a file. Raises `DataError` that names the file, the key and what was expected."""
        return _plan(_read(path), Path(path))

    # --- what an engine with fixed places for roles can do with it ------------------------------------------

    def homes(self) -> dict[str, DeviceMesh]:
        """Where the weights of each role stay: where it trains, or else where its first call is. Raises `UsageError` where the
        plan does not say whose calls it places."""
        found: dict[str, DeviceMesh] = {}
        for name, (mesh, _) in self.assignments.items():
            if name not in self.roles:
                raise UsageError(f"the plan does not say whose call '{name}' is; give its role and its kind")
            role, kind = self.roles[name]
            if kind == "train" or role not in found:
                found[role] = mesh
        return found

    def placement(self) -> Placement:
        """The pools of processes nearest to the plan, for engines that give a role its processes once (`--placement`).

        Roles whose GPUs overlap share a pool of all those GPUs. A trained role that generates where nobody lives gets the role
        "generator" there. `not_followed` says what is lost.
        """
        homes = self.homes()
        living = dict(homes)
        trained = {role for role, kind in self.roles.values() if kind == "train"}
        for name, (mesh, _) in self.assignments.items():
            role, kind = self.roles[name]
            if kind == "generate" and role in trained and not any(map(mesh.overlaps, homes.values())):
                living["generator"] = mesh
        pools: list[tuple[list[str], list[DeviceMesh]]] = []
        for role, mesh in living.items():
            touching = [pool for pool in pools if any(map(mesh.overlaps, pool[1]))]
            pools = [pool for pool in pools if pool not in touching]
            pools.append(
                ([*(r for p in touching for r in p[0]), role], [*(m for p in touching for m in p[1]), mesh])
            )
        names = ["all"] if len(pools) == 1 else ["+".join(members) for members, _ in pools]
        mapping = {role: name for name, (members, _) in zip(names, pools, strict=True) for role in members}
        sizes = [_by_node(used, self.gpus_per_node) for _, used in pools]
        return Placement(
            {name: size[0] if len(size) == 1 else size for name, size in zip(names, sizes, strict=True)},
            {role: mapping[role] for role in living},
            prediction=dict(self.prediction),
        )

    def not_followed(self) -> list[str]:
        """What such a placement leaves out, a sentence each."""
        placed, said = self.placement(), []
        for name, (mesh, layout) in self.assignments.items():
            role, kind = self.roles[name]
            where = "generator" if kind == "generate" and "generator" in placed.mapping else role
            pool = placed.mapping[where]
            if placed.size(pool) != mesh.size:
                said.append(
                    f"{name} runs on the {placed.size(pool)} processes of '{pool}', not on {mesh.size}"
                )
            if (layout.pp, layout.tp) != (1, 1):
                said.append(f"{name} is data parallel, not {brief(layout)}")
        if self.offload:
            said.append(f"{', '.join(sorted(self.offload))} stay where they are and are not offloaded")
        return said


def read_placement(path: str | Path) -> Placement:
    """A placement from a file of its own, or the one nearest to the execution plan in the file. Raises `DataError` and, where a
    plan does not say whose calls it places, `UsageError`."""
    values = _read(path)
    if isinstance(values, dict) and "calls" in values:
        return _plan(values, Path(path)).placement()
    return Placement.from_json(path)


def _by_node(used: Sequence[DeviceMesh], gpus_per_node: int) -> list[int]:
    """How many different GPUs these meshes have on each node that they touch."""
    ranks = {rank for mesh in used for rank in mesh.ranks(gpus_per_node)}
    counts = Counter(rank // gpus_per_node for rank in ranks)
    return [counts[node] for node in sorted(counts)]


def _read(path: str | Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the plan {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error


def _plan(values: Any, path: Path) -> ExecutionPlan:
    """The plan that a file's ``values`` describe."""

    def refuse(where: str, problem: str) -> DataError:
        return DataError(f"{path}: '{where}' {problem}")

    def count(value: Any, least: int = 1) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    if not isinstance(values, dict):
        raise refuse("plan", "must be an object with 'nodes', 'gpus_per_node' and 'calls'")
    for key in values:
        if key not in _KEYS:
            raise refuse(str(key), f"is no key of a plan; {nearest(str(key), _KEYS)}")
    for key in ("nodes", "gpus_per_node"):
        if not count(values.get(key)):
            raise refuse(key, f"is {json.dumps(values.get(key))}; expected a whole number of at least 1")
    calls = values.get("calls")
    if not isinstance(calls, dict) or not calls:
        raise refuse("calls", "must be an object with at least one call")
    assignments, micro, roles = {}, {}, {}
    for name, entry in calls.items():
        where = f"calls.{name}"
        if not isinstance(entry, dict):
            raise refuse(where, 'must be an object with "mesh" and "layout"')
        for key in entry:
            if key not in _ENTRY:
                raise refuse(f"{where}.{key}", f"is no key of a call; {nearest(str(key), _ENTRY)}")
        for key, expected, least in (("mesh", _MESH, 0), ("layout", _LAYOUT, 1)):
            part = entry.get(key)
            if (
                not isinstance(part, dict)
                or set(part) != set(expected)
                or not all(count(v, least) for v in part.values())
            ):
                raise refuse(
                    f"{where}.{key}",
                    f"is {json.dumps(part)}; expected whole numbers {', '.join(expected)}",
                )
        assignments[name] = DeviceMesh(**entry["mesh"]), Layout(**entry["layout"])
        if "micro_batches" in entry:
            if not count(entry["micro_batches"]):
                raise refuse(f"{where}.micro_batches", "must be a whole number of at least 1")
            micro[name] = entry["micro_batches"]
        if "role" in entry or "kind" in entry:
            role, kind = entry.get("role"), entry.get("kind")
            if not isinstance(role, str) or kind not in MODEL_KINDS:
                raise refuse(where, f"needs a role and a kind ({', '.join(MODEL_KINDS)})")
            roles[name] = role, str(kind)
    offload = values.get("offload", [])
    if not isinstance(offload, list) or not all(isinstance(role, str) for role in offload):
        raise refuse("offload", "must be a list of roles")
    if not isinstance(values.get("prediction", {}), dict):
        raise refuse("prediction", "must be an object")
    try:
        return ExecutionPlan(
            values["nodes"],
            values["gpus_per_node"],
            assignments,
            micro,
            frozenset(offload),
            roles,
            values.get("prediction", {}),
        )
    except UsageError as error:
        raise DataError(f"{path}: {error}") from error


_KEYS = ("nodes", "gpus_per_node", "calls", "offload", "prediction")
_ENTRY = ("role", "kind", "mesh", "layout", "micro_batches")
_MESH = ("first_node", "nodes", "first_gpu", "gpus")
_LAYOUT = ("dp", "pp", "tp")
