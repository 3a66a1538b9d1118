"""Where metrics go besides the run's folder: TensorBoard, Weights & Biases, Trackio.

Each is imported only when asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np

from guerdon.errors import UsageError, nearest
from guerdon.run.storage import guard

Metrics = Mapping[str, float | int | bool | str | None]


@runtime_checkable
class Logger(Protocol):
    """What a run needs of a logger."""

    def write(self, step: int, metrics: Metrics) -> None:
        """Record the metrics of a step; None stands for a value that is not finite."""

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """Record a picture, uint8 ``[H, W, 3]``."""

    def close(self) -> None:
        """Write out what is left."""


def open_logger(name: str, folder: Path, content: Mapping[str, Any], resume: bool = False) -> Logger:
    """The logger called ``name`` (one of ``LOGGERS``).

    Args:
        name: which.
        folder: the run's folder; its name is the run's name.
        content: what ``config.json`` holds; ``content["id"]`` identifies the run.
        resume: the run continues an earlier one.

    Raises:
        UsageError: an unknown name, or the package is not installed.
    """
    if name not in LOGGERS:
        raise UsageError(f"there is no logger '{name}' ({nearest(name, LOGGERS)})")
    return LOGGERS[name](folder, content, resume)


def _need(module: str, logger: str, install: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(f"--log {logger} needs the package {logger}: {install}") from error


class TensorBoard:
    """Event files in ``FOLDER/tensorboard``."""

    def __init__(self, folder: Path, content: Mapping[str, Any], resume: bool) -> None:
        module = _need("torch.utils.tensorboard", "tensorboard", "pip install 'guerdon[tensorboard]'")
        self._module, self._folder, self._resume = module, folder / "tensorboard", resume
        self._writer: Any = None

    def _open(self, step: int) -> Any:
        if self._writer is None:
            with guard(self._folder):
                # records of steps that a resume takes again are purged from the display
                purge = step if self._resume else None
                self._writer = self._module.SummaryWriter(log_dir=str(self._folder), purge_step=purge)
        return self._writer

    def write(self, step: int, metrics: Metrics) -> None:
        writer = self._open(step)
        for name, value in metrics.items():
            if isinstance(value, str):
                writer.add_text(name, value, step)
            elif value is not None:
                writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        self._open(step).add_image(name, array, step, dataformats="HWC")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandB:
    """Weights & Biases, project ``guerdon``; the run keeps its id over a resume."""

    def __init__(self, folder: Path, content: Mapping[str, Any], resume: bool) -> None:
        self._wandb = _need("wandb", "wandb", "pip install wandb")
        self._run = self._wandb.init(
            project="guerdon",
            name=folder.name,
            id=content["id"],
            dir=str(folder),
            config=dict(content["config"]),
            resume="allow",
        )

    def write(self, step: int, metrics: Metrics) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(array)}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """Trackio, project ``guerdon``; a resume continues the run of the same name."""

    def __init__(self, folder: Path, content: Mapping[str, Any], resume: bool) -> None:
        self._trackio = _need("trackio", "trackio", "pip install trackio")
        self._trackio.init(
            project="guerdon",
            # names are all that trackio tells runs apart by
            name=f"{folder.name}-{content['id'][:6]}",
            config=dict(content["config"]),
            resume="allow",
        )

    def write(self, step: int, metrics: Metrics) -> None:
        self._trackio.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        self._trackio.log({name: self._trackio.Image(array)}, step=step)

    def close(self) -> None:
        self._trackio.finish()


LOGGERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
