"""A process of the runtime: it holds its shards of several models and the data that were made here.

What it is told (`Request`) and what it answers (`Answer`) are names and sizes; tokens, scores and weights go from worker to
worker. See `guerdon.engine.runtime` for the master.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from guerdon.engine import parallel
from guerdon.engine.graph import DataflowGraph, Hook, ModelFunctionCall, Offload, ParamRealloc
from guerdon.engine.offload import Offloader
from guerdon.engine.pipelines import ModelPart
from guerdon.engine.protocols import Layout
from guerdon.engine.reallocation import Reallocation
from guerdon.engine.sharded import Blueprint
from guerdon.engine.shards import Groups, Mesh, Store
from guerdon.engine.workers import Worker, register
from guerdon.errors import ShapeError, UsageError, nearest

Size = tuple[int, ...]

# --- messages ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parcel:
    """Rows of one key that go from the rank that has them to others, as one flat tensor.

    Args:
        rows: numbers of the sequences; ``sizes`` the shape of each, ``dtype`` the type of all.
    """

    key: str
    sender: int
    receivers: tuple[int, ...]
    rows: tuple[int, ...]
    sizes: tuple[Size, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """What each receiver gets."""
        return sum(map(prod, self.sizes)) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Request:
    """One call, as every rank that takes part in it is told.

    Args:
        rows: numbers of the sequences by minibatch and replica.
    """

    iteration: int
    call: str
    rows: tuple[tuple[tuple[int, ...], ...], ...]


@dataclass
class Answer:
    """What a rank says of a call.

    Args:
        sizes: of what it made, by key and row; None on ranks that do not speak for their replica.
        metrics: numbers of the call.
        start, ready, end: seconds of the machine's clock: begun, inputs and weights here, done.
        data_bytes, weight_bytes: received for the call.
        memory: bytes held after it, see `ModelWorker.memory`.
    """

    sizes: dict[str, dict[int, tuple[Size, str]]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    start: float = 0.0
    ready: float = 0.0
    end: float = 0.0
    data_bytes: int = 0
    weight_bytes: int = 0
    memory: dict[str, int] = field(default_factory=dict)


# --- what the calls do ------------------------------------------------------------------------------------


@dataclass
class Rows:
    """Some sequences: their numbers, and for each word that the call reads one tensor a sequence."""

    numbers: list[int]
    columns: dict[str, list[Tensor]]

    def __len__(self) -> int:
        return len(self.numbers)


@dataclass
class Work:
    """What the function of a call is given, on every rank of the call's mesh.

    Args:
        minibatches: this replica's sequences; one a call that does not train.
        part: this rank's part of the model, in the layout of the call.
        optimiser: of a call that trains.
        micro_batches: parts in which a replica's sequences go through the model; None for as many as the pipeline wants.
    """

    iteration: int
    call: ModelFunctionCall
    part: ModelPart
    minibatches: list[Rows]
    optimiser: torch.optim.Optimizer | None = None
    micro_batches: int | None = None

    @property
    def rows(self) -> Rows:
        """All sequences of this replica."""
        return Rows(
            [number for part in self.minibatches for number in part.numbers],
            {
                word: [tensor for part in self.minibatches for tensor in part.columns[word]]
                for word in self.call.inputs
            },
        )


class Functions(Protocol):
    """What the calls of a graph do; `guerdon.engine.ppo_calls.PPOCalls` is one."""

    def optimiser(self, role: str, weights: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Of a role that is trained, for the shards of one rank."""

    def __call__(self, work: Work) -> tuple[dict[str, list[Tensor]], dict[str, float]]:
        """Do a call: for each word that it writes a tensor a sequence (the same on all ranks of a replica), and metrics."""


# --- the worker -------------------------------------------------------------------------------------------


