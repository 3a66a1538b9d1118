"""How much of a space has been visited: the figure by which explorers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from guerdon.errors import CheckpointError, UsageError


class Coverage:
    """The cells of a grid over two entries of the observation that have been visited so far.

    Args:
        low, high: ``[2]``, the grid's corners in units of the observation.
        columns: which two entries.
        cells: along each side.

    Raises `UsageError` for bounds that are not finite or leave no room.
    """

    def __init__(
        self,
        low: Sequence[float],
        high: Sequence[float],
        columns: tuple[int, int] = (0, 1),
        cells: int = 40,
    ) -> None:
        self.low, self.high = np.array(low, np.float64), np.array(high, np.float64)
        if not (np.isfinite(self.low) & np.isfinite(self.high) & (self.low < self.high)).all():
            raise UsageError(
                f"coverage is counted between finite bounds, not from {list(low)} to {list(high)}; choose two entries "
                "of the observation that have them"
            )
        self.columns, self.cells = list(columns), cells
        self.visited = np.zeros((cells, cells), dtype=bool)

    @classmethod
    def of(cls, space: Any, columns: tuple[int, int] = (0, 1), cells: int = 40) -> Coverage | None:
        """A grid over two entries of a gymnasium observation space; None where they do not exist or are unbounded."""
        shape = getattr(space, "shape", None)
        if not shape or len(shape) != 1 or shape[0] <= max(columns) or not hasattr(space, "low"):
            return None
        low, high = space.low[list(columns)], space.high[list(columns)]
        # gymnasium writes "no bound" as infinity or as the type's largest number
        return cls(low.tolist(), high.tolist(), columns, cells) if np.abs([low, high]).max() < 1e30 else None

    def add(self, observation: ArrayLike) -> None:
        """Count observations ``[..., D]``; those outside the grid belong to its border."""
        place = np.asarray(observation)[..., self.columns].reshape(-1, 2)
        share = (place - self.low) / (self.high - self.low)
        cell = np.clip((share * self.cells).astype(np.int64), 0, self.cells - 1)
        self.visited[cell[:, 0], cell[:, 1]] = True

    @property
    def count(self) -> int:
        """Cells visited."""
        return int(self.visited.sum())

    def state_dict(self) -> dict[str, Any]:
        """The cells visited."""
        return {"visited": torch.from_numpy(self.visited.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises `CheckpointError` when it is of a grid of another size."""
        visited = state["visited"].numpy().copy()
        if visited.shape != self.visited.shape:
            raise CheckpointError(
                f"the saved coverage is of {visited.shape[0]} x {visited.shape[1]} cells, this one of "
                f"{self.cells} x {self.cells}"
            )
        self.visited = visited
