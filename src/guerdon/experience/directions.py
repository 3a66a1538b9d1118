"""Directions in reward space: drawing them, writing them into prompts, reading them back (Wang et al., 2024, DPA).

A user is a unit vector ``v``: how much each objective counts, with negative numbers for what is not wanted. The prompt
says it in whole numbers, "helpfulness*97 + verbosity*-26".
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.batch import Trajectories, encode_text
from guerdon.errors import DataError, ShapeError, UsageError
from guerdon.experience.prompts import Prompted
from guerdon.randomness import row_seeds

SYSTEM = "You are a helpful assistant. Your response should maximize weighted rating = {rating}."
PLACE = "{direction}"  # in a prompt: where the direction is to stand


def at_angles(degrees: Sequence[float] | Tensor) -> Float[Tensor, "angle 2"]:
    """Unit vectors of the plane, ``(cos a, sin a)``: 0 is the first objective alone, 45 both alike, -45 the first
    against the second."""
    angle = torch.as_tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=-1).float()


@dataclass(frozen=True)
class DirectionSampler:
    """Unit vectors, uniform on the part of the sphere around a centre.

    Args:
        size: k, the number of objectives, at least 2.
        spread: degrees from the centre to the edge, 0 to 180; of two objectives, angles reach that far either way.
        centre: degrees from the first axis towards the second, where the centre lies. Components may be negative.
    """

    size: int = 2
    spread: float = 45.0
    centre: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 2:
            raise UsageError(f"a direction among {self.size} objectives says nothing; give at least 2")
        if not 0 <= self.spread <= 180:
            raise UsageError(f"directions spread {self.spread} degrees; expected 0 to 180")

    def draw(
        self, rows: int, each: int, generator: torch.Generator | None = None
    ) -> Float[Tensor, "row each objective"]:
        """``[rows, each, k]``. The directions of a row are spread: of two objectives one lies in each of ``each`` equal
        parts of the range of angles, of more one in each of as many equally likely distances from the centre."""
        place = torch.rand(rows, each, generator=generator, dtype=torch.float64)
        place = (place + torch.arange(each)) / each
        if self.size == 2:
            return at_angles(self.centre + self.spread * (2 * place - 1))
        angle = self._distance(place)[..., None]
        around = torch.randn(rows, each, self.size - 1, generator=generator, dtype=torch.float64)
        around = around / around.norm(dim=-1, keepdim=True)
        # the cap around the first axis, turned in the plane of the first two
        vector = torch.cat([angle.cos(), angle.sin() * around], dim=-1)
        turn = math.radians(self.centre)
        first, second = vector[..., 0].clone(), vector[..., 1].clone()
        vector[..., 0] = math.cos(turn) * first - math.sin(turn) * second
        vector[..., 1] = math.sin(turn) * first + math.cos(turn) * second
        return vector.float()

    def _distance(self, place: Tensor) -> Tensor:
        """Angles from the centre whose share of the cap is ``place``: on a sphere of k - 1 dimensions the ring at angle t
        has area in proportion to ``sin(t)^(k - 2)``."""
        angle = torch.linspace(0, math.radians(self.spread), 4097, dtype=torch.float64)
        ring = angle.sin().clamp(min=0) ** (self.size - 2)
        area = torch.cat([ring.new_zeros(1), ((ring[1:] + ring[:-1]) / 2).cumsum(0)])
        if area[-1] == 0:
            return torch.zeros_like(place)
        area = area / area[-1]
        right = torch.searchsorted(area, place.contiguous()).clamp(1, len(area) - 1)
        inside = (place - area[right - 1]) / (area[right] - area[right - 1]).clamp(min=1e-300)
        return angle[right - 1] + inside * (angle[1] - angle[0])


@dataclass(frozen=True)
class DirectionalPrompt:
    """Writes a direction into a prompt, and reads it.

    Args:
        names: of the k objectives, in the order of a direction's components.
        system: what is said, with ``{rating}`` where the weighted sum stands.

    The text takes the place of ``{direction}`` in a prompt that has it (in the system message of a rendered
    conversation, say), and otherwise stands before the prompt, on a line of its own.
    """

    names: tuple[str, ...] = ("helpfulness", "verbosity")
    system: str = SYSTEM

    def __post_init__(self) -> None:
        if "{rating}" not in self.system:
            raise UsageError(
                "the system text must hold {rating}, the place where the weighted sum is written"
            )
        if not all(re.fullmatch(r"[\w-]+", name) for name in self.names):
            raise UsageError(f"names of objectives are single words, not {', '.join(map(repr, self.names))}")

    def rating(self, direction: Tensor | Sequence[float]) -> str:
        """A direction in whole hundredths: "helpfulness*97 + verbosity*-26". Raises `ShapeError` unless it has a
        component for each name, and unit length."""
        v = torch.as_tensor(direction, dtype=torch.float64)
        if v.shape != (len(self.names),) or abs(v.norm().item() - 1) > 1e-3:
            raise ShapeError(
                f"a direction is a unit vector of {len(self.names)} numbers, not {[round(x, 3) for x in v.tolist()]}"
            )
        hundredths = (100 * v).round().long().tolist()
        return " + ".join(f"{name}*{w}" for name, w in zip(self.names, hundredths, strict=True))

    def write(self, prompt: str, direction: Tensor | Sequence[float]) -> str:
        """The prompt with the direction in it."""
        text = self.system.replace("{rating}", self.rating(direction))
        return prompt.replace(PLACE, text) if PLACE in prompt else f"{text}\n{prompt}"

    def plain(self, prompt: str) -> str:
        """The prompt as it is for nobody in particular: without a place for the direction."""
        return prompt.replace(PLACE, "")

    def read(self, text: str) -> Float[Tensor, " objective"]:
        """The direction in a text, brought back to unit length (rounding takes it off a little). Raises `DataError` where
        there is none."""
        pattern = r"\s*\+\s*".join(rf"{re.escape(name)}\s*\*\s*(-?\d+)" for name in self.names)
        found = re.search(rf"(?<![\w-]){pattern}", text)
        v = torch.tensor([float(w) for w in found.groups()] if found else [0.0])
        if not v.any():
            raise DataError(
                f"no direction in {text[:80]!r}; expected something like {' + '.join(n + '*71' for n in self.names)}"
            )
        return v / v.norm()


def reprompted(policy: Any, traj: Trajectories, prompts: Sequence[str]) -> Trajectories:
    """The same answers, token by token, behind other prompts: recorded trajectories (temperature 1, behaviour
    unknown) for a policy to learn from or a judge to read. Group and version stay."""
    if len(prompts) != len(traj):
        raise ShapeError(f"{len(prompts)} prompts for {len(traj)} answers; give each answer one")
    token = traj.inputs["step", "token"]
    answers = [row[real].tolist() for row, real in zip(token.cpu(), traj.mask.cpu(), strict=True)]
    known = {prompt: policy.tokens(prompt) for prompt in dict.fromkeys(prompts)}
    other = policy.collate([known[prompt] for prompt in prompts], answers)
    outputs = None if traj.outputs is None else traj.outputs.clone(False).to(token.device)
    if outputs is not None:
        outputs["prompt"] = encode_text(list(prompts)).to(token.device)
    return other.with_(outputs=outputs, group=traj.group, version=traj.version)


def answer_prompts(
    experience: Prompted, actor: Any, texts: Sequence[str], places: Sequence[int], **options: Any
) -> Trajectories:
    """Answers to ``texts``, which were made of the prompts at ``places`` of the experience's list. Noise and cursor are
    the experience's, as in `Prompted.collect`."""
    seeds = row_seeds(experience.seed, experience.rows, len(texts))
    experience.rows += len(texts)
    return actor.sample(texts, seeds, group=torch.tensor(places, dtype=torch.int64), **options)


def objective_weights(text: str, objectives: int, outputs: int) -> Float[Tensor, "output objective"]:
    """How the outputs of a reward model make up objectives: "0,1,5;4" averages three for the first and takes one for the
    second; "" takes one each, in order. Raises `UsageError` where that does not fit ``outputs`` and ``objectives``."""
    if not text and outputs == objectives:
        return torch.eye(outputs)
    parts = [
        [int(i) if i.strip().isdecimal() else outputs for i in part.split(",")] for part in text.split(";")
    ]
    if len(parts) != objectives or any(max(part) >= outputs for part in parts):
        raise UsageError(
            f"the reward model has {outputs} outputs, there are {objectives} objectives, and outputs is '{text}'; name the "
            "outputs of each, as in '0,1,5;4'"
        )
    table = torch.zeros(outputs, objectives)
    for objective, part in enumerate(parts):
        table[part, objective] = 1 / len(part)
    return table
