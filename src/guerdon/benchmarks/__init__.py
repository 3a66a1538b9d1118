"""Speed, measured beside the plain code that does the same work. Run by ``guerdon bench``.

The two sides take turns (A B A B ...) in one process, so that a drift of the machine's speed hits both; the
ratio of the medians is what counts.
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from guerdon.errors import UsageError, nearest

BENCHMARKS = {
    "roles": "what the frame costs",
    "images": "sampling and training of the tiny image models",
    "control": "controllers beside Stable-Baselines3",
    "language": "language models beside TRL",
    "engine": "calls, updates and traffic of the Ray engine",
}


def take_turns(
    sides: Sequence[Callable[[], Any]], *, inner: int = 1, rounds: int = 20, warm_up: int = 3
) -> list[float]:
    """Median seconds a call of each side, over ``rounds`` turns of ``inner`` calls each."""
    for side in sides:
        for _ in range(warm_up):
            side()
    times: list[list[float]] = [[] for _ in sides]
    for turn in range(rounds):
        # who goes first changes, so that neither always finds the other's leftovers in the cache
        order = range(len(sides)) if turn % 2 == 0 else reversed(range(len(sides)))
        for i in order:
            start = time.perf_counter()
            for _ in range(inner):
                sides[i]()
            times[i].append((time.perf_counter() - start) / inner)
    return [statistics.median(t) for t in times]


def main(what: str, rest: Sequence[str]) -> int:
    """``guerdon bench WHAT [--out results]``: run, print, write ``results/bench_WHAT.json``; status 1 if a
    target is missed."""
    if what not in BENCHMARKS:
        raise UsageError(f"unknown benchmark '{what}'; {nearest(what, BENCHMARKS)}")
    out = Path("results")
    if rest:
        if len(rest) != 2 or rest[0] != "--out":
            raise UsageError(f"unknown option '{rest[0]}'; 'guerdon bench {what}' takes --out FOLDER")
        out = Path(rest[1])
    module = importlib.import_module(f"guerdon.benchmarks.{what}")
    from guerdon.run.records import format_table, machine

    rows: list[dict[str, Any]] = module.run()
    header = ["work", "guerdon", "beside it", "ratio", "target", ""]
    cells = [
        [
            row["work"],
            f"{1e3 * row['seconds']:.3g} ms",
            f"{1e3 * row['beside_seconds']:.3g} ms ({row['beside']})",
            f"{row['ratio']:.2f}",
            f"{row['sense']} {row['target']:g}" if row.get("target") else "-",
            "" if not row.get("target") else "ok" if row["met"] else "MISSED",
        ]
        for row in rows
    ]
    print(format_table([header, *cells]))
    out.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": what, "rows": rows, "machine": machine(), "date": time.strftime("%Y-%m-%d")}
    path = out / f"bench_{what}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{path}")
    return 0 if all(row.get("met", True) for row in rows) else 1


def row(
    work: str, seconds: float, beside: str, beside_seconds: float, target: float | None, sense: str = ">="
) -> dict[str, Any]:
    """One line of a benchmark. ``ratio`` is how many times faster guerdon is (sense ">="), or what it costs
    as a multiple of the other side (sense "<=")."""
    ratio = beside_seconds / seconds if sense == ">=" else seconds / beside_seconds
    made: dict[str, Any] = {
        "work": work,
        "seconds": seconds,
        "beside": beside,
        "beside_seconds": beside_seconds,
        "ratio": ratio,
        "sense": sense,
        "target": target,
    }
    if target is not None:
        made["met"] = ratio >= target if sense == ">=" else ratio <= target
    return made
