"""Checkpoints that survive a kill at any moment.

    checkpoints/step_00000042/state.pt        torch.save of tensors, containers and scalars only
    checkpoints/step_00000042/manifest.json   sha256 and size of state.pt, step, versions

A checkpoint is written under a temporary name in the same folder, synced, and renamed: a name of the form
``step_*`` always was complete. It is read back with ``weights_only=True`` after its hash was verified.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from guerdon.errors import CheckpointError, UsageError
from guerdon.run.storage import guard, sync_folder, write_synced

FORMAT = 1
FOLDER = "checkpoints"
_TEMPORARY = ".tmp-"
_PLAIN = (int, float, complex, bool, str, bytes, type(None), torch.Size, torch.dtype, torch.device)


def save(folder: str | Path, step: int, payload: dict[str, Any], keep: int = 3) -> Path:
    """Write the checkpoint of ``step`` into ``folder/checkpoints`` and remove all but the newest ``keep``.

    Checkpoints of later steps are removed too: they belong to a future that a resume has abandoned.

    Args:
        folder: the run's folder.
        step: how many steps the checkpoint covers.
        payload: tensors, numbers, texts, None, and dicts, lists, tuples and sets of these.
        keep: how many checkpoints to keep, at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        UsageError: the payload holds something that could not be read back safely.
    """
    check_plain(payload)
    root = Path(folder) / FOLDER
    final = root / f"step_{step:08d}"
    temporary = root / f"{_TEMPORARY}{final.name}-{os.getpid()}"
    with guard(final):
        try:
            temporary.mkdir(parents=True)
            digest, size = _write_state(temporary / "state.pt", payload)
            manifest = {
                "format": FORMAT,
                "step": step,
                "sha256": digest,
                "size": size,
                "versions": _versions(),
            }
            write_synced(temporary / "manifest.json", json.dumps(manifest, indent=1) + "\n")
            sync_folder(temporary)
            if final.exists():  # a damaged one that a resume went past
                _remove(final)
            os.rename(temporary, final)
            sync_folder(root)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    # the new one is safe: what cannot be removed now is no reason to stop the run
    earlier = [path for number, path in _existing(root) if number <= step]
    later = [path for number, path in _existing(root) if number > step]
    for path in earlier[: -max(1, keep)] + later:
        with contextlib.suppress(OSError):
            _remove(path)
    return final


def load_newest(folder: str | Path) -> tuple[int, dict[str, Any]] | None:
    """The newest undamaged checkpoint in ``folder/checkpoints``: its step and payload (tensors on the CPU).

    Damaged ones are skipped with one warning that names them. None when there is no checkpoint at all.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    found = _existing(Path(folder) / FOLDER)
    if not found:
        return None
    damaged: list[str] = []
    for step, path in reversed(found):
        try:
            payload = _load(path, step)
        except _DamagedError as error:
            damaged.append(f"{path.name} ({error})")
            continue
        if damaged:
            warnings.warn(
                f"skipped damaged checkpoint{'s' * (len(damaged) > 1)} {', '.join(damaged)} of {folder}; "
                f"continuing from {path.name}",
                RuntimeWarning,
                stacklevel=2,
            )
        return step, payload
    raise CheckpointError(
        f"no checkpoint of {folder} can be used: {', '.join(damaged)}; "
        "restore one from a copy or start a new run"
    )


def clean(folder: str | Path) -> None:
    """Remove what a kill left behind half written (or half removed)."""
    for path in (Path(folder) / FOLDER).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def check_plain(value: Any, path: str = "") -> None:
    """Raise `UsageError` if ``value`` holds anything that ``torch.load(weights_only=True)`` would refuse."""
    kind = type(value)
    if kind in _PLAIN or isinstance(value, Tensor):
        return
    if kind in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in _PLAIN and type(key) is not tuple:
                raise UsageError(
                    f"cannot save {path or 'this'}: its key {key!r} is a {kind_name(key)}, not plain"
                )
            check_plain(item, f"{path}.{key}" if path else str(key))
    elif kind in (list, tuple, set):
        for index, item in enumerate(value):
            if type(item) not in _PLAIN:
                check_plain(item, f"{path}[{index}]")
    else:
        raise UsageError(
            f"cannot save {path or 'this'}, a {kind_name(value)}: a checkpoint holds only tensors, numbers, "
            "texts, None, and dicts, lists, tuples and sets of these"
        )


def kind_name(value: Any) -> str:
    """``numpy.float64`` for a numpy float, ``deque`` and so on."""
    kind = type(value)
    return (
        kind.__qualname__
        if kind.__module__ in ("builtins", "collections")
        else f"{kind.__module__}.{kind.__qualname__}"
    )


class _DamagedError(Exception):
    """Why a checkpoint cannot be used."""


class _HashingWriter:
    """The file object given to ``torch.save``: hashes what passes through, and remembers the error that torch
    replaces by one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.size = file, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self.file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.hash.update(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        self.file.flush()


def _write_state(path: Path, payload: dict[str, Any]) -> tuple[str, int]:
    """SHA-256 and size of the synced file."""
    with open(path, "wb", buffering=1 << 20) as file:
        writer = _HashingWriter(file)
        try:
            torch.save(payload, cast(Any, writer))
        except RuntimeError:
            if writer.error is not None:
                raise writer.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return writer.hash.hexdigest(), writer.size


def _load(path: Path, step: int) -> dict[str, Any]:
    """The verified payload. Raises `_DamagedError`; `CheckpointError` for a format of a later guerdon."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        form, number, size, digest = (manifest[key] for key in ("format", "step", "size", "sha256"))
    except FileNotFoundError as error:
        raise _DamagedError("its manifest.json is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _DamagedError("its manifest.json cannot be read") from error
    if form != FORMAT:
        raise CheckpointError(
            f"{path} has format {form}, this guerdon reads {FORMAT}; use the version that wrote it"
        )
    if number != step:
        raise _DamagedError(f"its manifest.json is of step {number}")
    state = path / "state.pt"
    try:
        found = state.stat().st_size
        if found != size:
            raise _DamagedError(f"its state.pt has {found} bytes of {size}")
        with open(state, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _DamagedError("the hash of its state.pt is wrong")
        return torch.load(state, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise _DamagedError("its state.pt is missing") from error
    except OSError as error:
        raise _DamagedError(f"its state.pt cannot be read: {error.strerror}") from error
    except (
        RuntimeError,
        pickle.UnpicklingError,
    ) as error:  # torch's advice to unpickle it anyway is not passed on
        raise _DamagedError("its state.pt holds other things than tensors and plain values") from error


def _existing(root: Path) -> list[tuple[int, Path]]:
    """Step and folder of every checkpoint, oldest first."""
    if not root.is_dir():
        return []
    matches = ((re.fullmatch(r"step_(\d+)", path.name), path) for path in root.iterdir())
    return sorted((int(match[1]), path) for match, path in matches if match)


def _remove(path: Path) -> None:
    """Delete a checkpoint; first rename it, so that a kill half-way leaves no half checkpoint."""
    doomed = path.with_name(f"{_TEMPORARY}removed-{path.name}")
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _versions() -> dict[str, str]:
    from guerdon.run.config import versions

    return versions()
