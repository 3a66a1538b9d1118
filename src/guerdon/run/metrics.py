"""Collecting the metrics of one step without waiting for the device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import ShapeError, UsageError
from guerdon.run.storage import read_lines

Number = float | int | bool
Value = Number | str | Tensor

METRICS_FILE = "metrics.jsonl"
TIMINGS_FILE = "timings.jsonl"


class Meter:
    """The metrics logged during one step. A name that is logged several times (once a minibatch) is averaged.

    Tensors are kept as they are until `take`, which fetches all of them from the device at once: logging in
    the inner loop costs no synchronisation.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}

    def add(self, name: str, value: Any) -> None:
        """Log one value: a number, a text (the last one of the step counts) or a 0-d tensor.

        Raises:
            ShapeError: a tensor of more than one number.
            UsageError: a value of another kind, or the reserved name ``step``.
        """
        if isinstance(value, Tensor):
            if value.ndim:
                raise ShapeError(
                    f"the metric {name} has shape {list(value.shape)}, expected one number (its mean?)"
                )
            if value.requires_grad or value._base is not None:
                # a parameter or a view may be changed in place before the step ends
                value = value.detach().clone()
        elif isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
            value = value.item()
        if not isinstance(value, (float, int, str, Tensor)):
            raise UsageError(
                f"the metric {name} is a {type(value).__name__}, expected a number, a text or a 0-d tensor"
            )
        if name in self._values:
            self._values[name].append(value)
        elif name == "step":
            raise UsageError(
                "'step' is the number of the step in every record; give this metric another name"
            )
        else:
            self._values[name] = [value]

    def take(self) -> dict[str, Number | str]:
        """The averages, as plain numbers (possibly not finite) in the order of logging; starts anew."""
        values, self._values = self._values, {}
        waiting: dict[tuple[torch.device, torch.dtype], list[tuple[list[Any], int]]] = {}
        for row in values.values():
            for index, value in enumerate(row):
                if isinstance(value, Tensor) and value.device.type == "cpu":
                    row[index] = value.item()  # nothing to wait for, and ten times faster than to stack
                elif isinstance(value, Tensor):
                    waiting.setdefault((value.device, value.dtype), []).append((row, index))
        for places in waiting.values():
            numbers = torch.stack([row[index] for row, index in places]).tolist()
            for (row, index), number in zip(places, numbers, strict=True):
                row[index] = number
        return {name: _average(name, row) for name, row in values.items()}

    def clear(self) -> None:
        """Forget what was logged."""
        self._values = {}


def _average(name: str, values: list[Any]) -> Number | str:
    texts = sum(isinstance(value, str) for value in values)
    if texts and texts < len(values):
        raise UsageError(f"the metric {name} was logged as a text and as a number in the same step")
    if texts or len(values) == 1:
        return values[-1]
    return sum(values) / len(values)


def critical(name: str) -> bool:
    """Whether a metric must be finite for the run to go on: rewards and losses (``loss``, ``actor/loss``,
    ``value_loss``, ``reward``), but not, say, ``reward_std``."""
    return re.split(r"[/._\s]", name)[-1] in ("reward", "loss")


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The records of ``metrics.jsonl`` in a run's folder (none if there is no such file)."""
    return read_lines(Path(folder) / METRICS_FILE)


def read_timings(folder: str | Path) -> list[dict[str, Any]]:
    """The records of ``timings.jsonl``: step, seconds since the start, seconds of the step, peak memory."""
    return read_lines(Path(folder) / TIMINGS_FILE)
