"""Scenes as data: the plane, its shelves, where the vehicle starts, where it must go and what moves about.

A scene is a `Scene`, or a JSON file with the same fields; the built-in ones (`SCENES`) are such files beside
this module. Lengths are metres, speeds metres per second, boxes and regions `(x0, y0, x1, y1)`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from guerdon.errors import DataError, UsageError, nearest

SCENES: tuple[str, ...] = ("simple_static", "complex_static", "simple_dynamic", "complex_dynamic", "room")

RADIUS = 0.4  # of the vehicle, a disc [m]
MAX_SPEED = 1.5  # [m/s]
MAX_TURN = 1.0  # [rad/s]
TARGET_RADIUS = 0.6  # the vehicle has arrived when its centre is nearer than this [m]

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass(frozen=True)
class Patrol:
    """A disc that goes to and fro on the line from `start` to `end`."""

    start: Point
    end: Point
    radius: float = 0.4
    speed: float = 0.8


@dataclass(frozen=True)
class Scene:
    """A walled plane `[0, width] x [0, height]` with axis-aligned boxes.

    Every episode draws the vehicle's position uniformly from `start`, its heading from all directions, the
    target uniformly from `target` (a point where both corners are the same) and each patrol's phase. An
    episode that has taken `time_limit` steps is truncated.

    Raises `DataError` when made, if a box leaves the plane, if the vehicle could start in or touching
    something, if the target lies where the vehicle cannot be, or if a patrol would run through a box.
    """

    name: str
    width: float
    height: float
    start: Box
    target: Box
    boxes: tuple[Box, ...] = ()
    patrols: tuple[Patrol, ...] = ()
    time_limit: int = 300

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise DataError(f"scene '{self.name}': {what}")

        if not (self.width > 2 * RADIUS and self.height > 2 * RADIUS and self.time_limit > 0):
            refuse("width, height and time_limit must be positive and leave room for the vehicle")
        for box in (*self.boxes, self.start, self.target):
            x0, y0, x1, y1 = box
            if not (0 <= x0 <= x1 <= self.width and 0 <= y0 <= y1 <= self.height):
                refuse(f"{box} is not (x0, y0, x1, y1) inside the plane {self.width} x {self.height}")
        for which, region in (("start", self.start), ("target", self.target)):
            x0, y0, x1, y1 = region
            if min(x0, y0, self.width - x1, self.height - y1) <= RADIUS:
                refuse(f"the {which} region {region} is nearer to the outer wall than the vehicle's radius")
            for box in self.boxes:
                if _gap(region, box) <= RADIUS:
                    refuse(f"the {which} region {region} is nearer to {box} than the vehicle's radius")
        for patrol in self.patrols:
            (ax, ay), (bx, by) = patrol.start, patrol.end
            if not (patrol.radius > 0 and patrol.speed > 0 and patrol.start != patrol.end):
                refuse("a patrol needs a positive radius and speed and two different ends")
            along = np.linspace(0, 1, 1 + int(np.ceil(np.hypot(bx - ax, by - ay) / 0.05)))
            line = np.stack([ax + along * (bx - ax), ay + along * (by - ay)], 1)
            if (self.clearance(line) < patrol.radius).any():
                refuse(f"the patrol from {patrol.start} to {patrol.end} runs into a wall or a box")
            x0, y0, x1, y1 = self.start
            inside = np.stack([line[:, 0].clip(x0, x1), line[:, 1].clip(y0, y1)], 1)
            if (np.hypot(*(line - inside).T) <= patrol.radius + RADIUS).any():
                refuse(f"the patrol from {patrol.start} to {patrol.end} runs through the start region")

    def clearance(self, points: np.ndarray) -> np.ndarray:
        """`[..., 2]` points -> `[...]` exact distances to the nearest box or outer wall (0 inside a box)."""
        x, y = points[..., 0], points[..., 1]
        gap = np.minimum(np.minimum(x, self.width - x), np.minimum(y, self.height - y))
        for x0, y0, x1, y1 in self.boxes:
            gap = np.minimum(gap, np.hypot(x - np.clip(x, x0, x1), y - np.clip(y, y0, y1)))
        return gap

    def save(self, path: str | Path) -> None:
        """Write the scene as JSON, in the form that `load` reads."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, name: str | Path) -> Scene:
        """A built-in scene by name (see `SCENES`; '-' may stand for '_'), or one from a JSON file.

        Raises `UsageError` for a name that is neither, `DataError` for a file that is not a scene."""
        built_in = str(name).replace("-", "_")
        if built_in in SCENES:
            path = Path(__file__).parent / "scenes" / f"{built_in}.json"
        elif Path(name).suffix == ".json" and Path(name).is_file():
            path = Path(name)
        else:
            raise UsageError(
                f"no scene '{name}', neither built in nor a JSON file: {nearest(built_in, SCENES)}"
            )
        try:
            fields: dict[str, Any] = json.loads(path.read_text())
            fields["boxes"] = tuple(_numbers(box, 4) for box in fields.get("boxes", ()))
            fields["patrols"] = tuple(
                Patrol(**{**patrol, "start": _numbers(patrol["start"], 2), "end": _numbers(patrol["end"], 2)})
                for patrol in fields.get("patrols", ())
            )
            for region in ("start", "target"):
                fields[region] = _numbers(fields[region], 4)
            return cls(**fields)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path} is not a scene: {type(error).__name__}: {error}") from error


def _numbers(values: Any, n: int) -> Any:
    if len(values) != n:
        raise ValueError(f"{values} should be {n} numbers")
    return tuple(float(value) for value in values)


def _gap(a: Box, b: Box) -> float:
    """The distance between two rectangles."""
    dx = max(a[0] - b[2], b[0] - a[2], 0.0)
    dy = max(a[1] - b[3], b[1] - a[3], 0.0)
    return float(np.hypot(dx, dy))
