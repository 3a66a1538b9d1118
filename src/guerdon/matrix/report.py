"""What the matrix came to: a record, a heat map and a table, from the records of its cells."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from guerdon.matrix.columns import COLUMNS
from guerdon.matrix.grid import fingerprint
from guerdon.matrix.rows import ROWS
from guerdon.run.records import machine

WORKS = 0.5  # share of the way to the goal from which on a cell works; both fixed before the seeds that count
CONTROL = 0.5  # the control's share is at most this part of it


def summarise(
    records: Sequence[dict[str, Any]],
    rows: Sequence[str],
    columns: Sequence[str],
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The matrix of ``rows`` and ``columns`` as one JSON value.

    Args:
        before: an earlier record, whose other cells are kept as long as their settings are those of now.

    ``cells[row][column]``: for a cell that was measured ``share``, how much of the way from the untrained policy to the
    column's goal was gone, and ``control``, the same with shuffled feedback (means over seeds; ``shares`` and ``controls``
    one by one, of ``seeds``); ``before``, ``after`` and ``spread`` of the reward, ``seconds`` of training, ``works``. For one
    without sense ``senseless``, the reason; for one that failed outright ``error``.
    """
    asked = {(row, column) for row in rows for column in columns}
    kept = {
        (row, column): cell
        for row, by_column in ((before or {}).get("cells") or {}).items()
        for column, cell in by_column.items()
        if row in ROWS
        and column in COLUMNS
        and (row, column) not in asked
        and ("senseless" in cell or cell.get("settings") == fingerprint(ROWS[row], COLUMNS[column]))
    }
    rows = [row for row in ROWS if any(row == place[0] for place in (*asked, *kept))]
    columns = [column for column in COLUMNS if any(column == place[1] for place in (*asked, *kept))]
    cells: dict[str, dict[str, Any]] = {row: {} for row in rows}
    for row in rows:
        for column in columns:
            if (row, column) in kept:
                cells[row][column] = kept[row, column]
                continue
            why = ROWS[row].senseless(COLUMNS[column])
            if why:
                cells[row][column] = {"senseless": why}
                continue
            here = [r for r in records if (r["row"], r["column"]) == (row, column)]
            arms = {arm: [r for r in here if r["arm"] == arm] for arm in ("trained", "control")}
            if arms["trained"] and arms["control"]:
                cells[row][column] = _cell(arms["trained"], arms["control"], COLUMNS[column].goal)
    return {
        "rows": {row: ROWS[row].title for row in rows},
        "columns": {
            name: {
                "title": COLUMNS[name].title,
                "problem": COLUMNS[name].problem,
                "goal": COLUMNS[name].goal,
            }
            for name in columns
        },
        "cells": cells,
        "thresholds": {"works": WORKS, "control": CONTROL},
        "seconds": round(
            sum(cell.get("seconds_all", 0.0) for by in cells.values() for cell in by.values()), 1
        ),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cell(trained: list[dict[str, Any]], control: list[dict[str, Any]], goal: float) -> dict[str, Any]:
    share = [_share(r, goal) for r in trained]
    other = [_share(r, goal) for r in control]
    mean, mean_control = _mean(share), _mean(other)
    error = next((r["error"] for r in trained if r["error"]), "")
    return {
        "share": round(mean, 4),
        "control": round(mean_control, 4),
        "shares": [round(s, 4) for s in share],
        "controls": [round(s, 4) for s in other],
        **{key: round(_mean([r[key] for r in trained]), 4) for key in ("before", "after", "spread")},
        "seconds": round(_mean([r["seconds"] for r in trained]), 1),
        "seconds_all": round(sum(r["seconds"] for r in (*trained, *control)), 1),
        "seeds": sorted(r["seed"] for r in trained),
        "settings": trained[0]["settings"],
        "updates": trained[0]["updates"],
        "works": not error and mean >= WORKS and mean_control <= CONTROL * mean,
        "error": error,
    }


def _share(record: dict[str, Any], goal: float) -> float:
    return (record["after"] - record["before"]) / (goal - record["before"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def table(record: dict[str, Any]) -> list[list[str]]:
    """Rows of texts for a table, the first one the header: share of the way to the goal, the control in brackets, seconds."""
    lines = [["objective", *(column["title"] for column in record["columns"].values())]]
    for row, title in record["rows"].items():
        line = [title]
        for column in record["columns"]:
            cell = record["cells"][row].get(column)
            if cell is None:
                line.append("")
            elif "senseless" in cell:
                line.append("no sense")
            else:
                text = f"{cell['share']:.0%} ({cell['control']:.0%}), {cell['seconds']:.0f} s"
                line.append(text if cell["works"] else f"**{text}**")
        lines.append(line)
    return lines


def remarks(record: dict[str, Any]) -> list[str]:
    """A line for every cell without sense, and for every one that does not work."""
    found = []
    for row, title in record["rows"].items():
        for column, about in record["columns"].items():
            cell = record["cells"][row].get(column, {})
            where = f"{title}, {about['title']}"
            if "senseless" in cell:
                found.append(f"{where}: {cell['senseless']}.")
            elif cell.get("error"):
                found.append(f"{where}: stopped, {cell['error']}")
            elif cell and not cell["works"]:
                found.append(
                    f"{where}: {cell['share']:.0%} of the way (control {cell['control']:.0%}) after {cell['updates']} updates; "
                    f"it takes {record['thresholds']['works']:.0%}."
                )
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """The heat map: green as far as the goal was reached, red where a cell does not work, grey where it has no sense."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    rows, columns = list(record["rows"]), list(record["columns"])
    figure = Figure(figsize=(2.6 + 1.45 * len(columns), 1.5 + 0.52 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    green = LinearSegmentedColormap.from_list("share", ["#FFFFFF", "#B7E0C8", "#3C9D6B"])
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            cell = record["cells"][row].get(column)
            if cell is None:
                continue
            small = ""
            if "senseless" in cell:
                colour, text, ink = "#E6E6E6", "no sense", "#777777"
            else:
                share = min(max(cell["share"], 0.0), 1.0)
                colour = green(share) if cell["works"] else "#E9A199"
                text, ink = f"{cell['share']:.0%}", "#111111"
                small = f"control {cell['control']:.0%} · {cell['seconds']:.0f} s"
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
            middle = y + (0.36 if small else 0.5)
            axes.text(x + 0.5, middle, text, ha="center", va="center", fontsize=10.5, color=ink)
            axes.text(x + 0.5, y + 0.74, small, ha="center", va="center", fontsize=6.8, color="#333333")
    axes.set_xlim(0, len(columns))
    axes.set_ylim(len(rows), 0)
    titles = [record["columns"][c]["title"].replace(" ", "\n") for c in columns]
    axes.set_xticks([i + 0.5 for i in range(len(columns))], titles, fontsize=9.5)
    axes.set_yticks([i + 0.5 for i in range(len(rows))], list(record["rows"].values()), fontsize=9.5)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    figure.supxlabel(
        "share of the way from the untrained policy to the goal\ncontrol: the same with shuffled feedback",
        fontsize=8.5,
    )
    figure.savefig(path, dpi=120)


def write(record: dict[str, Any], out: Path) -> list[Path]:
    """``matrix.json`` and ``matrix.png`` in ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / "matrix.json", out / "matrix.png"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(record, paths[1])
    return paths