class ModelWorker(Worker):
    """One rank.

    Args:
        graph: the calls.
        meshes: where each runs.
        homes: where the weights of each role are between calls.
        models: what each role is before it is split, made where it is held.
        functions: what the calls do.
        data: the dataset: from the number of a sequence to a tensor for each key that no call writes.
        micro_batches: by call, where the plan says so.
        offload: roles whose weights wait in the host's memory between their calls.
        ranks_per_node: so many neighbouring ranks share a machine.
        threads: of torch.
        timeout: seconds that a rank waits for another one.
        device: where models are, "cpu" or "cuda" (each worker one GPU of its machine). Data stay in the host's memory.
    """

    def __init__(
        self,
        graph: DataflowGraph,
        meshes: Mapping[str, Mesh],
        homes: Mapping[str, Mesh],
        models: Mapping[str, Callable[[], Blueprint]],
        functions: Functions,
        data: Callable[[int], Mapping[str, Tensor]],
        micro_batches: Mapping[str, int],
        offload: Sequence[str] = (),
        ranks_per_node: int = 8,
        threads: int = 1,
        timeout: float = 600.0,
        device: str = "cpu",
    ) -> None:
        torch.set_num_threads(threads)
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
        address = self.master_address, self.master_port
        parallel.join(*address, self.rank, self.world_size, timeout=timeout)
        self.graph, self.where, self.homes = graph, dict(meshes), dict(homes)
        self.functions, self.source = functions, data
        self.micro_batches, self.ranks_per_node = dict(micro_batches), ranks_per_node
        self.groups = Groups()
        self.data: dict[tuple[str, int], Tensor] = {}
        self._coming: dict[tuple[str, int], tuple[Any, Parcel, Tensor]] = {}
        self._going: dict[tuple[str, int], list[tuple[Any, Tensor]]] = {}
        self._arrived = 0
        self.blueprints = {role: models[role]() for role in homes}
        self.stores: dict[str, Store] = {}
        self.parts: dict[str, ModelPart] = {}
        self.optimisers: dict[str, torch.optim.Optimizer] = {}
        self.offloaders: dict[str, Offloader] = {}
        self.offload = tuple(offload)
        self._moved = 0
        self.groups.make(
            group for mesh in (*meshes.values(), *homes.values()) for group in mesh.every_group()
        )
        self._moves = self._ways()
        for role, home in self.homes.items():
            if self.rank in home.members():
                self.stores[role] = self.blueprints[role].cut(home, self.rank, self.device)
                trains = role in graph.trained_roles
                self.parts[role] = self._part(role, home, self.stores[role].views, trains)
                if trains:
                    self.optimisers[role] = functions.optimiser(role, self.parts[role].weights.values())
                self._put_away(role)

    def _part(self, role: str, mesh: Mesh, shards: Mapping[str, Tensor], trains: bool = False) -> ModelPart:
        a, parameters = self.blueprints[role].architecture, self.blueprints[role].parameters
        return ModelPart(a, parameters, mesh, self.groups, self.rank, shards, trains)

    # -- data ----------------------------------------------------------------------------------------------

    @register()
    def load(self, rows: Sequence[int]) -> Answer:
        """Read this rank's share of new sequences."""
        found: dict[str, dict[int, tuple[Size, str]]] = {key: {} for key in self.graph.data_keys}
        for row in rows:
            if row % self.world_size == self.rank:
                columns = self.source(row)
                for key, sizes in found.items():
                    if key not in columns:
                        raise UsageError(
                            f"the dataset gave no '{key}' for sequence {row}; {nearest(key, columns)}"
                        )
                    sizes[row] = self._keep(key, row, columns[key])
        return Answer(found)

    def _keep(self, key: str, row: int, tensor: Tensor) -> tuple[Size, str]:
        self.data[key, row] = tensor.detach().cpu().contiguous()
        return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")

    @register()
    def forget(self, keys: Sequence[tuple[str, int]]) -> None:
        """Drop what all consumers have had."""
        for key in keys:
            self.data.pop(key, None)
            for work, _ in self._going.pop(key, ()):
                work.wait()  # it has arrived: who got it has used it

    @register()
    def transfer(self, parcels: Sequence[Parcel]) -> None:
        """Begin to send and to receive; nobody waits before the data are needed."""
        for parcel in parcels:
            if self.rank == parcel.sender:
                flat = torch.cat([self._get(parcel.key, row).reshape(-1) for row in parcel.rows])
                sent = [(dist.isend(_raw(flat), rank), flat) for rank in parcel.receivers if len(flat)]
                self._going.setdefault((parcel.key, parcel.rows[0]), []).extend(sent)
            elif self.rank in parcel.receivers:
                flat = torch.empty(sum(map(prod, parcel.sizes)), dtype=getattr(torch, parcel.dtype))
                work = dist.irecv(_raw(flat), parcel.sender) if len(flat) else None
                self._coming.update({(parcel.key, row): (work, parcel, flat) for row in parcel.rows})

    def _get(self, key: str, row: int) -> Tensor:
        """What was made here, or has come or is coming."""
        if (key, row) in self._coming:
            work, parcel, flat = self._coming[key, row]
            if work is not None:
                work.wait()
            self._arrived += flat.nbytes
            pieces = flat.split([prod(size) for size in parcel.sizes])
            for number, size, piece in zip(parcel.rows, parcel.sizes, pieces, strict=True):
                self.data[key, number] = piece.view(size)
                del self._coming[key, number]
        return self.data[key, row]

    # -- weights -------------------------------------------------------------------------------------------

    def _ways(self) -> dict[tuple[str, Mesh], Reallocation]:
        """Every way that weights of a role may go, made by all ranks alike because their groups are."""
        wanted = {(role, Mesh(Layout(1), home.members()[:1])): None for role, home in self.homes.items()}
        for call in self.graph.calls:
            if self.where[call.name] != self.homes[call.role]:
                wanted[call.role, self.where[call.name]] = None
            for hook in (*call.pre, *call.post):
                if isinstance(hook, ParamRealloc):
                    wanted[hook.source, self.homes[hook.target]] = None
        found = {}
        for role, mesh in wanted:
            parameters, home = self.blueprints[role].parameters, self.homes[role]
            found[role, mesh] = Reallocation(parameters, home, mesh, self.ranks_per_node, self.groups)
        return found

    def _move(
        self, role: str, mesh: Mesh, into: Mapping[str, Tensor] | None = None, eta: float = 1.0
    ) -> dict[str, Tensor]:
        """This rank's shards of ``role``, from its home to ``mesh``."""
        shards = self.stores[role].views if role in self.stores else {}
        move = self._moves[role, mesh]
        made = move.run(shards, into, eta, self.device, lend=into is None)
        self._moved += move.received
        return made

    def _fetch(self, role: str) -> None:
        """Bring weights back that wait in the host's memory."""
        if role in self.offloaders:
            self.offloaders[role].restore()

    def _put_away(self, role: str, hooked: bool = False) -> None:
        if role not in self.stores or not (hooked or role in self.offload):
            return
        if role not in self.offloaders:
            self.offloaders[role] = Offloader([self.stores[role].flat])
        self.offloaders[role].offload()

    def _hook(self, hook: Hook) -> None:
        if isinstance(hook, Offload):
            self._put_away(hook.role, hooked=True)
            return
        target = self.homes[hook.target]
        if self.rank not in (*self.homes[hook.source].members(), *target.members()):
            return
        for role in (hook.source, hook.target):
            self._fetch(role)
        shapes = [
            {p.name: p.shape for p in self.blueprints[r].parameters} for r in (hook.source, hook.target)
        ]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"the weights of '{hook.source}' cannot go to '{hook.target}': they are different models"
            )
        into = self.stores[hook.target].views if hook.target in self.stores else {}
        self._move(hook.source, target, into, hook.eta)
        for role in (hook.source, hook.target):
            self._put_away(role)

    @contextlib.contextmanager
    def _weights(self, call: ModelFunctionCall) -> Any:
        """This rank's part of the call's model in the call's layout; None for a rank that only sends."""
        role, mesh = call.role, self.where[call.name]
        self._fetch(role)
        try:
            if mesh == self.homes[role]:
                yield self.parts.get(role)
            else:
                shards = self._move(role, mesh)
                yield self._part(role, mesh, shards) if self.rank in mesh.members() else None
        finally:
            self._put_away(role)

    # -- calls ---------------------------------------------------------------------------------------------

    @register()
    def execute(self, request: Request) -> Answer:
        """Get what the call needs, and do it."""
        call, mesh = self.graph[request.call], self.where[request.call]
        answer = Answer(start=time.perf_counter())
        self._moved = 0
        self._fetch(call.role)  # on its way while the data come
        minibatches = self._gather(request, call, mesh)
        for hook in call.pre:
            self._hook(hook)
        with self._weights(call) as part:
            answer.ready = time.perf_counter()
            if part is not None:
                self._compute(request, call, part, minibatches, answer)
        for hook in call.post:
            self._hook(hook)
        answer.end, answer.memory = time.perf_counter(), self.memory()
        answer.data_bytes, answer.weight_bytes, self._arrived = self._arrived, self._moved, 0
        return answer

    def _gather(self, request: Request, call: ModelFunctionCall, mesh: Mesh) -> list[Rows]:
        """This rank's sequences."""
        if self.rank not in mesh.members():
            return []
        replica = mesh.layout.coordinates(mesh.members().index(self.rank)).dp
        found = []
        for by_replica in request.rows:
            mine = list(by_replica[replica])
            keys = zip(call.inputs, call.reads, strict=True)
            found.append(Rows(mine, {word: [self._get(key, row) for row in mine] for word, key in keys}))
        return found

    def _compute(
        self,
        request: Request,
        call: ModelFunctionCall,
        part: ModelPart,
        minibatches: list[Rows],
        answer: Answer,
    ) -> None:
        micro = self.micro_batches.get(call.name, call.micro_batches)
        optimiser = self.optimisers.get(call.role) if call.kind == "train" else None
        work = Work(request.iteration, call, part, minibatches, optimiser, micro)
        made, answer.metrics = self.functions(work)
        numbers = work.rows.numbers
        sizes: dict[str, dict[int, tuple[Size, str]]] = {}
        for word, key in zip(call.outputs, call.writes, strict=True):
            if len(made[word]) != len(numbers):
                raise ShapeError(
                    f"'{call.name}' gave {len(made[word])} tensors of '{word}' for {len(numbers)} sequences"
                )
            pairs = zip(numbers, made[word], strict=True)
            sizes[key] = {row: self._keep(key, row, tensor) for row, tensor in pairs}
        speaks = (part.place.stage, part.place.index) == (0, 0)
        answer.sizes = sizes if speaks else None

    # -- looking in ----------------------------------------------------------------------------------------

    @register()
    def memory(self) -> dict[str, int]:
        """Bytes of ``weights`` on the device, of those ``offloaded`` to the host, and of ``data``."""
        return {
            "weights": sum(store.flat.untyped_storage().nbytes() for store in self.stores.values()),
            "offloaded": sum(away.host_bytes for away in self.offloaders.values()),
            "data": sum(tensor.nbytes for tensor in self.data.values()),
        }

    @register()
    def save(self, role: str, path: str) -> None:
        """Write a role's whole weights to a safetensors file, on the first rank of its home."""
        from safetensors.torch import save_file

        home = self.homes[role]
        if self.rank not in home.members():
            return
        first = home.members()[0]
        self._fetch(role)
        whole = self._move(role, Mesh(Layout(1), (first,)))
        if self.rank == first:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.detach().clone() for name, tensor in whole.items()}, path)
        self._put_away(role)


def _raw(flat: Tensor) -> Tensor:
    """As torch.distributed sends it: it knows no truth values."""
    return flat.view(torch.uint8) if flat.dtype == torch.bool else flat


def ranks_of(call: ModelFunctionCall, meshes: Mapping[str, Mesh], homes: Mapping[str, Mesh]) -> set[int]:
    """The ranks that take part in a call whatever its data: its mesh, where its weights come from, and its hooks'."""
    mesh = meshes[call.name]
    found = set(mesh.members())
    if mesh != homes[call.role]:
        found |= set(homes[call.role].members())
    for hook in (*call.pre, *call.post):
        roles = (hook.source, hook.target) if isinstance(hook, ParamRealloc) else (hook.role,)
        for role in roles:
            found |= set(homes[role].members())
    return found
