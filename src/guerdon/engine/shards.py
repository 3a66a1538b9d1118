"""Which numbers of which weight a rank holds, and the ranks that it computes with.

A model is cut over pipeline stages and tensor shards (`Parameter`, `Share`, `holding`) and put on ranks of
torch.distributed (`Mesh`). A rank keeps its shards in one flat tensor (`Store`), so that they travel as they lie. Everything
else in this package that moves or computes with shards begins here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from guerdon.engine.protocols import Layout
from guerdon.errors import ShapeError, UsageError

# --- which numbers of which weight ------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The piece ``index`` of ``of`` equal pieces. Pieces of unequal things nest: where ``of`` divides another count,
    every piece of the finer cut lies inside one of the coarser."""

    index: int = 0
    of: int = 1

    def cut(self, size: int) -> tuple[int, int]:
        """Start and end of this piece of ``size`` things."""
        return size * self.index // self.of, size * (self.index + 1) // self.of

    def __contains__(self, finer: Share) -> bool:
        """Whether a piece of a finer cut lies inside this one."""
        return finer.of % self.of == 0 and finer.index * self.of // finer.of == self.index


WHOLE = Share()


@dataclass(frozen=True)
class Parameter:
    """One weight of a model and how it may be split.

    Args:
        name: its name in the model's state.
        shape: of the whole weight.
        layer: the number of its block, "first" (before the blocks: embeddings), "last" (after them: norm and head), or
            "both" (an embedding that is also the head; it exists with one pipeline stage only).
        dim: the dimension that tensor parallelism cuts; None where every rank holds the whole weight.
        parts: sizes along ``dim`` of the projections fused into this weight, each of which is cut by itself; () for one.
        unit: numbers along ``dim`` that stay together, e.g. the size of an attention head. Units above 1 are dealt out
            evenly or not at all.
    """

    name: str
    shape: tuple[int, ...]
    layer: int | Literal["first", "last", "both"]
    dim: int | None = None
    parts: tuple[int, ...] = ()
    unit: int = 1
    dtype: torch.dtype = torch.float32

    def widths(self, share: Share) -> list[int]:
        """Sizes along ``dim`` of the pieces of each part."""
        return [stop - start for start, stop in self._pieces(share)]

    def _pieces(self, share: Share) -> list[tuple[int, int]]:
        """Start and end of the pieces of each part, counted from the part's beginning."""
        assert self.dim is not None
        parts = self.parts or (self.shape[self.dim],)
        if sum(parts) != self.shape[self.dim]:
            raise ShapeError(
                f"{self.name}: the parts {parts} do not add up to its size {self.shape[self.dim]} along {self.dim}"
            )
        pieces = []
        for size in parts:
            units, rest = divmod(size, self.unit)
            if rest or (self.unit > 1 and units % share.of):
                raise UsageError(
                    f"{self.name}: {units} units of {self.unit} cannot be dealt to {share.of} tensor-parallel ranks; "
                    f"use a number of ranks that divides {units}"
                )
            start, stop = share.cut(units)
            pieces.append((start * self.unit, stop * self.unit))
        return pieces

    def windows(self, held: Share, wanted: Share) -> list[tuple[int, int]]:
        """Where ``wanted`` lies inside the tensor of ``held``: start and length along ``dim``, one a part.

        Raises `UsageError` where it does not."""
        found, position = [], 0
        for (a, b), (c, d) in zip(self._pieces(held), self._pieces(wanted), strict=True):
            if c < a or d > b:
                raise UsageError(f"{self.name}: {wanted} is not part of {held}")
            found.append((position + c - a, d - c))
            position += b - a
        return found

    def shape_of(self, share: Share) -> tuple[int, ...]:
        """The shape of one share."""
        if self.dim is None:
            return self.shape
        shape = list(self.shape)
        shape[self.dim] = sum(self.widths(share))
        return tuple(shape)

    def bytes_of(self, share: Share) -> int:
        return prod(self.shape_of(share)) * self.dtype.itemsize

    def common(self, a: Share | None, b: Share | None) -> int:
        """Bytes that two shares have in common; None is a share of nothing."""
        if a is None or b is None:
            return 0
        if self.dim is None:
            return self.bytes_of(WHOLE)
        row = self.bytes_of(WHOLE) // self.shape[self.dim]
        pairs = zip(self._pieces(a), self._pieces(b), strict=True)
        return row * sum(max(0, min(x[1], y[1]) - max(x[0], y[0])) for x, y in pairs)


def take(tensor: Tensor, parameter: Parameter, wanted: Share, held: Share = WHOLE) -> Tensor:
    """The numbers of ``wanted`` out of a tensor with those of ``held``, part by part; a view where there is one part."""
    if parameter.dim is None:
        return tensor
    windows = parameter.windows(held, wanted)
    pieces = [tensor.narrow(parameter.dim, start, length) for start, length in windows]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, parameter.dim)


