"""``config.json``: everything needed to run again."""

from __future__ import annotations

import json
import os
import platform
import uuid
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from guerdon.errors import CheckpointError, UsageError
from guerdon.run.storage import write_atomic

CONFIG_FILE = "config.json"


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "unknown"

    return (
        ("guerdon", of("guerdon")),
        ("torch", str(torch.__version__)),
        ("numpy", of("numpy")),
        ("python", platform.python_version()),
    )


def versions() -> dict[str, str]:
    """Versions of guerdon, torch, numpy and python."""
    return dict(_versions())


def holds_run(folder: str | Path) -> bool:
    """Whether a run was started in ``folder``."""
    folder = Path(folder)
    return any((folder / name).exists() for name in (CONFIG_FILE, "metrics.jsonl", "checkpoints"))


def describe(config: dict[str, Any], seed: int, engine: dict[str, Any]) -> dict[str, Any]:
    """The content of ``config.json`` for a new run."""
    return {
        "id": uuid.uuid4().hex[
            :12
        ],  # names the run for outside loggers, so that a resume continues the same one
        "config": config,
        "seed": seed,
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "engine": engine,
    }


def write_config(folder: str | Path, content: dict[str, Any]) -> None:
    """Write ``config.json`` atomically.

    Raises:
        UsageError: a value that JSON cannot hold.
        StorageError: the folder cannot be written.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the config cannot be written to {CONFIG_FILE}: {error}") from error
    write_atomic(Path(folder) / CONFIG_FILE, text + "\n")


def read_config(folder: str | Path) -> dict[str, Any]:
    """What ``config.json`` holds: ``config`` and ``seed`` as given to the run, ``versions``, ``platform``,
    ``threads``, ``engine``, ``id``.

    Raises:
        CheckpointError: the folder holds no run, or its config cannot be read.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(
            f"{folder} holds no run (no {CONFIG_FILE}); give the folder of a run, such as runs/NAME"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); it must be the JSON that the run wrote"
        ) from error
    if not isinstance(content, dict) or not {"config", "seed"} <= content.keys():
        raise CheckpointError(f"{path} is not the config of a run: 'config' and 'seed' are missing")
    return content


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__qualname__}, expected numbers, texts, lists and dicts")
