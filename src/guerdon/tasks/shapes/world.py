"""ShapesWorld: captions and the pictures they describe.

A caption is

    a {size} {colour} {shape} {position} on a {background} background

for example "a large red circle at the top on a white background": 2 sizes x 6 colours x 5 shapes x 5
positions x 3 backgrounds = 900 captions. Each rendering varies a little (centre, radius, colour). In a video
the shape also moves: "a small blue ring on the left moving right on a black background".

Six pairs of colour and shape (`HELD_OUT`, 180 captions) are never used for training, so that "held out"
asks for a composition that was never seen and not merely for a caption that was not.

Only numpy is needed here.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Sequence
from typing import Literal

import numpy as np

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SHAPES = ("circle", "square", "triangle", "cross", "ring")
POSITIONS = ("centre", "top", "bottom", "left", "right")
BACKGROUNDS = ("white", "grey", "black")
DIRECTIONS = ("left", "right", "up", "down")

#: Attribute names in the order in which every array of attributes here has its columns.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": SIZES,
    "colour": COLOURS,
    "shape": SHAPES,
    "position": POSITIONS,
    "background": BACKGROUNDS,
}

#: (colour, shape) pairs that no training caption has: one of every colour, every shape at least once.
HELD_OUT: tuple[tuple[str, str], ...] = (
    ("red", "ring"),
    ("green", "square"),
    ("blue", "cross"),
    ("yellow", "triangle"),
    ("purple", "circle"),
    ("orange", "cross"),
)

#: Other spellings that `parse` (and the tokenizer) understands.
ALIASES: dict[str, str] = {
    "big": "large",
    "huge": "large",
    "little": "small",
    "tiny": "small",
    "violet": "purple",
    "disc": "circle",
    "disk": "circle",
    "plus": "cross",
    "center": "centre",
    "middle": "centre",
    "upper": "top",
    "lower": "bottom",
    "gray": "grey",
    "upwards": "up",
    "downwards": "down",
}

_PHRASES = {
    "centre": "in the centre",
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
}
_RADIUS = {"small": 0.155, "large": 0.26}  # of the picture's width
_PLACE = {
    "centre": (0.5, 0.5),
    "top": (0.5, 0.28),
    "bottom": (0.5, 0.72),
    "left": (0.28, 0.5),
    "right": (0.72, 0.5),
}
_RGB = {
    "red": (0.88, 0.10, 0.12),
    "green": (0.10, 0.66, 0.20),
    "blue": (0.12, 0.22, 0.90),
    "yellow": (0.95, 0.88, 0.10),
    "purple": (0.62, 0.12, 0.78),
    "orange": (0.96, 0.52, 0.06),
}
_GREY = {"white": 0.96, "grey": 0.50, "black": 0.04}
_STEP = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
_TRAVEL = 0.44  # how far a shape moves during a video, of the picture's width
_SUPERSAMPLE = 4

Style = Literal["clean", "degraded"]


def caption(
    size: str | None = None,
    colour: str | None = None,
    shape: str | None = None,
    position: str | None = None,
    background: str | None = None,
    direction: str | None = None,
) -> str:
    """The caption with these attributes. What is None is left unsaid:
    ``caption(colour="red")`` is "a red shape"."""
    words = ["a", size, colour, shape or "shape", _PHRASES[position] if position else None]
    words.append(f"moving {direction}" if direction else None)
    words.append(f"on a {background} background" if background else None)
    return " ".join(word for word in words if word)


def all_captions() -> list[str]:
    """The 900 captions, the last attribute varying fastest."""
    return [caption(*values) for values in itertools.product(*ATTRIBUTES.values())]


def held_out_captions() -> list[str]:
    """The 180 captions with a held-out pair of colour and shape."""
    return [text for text in all_captions() if _pair(text) in HELD_OUT]


def training_captions() -> list[str]:
    """The 720 captions without one."""
    return [text for text in all_captions() if _pair(text) not in HELD_OUT]


def _pair(text: str) -> tuple[str, str]:
    attributes = parse(text)
    return attributes["colour"], attributes["shape"]


def vocabulary() -> list[str]:
    """Every word that a caption can have, without repeats."""
    words = {word for phrase in _PHRASES.values() for word in phrase.split()}
    words |= {word for values in ATTRIBUTES.values() for word in values}
    return sorted(words | set(DIRECTIONS) | {"a", "on", "shape", "moving", "background"})


def parse(text: str) -> dict[str, str]:
    """The attributes that a caption names, as ``{"size": "large", "colour": "red", ...}``.

    Words in any order, any case, with or without punctuation, a few other spellings (`ALIASES`); an
    attribute that is not named is not in the result, and of two words for one attribute the first counts.
    A word after "moving" is the ``"direction"``.
    """
    blanks = str.maketrans(dict.fromkeys(string.punctuation, " "))
    words = [ALIASES.get(word, word) for word in text.lower().translate(blanks).split()]
    found: dict[str, str] = {}
    for place, word in enumerate(words):
        if word in DIRECTIONS and place and words[place - 1] == "moving":
            found.setdefault("direction", word)
            continue
        for name, values in ATTRIBUTES.items():
            if word in values:
                found.setdefault(name, word)
    return found


def attribute_indices(captions: Sequence[str]) -> np.ndarray:
    """``[N, 5]`` int64: each caption's place in each of `ATTRIBUTES`; -1 where it says nothing."""
    parsed = [parse(text) for text in captions]
    rows = [
        [values.index(p[name]) if name in p else -1 for name, values in ATTRIBUTES.items()] for p in parsed
    ]
    return np.array(rows, dtype=np.int64).reshape(len(rows), len(ATTRIBUTES))


