"""Judges of ShapesWorld pictures that follow rules: the gold standard, and a stand-in for people.

A picture is read by its nearest template: the 900 clean pictures, each at nine small shifts. The shifts are
needed: without them, jitter alone makes 3 % of true renderings read as another shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from guerdon.tasks.shapes import world

Images = Tensor | np.ndarray

_SHIFT = 0.03  # of the width


@lru_cache(maxsize=4)
def _templates(size: int) -> tuple[Tensor, Tensor]:
    """``[8100, 3 * size * size]`` clean pictures in [-1, 1] and their squared lengths ``[8100]``; nine
    consecutive rows belong to one caption of `world.all_captions`."""
    chosen = _attributes()
    moves = [(x, y) for x in (-_SHIFT, 0.0, _SHIFT) for y in (-_SHIFT, 0.0, _SHIFT)]
    offsets = np.broadcast_to(np.array(moves, dtype=np.float32), (len(chosen), len(moves), 2))
    drawn = world._draw(chosen, offsets, size, np.random.default_rng(0), jitter=False, style="clean")
    rows = torch.from_numpy(drawn.reshape(len(chosen) * len(moves), -1))
    return rows, (rows**2).sum(1)


@lru_cache(maxsize=1)
def _attributes() -> np.ndarray:
    return world.attribute_indices(world.all_captions())


def as_float(images: Images) -> Tensor:
    """Pictures as float32 ``[B, 3, H, W]`` in [-1, 1].

    ``images`` is uint8 ``[B, H, W, 3]`` or float ``[B, 3, H, W]`` (already in [-1, 1]; values beyond are
    clamped, as they would be when shown). Raises ``ValueError`` for any other shape.
    """
    images = torch.as_tensor(images)
    if images.dtype == torch.uint8:
        if images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"uint8 pictures must be [B, H, W, 3], not {tuple(images.shape)}")
        return images.permute(0, 3, 1, 2).float() / 127.5 - 1
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"float pictures must be [B, 3, H, W], not {tuple(images.shape)}")
    return images.detach().float().clamp(-1, 1)


def _nearest(images: Images) -> tuple[Tensor, Tensor]:
    """Row of the nearest template and squared distance to it, both ``[B]``."""
    pixels = as_float(images).flatten(1).cpu()
    rows, lengths = _templates(round((pixels.shape[1] / 3) ** 0.5))
    best = [(lengths - 2 * part @ rows.T).min(dim=1) for part in pixels.split(1024)]
    index = torch.cat([part.indices for part in best]) if best else torch.zeros(0, dtype=torch.long)
    distance = torch.cat([part.values for part in best]) if best else torch.zeros(0)
    return index, (distance + (pixels**2).sum(1)).clamp(min=0)


def read(images: Images) -> np.ndarray:
    """What is in each picture: ``[B, 5]`` int64, columns and values as in `world.attribute_indices`.

    ``images`` as in `as_float`; square. Reads every jittered rendering rightly at 16x16 (over 99 % at 24x24),
    and about 99 % of them under white noise of standard deviation 0.2.
    """
    index, _ = _nearest(images)
    return _attributes()[index.numpy() // 9]


def describe(images: Images) -> list[str]:
    """The caption that each picture reads as."""
    index, _ = _nearest(images)
    captions = world.all_captions()
    return [captions[row // 9] for row in index.tolist()]


def template_distance(images: Images) -> np.ndarray:
    """``[B]`` root mean square difference (pixels in [-1, 1]) to the nearest template: how far a picture is
    from anything that this world contains. Jittered renderings: about 0.1."""
    pixels = as_float(images)
    _, distance = _nearest(pixels)
    return (distance / pixels[0].numel()).sqrt().numpy() if len(pixels) else np.zeros(0, np.float32)


def correct(images: Images, captions: Sequence[str]) -> np.ndarray:
    """``[B]`` bool: whether a picture has every attribute that its caption names."""
    return np.all(_matches(images, captions), axis=1)


def accuracy(images: Images, captions: Sequence[str]) -> dict[str, float]:
    """Share of pictures with the right ``size``, ``colour``, ``shape``, ``position``, ``background``, and
    with ``all`` of them; what a caption leaves open counts as right."""
    matches = _matches(images, captions)
    result = {"all": float(matches.all(axis=1).mean())}
    return result | {name: float(matches[:, column].mean()) for column, name in enumerate(world.ATTRIBUTES)}


def _matches(images: Images, captions: Sequence[str]) -> np.ndarray:
    if len(images) != len(captions):
        raise ValueError(f"{len(images)} pictures cannot be checked against {len(captions)} captions")
    wanted = world.attribute_indices(captions)
    return (wanted < 0) | (read(images) == wanted)


def sharpness(images: Images) -> np.ndarray:
    """``[B]`` mean absolute Laplacian of the brightness (in [-1, 1]): blur lowers it, noise raises it."""
    grey = as_float(images).mean(dim=1)
    centre = grey[:, 1:-1, 1:-1]
    around = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:]
    return (around - 4 * centre).abs().mean(dim=(1, 2)).cpu().numpy()


def saturation(images: Images) -> np.ndarray:
    """``[B]`` mean of (largest - smallest colour channel) / 2, in [0, 1]: 0 is grey."""
    pixels = as_float(images)
    return ((pixels.amax(dim=1) - pixels.amin(dim=1)) / 2).mean(dim=(1, 2)).cpu().numpy()


def direction_of_motion(video: Images) -> list[str]:
    """Where the shape goes: one of `world.DIRECTIONS` for each video, or "still".

    ``video`` is float ``[N, F, 3, H, W]`` or uint8 ``[N, F, H, W, 3]``. The shape is whatever has colour (the
    backgrounds have none); its centre of mass is followed by a straight line fitted through all frames.
    """
    video = torch.as_tensor(video)
    if video.ndim != 5:
        raise ValueError(f"videos must have five axes, [N, F, ...], not {tuple(video.shape)}")
    N, frames = video.shape[:2]
    pixels = as_float(video.flatten(0, 1))
    colour = (pixels.amax(dim=1) - pixels.amin(dim=1)).clamp(min=0)
    weight = (colour - 0.4 * colour.amax(dim=(1, 2), keepdim=True)).clamp(min=0)  # ignore noise
    total = weight.sum(dim=(1, 2)).clamp(min=1e-6)
    H, W = weight.shape[1:]
    x = (weight.sum(dim=1) * torch.arange(W)).sum(dim=1) / total / W
    y = (weight.sum(dim=2) * torch.arange(H)).sum(dim=1) / total / H
    track = torch.stack([x, y], dim=1).reshape(N, frames, 2)
    ticks = torch.linspace(-0.5, 0.5, frames)
    slope = (track * ticks[None, :, None]).sum(dim=1) / (ticks**2).sum()  # widths per video
    names = []
    for dx, dy in slope.tolist():
        if max(abs(dx), abs(dy)) < 0.08:
            names.append("still")
        elif abs(dx) > abs(dy):
            names.append("right" if dx > 0 else "left")
        else:
            names.append("down" if dy > 0 else "up")
    return names
