"""What `Role.update` minimises."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from guerdon.errors import ShapeError, UsageError, nearest

Metrics = dict[str, Tensor]


class Objective(Protocol):
    """A small picklable dataclass that turns a model and a batch into a scalar loss.

    ``__call__`` returns the loss, a MEAN over whatever it counts, and detached scalar metrics (tensors: no
    ``.item()`` here, the run converts them when it writes). ``weight`` tells how much it counted: a batch
    that is split into micro-batches, or spread over workers, gives the same gradient as the whole one when
    each part's loss is multiplied by its share of the total weight. `Role.update` does that.
    """

    def __call__(self, model: Any, batch: Any, /) -> tuple[Tensor, Metrics]: ...

    def weight(self, batch: Any, /) -> Tensor: ...


# --- what objectives check ----------------------------------------------------------------------------------------

_FILLED_BY = {
    "advantage": "compute it with guerdon.credit before the update",
    "target": "compute it with guerdon.credit before the update",
    "value": "store critic.value(batch) there before the first update",
    "reference": "store reference.distribution(batch) there before the first update",
    "reference_log_prob": "call guerdon.objectives.sides.with_reference(batch, reference) before the update",
}


def required(owner: object, batch: Any, name: str, when: str = "") -> Any:
    """The field ``name`` of a batch. Raises `ShapeError`, which says how it is filled, where it is missing.

    Args:
        owner: the objective that reads it; when: with which option, for the message ("with a clip").
    """
    value = getattr(batch, name)
    if value is None:
        raise ShapeError(
            f"{type(owner).__name__}{when and ' ' + when} needs batch.{name}, which is missing: {_FILLED_BY[name]}"
        )
    return value


def check_choices(owner: object, **known: tuple[str, ...]) -> None:
    """Raise `UsageError`, with the nearest name, where an option of ``owner`` is none of those ``known``."""
    for name, choices in known.items():
        value = getattr(owner, name)
        if value not in choices:
            raise UsageError(f"{type(owner).__name__}: {name} is '{value}'; {nearest(value, choices)}")
