"""Handwritten digits as a task: real data through the same code as ShapesWorld."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from guerdon.tasks.digits import oracles, world
from guerdon.tasks.images import ImageTask
from guerdon.tasks.shapes.task import Shapes


class Digits(ImageTask):
    """Handwritten digits from prompts such as "a handwritten seven"."""

    name: ClassVar[str] = "digits"
    summary: ClassVar[str] = "text to image: handwritten digits from prompts such as 'a handwritten seven'"
    fixtures: ClassVar[Path] = Path(__file__).parent / "fixtures"
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = Shapes.recipes

    def training_prompts(self) -> list[str]:
        return world.all_prompts()

    def held_out_prompts(self) -> list[str]:
        return []

    def clip(self) -> Any:
        from guerdon.tasks.shapes.clip import TinyCLIP

        return TinyCLIP.load(self.fixtures / "clip")

    def correct(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        return oracles.correct(images, prompts)
