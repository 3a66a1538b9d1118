"""Pictures of dataflow graphs: calls in layers from left to right, what they read written where it arrives.

The layout is that of Sugiyama, Tagawa and Toda (1981): the longest path gives a call its layer, long edges pass the layers
between in places of their own, and a few sweeps of averages keep crossings low. Edges of one source share their places. Weights
that the next iteration waits for run back in dashed lanes below.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from guerdon.errors import UsageError, nearest

if TYPE_CHECKING:
    from guerdon.engine.graph import DataflowGraph, ModelFunctionCall

COLOURS: dict[str, tuple[str, str, str]] = {  # kind -> fill, line, what the legend says
    "data": ("#f4f4f2", "#9a9a94", "recorded data"),
    "experience": ("#e9e5f1", "#7c6ba0", "acts"),
    "generate": ("#dfe9f4", "#4f7ba6", "generates"),
    "feedback": ("#f6f0d2", "#a18e3c", "judges"),
    "inference": ("#e3efe4", "#5d9067", "evaluates"),
    "train": ("#f9e6d5", "#bd7a41", "trains"),
}
_INK, _SOFT, _WEIGHTS = "#30343b", "#6f757e", "#a4688e"
_TELLING = {
    "prompts": "prompts",
    "token": "tokens",
    "text": "text",
    "image": "images",
    "state": "steps",
    "next": "steps",
    "observation": "observations",
    "action": "actions",
    "log_prob": "log-probs",
    "logits": "logits",
    "value": "values",
    "next_value": "next values",
    "score": "scores",
    "preference": "preferences",
    "reward": "rewards",
    "output": "outputs",
    "figures": "evaluations",
}
"""Fields worth naming on an edge, in this order, and how; masks and the like are left out where one of these is there."""

_FONT, _NAME, _SMALL = 13.0, 14.0, 11.5  # pixels
_LINE, _PORT, _PAD, _BETWEEN, _LANE = 17.0, 19.0, 12.0, 26.0, 16.0
_MARGIN, _HEAD = 16.0, 34.0
_DASHES: Any = (0, (4, 2.5))
_SUFFIXES = (".svg", ".png", ".pdf")
_Point = tuple[float, float]
_DATA = "\0data"  # no call is called that


@dataclass
class _Place:
    """Something in a layer: a box with lines of text, or (without any) a place where edges pass."""

    layer: int
    kind: str = ""
    lines: list[tuple[str, float, str, str]] = field(default_factory=list)  # text, size, colour, weight
    arrivals: list[_Arrival] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 12.0

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


@dataclass
class _Arrival:
    """An edge that ends at a box: from a place, with a label."""

    source: _Place
    label: str
    kind: str
    y: float = 0.0
    lane: int = 0  # of weights: which of the dashed ones


def draw_graph(graph: DataflowGraph, path: Path, title: str | None = None) -> Path:
    """Draw ``graph`` to ``path``; see `DataflowGraph.draw`."""
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"{path} is no picture that can be written; {nearest(path.suffix, _SUFFIXES)}")
    layers, boxes, passes = _layered(graph)
    _ordered(layers, passes)
    back = [
        (boxes[e.source], boxes[e.target], "weights of " + _spoken(", ".join(e.keys)))
        for e in graph.version_edges
    ]
    back.sort(key=lambda one: -one[1].layer)  # short ways inside, long ones around them
    for lane, (source, target, label) in enumerate(back):
        target.arrivals.append(_Arrival(source, label, "weights", lane=lane))
    _painted(graph.name if title is None else title, path, layers, passes, _placed(layers))
    return path


# --- layers -----------------------------------------------------------------------------------------------


def _layered(
    graph: DataflowGraph,
) -> tuple[list[list[_Place]], dict[str, _Place], list[tuple[_Place, _Place]]]:
    """Places by layer, the boxes by name, and pairs of places that an edge joins on its way past layers."""
    boxes: dict[str, _Place] = {}
    first = 1 if graph.data_keys else 0
    if first:
        lines: list[Any] = [("data", _NAME, _INK, "bold")]
        names = dict.fromkeys(_source_name(key) for key in graph.data_keys)
        boxes[_DATA] = _Place(0, "data", lines + [(name, _FONT, _SOFT, "normal") for name in list(names)[:4]])
    for call in graph.order():
        above = [boxes[parent].layer + 1 for parent in graph.parents(call.name)]
        boxes[call.name] = _Place(max([first, *above]), call.kind, _lines_of(call))
    layers: list[list[_Place]] = [[] for _ in range(1 + max(box.layer for box in boxes.values()))]
    for box in boxes.values():
        layers[box.layer].append(box)
    passing: dict[tuple[int, int], _Place] = {}
    passes: list[tuple[_Place, _Place]] = []
    for call in graph.order():
        target = boxes[call.name]
        keys: dict[str, list[str]] = {}
        for key in call.reads:
            keys.setdefault(graph.producer(key) or _DATA, []).append(key)
        for name, read in keys.items():
            source = before = boxes[name]
            for layer in range(source.layer + 1, target.layer):
                place = passing.get((id(source), layer))
                if place is None:
                    place = passing[id(source), layer] = _Place(layer, source.kind)
                    layers[layer].append(place)
                    passes.append((before, place))
                before = place
            target.arrivals.append(_Arrival(before, _label(read, name == _DATA), source.kind))
    return layers, boxes, passes


def _lines_of(call: ModelFunctionCall) -> list[tuple[str, float, str, str]]:
    """What a box says: role, verb, how much, whose weights else, which follow."""
    verb = call.name.removeprefix(f"{call.role}.")
    lines = [(_spoken(call.role), _NAME, _INK, "bold"), (_spoken(verb), _FONT, _INK, "normal")]
    unit = "step" if call.name.endswith((".advance", ".act", ".step")) else "row"
    much = [] if call.sequences is None else [f"{call.sequences:,} {unit}{'s' * (call.sequences > 1)}"]
    much += [f"{call.minibatches} updates"] if call.minibatches > 1 else []
    said = [", ".join(much)] if much else []
    by = "by " if call.kind == "experience" else "reads "
    said += [by + ", ".join(call.uses)] if call.uses else []
    for move in call.moves:
        share = "" if move.eta == 1 else f"{move.eta:g} of "
        said.append(f"{move.target} \N{LEFTWARDS ARROW} {share}{move.source}")
    return lines + [(_spoken(text), _SMALL, _SOFT, "normal") for text in said]


def _spoken(name: str) -> str:
    """A name as text: "actor sample 2" of "actor_sample#2"."""
    return name.replace("_", " ").replace("#", " ")


def _source_name(key: str) -> str:
    """What a key of recorded data belongs to: "preferences" of "preferences.chosen", role and field of what a call before the
    loop has made."""
    first, _, rest = key.partition(".")
    return _spoken(f"{first} {rest.split('.')[-1]}" if "." in rest else first)


def _label(keys: Sequence[str], data: bool) -> str:
    """The telling fields among ``keys``, at most three."""
    if data:
        return ", ".join(dict.fromkeys(_source_name(key) for key in keys))
    words = [key.rpartition(".")[2] for key in keys]
    names = dict.fromkeys(name for word, name in _TELLING.items() if word in words)
    found = [*names, *(_spoken(word) for word in words if word.endswith("weights"))]
    found = found or [_spoken(word) for word in words]
    return ", ".join(found[:3]) + (" \N{HORIZONTAL ELLIPSIS}" if len(found) > 3 else "")


def _ordered(layers: list[list[_Place]], passes: list[tuple[_Place, _Place]]) -> None:
    """Sort each layer by the mean place of its neighbours in the layers before (and, every other sweep, after)."""
    joined = [*passes, *((a.source, box) for layer in layers for box in layer for a in box.arrivals)]
    for sweep in range(8):
        forward = sweep % 2 == 0
        for layer in layers if forward else layers[::-1]:
            rank = {id(place): i / max(1, len(own) - 1) for own in layers for i, place in enumerate(own)}

            def mean(place: _Place, rank: dict[int, float] = rank, forward: bool = forward) -> float:
                near = [(b, a) if forward else (a, b) for a, b in joined]
                found = [rank[id(other)] for own, other in near if own is place]
                return sum(found) / len(found) if found else rank[id(place)]

            layer.sort(key=mean)


# --- coordinates ------------------------------------------------------------------------------------------


def _width(text: str, size: float, weight: str = "normal") -> float:
    """Pixels that a line of text is wide."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    properties = FontProperties(family="DejaVu Sans", weight=weight)
    return float(TextPath((0, 0), text or " ", size=size, prop=properties).get_extents().width)