def render(
    captions: Sequence[str],
    size: int = 16,
    rng: np.random.Generator | int | None = None,
    jitter: bool = True,
    style: Style = "clean",
) -> np.ndarray:
    """A picture for each caption.

    Args: ``size`` width and height in pixels; ``rng`` a generator or a seed (None: a fresh one), which
    decides the jitter, the noise of the degraded style and every attribute that a caption leaves open;
    ``jitter`` False draws exactly what is said; ``style`` "degraded" is blurred, washed out and noisy.

    Returns ``[N, 3, size, size]`` float32 in [-1, 1]. Raises ``ValueError`` for an unknown style.
    """
    rng = np.random.default_rng(rng)
    chosen = _choose(captions, rng)
    offsets = np.zeros((len(chosen), 1, 2), dtype=np.float32)
    return _draw(chosen, offsets, size, rng, jitter, style)[:, 0]


def render_video(
    captions: Sequence[str],
    frames: int = 8,
    size: int = 16,
    rng: np.random.Generator | int | None = None,
    jitter: bool = True,
    style: Style = "clean",
) -> np.ndarray:
    """A video for each caption: the shape crosses its position at constant speed in the direction that
    "moving left/right/up/down" names (no such words: any direction, drawn from ``rng``).

    Arguments as in `render`. Returns ``[N, frames, 3, size, size]`` float32 in [-1, 1].
    """
    rng = np.random.default_rng(rng)
    chosen = _choose(captions, rng)
    directions = [
        parse(text).get("direction") or DIRECTIONS[rng.integers(len(DIRECTIONS))] for text in captions
    ]
    steps = np.array([_STEP[name] for name in directions], dtype=np.float32).reshape(len(directions), 1, 2)
    # symmetric about the named position, so that the position stays readable from the middle of the video
    track = np.linspace(-0.5, 0.5, frames, dtype=np.float32) if frames > 1 else np.zeros(1, np.float32)
    return _draw(chosen, steps * track[None, :, None] * _TRAVEL, size, rng, jitter, style)


