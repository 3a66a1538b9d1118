"""Experience of an image generator: prompts denoised into pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import DataError
from guerdon.experience.prompts import Prompted, Prompts

_TRAJECTORIES = "trajectories.safetensors"
_INDEX = "images.jsonl"


class Denoisings(Prompted):
    """Denoising trajectories for drawn prompts.

    Args:
        prompts, group_size, seed: see `Prompted`.
        shared_noise: the answers of a group start from the same initial latent and differ only by the noise
            of their steps, as D3PO compares them (Yang et al., 2024); in PRDP it makes the unknown
            normaliser of a pair cancel exactly.
    """

    def __init__(
        self,
        prompts: Prompts | Sequence[str],
        group_size: int = 1,
        shared_noise: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(prompts, group_size, seed)
        self.shared_noise = shared_noise

    def _options(self, seeds: Tensor, group_size: int) -> dict[str, Any]:
        if not self.shared_noise:
            return {}
        first = seeds.view(-1, group_size)[:, :1]
        return {"initial_seeds": first.expand(-1, group_size).reshape(-1)}


def save(traj: Trajectories, folder: str | Path) -> None:
    """Write trajectories for people to judge and for training later: every latent in one safetensors file,
    the pictures as PNG, and ``images.jsonl`` with a row (``image``, ``prompt``, ``group``) for each."""
    from PIL import Image

    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    groups = traj.group.tolist() if traj.group is not None else range(traj.batch_size[0])
    rows = []
    for number, (pixels, prompt, group) in enumerate(
        zip(_arrays(traj.images), traj.prompts, groups, strict=True)
    ):
        name = f"images/{number:05d}.png"
        Image.fromarray(pixels).save(folder / name)
        rows.append({"image": name, "prompt": prompt, "group": group})
    traj.save_file(folder / _TRAJECTORIES)
    index = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / _INDEX).write_text(index, encoding="utf-8")


def load(folder: str | Path) -> Trajectories:
    """The trajectories that `save` wrote: the same latents, so the same log-probabilities.
    Raises `DataError` when there are none."""
    path = Path(folder) / _TRAJECTORIES
    if not path.is_file():
        raise DataError(f"{folder}: holds no {_TRAJECTORIES}; expected a folder of saved trajectories")
    return Trajectories.load_file(path)


def _arrays(images: Tensor) -> np.ndarray:
    return images.cpu().numpy()