def _placed(layers: list[list[_Place]]) -> float:
    """Give every place its coordinates (y grows downwards, from 0); the right edge."""
    x = 0.0
    for number, layer in enumerate(layers):
        labels = [_width(a.label, _SMALL) for place in layer for a in place.arrivals]
        turns = sum(a.kind == "weights" for place in layer for a in place.arrivals)
        if labels:
            x += max(labels) + 14 + (34 if number else 0) + 7 * turns
        for place in layer:
            if place.lines:
                wide = max(_width(text, size, weight) for text, size, _, weight in place.lines)
                place.width = max(74.0, wide + 2 * _PAD)
                place.height = max(_LINE * len(place.lines) + _PAD, _PORT * len(place.arrivals) + 8)
        wide = max(place.width for place in layer)
        for place in layer:
            place.width, place.x = wide, x
        x += wide
    heights = [sum(p.height for p in layer) + _BETWEEN * (len(layer) - 1) for layer in layers]
    for layer, height in zip(layers, heights, strict=True):
        y = (max(heights) - height) / 2
        for place in layer:
            place.y = y
            y += place.height + _BETWEEN
    for place in (place for layer in layers for place in layer):
        place.arrivals.sort(key=lambda a: (a.kind == "weights", a.source.middle))
        top = place.middle - _PORT * (len(place.arrivals) - 1) / 2
        for i, arrival in enumerate(place.arrivals):
            arrival.y = top + _PORT * i
    return x


