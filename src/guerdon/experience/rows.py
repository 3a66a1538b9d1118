"""Rows of recorded data from wherever they lie: files, folders, the hub, or Python objects.

A row is a dictionary that knows where it was found, so that whatever is wrong with it can be said with file, row and
column. Rows are numbered from 1 as an editor shows them: by line in JSONL and CSV, by place elsewhere. Files are read
bit by bit, never whole (a JSON array excepted).
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from guerdon.errors import DataError, UsageError

JSON_LINES = (".jsonl", ".ndjson")
KINDS = (*JSON_LINES, ".json", ".parquet", ".csv", ".tsv")
_CHUNK = 1024  # rows of a Parquet file in memory at a time


@dataclass(slots=True)
class Row:
    """One row: its ``values`` by column, and where it was found.

    Attributes:
        source, number: file (or what else holds it) and number, from 1.
        typed: False where every value is a text (CSV), so that a number has to be read from one.
    """

    values: dict[str, Any]
    source: str
    number: int
    typed: bool = True

    def __contains__(self, column: str) -> bool:
        """Whether the row has the column, with something in it."""
        return self.values.get(column) is not None

    def error(self, message: str, column: str | None = None) -> DataError:
        """A `DataError` that says where."""
        where = f"{self.source}, row {self.number}" + (f", column '{column}'" if column else "")
        return DataError(f"{where}: {message}")

    def get(self, column: str) -> Any:
        """What is in the column. Raises `DataError` when it is missing or empty."""
        value = self.values.get(column)
        if value is not None:
            return value
        if column in self.values:
            raise self.error("expected a value, found none", column)
        raise self.error(f"no column '{column}' (it has: {', '.join(map(str, self.values)) or 'nothing'})")

    def text(self, column: str) -> str:
        """The text in the column. Raises `DataError` for anything else."""
        value = self.get(column)
        if not isinstance(value, str):
            raise self.error(f"expected a text, found {what(value)}", column)
        return self.valid(value, column)

    def valid(self, text: str, column: str) -> str:
        """``text``, if it is valid Unicode."""
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # half a surrogate pair, which JSON's escapes can write
                raise self.error(f"no valid Unicode ({error.reason})", column) from error
        return text

    def number_in(self, column: str) -> float:
        """The finite number in the column; true and false are 1 and 0. Raises `DataError` for anything else."""
        value = self.get(column)
        if isinstance(value, str) and not self.typed:
            try:
                value = {"true": 1.0, "false": 0.0}.get(value.lower()) if value.isalpha() else float(value)
            except ValueError:
                value = None
            if value is None:
                raise self.error(f"expected a number, found {self.values[column]!r}", column)
        return finite(self, value, column)


def finite(row: Row, value: Any, column: str) -> float:
    """``value`` as a number. Raises `DataError` when it is none, or not finite."""
    if not isinstance(value, (int, float)):
        raise row.error(f"expected a number, found {what(value)}", column)
    if not -float("inf") < value < float("inf"):
        raise row.error(f"expected a finite number, found {value}", column)
    return float(value)


class Rows:
    """An iterable of `Row`, to be read once.

    Args:
        name: how messages call the source.
        rows: numbered dictionaries.
        columns: what the convention calls a column, and what the source calls it.
        limit: stop after so many rows.
        typed: see `Row`.
    """

    def __init__(
        self,
        name: str,
        rows: Iterable[tuple[int, Any]],
        columns: Mapping[str, str] | None = None,
        limit: int | None = None,
        typed: bool = True,
    ) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"limit is {limit}; read at least one row")
        self.name, self._rows, self._limit, self._typed = name, rows, limit, typed
        self._columns = dict(columns or {})

    def __iter__(self) -> Iterator[Row]:
        """Raises `DataError` for what is no row, and at the end if there was none."""
        found = False
        for number, values in islice(self._rows, self._limit):
            found = True
            if not isinstance(values, Mapping):
                raise DataError(
                    f"{self.name}, row {number}: expected named columns, found {what(values)}; "
                    'write rows like {"prompt": "..."}'
                )
            values = dict(values)
            for wanted, given in self._columns.items():
                if given not in values:
                    has = ", ".join(map(str, values))
                    raise DataError(f"{self.name}, row {number}: no column '{given}' (it has: {has})")
                values[wanted] = values[given]
            yield Row(values, self.name, number, self._typed)
        if not found:
            raise DataError(f"{self.name}: holds no rows")


def read_rows(
    source: Any,
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    streaming: bool = False,
) -> Rows:
    """The rows of ``source``, read while they are asked for.

    Args:
        source: a ``.jsonl``, ``.json``, ``.parquet``, ``.csv`` or ``.tsv`` file (text files also as ``.gz``); a folder
            of such files, or one that ``datasets`` saved with ``save_to_disk``; the name of a data set on the hub
            (``owner/name``; only through ``datasets.load_dataset``); a ``datasets`` object; or any iterable
            of dictionaries.
        split: which part of a source that has several; "train" unless told otherwise.
        columns: names of the convention and what the source calls them, ``{"prompt": "question"}``.
        limit: read so many rows and no more.
        streaming: a data set of the hub is read over the network while it is used instead of downloaded first.

    Raises:
        DataError: a file that is missing or unreadable, naming row and column where they are known; while iterating.
        UsageError: a source that is none of these, or a split that it does not have.
    """
    typed = True
    if isinstance(source, (str, Path)):
        path = Path(source)
        name = str(source)
        if path.is_dir():
            rows, typed = _folder(path, split)
        elif path.is_file() or _kind(path) in KINDS or isinstance(source, Path):
            rows, typed = _file(path), _kind(path) not in (".csv", ".tsv")
        elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not re.fullmatch(r"\.[a-zA-Z]+", path.suffix):
            rows = _hub(name, split, streaming)
        else:
            raise DataError(f"{name}: no such file or folder")
    elif _is_hugging_face(source):
        name = "the data set"
        rows = _hugging_face(source, name, split)
    elif isinstance(source, Iterable) and not isinstance(source, (Mapping, bytes)):
        name = "the given rows"
        rows = enumerate(source, 1)
    else:
        raise UsageError(
            f"rows cannot be read from {what(source)}; give a file, a folder, a datasets object or a list of dictionaries"
        )
    return Rows(name, rows, columns, limit, typed)


# --- files ------------------------------------------------------------------------------------------------


def _kind(path: Path) -> str:
    """The suffix that says what is in a file, ``.gz`` left out."""
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def _file(path: Path) -> Iterator[tuple[int, Any]]:
    kind = _kind(path)
    if kind == ".parquet":
        return _parquet(path)
    if kind in (".csv", ".tsv"):
        return _csv(path, "," if kind == ".csv" else "\t")
    if kind == ".json":
        return _json(path)
    if kind in JSON_LINES:
        return _json_lines(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    raise DataError(f"{path}: unknown kind of file; expected one of {', '.join(KINDS)}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, decoded one by one, so that a bad byte can be placed."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise DataError(
            f"{path}, row {number}: not UTF-8 (byte {bad:#04x}); save the file as UTF-8"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read ({reason})") from error


def _object(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, row {number}: not a JSON object ({error})") from error


def _json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, _object(path, number, line)


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    """A JSON array of rows, an object with one such array in it, or JSON lines under another name."""
    lines = list(_lines(path))
    text = "".join(line for _, line in lines)
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    except json.JSONDecodeError as error:
        if not text.strip():
            return
        if text.lstrip().startswith("["):
            raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
        for number, line in lines:
            if line.strip():
                yield number, _object(path, number, line)
        return
    if isinstance(content, dict):
        tables = [
            value
            for value in content.values()
            if isinstance(value, list) and value and all(isinstance(row, dict) for row in value)
        ]
        talk = bool(tables) and bool({"role", "from"} & set(tables[0][0]))  # one row, a conversation in it
        content = tables[0] if len(tables) == 1 and not talk else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of rows, found {what(content)}")
    yield from enumerate(content, 1)


def _csv(path: Path, delimiter: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    before = 0  # lines read before the present row, which may have several
    try:
        for fields in reader:
            number, before = before + 1, reader.line_num
            if not fields:
                continue
            if header is None:
                header = fields
                continue
            if len(fields) != len(header):
                raise DataError(
                    f"{path}, row {number}: has {len(fields)} columns, expected {len(header)} ({', '.join(header)}); "
                    "quote texts that hold the separator"
                )
            yield (
                number,
                {name: value if value != "" else None for name, value in zip(header, fields, strict=True)},
            )
    except csv.Error as error:
        raise DataError(f"{path}, row {before + 1}: not valid CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_CHUNK):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except FileNotFoundError as error:
        raise DataError(f"{path}: cannot be read (No such file or directory)") from error
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f", row {number + 1}" if number else ""
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"{path}{where}: not a readable Parquet file, perhaps cut short ({reason}); write or fetch it again"
        ) from error


def _folder(path: Path, split: str | None) -> tuple[Iterable[tuple[int, Any]], bool]:
    """A folder that ``datasets`` saved, or one of data files, read in the order of their names."""
    if any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        import datasets

        try:
            return _hugging_face(datasets.load_from_disk(str(path)), str(path), split), True
        except (UsageError, DataError):
            raise
        except Exception as error:  # whatever pyarrow and the file system say
            raise DataError(f"{path}: cannot be read ({_reason(error)})") from error
    files = sorted(file for file in path.iterdir() if _kind(file) in KINDS)
    if not files:
        raise DataError(f"{path}: holds no data files; expected {', '.join(KINDS)}")
    if len({_kind(file) for file in files}) > 1 or split is not None:
        names = ", ".join(file.name for file in files[:4])
        raise DataError(f"{path}: holds files of several kinds or parts ({names}); name one of them")
    return _each(files), _kind(files[0]) not in (".csv", ".tsv")


def _each(files: list[Path]) -> Iterator[tuple[int, Any]]:
    """The rows of several files, counted on, since they are one source."""
    number = 0
    for file in files:
        for _, values in _file(file):
            number += 1
            yield number, values


# --- the library "datasets" -------------------------------------------------------------------------------


def _is_hugging_face(source: Any) -> bool:
    """Whether ``source`` is an object of ``datasets``, which is imported already if it is."""
    library = sys.modules.get("datasets")
    kinds = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
    return library is not None and isinstance(source, tuple(getattr(library, kind) for kind in kinds))


def _hugging_face(source: Any, name: str, split: str | None) -> Iterator[tuple[int, Any]]:
    if isinstance(source, dict):
        wanted = split or ("train" if "train" in source or len(source) != 1 else next(iter(source)))
        if wanted not in source:
            raise UsageError(f"{name} has no split '{wanted}'; it has: {', '.join(map(str, source))}")
        source = source[wanted]
    plain = source.with_format(None) if hasattr(source, "with_format") else source
    return _guarded(name, lambda: iter(plain))


def _guarded(name: str, start: Callable[[], Iterator[Any]]) -> Iterator[tuple[int, Any]]:
    """Numbered rows of an iterator of ``datasets``; what it raises becomes a `DataError` with the row."""
    number = 0
    try:
        for values in start():
            number += 1
            yield number, values
    except Exception as error:  # network, Arrow, decoding: anything
        raise DataError(f"{name}, row {number + 1}: cannot be read ({_reason(error)})") from error


def _hub(name: str, split: str | None, streaming: bool) -> Iterator[tuple[int, Any]]:
    import datasets

    try:
        found = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # no network, no such name, no such split, a gated data set: anything
        raise DataError(
            f"no file or folder '{name}', nor can a data set of this name be loaded from the hub ({_reason(error)})"
        ) from error
    return _hugging_face(found, name, split)


def _reason(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def what(value: Any) -> str:
    """What a value is, in a word, for messages."""
    names = {
        "str": "a text",
        "list": "a list",
        "dict": "an object",
        "NoneType": "nothing",
        "bool": "true or false",
    }
    kind = type(value).__name__
    return names.get(kind, kind)
