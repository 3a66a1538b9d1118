"""Curves of a run, or of several beside each other, as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from guerdon.errors import DataError, UsageError, nearest
from guerdon.run.metrics import read_metrics, read_timings
from guerdon.run.storage import guard

Records = Sequence[Mapping[str, Any]]
One: TypeAlias = "str | Path | Records"
Source: TypeAlias = (
    "One | Sequence[str | Path | Records] | Mapping[str, One | Sequence[str | Path | Records]]"
)

# Okabe and Ito's palette: distinct for colour-blind eyes too (its yellow is too light for lines)
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_INK, _GRID = "#333333", "#E3E3E3"


def curves(
    source: Source,
    keys: Sequence[str],
    path: str | Path,
    *,
    against: str = "step",
    smooth: int | None = None,
    names: Mapping[str, str] | None = None,
) -> Path:
    """Draw metrics over the steps (or the seconds) of training; one panel a metric, one colour a source.

    Args:
        source: a run's folder or its records; a list of several (seeds), drawn as their mean inside the band
            from lowest to highest; or a dict from labels to either, drawn in colours with a legend.
        keys: the metrics.
        path: where to write the PNG.
        against: ``step`` or ``seconds`` (the latter needs folders, or records with a ``seconds`` entry).
        smooth: average over so many records, the raw ones faint behind; chosen by the number of records if
            None; 1 for none.
        names: what to write on the axes instead of the metrics' own names.

    Raises:
        UsageError: no source has one of the metrics.
        DataError: a folder without records.
    """
    if not keys:
        raise UsageError("curves() needs at least one metric to draw")
    series = _series(source, [*keys], against)
    columns = 1 if len(keys) == 1 else 2 if len(keys) in (2, 4) else min(3, len(keys))
    rows = math.ceil(len(keys) / columns)
    figure = _figure(columns * 4.4 + 0.4 if columns > 1 else 6.4, rows * 3.1 + 0.3 if columns > 1 else 4.0)
    for index, key in enumerate(keys):
        axes = figure.add_subplot(rows, columns, index + 1)
        for look, (label, runs) in zip(_looks(len(series)), series.items(), strict=True):
            _draw_curve(axes, [run for run in runs if run.has(key)], key, look, label, smooth)
        if index + columns >= len(keys):
            axes.set_xlabel("seconds of training" if against == "seconds" else against)
        axes.set_ylabel((names or {}).get(key, _readable(key)))
        _style(axes)
        axes.margins(x=0.02)
    _legend(figure, list(series))
    return _save(figure, path)


def against_each_other(
    source: Source,
    x: str,
    y: str,
    path: str | Path,
    *,
    smooth: int | None = None,
    names: Mapping[str, str] | None = None,
) -> Path:
    """Draw one metric against another (reward against prompt accuracy, say) as a path through training:
    from a hollow dot, the first record, to a full one, the last.

    Args: as for `curves`; records that lack one of the two metrics are left out, and several runs of a
    label are drawn as several paths of one colour.
    """
    series = _series(source, [x, y], "step")
    figure = _figure(5.6, 4.6)
    axes = figure.add_subplot()
    drawn = 0
    for look, (_label, runs) in zip(_looks(len(series)), series.items(), strict=True):
        for run in runs:
            both = run.both(x, y)
            if not len(both):
                continue
            drawn += 1
            raw_x, raw_y = both.T
            window = smooth or _window(len(raw_x))
            smooth_x, smooth_y = _moving(raw_x, window), _moving(raw_y, window)
            if window > 1:
                axes.plot(raw_x, raw_y, ".", color=look["color"], alpha=0.18, markersize=4, markeredgewidth=0)
            axes.plot(smooth_x, smooth_y, **look, linewidth=1.6, alpha=0.9)
            axes.plot(
                smooth_x[0],
                smooth_y[0],
                "o",
                color=look["color"],
                markerfacecolor="white",
                markersize=7,
                zorder=4,
            )
            axes.plot(smooth_x[-1], smooth_y[-1], "o", color=look["color"], markersize=7, zorder=4)
    if not drawn:
        raise UsageError(f"no record has both {x} and {y}")
    axes.set_xlabel((names or {}).get(x, _readable(x)))
    axes.set_ylabel((names or {}).get(y, _readable(y)))
    _style(axes)
    _legend(figure, list(series), ends=True)
    return _save(figure, path)


# --- what to draw -----------------------------------------------------------------------------------------


class _Run:
    """The records of one run, by metric."""

    def __init__(self, records: Records, against: str) -> None:
        self.records, self.against = records, against

    def has(self, key: str) -> bool:
        return len(self.points(key)) > 0

    def points(self, key: str) -> np.ndarray:
        """``[n, 2]``: position and value of every record that has the metric (null ones are gaps)."""
        return self.both(self.against, key)

    def both(self, x: str, y: str) -> np.ndarray:
        rows = [(r[x], r[y]) for r in self.records if _number(r.get(x)) and _number(r.get(y))]
        return np.array(rows, dtype=float).reshape(-1, 2)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _series(source: Source, keys: list[str], against: str) -> dict[str, list[_Run]]:
    if against not in ("step", "seconds"):
        raise UsageError(f"curves are drawn against 'step' or 'seconds', not '{against}'")
    labelled = dict(source) if isinstance(source, Mapping) else {"": source}
    if not labelled:
        raise UsageError("there is nothing to draw: no runs were given")
    series = {
        str(label): [_Run(_records(one, against), against) for one in _runs(runs)]
        for label, runs in labelled.items()
    }
    every = [run for runs in series.values() for run in runs]
    for key in keys:
        if not any(run.has(key) for run in every):
            known = {name for run in every for record in run.records for name in record} - {"step", "seconds"}
            raise UsageError(f"no record has the metric {key} ({nearest(key, known)})")
    return series


def _runs(source: Any) -> list[Any]:
    """A source as a list of runs: records are a list of dicts, runs a list of anything else."""
    if isinstance(source, (str, Path)):
        return [source]
    items = list(source)
    return [items] if not items or isinstance(items[0], Mapping) else items


def _records(source: Any, against: str) -> Records:
    if not isinstance(source, (str, Path)):
        return list(source)
    records = read_metrics(source)
    if not records:
        raise DataError(f"{source} has no metrics.jsonl with records to draw")
    if against == "seconds":
        seconds = {timing["step"]: timing["seconds"] for timing in read_timings(source)}
        records = [{**record, "seconds": seconds.get(record["step"])} for record in records]
    return records


# --- drawing ----------------------------------------------------------------------------------------------


def _draw_curve(
    axes: Any, runs: list[_Run], key: str, look: dict[str, Any], label: str, smooth: int | None
) -> None:
    if not runs:
        return
    points = [run.points(key) for run in runs]
    if len(points) == 1:
        x, y = points[0].T
        window = smooth or _window(len(x))
        if window > 1:
            axes.plot(x, y, color=look["color"], alpha=0.22, linewidth=0.9)
        marker = "o" if len(x) == 1 else None
        axes.plot(x, _moving(y, window), **look, linewidth=1.8, marker=marker)
        return
    # several seeds: their mean where all of them have been, on the positions of all
    start, end = max(p[0, 0] for p in points), min(p[-1, 0] for p in points)
    if start > end:
        raise UsageError(f"the runs of '{label}' have no common part to average")
    x = np.unique(np.concatenate([p[:, 0] for p in points]))
    x = x[(x >= start) & (x <= end)]
    window = smooth or _window(max(len(p) for p in points))
    values = np.stack([np.interp(x, p[:, 0], _moving(p[:, 1], window)) for p in points])
    axes.fill_between(x, values.min(0), values.max(0), color=look["color"], alpha=0.18, linewidth=0)
    axes.plot(x, values.mean(0), **look, linewidth=1.8)


def _window(count: int) -> int:
    """How many records to average: about a twentieth of them, none when there are few."""
    return 1 if count < 60 else max(3, count // 20)


def _moving(values: np.ndarray, window: int) -> np.ndarray:
    """The centred moving average; at the ends over the part of the window that exists."""
    if window <= 1 or len(values) < 3:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def save(figure: Any, path: str | Path) -> None:
    """Write a figure of panels: light grids, open frames, and a legend wherever there are labels and none yet."""
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color=_GRID, linewidth=0.6)
        if panel.get_legend() is None and panel.get_legend_handles_labels()[0]:
            panel.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    if hasattr(figure, "number"):  # one of pyplot's, which keeps it otherwise
        import matplotlib.pyplot as plt

        plt.close(figure)


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # not pyplot: no global state, no window system, usable from any thread
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(width, height), dpi=150, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors=_INK, labelsize=9, length=3, color="#999999")
    axes.xaxis.label.set(color=_INK, size=10)
    axes.yaxis.label.set(color=_INK, size=10)
    axes.grid(True, color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.ticklabel_format(axis="both", useOffset=False, style="plain") if _plain(axes) else None


def _plain(axes: Any) -> bool:
    """Whether the tick labels are better written out than as powers of ten."""
    limits = [abs(v) for v in (*axes.get_xlim(), *axes.get_ylim()) if v]
    return all(1e-4 < v < 1e7 for v in limits)


def _legend(figure: Any, labels: list[str], ends: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], **look, linewidth=2.2, label=label)
        for look, label in zip(_looks(len(labels)), labels, strict=True)
        if label
    ]
    if ends:
        handles += [
            Line2D([], [], color=_INK, marker="o", markerfacecolor="white", linestyle="", label="start"),
            Line2D([], [], color=_INK, marker="o", linestyle="", label="end"),
        ]
    if handles:
        width = figure.get_figwidth() / 1.5
        figure.legend(
            handles=handles,
            loc="outside upper center",
            ncols=max(1, min(len(handles), int(width))),
            frameon=False,
            fontsize=9,
            labelcolor=_INK,
            handlelength=1.6,
            columnspacing=1.6,
        )


def _looks(count: int) -> list[dict[str, Any]]:
    """Colour and dashes of each source; the dashes change when the colours begin again."""
    dashes = ("-", "--", ":", "-.")
    size = len(PALETTE)
    return [{"color": PALETTE[i % size], "linestyle": dashes[i // size % 4]} for i in range(count)]


def _readable(key: str) -> str:
    return key.replace("_", " ")


def _save(figure: Any, path: str | Path) -> Path:
    path = Path(path)
    with guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png")
    return path