# --- paint ------------------------------------------------------------------------------------------------


class _Canvas:
    """A figure measured in pixels, y downwards."""

    def __init__(self, left: float, top: float, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(width / 72, height / 72), facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(left, left + width), ylim=(top + height, top))
        self.axes.axis("off")

    def line(self, points: Sequence[_Point], colour: str) -> None:
        self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, zorder=1)

    def dashes(self, points: Sequence[_Point], colour: str) -> None:
        self.axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.1, linestyle=_DASHES, zorder=1)

    def curve(self, start: _Point, end: _Point, colour: str) -> None:
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Outline

        middle = (start[0] + end[0]) / 2
        points = [start, (middle, start[1]), (middle, end[1]), end]
        outline = Outline(points, [Outline.MOVETO, *[Outline.CURVE4] * 3])
        self.axes.add_patch(PathPatch(outline, fill=False, edgecolor=colour, linewidth=1.3, zorder=1))

    def arrow(self, x: float, y: float, colour: str) -> None:
        self.axes.fill([x, x - 7, x - 7], [y, y - 3.6, y + 3.6], color=colour, zorder=3, linewidth=0)

    def text(self, x: float, y: float, text: str, size: float, colour: str, **settings: Any) -> None:
        self.axes.text(x, y, text, size=size, color=colour, zorder=4, **settings)

    def box(self, place: _Place) -> None:
        from matplotlib.patches import FancyBboxPatch

        fill, line, _ = COLOURS[place.kind]
        look: Any = {"facecolor": fill, "edgecolor": line, "linewidth": 1.2, "zorder": 2}
        round_ = "round,pad=0,rounding_size=6"
        self.axes.add_patch(
            FancyBboxPatch((place.x, place.y), place.width, place.height, boxstyle=round_, **look)
        )
        x, y = place.x + place.width / 2, place.middle - _LINE * (len(place.lines) - 1) / 2
        for text, size, colour, weight in place.lines:
            self.text(x, y, text, size, colour, weight=weight, ha="center", va="center_baseline")
            y += _LINE

    def legend(self, kinds: Sequence[str], weights: bool) -> None:
        from matplotlib.lines import Line2D
        from matplotlib.patches import Patch

        looks = [COLOURS[kind] for kind in kinds]
        handles: list[Any] = [Patch(facecolor=fill, edgecolor=line, label=said) for fill, line, said in looks]
        if weights:
            said = "weights for the next iteration"
            handles.append(Line2D([], [], color=_WEIGHTS, linewidth=1.1, linestyle=_DASHES, label=said))
        look = {"frameon": False, "fontsize": _SMALL, "labelcolor": _SOFT}
        spaces = {"handlelength": 1.3, "columnspacing": 1.4, "bbox_to_anchor": (0.0, 0.0)}
        self.figure.legend(handles=handles, loc="lower left", ncols=len(handles), **look, **spaces)

    def save(self, path: Path) -> None:
        import matplotlib

        path.parent.mkdir(parents=True, exist_ok=True)
        undated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix, {})
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "guerdon"}):
            self.figure.savefig(path, dpi=108, metadata=undated)
        if path.suffix == ".png":  # a few flat colours: a palette makes the file a third as large
            from PIL import Image

            with Image.open(path) as picture:
                few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            few.save(path, optimize=True)


