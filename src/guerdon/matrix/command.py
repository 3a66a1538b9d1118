"""``guerdon matrix``: the grid as a command."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guerdon.errors import UsageError, nearest
from guerdon.matrix.columns import COLUMNS
from guerdon.matrix.grid import load_plugin, run_grid
from guerdon.matrix.report import remarks, summarise, table, write
from guerdon.matrix.rows import ROWS
from guerdon.run.records import format_table


@dataclass
class MatrixOptions:
    """What ``guerdon matrix`` takes."""

    rows: str = ""  # objectives, by comma; all when empty
    columns: str = ""  # kinds of policy, by comma; all when empty
    seeds: int = 1  # how many
    first_seed: int = 0  # the first of them
    jobs: int = 2  # cells side by side, each on one thread
    plugin: str = ""  # files that register rows or columns of your own, by comma
    out: str = "results"  # where matrix.json and matrix.png go
    store: str = "runs/matrix/cells.jsonl"  # every measured cell; what is in it is not measured again


def main(options: MatrixOptions) -> int:
    """Measure what is missing of the grid, bring record and picture up to date. Returns 0 if every cell of them works that has
    sense, else 1."""
    plugins = _names(options.plugin)
    for path in plugins:
        if not Path(path).is_file():
            raise UsageError(f"--plugin {path}: there is no such file")
        load_plugin(path)
    rows = _chosen("rows", options.rows, ROWS)
    columns = _chosen("columns", options.columns, COLUMNS)
    if options.seeds < 1 or options.jobs < 1:
        raise UsageError("--seeds and --jobs: at least one")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    start = time.perf_counter()

    def report(record: dict[str, Any], done: int, total: int) -> None:
        spent = time.perf_counter() - start
        print(
            f"{done:>4} of {total}  {record['row']:<15} {record['column']:<12} {record['arm']:<8} seed {record['seed']}  "
            f"{record['before']:8.3g} -> {record['after']:<8.3g} {record['seconds']:5.1f} s  ({spent / 60:.1f} min)"
            + (f"  stopped: {record['error'][:80]}" if record["error"] else ""),
            flush=True,
        )

    records = run_grid(rows, columns, seeds, Path(options.store), options.jobs, plugins, report)
    held = Path(options.out) / "matrix.json"
    before = json.loads(held.read_text(encoding="utf-8")) if held.is_file() else None
    record = summarise(records, rows, columns, before)
    print(f"\n{format_table(table(record))}\n")
    for line in remarks(record):
        print(line)
    paths = write(record, Path(options.out))
    cells = [cell for by_column in record["cells"].values() for cell in by_column.values()]
    measured = [cell for cell in cells if "share" in cell]
    good = sum(cell["works"] for cell in measured)
    print(f"\n{good} of {len(measured)} cells work; {', '.join(map(str, paths))}")
    return 0 if good == len(measured) else 1


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _chosen(what: str, text: str, known: dict[str, Any]) -> list[str]:
    wanted = _names(text) or list(known)
    for name in wanted:
        if name not in known:
            raise UsageError(f"--{what}: '{name}' is not in the matrix; {nearest(name, known)}")
    return wanted
