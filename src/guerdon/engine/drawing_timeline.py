"""A timeline as a picture: GPUs from top to bottom, time from left to right, a colour for each call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.engine.shapes import GiB
from guerdon.errors import UsageError

if TYPE_CHECKING:
    from guerdon.engine.simulate import Row, Timeline

# Okabe and Ito's colours in lighter shades, so that dark words are readable on them; what generates, infers and trains
# differs in shade
_COLOURS = {
    "generate": ("#F2C14E", "#F7DC97"),
    "inference": ("#8CC8EC", "#A5DDC6", "#CFC3EA", "#C9E3A4", "#F3C4DA", "#D8D3C4"),
    "train": ("#E58F65", "#D986B3", "#7FA6D9", "#79B79B"),
}
_WEIGHTS, _INK, _GRID = "#4A4A4A", "#333333", "#D0D0D0"


def draw_timeline(found: Timeline, path: Path, title: str, iterations: int) -> Path:
    """Write the picture; the format is that of the suffix. Raises `UsageError` for another suffix than .png, .svg or .pdf."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"a timeline is drawn as .png, .svg or .pdf, not as '{path.name}'")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = [row for row in found.rows if row.iteration < iterations]
    end = max(row.end for row in rows)
    gpus = found.nodes * found.gpus_per_node
    height = min(8.0, max(3.6, 0.55 * found.nodes + 1.6)) if found.nodes > 1 else max(2.8, 0.3 * gpus + 1.6)
    figure = Figure(figsize=(12, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = _colours(rows)
    axes.set_xlim(0, end)
    axes.set_ylim(gpus, 0)
    scale = 12 * 0.88 / end  # inches a second, about
    for row in rows:
        moving = row.kind == "weights"
        for low, high in _stretches(row, found.gpus_per_node):
            axes.broken_barh(
                [(row.start, row.end - row.start)],
                (low, high - low),
                facecolors=_WEIGHTS if moving else colours[row.call],
                edgecolors=_WEIGHTS if moving else "white",
                linewidth=0.3 if moving else 0.8,
                alpha=1.0,
                zorder=3,
            )
            if not moving:
                tall = (high - low) / gpus * height * 0.8
                _write(axes, row, low, high, (row.end - row.start) * scale, tall)
    for node in range(1, found.nodes):
        axes.axhline(
            node * found.gpus_per_node, color=_GRID, linewidth=0.8, zorder=1 if found.nodes > 4 else 2
        )
    _ticks(axes, found.nodes, found.gpus_per_node)
    axes.set_xlabel(f"seconds ({'measured' if found.measured else 'simulated'})", color=_INK)
    axes.tick_params(colors=_INK, labelsize=9, length=3, color="#999999")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    unit, name = (GiB, "GiB") if found.capacity >= GiB else (2**20, "MiB")
    facts = (
        f"{found.seconds:.1f} s an iteration, GPUs taken {100 * found.busy:.1f}% of the time, at most "
        f"{found.peak / unit:.1f} of {found.capacity / unit:.0f} {name} a GPU"
    )
    axes.set_title(f"{title}: {facts}" if title else facts, fontsize=10, color=_INK, loc="left")
    handles = [Patch(facecolor=colour, label=call) for call, colour in colours.items()]
    if any(row.kind == "weights" for row in rows):
        handles.append(Patch(facecolor=_WEIGHTS, label="weights on their way"))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(7, len(handles)), frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=path.suffix.lower()[1:])
    return path


def _colours(rows: list[Row]) -> dict[str, str]:
    """A colour for each call, in the order in which they start."""
    found: dict[str, str] = {}
    for row in rows:
        if row.kind != "weights" and row.call not in found:
            shades = _COLOURS[row.kind]
            used = sum(colour in shades for colour in found.values())
            found[row.call] = shades[used % len(shades)]
    return found


def _stretches(row: Row, gpus_per_node: int) -> list[tuple[int, int]]:
    """The GPUs of all meshes of a row, as intervals that do not touch."""
    spans = sorted(mesh.span(gpus_per_node) for mesh in row.meshes)
    found = [spans[0]]
    for low, high in spans[1:]:
        if low <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], high)
        else:
            found.append((low, high))
    return found


def _write(axes: Any, row: Row, low: int, high: int, wide: float, tall: float) -> None:
    """The name of a call inside its bar, upright where it is too narrow, and not at all where there is no room."""
    need = 0.075 * len(row.call) + 0.1  # inches of a line of this size
    seconds = f"{row.end - row.start:.1f} s"
    if wide >= need and tall >= 0.18:
        text, turn = (f"{row.call}\n{seconds}" if tall >= 0.4 else row.call), 0
    elif wide >= 0.17 and tall >= need:
        text, turn = row.call, 90
    else:
        return
    axes.text(
        (row.start + row.end) / 2,
        (low + high) / 2,
        text,
        ha="center",
        va="center",
        rotation=turn,
        fontsize=8,
        color="#222222",
        zorder=4,
        clip_on=True,
    )


def _ticks(axes: Any, nodes: int, gpus_per_node: int) -> None:
    """A node a tick, or a GPU where there is one node."""
    if nodes == 1:
        axes.set_yticks(
            [gpu + 0.5 for gpu in range(gpus_per_node)], [f"GPU {gpu}" for gpu in range(gpus_per_node)]
        )
    else:
        axes.set_yticks(
            [(node + 0.5) * gpus_per_node for node in range(nodes)], [f"node {n}" for n in range(nodes)]
        )
    axes.tick_params(axis="y", length=0)