def _painted(
    title: str, path: Path, layers: list[list[_Place]], passes: list[tuple[_Place, _Place]], right: float
) -> None:
    everything = [place for layer in layers for place in layer]
    lowest = max(place.y + place.height for place in everything)
    back = sum(a.kind == "weights" for place in everything for a in place.arrivals)
    kinds = [kind for kind in COLOURS if any(p.kind == kind and p.lines for p in everything)]
    width = max(right + 2 * _MARGIN + 8 * (1 + back), 120.0 * (len(kinds) + 1))
    canvas = _Canvas(-_MARGIN, -_HEAD, width, lowest + _LANE * back + (10 if back else 0) + 50 + _HEAD)
    canvas.text(0, 10 - _HEAD, title, 15, _INK, weight="bold", va="top")
    for before, place in passes:
        colour, y = COLOURS[place.kind][1], place.middle
        canvas.curve((before.right, before.middle), (place.x, y), colour)
        canvas.line([(place.x, y), (place.right, y)], colour)
    for layer in layers:
        reach = 14 + max((_width(a.label, _SMALL) for box in layer for a in box.arrivals), default=0.0)
        turn = 0
        for box in (place for place in layer if place.lines):
            canvas.box(box)
            for arrival in box.arrivals:
                source, y, start = arrival.source, arrival.y, box.x - reach
                if arrival.kind == "weights":
                    colour, said, lane = _WEIGHTS, _WEIGHTS, lowest + 14 + _LANE * arrival.lane
                    leaves = source.middle + min(10.0, source.height / 4)
                    out, back_at = source.right + 8 + 7 * arrival.lane, start - 5 - 7 * turn
                    way = [(source.right, leaves), (out, leaves), (out, lane), (back_at, lane), (back_at, y)]
                    canvas.dashes([*way, (box.x - 6, y)], colour)
                    turn += 1
                else:
                    colour, said = COLOURS[arrival.kind][1], _INK
                    canvas.curve((source.right, source.middle), (start, y), colour)
                    canvas.line([(start, y), (box.x - 5, y)], colour)
                canvas.arrow(box.x, y, colour)
                canvas.text(box.x - 9, y - 2.5, arrival.label, _SMALL, said, ha="right", va="bottom")
    canvas.legend(kinds, bool(back))
    canvas.save(path)