def put(
    tensor: Tensor, parameter: Parameter, wanted: Share, value: Tensor, held: Share = WHOLE, eta: float = 1.0
) -> None:
    """Write ``value``, the numbers of ``wanted``, into a tensor with those of ``held``; with ``eta`` below 1 the tensor
    becomes ``eta * value + (1 - eta) * tensor`` there."""
    targets, values = [tensor], [value]
    if parameter.dim is not None:
        windows = parameter.windows(held, wanted)
        targets = [tensor.narrow(parameter.dim, start, length) for start, length in windows]
        values = list(value.split([length for _, length in windows], parameter.dim))
    for target, new in zip(targets, values, strict=True):
        target.copy_(new if eta == 1 else eta * new + (1 - eta) * target)


def join(pieces: Sequence[tuple[Share, Tensor]], parameter: Parameter, held: Share = WHOLE) -> Tensor:
    """One tensor with the numbers of ``held``, from the pieces that it consists of."""
    if parameter.dim is None:
        return pieces[0][1].clone()
    whole = pieces[0][1].new_empty(parameter.shape_of(held))
    for share, piece in pieces:
        put(whole, parameter, share, piece, held)
    return whole


def layers_of(parameters: Iterable[Parameter]) -> int:
    """The number of blocks."""
    return max((p.layer for p in parameters if isinstance(p.layer, int)), default=-1) + 1


def stage_of(parameter: Parameter, layers: int, pp: int) -> int:
    """The pipeline stage of a weight: stage ``s`` has the blocks from ``s L / pp`` up to ``(s + 1) L / pp``, the first
    stage the embeddings, the last one the head. Stages of a coarser cut consist of whole stages of a finer one."""
    if isinstance(parameter.layer, int):
        return next(s for s in range(pp) if Share(s, pp).cut(layers)[1] > parameter.layer)
    if parameter.layer == "both" and pp > 1:
        raise UsageError(
            f"{parameter.name} is embedding and head at once, which takes one pipeline stage, not {pp}; "
            "untie them (tie_word_embeddings=False) or use pp=1"
        )
    return pp - 1 if parameter.layer == "last" else 0


def holding(
    parameters: Sequence[Parameter], pp: int, tp: int, stage: int, index: int
) -> dict[str, tuple[Parameter, Share]]:
    """What the rank at pipeline stage ``stage`` with tensor shard ``index`` holds: weights and the share of each, by
    name, those that are split before those that are not. Raises `UsageError` for a model that cannot be split so."""
    layers = layers_of(parameters)
    if pp > max(layers, 1):
        raise UsageError(f"{layers} blocks cannot be split over {pp} pipeline stages; use at most {layers}")
    own = [p for p in parameters if stage_of(p, layers, pp) == stage]
    own.sort(key=lambda p: p.dim is None)
    return {p.name: (p, WHOLE if p.dim is None else Share(index, tp)) for p in own}


# --- a rank's shards, and the ranks that it talks to --------------------------------------------------------


def piece_size(parameter: Parameter, rank: int, world: int) -> int:
    """Numbers in a rank's flat piece of a weight."""
    start, stop = Share(rank, world).cut(prod(parameter.shape))
    return stop - start


class Store:
    """A rank's training shards in one flat tensor, so that they travel as they lie.

    Args:
        shapes: shape by name; those that are split come first.
        split: how many of them are split.

    ``views`` are the shards, by name: writing to them, as an optimiser does, writes to ``flat``.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        split: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = [prod(shape) for shape in shapes.values()]
        ends = [0, *accumulate(sizes)]
        self.split = ends[split]
        self.flat = torch.empty(ends[-1], dtype=dtype, device=device)
        self.views = {
            name: self.flat[start : start + size].view(shape)
            for (name, shape), start, size in zip(shapes.items(), ends, sizes, strict=False)
        }

    @classmethod
    def empty(cls, held: Mapping[str, tuple[Parameter, Share]], device: torch.device | str = "cpu") -> Store:
        """Room for what `holding` says."""
        shapes = {name: p.shape_of(share) for name, (p, share) in held.items()}
        split = sum(p.dim is not None for p, _ in held.values())
        return cls(shapes, split, _dtype(p for p, _ in held.values()), device)

    @classmethod
    def cut(
        cls, parameters: Sequence[Parameter], weights: Mapping[str, Tensor], layout: Layout, rank: int
    ) -> Store:
        """A rank's shards of a whole model, copied."""
        _, stage, index = layout.coordinates(rank)
        held = holding(parameters, layout.pp, layout.tp, stage, index)
        device = next(iter(weights.values())).device
        store = cls.empty(held, device)
        for name, (parameter, share) in held.items():
            store.views[name].copy_(take(weights[name].detach(), parameter, share))
        return store

    @classmethod
    def zero(
        cls, parameters: Sequence[Parameter], weights: Mapping[str, Tensor], world: int, rank: int
    ) -> Store:
        """A rank's pieces of a whole model as ZeRO splits it: one flat piece of every weight."""
        shapes = {p.name: (piece_size(p, rank, world),) for p in parameters}
        store = cls(shapes, len(shapes), _dtype(parameters), next(iter(weights.values())).device)
        for p in parameters:
            start, stop = Share(rank, world).cut(prod(p.shape))
            store.views[p.name].copy_(weights[p.name].detach().reshape(-1)[start:stop])
        return store


