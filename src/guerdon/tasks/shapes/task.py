"""ShapesWorld as a task: a tiny text-to-image model learns from any reward of its pictures."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from guerdon.tasks.images import ImageTask
from guerdon.tasks.shapes import oracles, world


class Shapes(ImageTask):
    """Coloured shapes from captions such as "a large red circle at the top on a white background"."""

    name: ClassVar[str] = "shapes"
    summary: ClassVar[str] = "text to image: coloured shapes from captions such as 'a large red circle ...'"
    fixtures: ClassVar[Path] = Path(__file__).parent / "fixtures"
    # tuned for two CPU cores and 16x16 pictures; the published values are for 512x512 on several GPUs
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "rlcm": {
            "rounds": 120,
            "samples": 64,
            "steps": 4,
            "guidance": 3.0,
            "update_batch": 16,
            "lr": 1e-4,
            "lora_rank": 8,
            "lora_alpha": 8.0,
            "buffer_size": 32,
        },
        "ddpo": {
            "rounds": 20,
            "samples": 64,
            "steps": 20,
            "guidance": 3.0,
            "update_batch": 16,
            "lr": 1e-3,
            "lora_rank": 8,
            "lora_alpha": 8.0,
            "max_grad_norm": 5.0,
            "advantage_clamp": 10.0,
        },
        "reinforce": {"rounds": 60, "samples": 64, "lr": 3e-4},
        "ppo": {
            "rounds": 40,
            "samples": 64,
            "epochs": 1,
            "minibatch": 16,
            "clip": 1e-3,
            "lr": 1e-3,
            "lora_rank": 8,
        },
        "grpo": {
            "rounds": 40,
            "prompts_per_round": 8,
            "group_size": 8,
            "minibatch": 16,
            "clip": 1e-3,
            "kl": 0.0,
            "lr": 1e-3,
            "lora_rank": 8,
        },
        "rebel": {
            "rounds": 40,
            "prompts_per_round": 32,
            "minibatch": 8,
            "eta": 1.0,
            "lr": 1e-3,
            "lora_rank": 8,
        },
    }

    def training_prompts(self) -> list[str]:
        """Forty captions, the same ones always."""
        return list(_choice(tuple(world.training_captions()), 40))

    def held_out_prompts(self) -> list[str]:
        """Captions whose pairs of colour and shape the models never saw."""
        return list(_choice(tuple(world.held_out_captions()), 64))

    def correct(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return oracles.correct(images, prompts)

    @functools.cached_property
    def _clip(self) -> Any:
        from guerdon.tasks.shapes.clip import TinyCLIP

        return TinyCLIP.load()

    def clip(self) -> Any:
        return self._clip


@functools.cache
def _choice(captions: tuple[str, ...], count: int) -> tuple[str, ...]:
    order = np.random.default_rng(0).permutation(len(captions))
    return tuple(captions[i] for i in order[:count])
