"""Tables of the docs, made from ``results/``: ``python -m guerdon.reproductions.tables docs/results.md``.

A document marks a place with ``<!-- results: NAME -->`` and ``<!-- end -->``; what lies between is replaced by
the table of ``results/NAME.json`` (a reproduction or a benchmark; ``NAME with notes`` adds what the record says about
settings and thresholds). NAME ``fixtures`` is the quality of the
shipped models.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from guerdon import tasks
from guerdon.matrix import report

_MARK = re.compile(r"(<!-- results: (\w+)( with notes)? -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first row is the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = machine["gpu"] or f"{machine['cores']} cores of {machine['cpu']}"
    return f"{record['date']}, {where}, torch {machine['torch']}, Python {machine['python']}"


def reproduction(record: dict[str, Any]) -> str:
    """The arms' table, the checks and the verdict of a reproduction's record."""
    checks = [["statement", "seed", "measured", "threshold", "holds"]]
    for check in record["checks"]:
        seed = "" if check["seed"] is None else str(check["seed"])
        bound = f"{'at least' if check['sense'] == '>=' else 'at most'} {check['threshold']:g}"
        checks.append(
            [check["name"], seed, f"{check['value']:.3g}", bound, "yes" if check["passed"] else "**no**"]
        )
    verdict = "The claim holds." if record["holds"] else "The claim does **not** hold as stated."
    return f"{markdown(record['table'])}\n\n{markdown(checks)}\n\n{verdict} ({_machine(record)})"


def benchmark(record: dict[str, Any]) -> str:
    """The table of a benchmark's record; where it was measured, with the share of the machine's rate of matrix products
    that both sides reach."""
    shares = any("share" in row for row in record["rows"])
    rows = [["work", "guerdon", "beside it", "ratio", "target", *(["matrix rate"] if shares else [])]]
    for row in record["rows"]:
        target = (
            f"{'at least' if row['sense'] == '>=' else 'at most'} {row['target']:g}" if row["target"] else ""
        )
        if row["target"] and not row["met"]:
            target += " (**missed**)"
        beside = f"{1e3 * row['beside_seconds']:.3g} ms ({row['beside']})"
        cells = [row["work"], f"{1e3 * row['seconds']:.3g} ms", beside, f"{row['ratio']:.2f}", target]
        if shares:
            cells.append(f"{row['share']:.0%}, {row['beside_share']:.0%}" if "share" in row else "")
        rows.append(cells)
    return f"{markdown(rows)}\n\n({_machine(record)})"


def matrix(record: dict[str, Any]) -> str:
    """The grid's table, what is to be said about single cells, and where it was measured."""
    remarks = "\n".join(f"* {line}" for line in report.remarks(record))
    by_seeds: dict[str, set[str]] = {}
    for by_column in record["cells"].values():
        for column, cell in by_column.items():
            if "seeds" in cell:
                seeds = ", ".join(map(str, cell["seeds"]))
                by_seeds.setdefault(seeds, set()).add(record["columns"][column]["title"])
    said = "; ".join(
        f"seed{'s' if ',' in seeds else ''} {seeds}: {', '.join(sorted(titles))}"
        for seeds, titles in by_seeds.items()
    )
    seconds = f"{record['seconds'] / 60:.0f} minutes of training on one core, all cells, controls and seeds ({said})"
    return f"{markdown(report.table(record))}\n\n{remarks}\n\n{seconds}. ({_machine(record)})"


def fixtures() -> str:
    """What the shipped models reach: the ``quality.json`` beside each, measured on the shipped weights."""
    rows = [["model", "sampler", "training prompts", "held-out pairs", "training steps"]]
    for task in ("shapes", "digits"):
        for kind in ("diffusion", "consistency"):
            path = Path(tasks.__file__).parent / task / "fixtures" / kind / "quality.json"
            quality = json.loads(path.read_text(encoding="utf-8"))
            for sampler, shares in quality["right"].items():
                shown = [
                    f"{100 * shares[k]['all']:.1f} %" if k in shares else "" for k in ("training", "held out")
                ]
                rows.append([f"{task}, {kind}", sampler, *shown, str(quality["steps"])])
    return markdown(rows)


def fill(text: str, results: Path) -> str:
    """``text`` with every marked place filled from ``results``; a missing record leaves a note."""

    def table(match: re.Match[str]) -> str:
        if match.group(2) == "fixtures":
            return f"{match.group(1)}\n{fixtures()}\n\n{match.group(4)}"
        path = results / f"{match.group(2)}.json"
        if not path.is_file():
            body = f"(not measured yet: {path.name} is missing)"
        else:
            record = json.loads(path.read_text(encoding="utf-8"))
            if match.group(2) == "matrix":
                body = matrix(record)
            else:
                body = benchmark(record) if "benchmark" in record else reproduction(record)
            if match.group(3):
                body += f"\n\n{' '.join(str(record['notes']).split())}"
        return f"{match.group(1)}\n{body}\n\n{match.group(4)}"

    return _MARK.sub(table, text)


def main(paths: Sequence[str]) -> int:
    """Rewrite the documents at ``paths`` in place."""
    for path in map(Path, paths):
        path.write_text(fill(path.read_text(encoding="utf-8"), Path("results")), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(
        main(sys.argv[1:] or ["docs/results.md", "docs/language.md", "docs/matrix.md", "docs/planner.md"])
    )
