"""A model's weights from any layout to any other one, also on other ranks (ReaLHF: Mei et al., 2025, section 6).

Each piece of the model is cut as finely as the finer of the two layouts and goes out in broadcasts: one sender for each
node that holds it, to the ranks that need it and do not have it. `plan_broadcasts` says who sends what to whom, and so
how many bytes move, before anything does; `Reallocation` does it. With ``eta`` below 1 the target becomes a moving average
of itself and the source, which is how a reference model follows its policy for the price of a copy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

from guerdon.engine.shards import WHOLE, Groups, Mesh, Parameter, Share, layers_of, put, stage_of, take
from guerdon.errors import UsageError


@dataclass(frozen=True)
class Broadcast:
    """One message: a share of some weights, from one rank to others that do not have it.

    ``bytes`` is what each receiver gets."""

    sender: int
    receivers: tuple[int, ...]
    parameters: tuple[Parameter, ...]
    share: Share
    bytes: int


def plan_broadcasts(
    parameters: Sequence[Parameter], source: Mesh, target: Mesh, ranks_per_node: int = 8
) -> list[Broadcast]:
    """The messages that take a model from ``source`` to ``target``.

    A receiver gets its piece from its own node where the piece is there already, otherwise from the node that has it and
    has sent least so far; on a node, a rank that keeps the piece itself sends before others, then the one that has sent
    least. Ranks that hold a piece in both layouts are not sent it.

    Raises `UsageError` where neither number of tensor shards divides the other, or a layout does not suit the model.
    """
    grain = max(source.layout.tp, target.layout.tp)
    if grain % min(source.layout.tp, target.layout.tp):
        raise UsageError(
            f"weights cannot go from tp={source.layout.tp} to tp={target.layout.tp}; one must divide the other"
        )
    layers = layers_of(parameters)
    together: dict[tuple[int, int, bool, torch.dtype], list[Parameter]] = defaultdict(list)
    for p in parameters:
        stages = stage_of(p, layers, source.layout.pp), stage_of(p, layers, target.layout.pp)
        together[*stages, p.dim is not None, p.dtype].append(p)
    sent: Counter[int] = Counter()  # bytes by rank
    load: Counter[int] = Counter()  # bytes by node
    plan = []
    for (old, new, split, _), group in together.items():
        for share in [Share(i, grain) for i in range(grain)] if split else [WHOLE]:
            size = sum(p.bytes_of(share) for p in group)
            if not size:
                continue
            holders = source.at(old, share.index * source.layout.tp // grain if split else None)
            needers = target.at(new, share.index * target.layout.tp // grain if split else None)
            senders: dict[int, int] = {}  # by node
            for node in {rank // ranks_per_node for rank in holders}:
                local = [rank for rank in holders if rank // ranks_per_node == node]
                senders[node] = min(local, key=lambda r: (r not in needers, sent[r], r))
            asking: dict[int, list[int]] = defaultdict(list)
            for rank in sorted(set(needers) - set(holders)):
                asking[rank // ranks_per_node].append(rank)
            jobs: dict[int, list[int]] = defaultdict(list)
            for node, ranks in asking.items():
                least = min(senders, key=lambda n: (load[n], n))
                sender = senders[node if node in senders else least]
                jobs[sender] += ranks
                sent[sender] += size * len(ranks)
                load[sender // ranks_per_node] += size * len(ranks)
            plan += [Broadcast(s, tuple(ranks), tuple(group), share, size) for s, ranks in jobs.items()]
    return plan


def received(plan: Sequence[Broadcast], rank: int) -> int:
    """Bytes that a rank receives."""
    return sum(message.bytes for message in plan if rank in message.receivers)


class Reallocation:
    """Moves shards from one placement to another, over torch.distributed. Every rank of the world makes one, at the same
    point of its program, also ranks that are in neither placement.

    Args:
        parameters: the weights of the model.
        source, target: where they are and where they go.
        ranks_per_node: so many neighbouring ranks share a machine.
        groups: process groups to share with others.

    ``plan`` are the messages; `run` counts ``received``, the bytes that this rank got in its last run.
    """

    def __init__(
        self,
        parameters: Sequence[Parameter],
        source: Mesh,
        target: Mesh,
        ranks_per_node: int = 8,
        groups: Groups | None = None,
    ) -> None:
        self.parameters, self.source, self.target = list(parameters), source, target
        self.plan = plan_broadcasts(self.parameters, source, target, ranks_per_node)
        self.rank, self.received = dist.get_rank(), 0
        self.groups = Groups() if groups is None else groups
        self.groups.make([(message.sender, *message.receivers) for message in self.plan])

    @torch.no_grad()
    def run(
        self,
        shards: Mapping[str, Tensor],
        into: Mapping[str, Tensor] | None = None,
        eta: float = 1.0,
        device: torch.device | str = "cpu",
        lend: bool = False,
    ) -> dict[str, Tensor]:
        """This rank's shards in the target layout. All ranks of the two meshes call it.

        Args:
            shards: this rank's in the source layout, by name; only read.
            into: tensors of the target layout to write to; None makes new ones. The same for all ranks.
            eta: they become ``eta * source + (1 - eta) * themselves``.
            lend: with ``into`` None, shards that are the same in both layouts are handed on as they are, not copied.
        """
        if not 0 <= eta <= 1 or (eta < 1 and into is None):
            raise UsageError(
                f"eta={eta:g} must be between 0 and 1, and below 1 there must be weights to average into"
            )
        held = self.source.holding(self.parameters, self.rank)
        wanted = self.target.holding(self.parameters, self.rank)
        lent: dict[str, Tensor] = {}
        if into is None:
            if lend:
                lent = {name: shards[name] for name, pair in wanted.items() if held.get(name) == pair}
            into = lent | {
                n: torch.empty(p.shape_of(s), dtype=p.dtype, device=device)
                for n, (p, s) in wanted.items()
                if n not in lent
            }
        for name in (held.keys() & wanted.keys()) - lent.keys():  # what is here already
            (parameter, have), (_, want) = held[name], wanted[name]
            fine, coarse = (have, want) if have.of >= want.of else (want, have)
            if fine in coarse:
                put(into[name], parameter, fine, take(shards[name], parameter, fine, have), want, eta)
        self.received = 0
        for message in self.plan:
            if self.rank not in (message.sender, *message.receivers):
                continue
            shapes = [p.shape_of(message.share) for p in message.parameters]
            if self.rank == message.sender:
                pieces = [
                    take(shards[p.name], p, message.share, held[p.name][1]).reshape(-1)
                    for p in message.parameters
                ]
                parcel = torch.cat(pieces)
            else:
                parcel = torch.empty(sum(map(prod, shapes)), dtype=message.parameters[0].dtype, device=device)
            dist.broadcast(parcel, message.sender, group=self.groups[message.sender, *message.receivers])
            if self.rank != message.sender:
                self.received += parcel.nbytes
                for p, shape, piece in zip(
                    message.parameters, shapes, parcel.split([prod(s) for s in shapes]), strict=True
                ):
                    put(into[p.name], p, message.share, piece.view(shape), wanted[p.name][1], eta)
        return dict(into)
