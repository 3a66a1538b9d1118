"""A model's weights between the layout that trains it and the layout that generates with it.

Training splits a model over ``p`` pipeline stages and ``t`` tensor-parallel shards, ``d`` times over. Generation wants
fewer shards, ``p_g`` and ``t_g``, and so ``d_g = p t / (p_g t_g)`` micro data-parallel replicas inside each training
replica (the 3D-HybridEngine of HybridFlow: Sheng et al., 2025, section 5):

- `GenerationLayout`: who generates with whom, and `account`: how many bytes that moves, holds and wastes;
- `HybridEngine`: the transition itself over torch.distributed, and the batch on its way there and back.

Weights move as they lie: a rank's shard is one flat tensor (`Store`), a gathered weight is the list of the training
shards that it consists of, its own among them without a copy, and linear layers compute with such lists
(`guerdon.engine.sharded`). That is what makes generation's weights and the training shard fit into M / (t_g p_g) bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from guerdon.engine.protocols import Layout
from guerdon.engine.shards import (
    WHOLE,
    Groups,
    Parameter,
    Share,
    Store,
    holding,
    join,
    partition,
    piece_size,
    take,
)
from guerdon.errors import ShapeError, UsageError, nearest

ENGINES = ("hybridflow", "vanilla", "zero")

# --- who generates with whom ------------------------------------------------------------------------------


@dataclass(frozen=True)
class GenerationLayout:
    """Generation groups ``p_g - t_g - d_g - d`` on the ranks of a training layout ``p - t - d``.

    Args:
        train: the training layout.
        pp, tp: ``p_g`` and ``t_g``; they divide ``p`` and ``t``.
        strided: HybridFlow's choice: tensor groups of ranks at stride ``t / t_g`` (pipeline groups at ``p / p_g``) and
            micro data-parallel groups of neighbours, so that each rank's training shard lies inside its generation
            shard. Otherwise the order of training layouts: neighbours form tensor groups.
    """

    train: Layout
    pp: int = 1
    tp: int = 1
    strided: bool = True

    def __post_init__(self) -> None:
        for name, of in (("pp", self.train.pp), ("tp", self.train.tp)):
            if getattr(self, name) < 1 or of % getattr(self, name):
                raise UsageError(
                    f"generation with {name}={getattr(self, name)} does not divide training's {name}={of}"
                )

    @property
    def micro(self) -> int:
        """``d_g``: replicas that generate inside one training replica."""
        return self.train.pp * self.train.tp // (self.pp * self.tp)

    @property
    def replicas(self) -> int:
        """``d d_g``: replicas that generate."""
        return self.train.dp * self.micro

    def coordinates(self, rank: int) -> tuple[int, int, int, int]:
        """Training replica, micro replica within it, pipeline stage and tensor shard of a rank in generation."""
        dp, pp, tp = self.train.coordinates(rank)
        if self.strided:
            every_pp, every_tp = self.train.pp // self.pp, self.train.tp // self.tp
            micro = (pp % every_pp) * every_tp + tp % every_tp
            return dp, micro, pp // every_pp, tp // every_tp
        place = pp * self.train.tp + tp
        return dp, place // self.tp % self.micro, place // (self.tp * self.micro), place % self.tp

    def groups(self, kind: Literal["tp", "pp", "micro_dp"]) -> list[tuple[int, ...]]:
        """All groups of a kind, ranks ascending, which is also the order of their shards, stages or replicas."""
        free = {"tp": 3, "pp": 2, "micro_dp": 1}[kind]
        return partition(
            range(self.train.world_size),
            lambda r: tuple(c for i, c in enumerate(self.coordinates(r)) if i != free),
        )

    def rows(self, rows: int, rank: int) -> slice:
        """Which of ``rows`` rows of a batch a rank generates: the same ones as the other ranks of its replica."""
        dp, micro, *_ = self.coordinates(rank)
        return slice(*Share(dp * self.micro + micro, self.replicas).cut(rows))


# --- how many bytes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Traffic:
    """Bytes of one rank in one transition.

    Args:
        received: by collectives, from other ranks.
        peak: most gathered weights held at once, the rank's own shard counted once where it is among them.
        redundant: of the training shard, kept while generating although generation does not compute with it.
    """

    received: int | Fraction
    peak: int | Fraction
    redundant: int | Fraction


def formula(engine: str, size: int, train: Layout, pp: int, tp: int) -> Traffic:
    """The bytes of a rank for a model of ``size`` bytes that splits evenly (HybridFlow, table 2).

    ``redundant`` of "vanilla" is that of its worst rank where a rank is left out at all; `account` knows which."""
    _known(engine)
    shards, gathered = train.tp * train.pp, tp * pp
    world = shards * train.dp
    if engine == "zero":
        return Traffic(Fraction(world - 1, world) * size, size, Fraction(size, world))
    if engine == "vanilla":
        return Traffic(Fraction(shards - 1, shards) * size, size, Fraction(size, shards))
    return Traffic(
        Fraction(shards - gathered, gathered * shards) * size, Fraction(size, gathered), Fraction(0)
    )


def account(
    parameters: Sequence[Parameter], train: Layout, pp: int, tp: int, engine: str, rank: int
) -> Traffic:
    """The bytes of one rank for one model, to the byte: unequal stages and weights that are not split included.

    Args:
        train: layout ``p - t - d`` of training; with "zero" only its number of ranks counts, each with one piece of
            every weight.
        pp, tp: ``p_g`` and ``t_g`` of generation.
        engine: "hybridflow" gathers what generation needs, in micro data-parallel groups; "vanilla" gathers the model in
            each training replica and forms generation groups of neighbours; "zero" gathers the model from all ranks.
    """
    _known(engine)
    model = sum(p.bytes_of(WHOLE) for p in parameters)
    if engine == "zero":
        own = sum(piece_size(p, rank, train.world_size) * p.dtype.itemsize for p in parameters)
        return Traffic(model - own, model, own)
    _, stage, index = train.coordinates(rank)
    held = holding(parameters, train.pp, train.tp, stage, index)
    _, _, stage, index = GenerationLayout(train, pp, tp, engine == "hybridflow").coordinates(rank)
    wanted = holding(parameters, pp, tp, stage, index)
    own = sum(p.bytes_of(share) for p, share in held.values())
    used = sum(p.common(share, wanted[n][1]) for n, (p, share) in held.items() if n in wanted)
    if engine == "vanilla":
        return Traffic(model - own, model, own - used)
    gathered = sum(p.bytes_of(share) for p, share in wanted.values())
    return Traffic(gathered - used, gathered + own - used, own - used)


def _known(engine: str) -> None:
    if engine not in ENGINES:
        raise UsageError(f"there is no resharding engine '{engine}'; {nearest(engine, ENGINES)}")


# --- for real ---------------------------------------------------------------------------------------------


class _Meter:
    """Counts bytes received, and bytes of gathered weights as long as their memory really is in use."""

    def __init__(self) -> None:
        self.received = 0
        self.peak = 0
        self._held: list[tuple[StorageWeakRef, int]] = []

    def hold(self, tensor: Tensor) -> Tensor:
        self._held.append((StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        self.peak = max(self.peak, self.live())
        return tensor

    def live(self) -> int:
        return sum(size for storage, size in self._held if not storage.expired())


class GenerationWeights:
    """What a rank generates with. Leave it (``with``), or `close` it, and the gathered weights are gone.

    ``blocks[name]`` are the training shards, in order, that together are the generation shard of a weight; ``shares``
    says which share each of the split ones is. ``traffic`` is what was measured while gathering.
    """

    def __init__(
        self,
        held: dict[str, tuple[Parameter, Share]],
        blocks: dict[str, list[Tensor]],
        shares: list[Share],
        traffic: Traffic,
        meter: _Meter,
    ) -> None:
        self.held, self.blocks, self.shares, self.traffic = held, blocks, shares, traffic
        self._meter = meter

    def assemble(self, name: str) -> Tensor:
        """A weight's generation shard as one tensor of its own, a copy."""
        parameter, share = self.held[name]
        blocks = self.blocks[name]
        if len(blocks) == 1:
            return blocks[0].clone()
        return join(list(zip(self.shares, blocks, strict=True)), parameter, share)

    def live(self) -> int:
        """Bytes of gathered weights whose memory is in use at this moment, a shard of the rank's own not counted once
        this was closed."""
        return self._meter.live()

    def close(self) -> None:
        self.blocks = {}

    def __enter__(self) -> GenerationWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class HybridEngine:
    """Takes a model from its training layout to its generation layout and back, on the ranks of torch.distributed.

    Every rank makes one, at the same point of its program, for forming groups takes them all.

    Args:
        parameters: the weights of the model.
        train: the training layout; its ranks are all ranks of torch.distributed.
        pp, tp: of generation.
        engine: "hybridflow", or, to compare, "vanilla" and "zero" (see `account`).
        groups: process groups to share with others.

    All-gathers are written as one broadcast a member, into memory of its own each: shards need not be equally large,
    and a rank's own shard is among the gathered ones without a copy.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        train: Layout,
        pp: int = 1,
        tp: int = 1,
        engine: str = "hybridflow",
        groups: Groups | None = None,
    ) -> None:
        _known(engine)
        self.parameters, self.train, self.engine = list(parameters), train, engine
        self.layout = GenerationLayout(train, pp, tp, engine == "hybridflow")
        self.rank, self.world = dist.get_rank(), train.world_size
        if dist.get_world_size() != self.world:
            raise UsageError(
                f"the layout {train} is for {self.world} ranks, there are {dist.get_world_size()}"
            )
        replicas = partition(range(self.world), lambda r: train.coordinates(r)[:1])
        # whose shards a rank gathers, and from whom it gets the weights that are not split
        key = self.layout.coordinates
        if engine == "hybridflow":
            families = [self.layout.groups("micro_dp"), self._across_stages(lambda r: key(r)[2])]
        elif engine == "vanilla":
            families = [replicas, self._across_stages(lambda _: 0)]
        else:
            families = [[tuple(range(self.world))], [(r,) for r in range(self.world)]]
        self._members, self._peers = (next(g for g in family if self.rank in g) for family in families)
        self.groups = Groups() if groups is None else groups
        self.groups.make([group for family in families for group in family] + self.layout.groups("micro_dp"))
        _, _, stage, index = self.layout.coordinates(self.rank)
        self.held = holding(self.parameters, pp, tp, stage, index)

    def _across_stages(self, generation_stage: Callable[[int], int]) -> list[tuple[int, ...]]:
        """Ranks of one replica with the same tensor shard in training: they hold different stages' norms."""

        def key(rank: int) -> tuple[int, ...]:
            dp, _, tp = self.train.coordinates(rank)
            return dp, tp, generation_stage(rank)

        return partition(range(self.world), key)

    @torch.no_grad()
    def gather(self, store: Store) -> GenerationWeights:
        """The weights to generate with, from every rank's `Store` (`Store.zero` for "zero"). All ranks call it.

        The stores are only read. Training must not change them before the result was closed."""
        meter = _Meter()
        if self.engine == "zero":
            blocks, shares = self._gather_pieces(store, meter), [self._generation_share()]
        else:
            blocks, shares = self._gather_shards(store, meter)
        mine = store.flat.untyped_storage().data_ptr()
        every = (block for row in blocks.values() for block in row)
        used = sum(block.nbytes for block in every if block.untyped_storage().data_ptr() == mine)
        traffic = Traffic(meter.received, meter.peak, store.flat.nbytes - used)
        return GenerationWeights(self.held, blocks, shares, traffic, meter)

    def _generation_share(self) -> Share:
        return Share(self.layout.coordinates(self.rank)[3], self.layout.tp)

    def _gather_shards(self, store: Store, meter: _Meter) -> tuple[dict[str, list[Tensor]], list[Share]]:
        """Other members' flat shards beside the own one, and views of those that generation needs."""
        meter.hold(store.flat)
        sources: list[tuple[dict[str, tuple[Parameter, Share]], dict[str, Tensor]]] = []

        def rooms(members: Sequence[int], split: bool) -> dict[int, Tensor]:
            """Each member's weights that are split, or that are not, in memory of their own: some may go earlier."""
            found = {}
            for member in members:
                _, stage, index = self.train.coordinates(member)
                held = holding(self.parameters, self.train.pp, self.train.tp, stage, index)
                held = {name: pair for name, pair in held.items() if (pair[0].dim is not None) == split}
                if member == self.rank:
                    found[member] = store.flat[: store.split] if split else store.flat[store.split :]
                    sources.append((held, store.views))
                else:
                    other = Store.empty(held, store.flat.device)
                    found[member] = meter.hold(other.flat)
                    sources.append((held, other.views))
            return found

        meter.received += _all_gather(rooms(self._members, True), self.groups[self._members])
        meter.received += _all_gather(rooms(self._peers, False), self.groups[self._peers])
        own, every = self._generation_share(), self.train.tp // self.layout.tp
        shares = [Share(own.index * every + i, self.train.tp) for i in range(every)]
        blocks = {}
        for name, (parameter, _) in self.held.items():
            found = {held[name][1]: views[name] for held, views in sources if name in held}
            blocks[name] = [found[s] for s in (shares if parameter.dim is not None else [WHOLE])]
        return blocks, shares

    def _gather_pieces(self, store: Store, meter: _Meter) -> dict[str, list[Tensor]]:
        """Every weight whole, then views of the slices that generation needs."""
        whole: dict[str, Tensor] = {}
        for p in self.parameters:
            flat = meter.hold(store.flat.new_empty(prod(p.shape)))
            rooms = {r: flat[slice(*Share(r, self.world).cut(len(flat)))] for r in range(self.world)}
            rooms[self.rank].copy_(store.views[p.name])
            meter.received += _all_gather(rooms, self.groups[range(self.world)])
            whole[p.name] = flat.view(p.shape)
        return {name: [take(whole[name], p, share)] for name, (p, share) in self.held.items()}

    def rows(self, rows: int) -> slice:
        """Which rows of a batch this rank generates."""
        return self.layout.rows(rows, self.rank)

    def gather_rows(self, answers: Tensor, rows: int, fill: float = 0) -> Tensor:
        """All answers of this rank's training replica, from those of its micro replicas.

        Args:
            answers: ``[b, T, ...]`` for this rank's `rows`; ``T`` may differ between replicas.
            rows: of the whole batch.
            fill: what shorter answers are filled up with.

        Returns ``[B / d, T, ...]``, in the order of the batch.
        """
        group = next(g for g in self.layout.groups("micro_dp") if self.rank in g)
        process_group = self.groups[group]
        if process_group is None:
            return answers
        mine = self.rows(rows)
        if len(answers) != mine.stop - mine.start:
            raise ShapeError(
                f"rank {self.rank} answers {mine.stop - mine.start} rows of {rows}, not {len(answers)}"
            )
        kind, tail = answers.dtype, list(answers.shape[1:])
        if tail:
            longest = torch.tensor(tail[0], device=answers.device)
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=process_group)
            tail[0] = int(longest)
        raw = torch.uint8 if kind == torch.bool else kind
        rooms = {}
        for member in group:
            share = self.layout.rows(rows, member)
            rooms[member] = torch.full(
                (share.stop - share.start, *tail), fill, dtype=raw, device=answers.device
            )
        room = rooms[self.rank]
        (room[:, : answers.shape[1]] if tail else room).copy_(answers)
        _all_gather(rooms, process_group)
        return torch.cat([rooms[member] for member in group]).to(kind)


def _all_gather(rooms: Mapping[int, Tensor], group: dist.ProcessGroup | None) -> int:
    """Fill every rank's room from that rank, at once; the bytes that this rank received."""
    if group is None:
        return 0
    waiting, received = [], 0
    for owner, room in rooms.items():
        if room.numel():
            waiting.append(dist.broadcast(room, owner, group=group, async_op=True))
            received += 0 if owner == dist.get_rank() else room.nbytes
    for work in waiting:
        work.wait()
    return received
