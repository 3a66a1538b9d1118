"""A runtime that follows an execution plan: each call on its own ranks in its own layout, weights moved in between.

One master walks the graph; one worker a rank holds shards of the models (`guerdon.engine.model_worker`). The master asks for
a call as soon as what it reads has been made and the weights that it needs are those of its iteration; calls on disjoint
meshes then run at the same time, calls on the same ranks in the order in which they were asked for, which is the same order
on all of them. The master never sees a token, a score or a weight: it knows which rank has which sequence and how long it
is, and tells ranks what to send to whom (ReaLHF: Mei et al., 2024, section 6).

    graph = PPOCalls(minibatches=4).graph()
    with Runtime(graph, plan, models, PPOCalls(), data, batch=64) as runtime:
        for done in runtime.run(3):
            print(done.call, done.iteration, done.metrics)
        runtime.save("actor", "actor.safetensors")
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from guerdon.engine.graph import DataflowGraph, ModelFunctionCall, Offload, ParamRealloc
from guerdon.engine.meshes import DeviceMesh, ExecutionPlan
from guerdon.engine.metadata import MetadataBuffer, balanced_partition, check_metadata
from guerdon.engine.model_worker import Answer, Functions, ModelWorker, Parcel, Request, ranks_of
from guerdon.engine.pools import ResourcePool
from guerdon.engine.sharded import Blueprint
from guerdon.engine.shards import Mesh
from guerdon.engine.simulate import Row, Timeline
from guerdon.engine.workers import WorkerGroup
from guerdon.errors import UsageError, nearest


@dataclass(frozen=True)
class Done:
    """One call that was made.

    Args:
        start, ready, end: seconds since the first call of a run began (by the clock of one machine): the first rank begun,
            inputs and weights there, the last rank done.
        ranks: that took part.
        tokens: of the longest input or output of each sequence, by replica.
        planned_bytes: of data that the master told ranks to send.
        data_bytes, weight_bytes: received by all ranks.
        spans: the same three times of each rank.
        memory: bytes that each rank held afterwards.
    """

    call: str
    iteration: int
    start: float
    ready: float
    end: float
    ranks: tuple[int, ...]
    metrics: dict[str, float] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    planned_bytes: int = 0
    data_bytes: int = 0
    weight_bytes: int = 0
    spans: dict[int, tuple[float, float, float]] = field(default_factory=dict)
    memory: dict[int, dict[str, int]] = field(default_factory=dict)

    def since(self, clock: float) -> Done:
        """With times counted from ``clock``."""
        spans = {rank: (a - clock, b - clock, c - clock) for rank, (a, b, c) in self.spans.items()}
        times = self.start - clock, self.ready - clock, self.end - clock
        return replace(self, start=times[0], ready=times[1], end=times[2], spans=spans)


@dataclass
class _Dealt:
    """Sequences of a call by minibatch and replica, the tokens of each replica, and the bytes that are sent for it."""

    rows: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: tuple[int, ...]
    bytes: int = 0


def meshes_of(graph: DataflowGraph, plan: ExecutionPlan | Mapping[str, Mesh]) -> dict[str, Mesh]:
    """Layout and ranks of each call. Raises `UsageError` where a call has no place, or cannot be placed."""
    for call in graph.calls:
        if not call.on_model:
            raise UsageError(
                f"'{call.name}' is {call.kind}, not work of a model; the runtime cannot place it"
            )
        if call.uses:
            raise UsageError(
                f"'{call.name}' also reads the weights of {', '.join(call.uses)}, which the runtime does not bring to it"
            )
        if not isinstance(plan, ExecutionPlan) and call.name not in plan:
            raise UsageError(f"the plan has no place for the call '{call.name}'; {nearest(call.name, plan)}")
    if isinstance(plan, ExecutionPlan):
        plan.check(graph)
        n = plan.gpus_per_node
        return {name: Mesh(layout, tuple(mesh.ranks(n))) for name, (mesh, layout) in plan.assignments.items()}
    return {call.name: Mesh(plan[call.name].layout, plan[call.name].members()) for call in graph.calls}


def homes_of(graph: DataflowGraph, meshes: Mapping[str, Mesh]) -> dict[str, Mesh]:
    """Where the weights of each role stay: where it trains, else where its first call is, else (it only follows another by a
    hook) where that one is. Raises `UsageError` for a role that trains in two places."""
    found: dict[str, Mesh] = {}
    for role in graph.roles():
        calls = graph.calls_of(role)
        trained = [call for call in calls if call.kind == "train"]
        if len({meshes[call.name] for call in trained}) > 1:
            names = ", ".join(call.name for call in trained)
            raise UsageError(
                f"'{role}' would train in different places ({names}); give them one mesh and layout"
            )
        if calls:
            found[role] = meshes[(trained or calls)[0].name]
    for call in graph.order():
        for hook in (*call.pre, *call.post):
            if isinstance(hook, ParamRealloc):
                found.setdefault(hook.target, found[hook.source])
            elif isinstance(hook, Offload) and hook.role in graph.trained_roles:
                raise UsageError(
                    f"'{call.name}' offloads '{hook.role}', which trains; its optimiser needs the weights"
                )
    return found


class Runtime:
    """Workers that hold the models of a graph, and the master that has them make its calls as a plan says.

    Args:
        graph: the calls of an iteration; all of them work of models.
        plan: where each runs: a plan of `guerdon.engine.plan`, or a `Mesh` for each call.
        models: by role, a function that makes the model's `Blueprint`; every worker that holds some of it calls it.
        functions: what the calls do.
        data: the dataset: from the number of a sequence to a tensor for each key that no call writes.
        batch: sequences in an iteration.
        backend: "process" or "ray".
        pool: where the workers live, one a rank; None: processes without GPUs, as many as the plan has ranks.
        offload: roles whose weights wait in the host's memory between their calls; None: those that the plan names.
        threads: of torch, in each worker.
        timeout: seconds that a worker waits for another one.
        device: "cpu", or "cuda" for models on GPUs, one a worker; data stay in the host's memory.

    Raises `UsageError` for a plan that does not fit the graph.
    """

    def __init__(
        self,
        graph: DataflowGraph,
        plan: ExecutionPlan | Mapping[str, Mesh],
        models: Mapping[str, Callable[[], Blueprint]],
        functions: Functions,
        data: Callable[[int], Mapping[str, Tensor]],
        batch: int,
        *,
        backend: str = "process",
        pool: ResourcePool | None = None,
        ranks_per_node: int | None = None,
        offload: Sequence[str] | None = None,
        threads: int = 1,
        timeout: float = 600.0,
        device: str = "cpu",
    ) -> None:
        self.graph, self.batch = graph, batch
        self.meshes = meshes_of(graph, plan)
        self.homes = homes_of(graph, self.meshes)
        for role in self.homes:
            if role not in models:
                raise UsageError(f"nobody says what model '{role}' is; {nearest(role, models)}")
        planned = isinstance(plan, ExecutionPlan)
        micro = dict(plan.micro_batches) if isinstance(plan, ExecutionPlan) else {}
        away = (
            tuple(plan.offload)
            if isinstance(plan, ExecutionPlan) and offload is None
            else tuple(offload or ())
        )
        trained = sorted(set(away) & set(graph.trained_roles))
        if trained:
            raise UsageError(f"{', '.join(trained)} cannot be offloaded: the optimiser needs the weights")
        world = 1 + max(rank for mesh in self.meshes.values() for rank in mesh.members())
        if planned:
            world = plan.nodes * plan.gpus_per_node  # type: ignore[union-attr]
            ranks_per_node = ranks_per_node or plan.gpus_per_node  # type: ignore[union-attr]
        self.ranks_per_node = ranks_per_node or 8
        self._rows = 0  # read so far
        self._iteration = 0
        self.group = WorkerGroup(
            pool or ResourcePool([world]),
            ModelWorker,
            graph,
            self.meshes,
            self.homes,
            models,
            functions,
            data,
            micro,
            away,
            self.ranks_per_node,
            threads,
            timeout,
            device,
            backend=backend,
            name="runtime",
        )

    def run(self, iterations: int) -> list[Done]:
        """So many iterations, and what was done in them, in the order in which it ended.

        Raises what a worker raised; the workers are ended then, for others may wait for the one that failed."""
        try:
            return asyncio.run(self._run(iterations))
        except BaseException as error:
            self.close()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise

    def save(self, role: str, path: str) -> None:
        """Write a role's whole weights to a safetensors file, on the machine of its first rank."""
        if role not in self.homes:
            raise UsageError(f"there is no role '{role}'; {nearest(role, self.homes)}")
        self.group.call("save", role, str(path))

    def memory(self) -> list[dict[str, int]]:
        """Bytes that each rank holds, see `ModelWorker.memory`."""
        return list(self.group.call("memory"))

    def close(self) -> None:
        """End the workers."""
        self.group.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- walking the graph ---------------------------------------------------------------------------------

    async def _run(self, iterations: int) -> list[Done]:
        self._buffer, self._done = MetadataBuffer(self.graph), list[Done]()
        self._dealt: dict[tuple[str, int], _Dealt] = {}
        unrolled = self.graph.unroll(iterations)
        over = {(node.iteration, node.call.name): asyncio.Event() for node in unrolled.nodes}
        waits = {
            at: [w.source for w in unrolled.waits if w.target == at and w.kind == "parameters"] for at in over
        }
        first = self._iteration
        self._iteration += iterations
        # one thread a call that is under way: all they do is wait
        self._threads = ThreadPoolExecutor(max_workers=2 * len(self.graph) + 2)
        try:
            await self._load(iterations * self.batch)
            async with asyncio.TaskGroup() as tasks:
                for node in unrolled.nodes:
                    at = node.iteration, node.call.name
                    before = [over[source] for source in waits[at]]
                    tasks.create_task(self._call(node.call, node.iteration, first, before, over[at]))
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
        self._rows += iterations * self.batch
        clock = min(done.start for done in self._done)
        return [done.since(clock) for done in self._done]

    async def _answers(self, method: str, *args: Any, ranks: Sequence[int]) -> list[Answer]:
        """Ask some ranks at once, wait without standing in the way of others, and check that no data came."""
        future = self.group.call(method, *args, blocking=False, ranks=ranks)
        loop = asyncio.get_running_loop()
        answers = await loop.run_in_executor(self._threads, future.get)
        found = [answers[rank] for rank in ranks]
        check_metadata(found, f"'{method}'")
        return found

    async def _load(self, count: int) -> None:
        ranks = range(self.group.world_size)
        rows = range(self._rows, self._rows + count)
        for rank, answer in zip(ranks, await self._answers("load", list(rows), ranks=ranks), strict=True):
            for key, sizes in (answer.sizes or {}).items():
                self._buffer.put(key, sizes, [rank])
        self._send_on(self.graph.data_keys, rows)

    async def _call(
        self,
        call: ModelFunctionCall,
        iteration: int,
        first: int,
        before: Sequence[asyncio.Event],
        over: asyncio.Event,
    ) -> None:
        """One call in one iteration, in as many requests as it takes when it takes fewer sequences than the batch."""
        for event in before:
            await event.wait()
        start = self._rows + iteration * self.batch
        for rows in dict.fromkeys(self._piece(call, row) for row in range(start, start + self.batch)):
            await self._buffer.wait(call.reads, rows)
            await self._request(call, first + iteration, rows)
        over.set()

    def _piece(self, call: ModelFunctionCall, row: int) -> range:
        """The sequences that ``call`` takes at once with this one."""
        start = row - (row - self._rows) % self.batch
        some = min(call.sequences or self.batch, self.batch)
        low = row - (row - start) % some
        return range(low, min(low + some, start + self.batch))

    def _deal(self, call: ModelFunctionCall, rows: range) -> _Dealt:
        """Who gets which sequences, by what is known of their lengths when it is first asked."""
        key = call.name, rows.start
        if key not in self._dealt:
            dp, tokens, by_minibatch = self.meshes[call.name].layout.dp, Counter[int](), []
            parts = call.minibatches if call.kind == "train" else 1
            for m in range(parts):
                some = rows[len(rows) * m // parts : len(rows) * (m + 1) // parts]
                lengths = [
                    max(math.prod(self._buffer.size(word, row)) for word in call.reads) for row in some
                ]
                cuts = balanced_partition(lengths, dp)
                by_minibatch.append(tuple(tuple(some[a:b]) for a, b in cuts))
                tokens.update({d: sum(lengths[a:b]) for d, (a, b) in enumerate(cuts)})
            self._dealt[key] = _Dealt(tuple(by_minibatch), tuple(tokens[d] for d in range(dp)))
        return self._dealt[key]

    def _send_on(self, keys: Sequence[str], rows: Sequence[int]) -> None:
        """Have what was just made sent to those who will read it, before anybody is given anything else to do: who holds it
        may be busy when they ask."""
        for call in self.graph.calls:
            for piece in dict.fromkeys(self._piece(call, row) for row in rows):
                parcels: list[Parcel] = []
                complete = [k for k in keys if k in call.reads and self._buffer.ready([k], piece)]
                dealt = self._deal(call, piece) if complete else None
                for d in range(self.meshes[call.name].layout.dp if dealt else 0):
                    assert dealt is not None
                    mine = [row for by_replica in dealt.rows for row in by_replica[d]]
                    replica = self.meshes[call.name].replica(d)
                    for key in complete:
                        parcels += self._buffer.parcels(key, mine, replica, self.ranks_per_node)
                if dealt and parcels:
                    dealt.bytes += sum(parcel.bytes * len(parcel.receivers) for parcel in parcels)
                    ranks = sorted({rank for p in parcels for rank in (p.sender, *p.receivers)})
                    self.group.call("transfer", parcels, blocking=False, ranks=ranks)

    async def _request(self, call: ModelFunctionCall, iteration: int, rows: range) -> None:
        mesh, dealt = self.meshes[call.name], self._deal(call, rows)
        ranks = sorted(ranks_of(call, self.meshes, self.homes))
        answers = await self._answers("execute", Request(iteration, call.name, dealt.rows), ranks=ranks)
        del self._dealt[call.name, rows.start]
        by_rank = dict(zip(ranks, answers, strict=True))
        for d in range(mesh.layout.dp):
            replica = mesh.replica(d)
            for key, sizes in (by_rank[replica[0]].sizes or {}).items():
                self._buffer.put(key, sizes, replica)
        self._send_on(call.writes, rows)
        await self._buffer.announce()
        for rank, keys in self._buffer.consumed(call.reads, rows).items():
            self.group.call("forget", keys, blocking=False, ranks=[rank])
        self._done.append(
            Done(
                call.name,
                iteration,
                min(a.start for a in answers),
                max(a.ready for a in answers),
                max(a.end for a in answers),
                tuple(ranks),
                by_rank[mesh.members()[-1]].metrics,
                dealt.tokens,
                dealt.bytes,
                sum(a.data_bytes for a in answers),
                sum(a.weight_bytes for a in answers),
                {rank: (answer.start, answer.ready, answer.end) for rank, answer in by_rank.items()},
                {rank: answer.memory for rank, answer in by_rank.items()},
            )
        )


def measured(graph: DataflowGraph, plan: ExecutionPlan, done: Sequence[Done]) -> Timeline:
    """What a run did, in the form of what `guerdon.engine.simulate` foretells: the same rows, one for each rank.

    "weights" are rows in which data and weights arrived, or were waited for, where weights came at all. ``memory`` is what
    each rank was seen to hold after a call, weights and data, without what a call needs while it runs.
    """
    rows = []
    for one in done:
        call = graph[one.call]
        members = plan.assignments[one.call][0].ranks(plan.gpus_per_node)
        for rank, (start, ready, end) in one.spans.items():
            node, gpu = divmod(rank, plan.gpus_per_node)
            here = (DeviceMesh(node, 1, gpu, 1),)
            if one.weight_bytes:
                rows.append(Row(call.name, call.role, "weights", one.iteration, here, start, ready))
            if rank in members:
                begin = ready if one.weight_bytes else start
                rows.append(Row(call.name, call.role, call.kind, one.iteration, here, begin, end))
    held: Counter[int] = Counter()
    for one in done:
        for rank, memory in one.memory.items():
            held[rank] = max(held[rank], memory["weights"] + memory["data"])
    first = min(one.iteration for one in done)
    rows = [replace(row, iteration=row.iteration - first) for row in rows]
    return Timeline(
        tuple(sorted(rows, key=lambda row: (row.start, row.end))),
        plan.nodes,
        plan.gpus_per_node,
        1 + max(row.iteration for row in rows),
        tuple((rank, rank + 1, float(held[rank])) for rank in range(plan.nodes * plan.gpus_per_node)),
        float(max(held.values())),
        measured=True,
    )
