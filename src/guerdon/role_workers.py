"""A role that several processes hold together: who they are to it, and the update that they make as one.

`Workers` and `Shards` say what `guerdon.roles.Role` needs of an engine (`guerdon.engine.parallel` has it, by
torch.distributed); `JointUpdate` adds up what each worker learned from its share of a batch.
"""

from __future__ import annotations

import contextlib
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from guerdon.batch import Batch
from guerdon.errors import GuerdonError, UsageError
from guerdon.objectives.base import Metrics, Objective
from guerdon.role_parts import add_share, check_adds_up, nothing_to_learn


class Workers(Protocol):
    """The processes that hold one role together, as one of them sees it (`guerdon.engine.parallel.Group`)."""

    rank: int
    world_size: int

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the workers. All call it alike, with tensors of the same shapes."""

    def max(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its element-wise maximum over the workers."""

    def broadcast(self, value: Any, source: int) -> Any:
        """What the worker ``source`` calls ``value``."""

    def shard(self, model: nn.Module, device: torch.device) -> Shards:
        """Leave on each worker's ``device`` its part of the weights of ``model.core`` (or ``model``)."""


class Shards(Protocol):
    """A model whose weights are spread over workers (`guerdon.engine.parallel.ShardedModel`).

    Attributes:
        model: what trains. Its layers gather their weights as they are called inside `run`.
        parameters: its weights that train, of which each worker holds a part.
    """

    model: nn.Module
    parameters: list[nn.Parameter]

    def run(self, function: Callable[[], Any]) -> Any:
        """``function()``, in which ``model`` may be called. All workers make the same calls of its layers."""

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the model that was sharded has its full weights; they do not train. All workers enter alike."""

    def store(self) -> None:
        """Inside `whole`: take over the weights that the model has there."""

    def norm(self, limit: float | None) -> Tensor:
        """The norm of the gradient, which is scaled down to ``limit``."""

    def full_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """An optimiser's ``state_dict()`` with full tensors in place of parts, in memory of the CPU."""

    def part_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """The inverse of `full_state`: this worker's parts."""

    def follow(self, other: Shards, tau: float) -> bool:
        """Move towards ``other``, part by part. False where its parts are others."""