def _dtype(parameters: Iterable[Parameter]) -> torch.dtype:
    found = {p.dtype for p in parameters}
    if len(found) > 1:
        raise UsageError(
            f"a flat store holds one type of numbers, not {sorted(map(str, found))}; cast the model first"
        )
    return found.pop() if found else torch.float32


class Groups:
    """Process groups by their ranks. Making one takes every rank of the world, so every rank makes all of them, in the
    same order: `make` sorts."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def make(self, groups: Iterable[Sequence[int]]) -> None:
        """Make those that there are not yet."""
        for ranks in sorted({tuple(sorted(set(g))) for g in groups if len(set(g)) > 1}):
            if ranks not in self._made:
                self._made[ranks] = dist.new_group(list(ranks))

    def __getitem__(self, ranks: Sequence[int]) -> dist.ProcessGroup | None:
        """The group of ``ranks``; None where that is one rank, which has nothing to say to itself."""
        members = tuple(sorted(set(ranks)))
        return None if len(members) == 1 else self._made[members]

    def close(self) -> None:
        """Give them back; the world's stays."""
        for group in self._made.values():
            dist.destroy_process_group(group)
        self._made.clear()


# --- where the shards are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a rank is: its stage of ``stages``, its tensor shard of ``shards``, and the ranks it computes with.

    ``tensor`` are the ranks of its tensor group, shard by shard; ``pipeline`` those of its pipeline, stage by stage; ``data``
    those with the same part of the model in other replicas."""

    stage: int = 0
    stages: int = 1
    index: int = 0
    shards: int = 1
    tensor: tuple[int, ...] = (0,)
    pipeline: tuple[int, ...] = (0,)
    data: tuple[int, ...] = (0,)

    @property
    def first(self) -> bool:
        return self.stage == 0

    @property
    def last(self) -> bool:
        return self.stage == self.stages - 1

    @property
    def share(self) -> Share:
        """Of the weights that are split."""
        return Share(self.index, self.shards)


@dataclass(frozen=True)
class Mesh:
    """A layout and the ranks that it is on.

    Args:
        layout: pipeline, tensor and data parallelism.
        ranks: of torch.distributed, one for each rank of the layout; None for the first ones.
    """

    layout: Layout
    ranks: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        size = self.layout.world_size
        if self.ranks is not None and (len(self.ranks) != size or len(set(self.ranks)) != size):
            raise UsageError(f"{self.layout} takes {size} different ranks, not {self.ranks}")

    def members(self) -> tuple[int, ...]:
        """The ranks, in the order of the layout."""
        return self.ranks or tuple(range(self.layout.world_size))

    def at(self, stage: int, index: int | None = None) -> list[int]:
        """Ranks of a pipeline stage, of one tensor shard or of all."""
        found = []
        for place, rank in enumerate(self.members()):
            _, pp, tp = self.layout.coordinates(place)
            if pp == stage and index in (None, tp):
                found.append(rank)
        return found

    def replica(self, dp: int) -> tuple[int, ...]:
        """The ranks that hold one replica of the model together."""
        pairs = enumerate(self.members())
        return tuple(rank for place, rank in pairs if self.layout.coordinates(place).dp == dp)

    def holding(self, parameters: Sequence[Parameter], rank: int) -> dict[str, tuple[Parameter, Share]]:
        """What a rank holds; nothing for a rank that is not among the mesh's."""
        if rank not in self.members():
            return {}
        _, stage, index = self.layout.coordinates(self.members().index(rank))
        return holding(parameters, self.layout.pp, self.layout.tp, stage, index)

    def groups(self, kind: Literal["tensor", "pipeline", "data"]) -> list[tuple[int, ...]]:
        """All groups of ranks that differ in one coordinate, ordered by it."""
        free = {"data": 0, "pipeline": 1, "tensor": 2}[kind]
        members = self.members()

        def others(place: int) -> tuple[int, ...]:
            return tuple(c for i, c in enumerate(self.layout.coordinates(place)) if i != free)

        return [tuple(members[i] for i in group) for group in partition(range(len(members)), others)]

    def every_group(self) -> list[tuple[int, ...]]:
        """The groups of all kinds, for `Groups.make`."""
        return [*self.groups("tensor"), *self.groups("pipeline"), *self.groups("data")]

    def place(self, rank: int) -> Place:
        """Where a rank of the mesh is."""
        _, stage, index = self.layout.coordinates(self.members().index(rank))

        def mine(kind: Literal["tensor", "pipeline", "data"]) -> tuple[int, ...]:
            return next(group for group in self.groups(kind) if rank in group)

        sizes = stage, self.layout.pp, index, self.layout.tp
        return Place(*sizes, mine("tensor"), mine("pipeline"), mine("data"))


def partition(ranks: Iterable[int], key: Callable[[int], tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Ranks with the same key together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in ranks:
        groups.setdefault(key(rank), []).append(rank)
    return [tuple(group) for group in groups.values()]
