"""Which roles share which processes: placements, written by hand, taken from a preset, or found by search.

`search` is the automatic mapping of HybridFlow (Sheng et al. 2024, algorithm 1): every way to group the roles into pools, every
way to share the GPUs among the pools, the fastest layout of each role in its pool, and the cheapest of it all.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guerdon.engine.cluster import ClusterSpec
from guerdon.engine.cost import CostModel, GiB, ModelShape, Workload, brief, layouts_of
from guerdon.engine.protocols import Layout
from guerdon.errors import DataError, UsageError, nearest

PRESETS = ("colocate", "split", "standalone", "inline")
"""Placements that have a name."""

JUDGING = ("critic", "value", "reward", "cost", "judge", "preference")
"""Words in the names of roles that judge: critics and reward models."""

_KEYS = ("pools", "mapping", "layouts", "prediction")
_TASKS = ("train", "infer", "generate")


@dataclass(frozen=True)
class Placement:
    """Where each role runs. Roles of one pool share its processes and take turns; pools work side by side.

    Args:
        pools: name of a pool -> its number of processes, or a list of processes a node.
        mapping: role -> the pool that holds it.
        layouts: role -> {"train" | "infer" | "generate": {"pp": .., "tp": .., "dp": ..}}, optional; the product of a layout
            is the number of processes of the role's pool.
        prediction: what a search expected of the placement (seconds, bytes); kept with the file and read by nobody else.

    Raises `UsageError` for a pool without processes or without roles, a role in an unknown pool, and a layout that does not
    fill its pool.
    """

    pools: dict[str, int | list[int]]
    mapping: dict[str, str]
    layouts: dict[str, dict[str, dict[str, int]]] = field(default_factory=dict)
    prediction: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        where, problem = _fault(
            {
                "pools": self.pools,
                "mapping": self.mapping,
                "layouts": self.layouts,
                "prediction": self.prediction,
            }
        )
        if problem:
            raise UsageError(f"placement: '{where}' {problem}")

    # --- reading --------------------------------------------------------------------------------------

    @property
    def workers(self) -> int:
        """Processes altogether; 0 where every role lives in the process of the driver."""
        return 0 if self.inline else sum(self.size(pool) for pool in self.pools)

    @property
    def inline(self) -> bool:
        """Whether the roles live in the process that runs the method: the one pool is called "inline"."""
        return list(self.pools) == ["inline"]

    def size(self, pool: str) -> int:
        """Processes of ``pool``."""
        return sum(self.processes(pool))

    def processes(self, pool: str) -> list[int]:
        """Processes of ``pool`` on each of its nodes; a plain number means one node."""
        value = self.pools[pool]
        return [value] if isinstance(value, int) else list(value)

    def pool_of(self, role: str) -> str:
        """The pool that holds ``role``. Raises `UsageError` for a role that has no place."""
        if role not in self.mapping:
            raise UsageError(f"the placement has no pool for role '{role}'; {nearest(role, self.mapping)}")
        return self.mapping[role]

    def roles_of(self, pool: str) -> list[str]:
        """The roles that share ``pool``, in the order of the mapping."""
        return [role for role, place in self.mapping.items() if place == pool]

    def check(self, roles: Iterable[str]) -> None:
        """Raises `UsageError` where the mapping and a method's ``roles`` differ, naming the role."""
        roles = list(roles)
        for role in roles:
            if role not in self.mapping:
                raise UsageError(f"the placement has no pool for role '{role}'; add it to 'mapping'")
        for role in self.mapping:
            if role not in roles:
                raise UsageError(
                    f"the placement maps '{role}', which the method does not have; {nearest(role, roles)}"
                )

    # --- presets --------------------------------------------------------------------------------------

    @staticmethod
    def preset(name: str, roles: Sequence[str], workers: int) -> Placement:
        """A placement with a name, for ``workers`` processes.

        "colocate": every role on all processes. "split": policies on one half, what judges (critic, reward, cost) on the
        other (NeMo-Aligner's placement); a side without roles gives its share away. "standalone": processes of its own for
        each role (OpenRLHF's), as even as possible, the rest to the first roles. "inline": no processes but the driver's.

        Raises `UsageError` for an unknown name, no roles, or fewer processes than pools.
        """
        if name not in PRESETS:
            raise UsageError(f"no placement is called '{name}'; {nearest(name, PRESETS)}")
        if not roles:
            raise UsageError(f"placement '{name}' needs at least one role")
        if name == "inline":
            return Placement({"inline": 1}, dict.fromkeys(roles, "inline"))
        sets = preset_sets(name, roles)
        if workers < len(sets):
            raise UsageError(
                f"placement '{name}' of {', '.join(roles)} needs at least {len(sets)} workers, not {workers}"
            )
        share, rest = divmod(workers, len(sets))
        names = _pool_names(sets)
        return Placement(
            {pool: share + (i < rest) for i, pool in enumerate(names)},
            {role: names[next(i for i, members in enumerate(sets) if role in members)] for role in roles},
        )

    # --- files ----------------------------------------------------------------------------------------

    def to_json(self, path: str | Path | None = None) -> str:
        """The placement as JSON text, also written to ``path`` if one is given."""
        values: dict[str, Any] = {"pools": self.pools, "mapping": self.mapping}
        if self.layouts:
            values["layouts"] = self.layouts
        if self.prediction:
            values["prediction"] = self.prediction
        text = json.dumps(values, indent=2) + "\n"
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @staticmethod
    def from_json(path: str | Path) -> Placement:
        """The placement in a file. Raises `DataError` that names the file, the key and what was expected."""
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read the placement {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not a text file in UTF-8") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
        where, problem = _fault(values)
        if problem:
            raise DataError(f"{path}: '{where}' {problem}")
        return Placement(**values)


def preset_sets(name: str, roles: Sequence[str]) -> list[list[str]]:
    """The sets of roles that share a pool under preset ``name``."""
    if name == "standalone":
        return [[role] for role in roles]
    if name == "split":
        judging = [role for role in roles if any(word in role for word in JUDGING)]
        return [side for side in ([role for role in roles if role not in judging], judging) if side]
    return [list(roles)]


def _pool_names(sets: Sequence[Sequence[str]]) -> list[str]:
    """A name for each pool, made of its roles: "actor+reference"."""
    return ["all"] if len(sets) == 1 else ["+".join(members) for members in sets]


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _fault(values: Any) -> tuple[str, str]:
    """(key, what is wrong with it and what was expected) of the first mistake in a placement; ("", "") for none."""
    if not isinstance(values, dict):
        return "placement", 'must be an object such as {"pools": {"all": 2}, "mapping": {"actor": "all"}}'
    for key in values:
        if key not in _KEYS:
            return str(key), f"is no key of a placement; {nearest(str(key), _KEYS)}"
    for key in ("pools", "mapping"):
        if not isinstance(values.get(key), dict) or not values[key]:
            return key, "must be an object with at least one entry"
    for key in ("layouts", "prediction"):
        if not isinstance(values.get(key, {}), dict):
            return key, "must be an object"
    pools, mapping = values["pools"], values["mapping"]
    for pool, size in pools.items():
        if not (_count(size) or (isinstance(size, list) and size and all(_count(n) for n in size))):
            return (
                f"pools.{pool}",
                f"is {json.dumps(size)}; expected a number of processes or a list of them a node",
            )
    for role, pool in mapping.items():
        if not isinstance(pool, str) or pool not in pools:
            return f"mapping.{role}", f"is {json.dumps(pool)}, which is no pool; {nearest(str(pool), pools)}"
    for pool in pools:
        if pool not in mapping.values():
            return f"pools.{pool}", "holds no role; map a role to it or leave it out"
    for role, layouts in values.get("layouts", {}).items():
        if role not in mapping:
            return (
                f"layouts.{role}",
                f"is of a role that 'mapping' does not have; {nearest(str(role), mapping)}",
            )
        if not isinstance(layouts, dict):
            return f"layouts.{role}", 'must be an object such as {"train": {"pp": 1, "tp": 1, "dp": 2}}'
        for task, layout in layouts.items():
            where = f"layouts.{role}.{task}"
            if task not in _TASKS:
                return where, f"is no kind of work; {nearest(str(task), _TASKS)}"
            if (
                not isinstance(layout, Mapping)
                or set(layout) != {"pp", "tp", "dp"}
                or not all(map(_count, layout.values()))
            ):
                return (
                    where,
                    f'is {json.dumps(layout)}; expected {{"pp": .., "tp": .., "dp": ..}}, each at least 1',
                )
            size = pools[mapping[role]]
            size = size if isinstance(size, int) else sum(size)
            if layout["pp"] * layout["tp"] * layout["dp"] != size:
                return (
                    where,
                    f"has pp x tp x dp = {layout['pp'] * layout['tp'] * layout['dp']}, but its pool has {size} processes",
                )
    return "", ""


# --- the search -------------------------------------------------------------------------------------------

STAGES = ("generation", "preparation", "training")
"""What follows one another in an iteration; within a stage pools work side by side."""


@dataclass(frozen=True)
class RoleWork:
    """What an algorithm asks of a role in one iteration.

    Args:
        role: its name.
        shape: sizes of its model.
        generate: how often it answers the batch.
        infer: how often it evaluates the batch.
        train: whether it is updated.
    """

    role: str
    shape: ModelShape
    generate: int = 0
    infer: int = 0
    train: bool = False


ALGORITHMS = ("ppo", "grpo", "remax", "safe_rlhf")
"""Algorithms whose calls `role_works` knows."""


def role_works(algorithm: str, actor: ModelShape, judge: ModelShape | None = None) -> list[RoleWork]:
    """The calls of an algorithm's iteration; critic, reward and cost models have the shape ``judge`` (by default the actor's).

    The actor evaluates its own answers once more: old log-probabilities come from the layout that trains. ReMax also generates
    and judges a greedy answer. Raises `UsageError` for an unknown algorithm.
    """
    if algorithm not in ALGORITHMS:
        raise UsageError(f"no calls are known for '{algorithm}'; {nearest(algorithm, ALGORITHMS)}")
    scalar, twice = (judge or actor).as_scalar(), 2 if algorithm == "remax" else 1
    works = [
        RoleWork("actor", actor, generate=twice, infer=1, train=True),
        RoleWork("reference", actor, infer=1),
    ]
    if algorithm in ("ppo", "safe_rlhf"):
        works.append(RoleWork("critic", scalar, infer=1, train=True))
    works.append(RoleWork("reward", scalar, infer=twice))
    if algorithm == "safe_rlhf":
        works.append(RoleWork("cost_critic", scalar, infer=1, train=True))
        works.append(RoleWork("cost", scalar, infer=1))
    return works


@dataclass(frozen=True)
class Member:
    """A role in its pool: its layouts, seconds in each stage, bytes a GPU that stay (``resident``) and the most that comes on
    top during a call (``active``)."""

    role: str
    layouts: dict[str, Layout]
    seconds: dict[str, float]
    resident: float
    active: float

    @property
    def total(self) -> float:
        """Seconds in all stages."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Pool:
    """Roles that share ``gpus`` GPUs and take turns."""

    gpus: int
    members: tuple[Member, ...]

    def seconds(self, stage: str) -> float:
        """How long the pool works in ``stage``: its members one after another."""
        return sum(member.seconds.get(stage, 0.0) for member in self.members)

    @property
    def peak(self) -> float:
        """Most bytes that a GPU holds at once: what stays of every member, and the largest call."""
        return sum(member.resident for member in self.members) + max(member.active for member in self.members)


@dataclass(frozen=True)
class Plan:
    """Pools with their roles and what an iteration is expected to cost."""

    name: str
    pools: tuple[Pool, ...]
    gpus_per_node: int

    @property
    def stages(self) -> dict[str, float]:
        """Seconds of each stage: those of its slowest pool."""
        return {stage: max(pool.seconds(stage) for pool in self.pools) for stage in STAGES}

    @property
    def seconds(self) -> float:
        """Seconds of an iteration (d_cost of Sheng et al. 2024, algorithm 1)."""
        return sum(self.stages.values())

    @property
    def sets(self) -> list[list[str]]:
        """The roles of each pool."""
        return [[member.role for member in pool.members] for pool in self.pools]

    @property
    def placement(self) -> Placement:
        """The plan as a placement that an engine takes."""
        names, node = _pool_names(self.sets), self.gpus_per_node
        pools: dict[str, int | list[int]] = {
            name: pool.gpus if pool.gpus <= node else [node] * (pool.gpus // node)
            for name, pool in zip(names, self.pools, strict=True)
        }
        members = [
            (name, member) for name, pool in zip(names, self.pools, strict=True) for member in pool.members
        ]
        prediction = {
            "plan": self.name,
            "seconds": round(self.seconds, 4),
            "stages": {stage: round(value, 4) for stage, value in self.stages.items()},
            "peak_gib": {
                name: round(pool.peak / GiB, 3) for name, pool in zip(names, self.pools, strict=True)
            },
            "roles": {
                m.role: {stage: round(value, 4) for stage, value in m.seconds.items()} for _, m in members
            },
        }
        return Placement(
            pools,
            {member.role: name for name, member in members},
            {m.role: {task: _sizes(layout) for task, layout in m.layouts.items()} for _, m in members},
            prediction,
        )

    def table(self) -> str:
        """The plan in plain text: a line a stage, a line a pool, a line a role."""
        stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in self.stages.items())
        lines = [f"{self.name}: {self.seconds:.1f} s an iteration ({stages})"]
        for pool in self.pools:
            lines.append(f"  {pool.gpus} GPUs, peak {pool.peak / GiB:.1f} GiB each")
            for member in pool.members:
                layouts = "; ".join(f"{task} {brief(layout)}" for task, layout in member.layouts.items())
                lines.append(f"    {member.role}: {member.total:.1f} s, {layouts}")
        return "\n".join(lines)


def partitions(items: Sequence[Any]) -> Iterator[list[list[Any]]]:
    """Every way to divide ``items`` into sets: 1, 2, 5, 15, 52, ... of them for 1, 2, 3, 4, 5 items."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for smaller in partitions(rest):
        yield [[first], *smaller]
        for i, members in enumerate(smaller):
            yield [*smaller[:i], [first, *members], *smaller[i + 1 :]]


def pool_sizes(gpus: int, gpus_per_node: int) -> list[int]:
    """Sizes that a pool may have, so that pools can be laid side by side without straddling nodes: powers of two that divide a
    node, and whole nodes."""
    inside = [
        n
        for n in (2**i for i in range(gpus_per_node.bit_length()))
        if n < gpus_per_node and gpus_per_node % n == 0
    ]
    return [n for n in inside if n <= gpus] + list(range(gpus_per_node, gpus + 1, gpus_per_node))


class Mapper:
    """Plans for one workload on one cluster, with what was worked out before kept for the next plan.

    Args:
        works: what each role does in an iteration; see `role_works`.
        cluster: the machines.
        work: batch, lengths and minibatches.
        costs: the estimator; by default `CostModel(cluster)`.
        engine: how the actor's weights reach its generation layout ("hybridflow", "vanilla", "zero").
    """

    def __init__(
        self,
        works: Sequence[RoleWork],
        cluster: ClusterSpec,
        work: Workload | None = None,
        costs: CostModel | None = None,
        engine: str = "hybridflow",
    ) -> None:
        if not works:
            raise UsageError("a plan needs at least one role")
        if len({w.role for w in works}) < len(works):
            raise UsageError(f"roles must have different names: {', '.join(w.role for w in works)}")
        if len(works) > 7:
            raise UsageError(f"{len(works)} roles have too many placements to try them all; name at most 7")
        self.works = {w.role: w for w in works}
        self.cluster = cluster
        self.work = work or Workload()
        self.costs = costs or CostModel(cluster)
        self.engine = engine
        self.sizes = pool_sizes(cluster.gpus, cluster.gpus_per_node)
        self._options: dict[tuple[str, int], list[Member]] = {}
        self._members: dict[tuple[str, Layout, float], Member | None] = {}
        self._pools: dict[tuple[tuple[str, ...], int], Pool | None] = {}

    # --- one role, one pool -----------------------------------------------------------------------------

    def member(self, role: str, layout: Layout, free: float) -> Member | None:
        """``role`` laid out by ``layout`` with ``free`` bytes a GPU beside what stays; None: a call does not fit.

        The actor's generation layout is the fastest whose shards divide those of its training layout.
        """
        key = (role, layout, free)
        if key not in self._members:
            self._members[key] = self._member(self.works[role], layout, free)
        return self._members[key]

    def _member(self, w: RoleWork, layout: Layout, free: float) -> Member | None:
        seconds, active, layouts = {}, 0.0, {"train" if w.train else "infer": layout}
        if w.train:
            call = self.costs.train(w.shape, layout, self.work, free)
            if call is None:
                return None
            seconds["training"], active = call.seconds, call.active
        if w.infer:
            call = self.costs.infer(w.shape, layout, self.work, free)
            if call is None:
                return None
            seconds["preparation"], active = w.infer * call.seconds, max(active, call.active)
        if w.generate:
            made = self._generation(w, layout, free)
            if made is None:
                return None
            layouts["generate"], seconds["generation"], held = made
            active = max(active, held)
        return Member(w.role, layouts, seconds, self.costs.resident(w.shape, layout, w.train), active)

    def _generation(self, w: RoleWork, train: Layout, free: float) -> tuple[Layout, float, float] | None:
        """(layout, seconds with the weights' way there, active bytes) of the fastest generation."""
        best: tuple[Layout, float, float] | None = None
        own = self.costs.weights(w.shape, train)
        for pp, tp in itertools.product(_divisors(train.pp), _divisors(train.tp)):
            layout = Layout(train.world_size // (pp * tp), pp, tp)
            extra, passing = self.costs.weights(w.shape, layout), 0.0
            if self.engine == "hybridflow":
                extra -= own  # the gathered shard holds the training shard
            else:
                passing = self.costs.model_bytes(w.shape) - own  # the whole model goes through every GPU
                if passing > free:
                    continue
            call = self.costs.generate(w.shape, layout, self.work, free - extra)
            if call is None:
                continue
            seconds = w.generate * call.seconds + self.costs.to_generation(
                w.shape, train, layout, self.engine
            )
            if best is None or seconds < best[1]:
                best = (layout, seconds, max(passing, call.active + extra))
        return best

    def options(self, role: str, gpus: int) -> list[Member]:
        """Layouts of ``role`` on ``gpus``, with its times where it has them for itself, fastest first.

        Left out are layouts that hold more than another and are slower with all, a half and a quarter of the memory that is
        left: beside other roles there is less of it for caches and micro-batches.
        """
        key = (role, gpus)
        if key not in self._options:
            w = self.works[role]
            found: list[tuple[float, list[float], Member]] = []
            kept: list[tuple[float, list[float], Member]] = []
            for layout in layouts_of(w.shape, gpus, self.cluster.gpus_per_node):
                free = self.cluster.memory - self.costs.resident(w.shape, layout, w.train)
                tried = [
                    self.member(role, layout, free * share) if free > 0 else None
                    for share in (1, 1 / 2, 1 / 4)
                ]
                if tried[0] is not None:
                    times = [math.inf if m is None else m.total for m in tried]
                    found.append((tried[0].resident, times, tried[0]))
            for held, times, member in sorted(found, key=lambda f: (f[1], f[0])):
                if not any(h <= held and all(map(float.__le__, t, times)) for h, t, _ in kept):
                    kept.append((held, times, member))
            self._options[key] = [member for *_, member in kept]
        return self._options[key]

    def pool(self, roles: Sequence[str], gpus: int) -> Pool | None:
        """The fastest way for ``roles`` to share ``gpus``; None: their memory does not suffice.

        A layout alone on its GPUs is never slower than beside others, so combinations are tried in the order of those times
        and the search ends when they pass the best found.
        """
        key = (tuple(roles), gpus)
        if key not in self._pools:
            self._pools[key] = self._pool(roles, gpus)
        return self._pools[key]

    def _pool(self, roles: Sequence[str], gpus: int) -> Pool | None:
        if (
            sum(self.costs.total(self.works[r].shape, self.works[r].train) for r in roles)
            > gpus * self.cluster.memory
        ):
            return None
        best: Pool | None = None
        bound = math.inf
        for seconds, chosen in _by_sum([self.options(role, gpus) for role in roles]):
            if seconds >= bound:
                break
            free = self.cluster.memory - sum(m.resident for m in chosen)
            if free <= 0:
                continue
            fitting: list[Member] = []
            for m in chosen:
                member = self.member(m.role, next(iter(m.layouts.values())), free)
                if member is None:
                    break
                fitting.append(member)
            if len(fitting) == len(chosen) and sum(m.total for m in fitting) < bound:
                best = Pool(gpus, tuple(fitting))
                bound = sum(m.total for m in fitting)
        return best

    def least(self, roles: Sequence[str]) -> int | None:
        """The smallest pool that holds ``roles``; None: not even the whole cluster does."""
        return next((n for n in self.sizes if self.pool(roles, n) is not None), None)

    # --- plans ------------------------------------------------------------------------------------------

    def best(self, sets: Sequence[Sequence[str]], name: str = "", below: float = math.inf) -> Plan | None:
        """The fastest plan whose pools hold ``sets``, over every way to share the GPUs; None: nothing fits, or nothing takes
        less than ``below`` seconds.

        Pools are given their GPUs one after another; a choice is dropped as soon as what is fixed, with every later pool at
        its fastest, takes too long.
        """
        tables: list[list[tuple[int, tuple[float, ...], Pool]]] = []
        for roles in sets:
            pools = [(n, self.pool(roles, n)) for n in reversed(self.sizes)]
            tables.append([(n, tuple(map(p.seconds, STAGES)), p) for n, p in pools if p is not None])
            if not tables[-1]:
                return None
        later, least = [(0.0,) * len(STAGES)], [0]
        for table in reversed(tables):
            fastest = tuple(map(min, zip(*(times for _, times, _ in table), strict=True)))
            later.insert(0, tuple(map(max, later[0], fastest)))
            least.insert(0, least[0] + table[-1][0])
        found: tuple[Pool, ...] = ()

        def choose(i: int, left: int, slowest: tuple[float, ...], chosen: tuple[Pool, ...]) -> None:
            nonlocal below, found
            if sum(map(max, slowest, later[i])) >= below:
                return
            if i == len(tables):
                below, found = sum(slowest), chosen
                return
            for n, times, pool in tables[i]:
                if n + least[i + 1] <= left:
                    choose(i + 1, left - n, tuple(map(max, slowest, times)), (*chosen, pool))

        choose(0, self.cluster.gpus, later[-1], ())
        # Largest first: laid side by side in this order, no pool straddles a node that it could fill.
        found = tuple(sorted(found, key=lambda pool: -pool.gpus))
        return Plan(name, found, self.cluster.gpus_per_node) if found else None

    def search(self) -> Plan:
        """The cheapest plan of all. Raises `UsageError` that says with figures why nothing fits."""
        best: Plan | None = None
        for sets in sorted(partitions(list(self.works)), key=len):  # colocation first: a good bound
            best = self.best(sets, "searched", best.seconds if best else math.inf) or best
        if best is None:
            raise UsageError(self._refusal())
        return best

    def baseline(self, preset: str, even: bool = False) -> Plan | None:
        """A fixed placement ("colocate", "split" or "standalone") by the same estimator, None where it does not fit: with the
        best share of GPUs for each pool, or with ``even`` shares (the largest legal size that all can have)."""
        if preset not in ("colocate", "split", "standalone"):
            raise UsageError(
                f"no baseline is called '{preset}'; {nearest(preset, ('colocate', 'split', 'standalone'))}"
            )
        sets = preset_sets(preset, list(self.works))
        if not even:
            return self.best(sets, preset)
        share = [n for n in self.sizes if n * len(sets) <= self.cluster.gpus]
        pools = [self.pool(roles, share[-1]) for roles in sets] if share else [None]
        fitting = tuple(pool for pool in pools if pool is not None)
        return (
            Plan(f"{preset} (even)", fitting, self.cluster.gpus_per_node)
            if len(fitting) == len(pools)
            else None
        )

    def deepspeed_chat(self) -> Plan | None:
        """A plan like DeepSpeed-Chat's, by the same estimator: every role on all GPUs, ZeRO stage 3 for training and inference,
        generation by tensor parallelism over a whole node with weights gathered from all GPUs. None: it does not fit."""
        cluster, costs, gpus = self.cluster, self.costs, self.cluster.gpus
        resident = {r: costs.zero3_resident(w.shape, gpus, w.train) for r, w in self.works.items()}
        free = cluster.memory - sum(resident.values())
        members = []
        for role, w in self.works.items():
            alone, seconds, active = Layout(gpus), {}, 0.0
            layouts = {"train" if w.train else "infer": alone}
            calls = [("preparation", w.infer, False)] * bool(w.infer) + [("training", 1, True)] * w.train
            for stage, times, trains in calls:
                call = costs.zero3(w.shape, gpus, self.work, free, trains)
                if call is None:
                    return None
                seconds[stage], active = times * call.seconds, max(active, call.active)
            if w.generate:
                tp = max(
                    n for n in _divisors(cluster.gpus_per_node) if gpus % n == 0 and w.shape.heads % n == 0
                )
                layout = Layout(gpus // tp, 1, tp)
                extra = costs.weights(w.shape, layout)
                made = costs.generate(w.shape, layout, self.work, free - extra)
                if made is None:
                    return None
                way = costs.to_generation(w.shape, layout, layout, "zero")
                layouts["generate"], seconds["generation"] = layout, w.generate * made.seconds + way
                active = max(active, made.active + extra)
            members.append(Member(role, layouts, seconds, resident[role], active))
        return Plan("DeepSpeed-Chat-like", (Pool(gpus, tuple(members)),), cluster.gpus_per_node)

    def _refusal(self) -> str:
        """Why nothing fits, with figures."""
        have = self.cluster.gpus * self.cluster.memory
        need = {r: self.costs.total(w.shape, w.train) for r, w in self.works.items()}
        parts = ", ".join(f"{role} {bytes_ / GiB:.0f}" for role, bytes_ in need.items())
        whole = math.ceil(sum(need.values()) / self.cluster.memory)
        text = (
            f"no placement fits {self.cluster.gpus} GPUs with {self.cluster.memory / GiB:.1f} GiB each ({have / GiB:.0f} GiB "
            f"together): weights, gradients and optimiser states take {sum(need.values()) / GiB:.0f} GiB ({parts})"
        )
        if sum(need.values()) > have:
            return f"{text}; use at least {whole} GPUs or smaller models"
        alone = [role for role in self.works if self.least([role]) is None]
        if alone:
            return f"{text}, and no layout of {', '.join(alone)} leaves room for activations and cache; use more GPUs"
        return f"{text}, which leaves too little for activations and cache; use more GPUs or shorter answers"


def search(
    works: Sequence[RoleWork],
    cluster: ClusterSpec,
    work: Workload | None = None,
    costs: CostModel | None = None,
    engine: str = "hybridflow",
) -> Plan:
    """The cheapest plan for ``works`` on ``cluster``; see `Mapper`. Raises `UsageError` where nothing fits."""
    return Mapper(works, cluster, work, costs, engine).search()


def _by_sum(options: Sequence[Sequence[Member]]) -> Iterator[tuple[float, tuple[Member, ...]]]:
    """Every choice of one member from each list (fastest first), in the order of their seconds together."""
    if not all(options):
        return
    first = (0,) * len(options)
    heap, seen = [(sum(members[0].total for members in options), first)], {first}
    while heap:
        seconds, at = heapq.heappop(heap)
        yield seconds, tuple(members[i] for members, i in zip(options, at, strict=True))
        for k, i in enumerate(at):
            further = (*at[:k], i + 1, *at[k + 1 :])
            if i + 1 < len(options[k]) and further not in seen:
                seen.add(further)
                heapq.heappush(heap, (seconds + options[k][i + 1].total - options[k][i].total, further))


def _sizes(layout: Layout) -> dict[str, int]:
    return {"pp": layout.pp, "tp": layout.tp, "dp": layout.dp}


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