def _choose(captions: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """`attribute_indices` with every open attribute drawn at random."""
    chosen = attribute_indices(captions)
    counts = np.array([len(values) for values in ATTRIBUTES.values()])
    return np.where(chosen < 0, rng.integers(counts, size=chosen.shape), chosen)


def _draw(
    chosen: np.ndarray, offsets: np.ndarray, size: int, rng: np.random.Generator, jitter: bool, style: str
) -> np.ndarray:
    """``chosen [N, 5]`` attributes, ``offsets [N, F, 2]`` of the width, to ``[N, F, 3, size, size]``."""
    if style not in ("clean", "degraded"):
        raise ValueError(f"style must be 'clean' or 'degraded', not {style!r}")
    count, frames = offsets.shape[:2]
    wiggle = 1.0 if jitter else 0.0
    radius = np.array([_RADIUS[name] for name in SIZES])[chosen[:, 0]]
    radius = radius * (1 + wiggle * rng.uniform(-0.08, 0.08, count))
    centre = np.array([_PLACE[name] for name in POSITIONS])[chosen[:, 3]]
    centre = centre + wiggle * rng.uniform(-0.04, 0.04, (count, 2))
    colour = np.array([_RGB[name] for name in COLOURS])[chosen[:, 1]]
    colour = np.clip(colour + wiggle * rng.uniform(-0.06, 0.06, (count, 3)), 0, 1)
    ground = np.array([_GREY[name] for name in BACKGROUNDS])[chosen[:, 4]]
    ground = ground + wiggle * rng.uniform(-0.03, 0.03, count)

    places = centre[:, None, :] + offsets  # [N, F, 2]
    cover = coverage(chosen[:, 2].repeat(frames), places.reshape(-1, 2), radius.repeat(frames), size)
    cover = cover.reshape(count, frames, 1, size, size)
    picture = ground[:, None, None, None, None] * (1 - cover) + colour[:, None, :, None, None] * cover
    if style == "degraded":
        picture = _degrade(picture, rng)
    return (picture * 2 - 1).astype(np.float32)


def coverage(shapes: np.ndarray, centres: np.ndarray, radii: np.ndarray, size: int) -> np.ndarray:
    """Share of each pixel that a shape covers.

    Args: ``shapes [N]`` indices into `SHAPES`; ``centres [N, 2]`` (x, y) and ``radii [N]`` in picture widths.
    Returns ``[N, size, size]`` float32 in [0, 1]: 4x4 boolean samples a pixel, averaged.
    """
    fine = size * _SUPERSAMPLE
    ticks = ((np.arange(fine) + 0.5) / fine).astype(np.float32)
    mask = np.zeros((len(shapes), fine, fine), dtype=bool)
    for index, name in enumerate(SHAPES):
        rows = np.flatnonzero(shapes == index)
        if not len(rows):
            continue
        # in units of the radius, y pointing down
        scale = radii[rows, None].astype(np.float32)
        x = ((ticks[None] - centres[rows, :1].astype(np.float32)) / scale)[:, None, :]
        y = ((ticks[None] - centres[rows, 1:].astype(np.float32)) / scale)[:, :, None]
        ax, ay = np.abs(x), np.abs(y)
        if name == "circle":
            mask[rows] = x * x + y * y < 1
        elif name == "ring":
            distance = x * x + y * y
            mask[rows] = (distance < 1) & (distance > 0.52**2)
        elif name == "square":
            mask[rows] = (ax < 0.92) & (ay < 0.92)
        elif name == "triangle":
            mask[rows] = (y < 0.8) & (ax < (y + 1.0) * 0.58)
        else:
            mask[rows] = ((ax < 0.33) & (ay < 1)) | ((ay < 0.33) & (ax < 1))
    blocks = mask.reshape(len(shapes), size, _SUPERSAMPLE, size, _SUPERSAMPLE)
    return blocks.mean(axis=(2, 4), dtype=np.float32)


def _degrade(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur (3x3 binomial), wash out (less colour and contrast), add noise: ``[..., 3, H, W]`` in [0, 1]."""
    for axis in (-1, -2):
        widths = [(0, 0)] * picture.ndim
        widths[axis] = (1, 1)
        padded = np.pad(picture, widths, mode="edge")
        length = picture.shape[axis]
        first, second, third = (np.take(padded, range(k, k + length), axis=axis) for k in range(3))
        picture = (first + 2 * second + third) / 4
    grey = picture.mean(axis=-3, keepdims=True)
    picture = grey + 0.6 * (picture - grey)
    picture = 0.5 + 0.75 * (picture - 0.5)
    return np.clip(picture + rng.normal(0, 0.04, picture.shape), 0, 1)
