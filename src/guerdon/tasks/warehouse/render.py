"""Pictures of scenes and drives, with Pillow: frames of a vehicle, a PNG with trajectories, a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from guerdon.errors import UsageError
from guerdon.tasks.warehouse.scene import RADIUS, TARGET_RADIUS, Point, Scene

FLOOR, SHELF, WALL = (247, 246, 242), (146, 121, 98), (70, 70, 74)
START, TARGET, VEHICLE, ALARM, MOVER = (
    (214, 226, 240),
    (64, 158, 92),
    (35, 96, 168),
    (205, 60, 50),
    (232, 148, 52),
)
TRACKS = ((35, 96, 168), (190, 70, 130), (100, 80, 180), (20, 140, 150), (200, 110, 20))  # colours of drives


class Picture:
    """A scene seen from above, x to the right and y up, `pixels` wide; the still parts are painted once.

    It is painted `fine` times larger and scaled down, for smooth edges."""

    def __init__(self, scene: Scene, pixels: int = 400, fine: int = 2) -> None:
        self.scene, self.fine = scene, fine
        self.scale = pixels * fine / scene.width
        self.size = (pixels, round(pixels * scene.height / scene.width))
        self._still = Image.new("RGB", (self.size[0] * fine, self.size[1] * fine), FLOOR)
        pen = ImageDraw.Draw(self._still)
        pen.rectangle(self._box(*scene.start), fill=START)
        for box in scene.boxes:
            pen.rectangle(self._box(*box), fill=SHELF)
        for patrol in scene.patrols:
            pen.line([self._at(patrol.start), self._at(patrol.end)], fill=(245, 214, 170), width=2 * fine)
        pen.rectangle([0, 0, self._still.width - 1, self._still.height - 1], outline=WALL, width=3 * fine)

    def _at(self, point: Point) -> tuple[float, float]:
        return point[0] * self.scale, (self.scene.height - point[1]) * self.scale

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> list[tuple[float, float]]:
        return [self._at((x0, y1)), self._at((x1, y0))]

    def _disc(
        self, pen: ImageDraw.ImageDraw, centre: Point, radius: float, fill: tuple[int, int, int]
    ) -> None:
        x, y = centre
        pen.ellipse(self._box(x - radius, y - radius, x + radius, y + radius), fill=fill)

    def _smooth(self, image: Image.Image) -> Image.Image:
        return image.reduce(self.fine)

    def frame(
        self, pose: tuple[float, float, float], target: Point, discs: np.ndarray, alarm: bool = False
    ) -> np.ndarray:
        """`[H, W, 3]` uint8: the vehicle at (x, y, heading), the target and moving discs `[M, 2]`; a vehicle with
        `alarm` (touching something) is red."""
        image = self._still.copy()
        pen = ImageDraw.Draw(image)
        self._disc(pen, target, TARGET_RADIUS, TARGET)
        for patrol, centre in zip(self.scene.patrols, discs, strict=True):
            self._disc(pen, centre, patrol.radius, MOVER)
        x, y, heading = pose
        self._disc(pen, (x, y), RADIUS, ALARM if alarm else VEHICLE)
        nose = (x + RADIUS * np.cos(heading), y + RADIUS * np.sin(heading))
        pen.line([self._at((x, y)), self._at(nose)], fill=(255, 255, 255), width=2 * self.fine)
        return np.array(self._smooth(image))

    def drives(self, trajectories: Sequence[np.ndarray], title: str = "") -> Image.Image:
        """The scene with drives `[T, 2]` drawn into it, each with a dot where it ended."""
        image = self._still.copy()
        pen = ImageDraw.Draw(image)
        x0, y0, x1, y1 = self.scene.target
        self._disc(pen, ((x0 + x1) / 2, (y0 + y1) / 2), TARGET_RADIUS, TARGET)
        for patrol in self.scene.patrols:
            self._disc(pen, patrol.start, patrol.radius, MOVER)
        for number, drive in enumerate(trajectories):
            colour = TRACKS[number % len(TRACKS)]
            points = [self._at((x, y)) for x, y in np.asarray(drive)[:, :2]]
            if len(points) > 1:
                pen.line(points, fill=colour, width=2 * self.fine, joint="curve")
            self._disc(pen, tuple(np.asarray(drive)[-1, :2]), RADIUS / 2, colour)
        if title:
            font = ImageFont.load_default(size=14 * self.fine)
            pen.text((8 * self.fine, 6 * self.fine), title, fill=WALL, font=font)
        return self._smooth(image)


def draw(
    path: str | Path,
    scenes: Scene | Sequence[Scene],
    trajectories: Sequence[np.ndarray] = (),
    pixels: int = 400,
) -> None:
    """Write a PNG of one scene with drives (`[T, 2]` or more columns, x and y first), or of several side by side.

    Raises `UsageError` for trajectories with several scenes: they would belong to none in particular."""
    if isinstance(scenes, Scene):
        Picture(scenes, pixels).drives(trajectories, scenes.name).save(path)
        return
    if trajectories:
        raise UsageError("draw: trajectories go with one scene, not with several")
    pictures = [Picture(scene, pixels).drives((), scene.name) for scene in scenes]
    columns = int(np.ceil(len(pictures) ** 0.5))
    width, height = max(p.width for p in pictures) + 8, max(p.height for p in pictures) + 8
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), (255, 255, 255))
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * width + 4, number // columns * height + 4))
    sheet.save(path)


def save_gif(frames: Sequence[np.ndarray], path: str | Path, fps: float = 10) -> None:
    """Write frames `[H, W, 3]` uint8 (those of `Warehouse.render`) as an endless GIF.

    Raises `UsageError` without frames."""
    if not len(frames):
        raise UsageError("save_gif: there are no frames; collect them with render() after every step")
    # one palette for all: to look for one in every frame takes most of the time and makes colours flicker
    palette = Image.fromarray(np.concatenate([frames[0], frames[-1]])).quantize(64)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
