"""Writing files so that a kill or a full disk never leaves half of one behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guerdon.errors import StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


def storage_error(path: Path, error: OSError) -> StorageError:
    """What went wrong with writing ``path`` and what to do about it, in one sentence."""
    if error.errno in _FULL:
        if error.errno == errno.EFBIG:
            cause = "the file is larger than this system allows (see `ulimit -f`)"
        elif error.errno == errno.EDQUOT:
            cause = "your disk quota is used up"
        else:
            cause = f"the disk is full{_free(path)}"
        return StorageError(f"{path} could not be written: {cause}; free some space, then continue the run")
    if error.errno in _FORBIDDEN:
        return StorageError(
            f"{path} could not be written: {os.strerror(error.errno or 0).lower()}; "
            "change the folder's permissions or choose another folder"
        )
    return StorageError(f"{path} could not be written ({error.strerror or error}); choose another folder")


def _free(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f" ({shutil.disk_usage(path).free / 1e6:.1f} MB free)"
    except OSError:
        return ""


@contextlib.contextmanager
def guard(path: str | Path) -> Iterator[None]:
    """Turn an `OSError` met while writing ``path`` into a `StorageError`."""
    try:
        yield
    except OSError as error:
        raise storage_error(Path(path), error) from error


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable (a no-op where folders cannot be opened, as on Windows)."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, text: str) -> None:
    """Write ``text`` and wait until it is on the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: readers see the old file or the new one, never a part.

    Raises:
        StorageError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    with guard(path):
        try:
            write_synced(temporary, text)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


class JsonLines:
    """A file of one JSON object a line, appended to line by line and cut back on a resume.

    The file is written without a buffer, so that a kill loses no finished line, and hashed on the way, so
    that a checkpoint can say exactly which bytes it covers.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with guard(path):
            self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 (closed by close())
        self.size = self._file.seek(0, os.SEEK_END)
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> str:
        """SHA-256 of the file (of what was appended since `rewind`, and what that kept)."""
        return self._hash.hexdigest()

    def append(self, record: dict[str, Any]) -> None:
        """Write one line. Raises `StorageError` (and leaves no torn line) when the disk is full."""
        data = (json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n").encode("utf-8")
        with guard(self.path):
            try:
                view = memoryview(data)
                while view:  # an unbuffered write may be cut short; the next one then says why
                    view = view[self._file.write(view) :]
            except OSError:
                with contextlib.suppress(OSError):
                    self._file.truncate(self.size)
                raise
        self.size += len(data)
        self._hash.update(data)

    def sync(self) -> None:
        """Wait until everything appended is on the disk."""
        with guard(self.path):
            os.fsync(self._file.fileno())

    def rewind(self, steps: int, size: int | None = None, digest: str | None = None) -> bool:
        """Cut the file back to the records of the first ``steps`` steps.

        If the first ``size`` bytes have the hash ``digest`` they are what is kept. Otherwise (or without
        them) the whole, readable lines before the first of step ``steps`` or later are kept.

        Returns:
            Whether the bytes were those that ``size`` and ``digest`` describe.
        """
        self._file.seek(0)
        data = self._file.readall()
        exact = size is not None and hashlib.sha256(data[:size]).hexdigest() == digest and len(data) >= size
        keep = size if exact and size is not None else _covered(data, steps)
        with guard(self.path):
            self._file.truncate(keep)
            os.fsync(self._file.fileno())
        self.size = keep
        self._hash = hashlib.sha256(data[:keep])
        return exact

    def close(self) -> None:
        self._file.close()


def _covered(data: bytes, steps: int) -> int:
    """How many bytes at the front of ``data`` are whole lines that record a step below ``steps``."""
    end = 0
    for line in data.splitlines(keepends=True):
        record = _parse(line)
        if record is None or not line.endswith(b"\n") or record.get("step", steps) >= steps:
            break
        end += len(line)
    return end


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file; a torn line (the run is going on, or was killed) is left out.

    Returns an empty list when there is no such file.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    return [record for record in map(_parse, data.splitlines()) if record is not None]
