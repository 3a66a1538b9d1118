"""A tiny CLIP: pictures and captions in one 64-dimensional space.

A stand-in for the real thing in rewards, alignment scores and as frozen features. Trained by
``python -m guerdon.tasks.shapes.train clip``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.policies.denoiser import WordTokenizer
from guerdon.tasks.shapes.oracles import Images, as_float

if TYPE_CHECKING:
    from guerdon.tasks.fixtures import World

FIXTURE = Path(__file__).parent / "fixtures" / "clip"


@dataclass
class TinyCLIPConfig:
    """Shape of a `TinyCLIP`."""

    width: int = 64  # of the shared space
    channels: int = 32
    size: int = 16  # pictures of another size are resized to this


class TinyCLIP(nn.Module):
    """An image tower (four convolutions), a text tower (words, their places, two layers), and a temperature
    (Radford et al., 2021)."""

    def __init__(self, tokenizer: WordTokenizer, config: TinyCLIPConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyCLIPConfig()
        self.tokenizer = tokenizer
        c, width = config.channels, config.width
        self.image_tower = nn.Sequential(
            nn.Conv2d(3, c, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(c, 2 * c, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * c),
            nn.SiLU(),
            nn.Conv2d(2 * c, 2 * c, 3, stride=2, padding=1),
            nn.GroupNorm(8, 2 * c),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(2 * c * (config.size // 4) ** 2, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width),
        )
        # a caption's words are read where they stand: a word for a place may also name a direction
        self.words = nn.Embedding(len(tokenizer), width)
        self.places = nn.Parameter(0.1 * torch.randn(tokenizer.model_max_length, width))
        self.text_tower = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.text_head = nn.Sequential(nn.SiLU(), nn.Linear(width, width))
        self.log_temperature = nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))

    def encode_image(self, images: Images) -> Tensor:
        """Unit vectors ``[B, width]`` of pictures: uint8 ``[B, H, W, 3]`` or float ``[B, 3, H, W]``
        in [-1, 1].

        Gradients flow to float pictures that ask for them.
        """
        pixels = images if isinstance(images, Tensor) and images.requires_grad else as_float(images)
        pixels = pixels.to(self.places)
        if pixels.shape[-2:] != (self.config.size, self.config.size):
            size = (self.config.size, self.config.size)
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)
        return F.normalize(self.image_tower(pixels), dim=-1)

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors ``[B, width]`` of prompts."""
        ids = torch.as_tensor(self.tokenizer(list(prompts)).input_ids, device=self.places.device)
        real = (ids != self.tokenizer.pad_token_id)[..., None]
        words = self.text_tower(self.words(ids) + self.places) * real
        return F.normalize(self.text_head(words.sum(dim=1)), dim=-1)

    def similarity(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Cosine of each picture with its own prompt, ``[B]`` in [-1, 1]."""
        return (self.encode_image(images) * self.encode_text(prompts)).sum(dim=-1)

    def save(self, directory: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (half precision)."""
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {"kind": "clip", "clip": asdict(self.config), "tokenizer": self.tokenizer.to_dict()}
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        weights = {
            key: value.detach().to("cpu", torch.float16).contiguous()
            for key, value in self.state_dict().items()
        }
        save_file(weights, directory / "model.safetensors")
        (directory / "model.safetensors").chmod(0o644)  # safetensors writes 0600

    @classmethod
    def load(cls, directory: str | Path = FIXTURE, device: str | torch.device = "cpu") -> TinyCLIP:
        """Read what `save` wrote (by default the shipped model), frozen, in evaluation mode."""
        from safetensors.torch import load_file

        directory = Path(directory)
        config: dict[str, Any] = json.loads((directory / "config.json").read_text())
        model = cls(WordTokenizer.from_dict(config["tokenizer"]), TinyCLIPConfig(**config["clip"]))
        model.load_state_dict(
            {key: w.float() for key, w in load_file(directory / "model.safetensors").items()}
        )
        return model.to(device).eval().requires_grad_(False)


def train_clip(
    world: World,
    directory: Path,
    steps: int = 1500,
    minutes: float | None = None,
    seed: int = 0,
    noise: float = 0.2,
) -> None:
    """Train a `TinyCLIP` on a world's pictures and write it with its log and its measured quality.

    It is a judge, so it sees every prompt, also those held out from the generators; a quarter of the batches
    comes from ``world.draw``, partial captions included. Half of the pictures get white noise of a standard
    deviation up to ``noise``, so that it can judge imperfect ones. Measured: how often a new picture of a
    prompt is nearest to that very prompt among all of the world's prompts.
    """
    from guerdon.tasks.fixtures import TrainingLog, write_quality

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 2)
    log = TrainingLog(directory)
    batch, peak = 256, 2e-3
    model = TinyCLIP(world.tokenizer)
    every = [prompt for prompts in world.prompts.values() for prompt in prompts]
    optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    count = sum(weight.numel() for weight in model.parameters())
    log(f"clip: {count / 1e6:.2f} M parameters, batch {batch}, at most {steps} steps, seed {seed}")
    start, running, done = time.monotonic(), 0.0, 0
    for step in range(steps):
        progress = step / steps
        if minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            break
        for group in optimiser.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50) * (1 - 0.98 * progress)
        if step % 4 == 0:
            pictures, prompts = world.draw(batch, rng)
        else:
            prompts = [every[at] for at in rng.integers(len(every), size=batch)]
            pictures = world.show(prompts, rng)
        images = torch.from_numpy(pictures)
        images = images + torch.randn_like(images) * noise * torch.rand(batch, 1, 1, 1) * (
            torch.rand(batch, 1, 1, 1) < 0.5
        )
        scores = (
            model.encode_image(images)
            @ model.encode_text(prompts).T
            * model.log_temperature.clamp(max=4.6).exp()
        )
        # equal prompts in one batch are all right answers: each shares the target evenly
        numbers = {text: number for number, text in enumerate(dict.fromkeys(prompts))}
        label = torch.tensor([numbers[text] for text in prompts])
        same = (label[:, None] == label[None]).float()
        same = same / same.sum(dim=1, keepdim=True)
        loss = (
            -(same * scores.log_softmax(1)).sum(1).mean() / 2
            - (same * scores.T.log_softmax(1)).sum(1).mean() / 2
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        done = step + 1
        running += max(0.02, 1 / done) * (loss.item() - running)
        if done % 100 == 0:
            log(f"step {done:5d}  loss {running:.4f}")

    wall = time.monotonic() - start
    model.save(directory)
    model = TinyCLIP.load(directory)
    figures = {
        name: round(own_first(model, prompts, every, world), 4)
        for name, prompts in world.prompts.items()
        if prompts
    }
    log(
        "shipped weights, own caption ranked first: "
        + ", ".join(f"{n} {100 * v:.1f} %" for n, v in figures.items())
    )
    write_quality(
        directory, {"steps": done, "seconds": round(wall), "seed": seed, "own caption first": figures}
    )


@torch.no_grad()
def own_first(
    model: TinyCLIP, prompts: Sequence[str], every: Sequence[str], world: World, seed: int = 99
) -> float:
    """Share of pictures of ``prompts`` (at least 900) whose nearest prompt among ``every`` is their own."""
    wanted = list(prompts) * -(-900 // len(prompts))
    pictures = torch.from_numpy(world.show(wanted, np.random.default_rng(seed)))
    nearest = (model.encode_image(pictures) @ model.encode_text(every).T).argmax(dim=1)
    return float(np.mean([every[at] == text for at, text in zip(nearest.tolist(), wanted, strict=True)]))
