"""What `Role.update` minimises."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

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
