"""An update that is made part by part: the refusals of a batch that cannot be, and sums of what the parts give.

The parts are micro-batches, the shares of several workers, or the minibatches of a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from guerdon.batch import Batch, Trajectories
from guerdon.errors import UsageError
from guerdon.objectives.base import Metrics, Objective
from guerdon.role_settings import RoleSettings


def minibatch_rows(
    rows: int,
    minibatch: int | None,
    epochs: int,
    generator: torch.Generator | None,
    orders: Sequence[Tensor] | None,
) -> int:
    """The rows of a minibatch of ``Role.fit``, from its arguments and the ``rows`` of its data.

    Raises `UsageError` for arguments that do not go together.
    """
    size = rows if minibatch is None else min(minibatch, rows)
    if size < 1:
        raise UsageError(f"a minibatch holds at least one row, not {size}")
    if orders is not None and (generator is not None or len(orders) != epochs):
        raise UsageError(
            f"fit takes an order for each of its {epochs} passes and no generator, or a generator"
        )
    return size


def micro_batches(
    role: str, model: nn.Module, batch: Any, objective: Objective, settings: RoleSettings
) -> list[Any]:
    """``batch`` in parts for a forward and backward pass each: so many rows, and so many steps where those of the model
    are independent. Raises `UsageError` where they are not."""
    rows, steps = settings.micro_batch, settings.micro_steps
    if not isinstance(batch, Batch) or (rows is None and steps is None):
        return [batch]
    parts: list[Any] = (
        [batch] if rows is None or rows >= batch.batch_size[0] else list(batch.minibatches(rows))
    )
    if steps is None or not isinstance(batch, Trajectories) or steps >= batch.steps:
        return parts
    if not getattr(model, "markov", False):
        raise UsageError(f"'{role}': the steps of {type(model).__name__} cannot be split (micro_steps)")
    if getattr(objective, "reduction", None) not in ("step", "constant"):
        raise UsageError(
            "micro_steps needs an objective that treats steps apart (reduction 'step' or 'constant')"
        )
    return [
        part.select_steps(start, start + steps) for part in parts for start in range(0, batch.steps, steps)
    ]


def check_adds_up(role: str, parts: float, whole: float, objective: Objective, workers: bool = False) -> None:
    """Raise `UsageError` where the weights of the ``parts`` of a batch are together not the weight of the ``whole``: the
    objective compares rows of different parts. ``workers``: the parts are the shares of workers, not micro-batches."""
    if not math.isclose(parts, whole, rel_tol=1e-4):
        how = "over workers" if workers else "into micro-batches"
        remedy = "train it in one worker" if workers else "use a larger micro_batch"
        raise UsageError(
            f"'{role}': this batch cannot be split {how}, because {type(objective).__name__} "
            f"compares its rows with one another; {remedy}, or a batch of pairs"
        )


def nothing_to_learn(role: str) -> UsageError:
    """What to raise where no part of a batch gives a gradient."""
    return UsageError(
        f"the loss of '{role}' does not depend on its weights: this batch holds no step to learn from"
    )


# --- metrics ----------------------------------------------------------------------------------------------


def add_metrics(sums: Metrics, metrics: Metrics) -> None:
    """Sum up metrics; of those called ``..._max`` keep the largest."""
    for name, value in metrics.items():
        if name not in sums:
            sums[name] = value
        elif name.endswith("_max"):
            sums[name] = torch.maximum(sums[name], value)
        else:
            sums[name] = sums[name] + value


def add_share(sums: Metrics, metrics: Metrics, share: Tensor | float) -> None:
    """`add_metrics` for a part that makes up this ``share`` of its batch: the sums become the batch's means."""
    add_metrics(sums, {n: v if n.endswith("_max") else v * share for n, v in metrics.items()})


def mean_metrics(sums: Metrics, count: int) -> Metrics:
    """The means of what `add_metrics` summed up over ``count`` updates."""
    return {name: v if name.endswith("_max") else v / max(count, 1) for name, v in sums.items()}


def add_figures(updates: Sequence[Tensor], names: Sequence[str]) -> Tensor:
    """``[2 + M]``: `add_metrics` for what compiled updates give, a vector each of loss, gradient norm and the ``M``
    metrics of these names."""
    if len(updates) == 1:
        return updates[0]
    table = torch.stack(list(updates))
    total = table.sum(0)
    for i, name in enumerate(names, 2):
        if name.endswith("_max"):
            total[i] = table[:, i].max()
    return total


# --- leaves -----------------------------------------------------------------------------------------------

_UNREAD = {"outputs", "group", "version", "index"}  # what judges and books read, objectives do not


def leaves(data: Batch) -> dict[tuple[str, ...], Tensor]:
    """The tensors of a batch that an objective may read, by nested name."""
    found: dict[tuple[str, ...], Tensor] = {}

    def walk(prefix: tuple[str, ...], node: Any) -> None:
        for name, value in node.items():
            if isinstance(value, Tensor):
                found[(*prefix, name)] = value
            elif value is not None and (prefix or name not in _UNREAD):
                walk((*prefix, name), value)

    walk((), data._tensordict)  # type: ignore[attr-defined]
    # compiled functions know one layout: an expanded tensor (one deviation for all rows) would be read beyond its end
    return {name: leaf.contiguous() for name, leaf in found.items() if name[0] not in _UNREAD}