def share(rows: int, rank: int, world_size: int) -> slice:
    """The rows of a batch that fall to a worker: one after the other in the order of ranks, as even as can be."""
    return slice(rank * rows // world_size, (rank + 1) * rows // world_size)


# --- one update of all ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JointUpdate:
    """Loss, metrics and gradient of a batch whose rows several workers have, a share each.

    Args:
        role: its name, and ``number`` of the update, for messages.
        group: the workers.
        device: where the role is.
        parameters: the weights that train; of sharded ones, this worker's parts.
        shards: of a role whose weights are sharded.
        objective: what is minimised.
        forward: its loss and metrics for a part of the batch.
    """

    role: str
    number: int
    group: Workers
    device: torch.device
    parameters: Sequence[nn.Parameter]
    shards: Shards | None
    objective: Objective
    forward: Callable[[Any], tuple[Tensor, Metrics]]

    def gradient(
        self,
        batch: Any,
        weigh: Callable[[], list[tuple[Any, float]]],
        whole: Tensor | float | None = None,
        mark: float = 0.0,
    ) -> tuple[Tensor, Metrics]:
        """Loss and metrics of the batch of which ``batch`` is this worker's share, and on all workers the gradient of
        that batch in ``.grad``.

        Two exchanges: what each share weighs, before the backward pass, and the gradients. No worker leaves out one
        of them, whatever happens to it: it tells the others that it failed.

        Args:
            weigh: gives the parts of this worker's share, each with what it weighs.
            whole: what all shares weigh together; None does not ask.
            mark: `fingerprint` of the weights, which must be that of the others.

        Raises as `Role.update` does.
        """
        trouble: Exception | None = None
        parts: list[tuple[Any, float]] = []
        first: tuple[Tensor, Metrics] | None = None
        rows = batch.batch_size[0] if isinstance(batch, Batch) else 1
        try:
            parts = weigh()
        except Exception as error:
            trouble = error
        if self.shards is not None:
            parts = self._level(batch, parts, rows, trouble)
        # padding only: nothing to learn, nothing to count. Of sharded layers all workers make the same calls
        useful = [(part, w) for part, w in parts if w or self.shards is not None]
        if useful and trouble is None:
            try:
                first = self.forward(useful[0][0])
            except Exception as error:
                trouble = error
        names = None if first is None else tuple(first[1])
        named = 0.0 if names is None else float(zlib.crc32("\n".join(names).encode()))
        weight = sum(w for _, w in parts)
        found = _gather(
            self.group, [weight, trouble is not None, rows, names is not None, named, mark], self.device
        )
        weights, failed, counts, knows, namings, marks = found.unbind(1)
        total = float(weights.sum())
        if trouble is not None:
            raise trouble
        self._all_well(failed)
        if not torch.isclose(marks, marks[0], rtol=1e-9, atol=0.0, equal_nan=True).all():
            raise UsageError(
                f"the workers of '{self.role}' have different weights; give all of them the same model or checkpoint"
            )
        if not counts.any():
            raise UsageError(f"this batch holds no row for '{self.role}' to learn from")
        if whole is not None and isinstance(batch, Batch):
            check_adds_up(self.role, total, float(whole), self.objective, workers=True)
        try:
            if not total and self.shards is None:  # padding only, everywhere
                useful = parts[:1]
                first = self.forward(useful[0][0]) if useful else None
                names = None if first is None else tuple(first[1])
        except Exception as error:
            trouble = error
        if not (knows.all() and (namings == namings[0]).all()):
            names = _agree(self.group, names, self.device)
        assert names is not None

        loss_sum = torch.zeros((), device=self.device)
        own: Metrics = {}
        learns = False
        try:
            for i, (part, w) in enumerate(useful if trouble is None else []):
                loss, metrics = first if i == 0 and first is not None else self.forward(part)
                first = None
                portion = w / max(total, 1e-12)
                if loss.requires_grad:
                    (loss * portion).backward()
                    learns = True
                loss_sum += loss.detach() * portion
                if w or not total:
                    add_share(own, metrics, portion)
        except Exception as error:
            trouble = error
        return self._summed(loss_sum, own, names, learns, trouble)

    def _level(
        self, batch: Any, parts: list[tuple[Any, float]], rows: int, trouble: Exception | None
    ) -> list[tuple[Any, float]]:
        """As many parts in every worker, since layers that gather their weights are called by all alike: some are passed
        once more for nothing. A worker without rows borrows one."""
        group = self.group
        found = _gather(group, [len(parts), trouble is not None, rows], self.device)
        if trouble is not None:
            raise trouble
        self._all_well(found[:, 1])
        if not found[:, 2].any():
            return parts  # refused below, by all
        if not found[:, 2].all():
            source = int(found[:, 2].argmax())
            row = group.broadcast(batch[:1].to("cpu") if group.rank == source else None, source)
            if not rows:
                parts = [(row.to(self.device), 0.0)]
        most = max(1, int(found[:, 0].max()))
        return parts + [(parts[-1][0], 0.0)] * (most - len(parts))

    def _summed(
        self, loss: Tensor, own: Metrics, names: tuple[str, ...], learns: bool, trouble: Exception | None
    ) -> tuple[Tensor, Metrics]:
        """Sum gradients, losses and metrics over the workers, in one exchange."""
        group = self.group
        unknown = [name for name in own if name not in names]
        if unknown and trouble is None:
            trouble = UsageError(
                f"the workers of '{self.role}' do not agree that there is a metric {unknown[0]}"
            )
        means = [name for name in names if not name.endswith("_max")]
        tops = [name for name in names if name.endswith("_max")]
        zero = torch.zeros((), device=self.device)

        def row(values: Sequence[Tensor | float]) -> Tensor:
            if not values:
                return torch.zeros(0, device=self.device)
            return torch.stack([zero + (v if isinstance(v, float) else v.detach().to(zero)) for v in values])

        table = torch.zeros(group.world_size, len(tops), device=self.device)
        table[group.rank] = row([own.get(name, -math.inf) for name in tops])
        gradients: list[Tensor] = []
        if self.shards is None:
            gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        there = torch.tensor([float(p.grad is not None) for p in self.parameters], device=self.device)
        flags = torch.zeros(group.world_size, 2, device=self.device)
        flags[group.rank] = torch.tensor([float(trouble is not None), float(learns)])
        pieces = [loss.float().reshape(1), flags.reshape(-1), row([own.get(n, 0.0) for n in means])]
        pieces += [table.reshape(-1), there]
        figures = torch.cat(pieces)
        group.sum([*gradients, figures])
        loss_, flags, mean, table, there = figures.split([len(piece) for piece in pieces])
        failed, learned = flags.view(-1, 2).unbind(1)
        if trouble is not None or failed.any() or not learned.any():
            for p in self.parameters:
                p.grad = None
            if trouble is not None:
                raise trouble
            self._all_well(failed)
            raise nothing_to_learn(self.role)
        if self.shards is None:
            # a weight that no worker's loss depends on has no gradient, as in one process
            for p, gradient, count in zip(self.parameters, gradients, there.tolist(), strict=True):
                p.grad = gradient if count else None
        summed = dict(zip(means, mean.unbind(), strict=True))
        summed |= zip(tops, table.view(-1, len(tops)).amax(0).unbind() if tops else (), strict=True)
        return loss_.squeeze(0), {name: summed[name] for name in names}

    def _all_well(self, failed: Tensor) -> None:
        """Raise `GuerdonError` where another worker has failed."""
        if failed.any():
            raise GuerdonError(
                f"worker {int(failed.argmax())} could not make update {self.number} of '{self.role}'; its own message "
                "says why"
            )


# --- what workers tell one another ------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> float:
    """A number by which workers see whether their weights are the same."""
    norms = [torch.linalg.vector_norm(p.detach(), 1, dtype=torch.float64) for p in model.parameters()]
    return float(torch.stack(norms).sum())


def _gather(group: Workers, numbers: Sequence[float], device: torch.device) -> Tensor:
    """``[W, K]`` float64 on the CPU: the K numbers of each worker."""
    table = torch.zeros(group.world_size, len(numbers), dtype=torch.float64)
    table[group.rank] = torch.tensor([float(n) for n in numbers], dtype=torch.float64)
    if device.type != "cpu":
        table = table.to(device)
    group.sum([table])
    return table.cpu()


def _agree(group: Workers, names: tuple[str, ...] | None, device: torch.device) -> tuple[str, ...]:
    """The names of all workers: those of the first that has some, then what others add."""
    text = torch.tensor(list("\n".join(names or ()).encode()), dtype=torch.int32, device=device)
    length = torch.tensor([text.numel()], dtype=torch.int32, device=device)
    group.max([length])
    table = torch.zeros(group.world_size, int(length), dtype=torch.int32, device=device)
    table[group.rank, : text.numel()] = text
    group.sum([table])
    lines = [bytes(row).rstrip(b"\0").decode() for row in table.tolist()]
    return tuple(dict.fromkeys(name for line in lines for name in line.split("\n") if name))
