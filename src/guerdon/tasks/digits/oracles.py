"""The judge of handwritten digits: a small classifier whose weights are shipped."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.tasks.digits import world
from guerdon.tasks.shapes.oracles import Images, as_float

FIXTURE = Path(__file__).parent / "fixtures" / "reader"


class Reader(nn.Module):
    """Scores of the ten digits from a 16x16 picture of which only the brightness counts."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(2 * channels, 2 * channels, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(32 * channels, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """``[B, 3 or 1, 16, 16]`` in [-1, 1] to scores ``[B, 10]``."""
        return self.layers(pictures.mean(dim=1, keepdim=True))


@lru_cache(maxsize=1)
def _reader() -> Reader:
    return load_reader(FIXTURE)


def load_reader(directory: str | Path) -> Reader:
    """Read what `train_reader` wrote, frozen and in evaluation mode."""
    from safetensors.torch import load_file

    directory = Path(directory)
    model = Reader(json.loads((directory / "config.json").read_text())["channels"])
    model.load_state_dict(
        {key: value.float() for key, value in load_file(directory / "model.safetensors").items()}
    )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def probabilities(images: Images) -> np.ndarray:
    """``[B, 10]`` float32: how probable each digit is.

    ``images`` is uint8 ``[B, H, W, 3]`` or float ``[B, 3, H, W]`` in [-1, 1]; other sizes than 16x16 are
    resized.
    """
    pixels = as_float(images).cpu()
    if pixels.shape[-2:] != (16, 16):
        pixels = F.interpolate(pixels, (16, 16), mode="bilinear", antialias=True, align_corners=False)
    return _reader()(pixels).softmax(dim=1).numpy()


def read(images: Images) -> np.ndarray:
    """``[B]`` int64: the most probable digit."""
    return probabilities(images).argmax(axis=1).astype(np.int64)


def correct(images: Images, prompts: Sequence[str]) -> np.ndarray:
    """``[B]`` bool: whether a picture reads as the digit of its prompt (any, if the prompt names none)."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} pictures cannot be checked against {len(prompts)} prompts")
    wanted = world.labels(prompts)
    return (wanted < 0) | (read(images) == wanted)


def accuracy(images: Images, prompts: Sequence[str]) -> dict[str, float]:
    """``{"all": share of pictures that read as their prompt}``."""
    return {"all": float(correct(images, prompts).mean())}


def train_reader(directory: Path, steps: int = 3000, minutes: float | None = None, seed: int = 0) -> None:
    """Train the classifier on the training pictures (moved by up to a pixel, partly with noise), write it
    with its log and its accuracy on the test pictures."""
    from safetensors.torch import save_file

    from guerdon.tasks.fixtures import TrainingLog, write_quality

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    log = TrainingLog(directory)
    model = Reader().train()
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    start, running, done = time.monotonic(), 0.0, 0
    prompts = world.all_prompts()
    for step in range(steps):
        progress = step / steps
        if minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * (1 - 0.98 * progress)
        digits = rng.integers(10, size=128)
        pictures = torch.from_numpy(world.draw([prompts[digit] for digit in digits], rng))
        pictures = pictures + torch.randn_like(pictures) * 0.3 * torch.rand(len(pictures), 1, 1, 1)
        loss = F.cross_entropy(model(pictures), torch.from_numpy(digits), label_smoothing=0.02)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        done = step + 1
        running += max(0.02, 1 / done) * (loss.item() - running)
        if done % 500 == 0:
            log(f"step {done:5d}  loss {running:.4f}")
    wall = time.monotonic() - start
    save_file(
        {key: value.half() for key, value in model.state_dict().items()}, directory / "model.safetensors"
    )
    (directory / "model.safetensors").chmod(0o644)  # safetensors writes 0600
    config = {"kind": "reader", "channels": model.channels}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    model = load_reader(directory)
    figures = {}
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    for split in splits:
        shown, truth = world.load(split)
        answers = model(torch.from_numpy(shown)).argmax(dim=1).numpy()
        figures[split] = round(float((answers == truth).mean()), 4)
    log(
        "shipped weights, right: "
        + ", ".join(f"{name} {100 * value:.1f} %" for name, value in figures.items())
    )
    write_quality(directory, {"steps": done, "seconds": round(wall), "seed": seed, "right": figures})
