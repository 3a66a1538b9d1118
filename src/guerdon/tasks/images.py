"""What the text-to-image tasks share: models, prompts, rewards, measuring and the report.

A task gives its fixtures, its prompts and an oracle that tells whether a picture shows what was asked for.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from guerdon.batch import Trajectories
from guerdon.critics.state import DenoisingCritic
from guerdon.errors import DataError, UsageError
from guerdon.experience.denoisings import Denoisings
from guerdon.experience.prompts import Prompted, Prompts, read_prompts
from guerdon.feedback.base import Feedback
from guerdon.feedback.functions import (
    IMAGE_REWARDS,
    Aesthetic,
    Alignment,
    FunctionReward,
    clip_from_pretrained,
    parse_reward,
)
from guerdon.policies.base import Policy
from guerdon.policies.denoising import DenoisingPolicy
from guerdon.policies.pretrained import load_policy
from guerdon.randomness import row_seeds
from guerdon.roles import Role
from guerdon.tasks.base import Measured, Task

# Seeds of the samples on which success is measured: the same before and after, apart from training's.
_MEASURE_SEED, _HELD_OUT_SEED = 1_000_003, 1_000_033


class ImageTask(Task, abc.ABC):
    """A text-to-image task with shipped models."""

    kinds: ClassVar[tuple[str, ...]] = ("consistency", "diffusion")
    fixtures: ClassVar[Path]
    default_reward: ClassVar[str] = "compressibility"
    shown: ClassVar[int] = 8  # pictures in the report

    # -- what a task says of itself ------------------------------------------------------------------------

    @abc.abstractmethod
    def training_prompts(self) -> list[str]:
        """The prompts of the task's own training."""

    @abc.abstractmethod
    def held_out_prompts(self) -> list[str]:
        """Prompts that training does not see (may be empty)."""

    @abc.abstractmethod
    def correct(self, images: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
        """``[B]`` bool: does the picture show what its prompt says? Raises `ValueError` for a prompt that
        this world cannot judge."""

    def clip(self) -> Any:
        """The shipped tiny CLIP. Raises `UsageError` if the task has none."""
        raise UsageError(f"task '{self.name}' ships no CLIP; use --reward alignment=PATH_OR_HUB_NAME")

    # -- the seam ------------------------------------------------------------------------------------------

    def prompts(self) -> list[str]:
        """The user's prompts or the task's own."""
        return read_prompts(self.pieces.prompts) if self.pieces.prompts else self.training_prompts()

    def policy(self, kind: str) -> Policy:
        """The shipped model of this kind, or the user's. Raises `UsageError` for a model of another kind."""
        if self.pieces.model is not None:
            return load_policy(self.pieces.model)
        return load_policy(self.fixtures / kind)

    def critic(self, policy: Policy) -> nn.Module:
        """A small convolutional critic of noisy images."""
        assert isinstance(policy, DenoisingPolicy)
        width = policy.encode([""]).shape[-1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return DenoisingCritic(policy.latent_shape[0], width)

    def experience(self, seed: int) -> Prompted:
        return Denoisings(Prompts(self.prompts(), seed=seed), seed=seed)

    def feedback(self) -> Feedback:
        known: dict[str, Any] = {
            name: lambda _=None, f=function, n=name: FunctionReward(f, n)
            for name, function in IMAGE_REWARDS.items()
        }
        known["alignment"] = lambda name=None: Alignment(clip_from_pretrained(name) if name else self.clip())
        known["aesthetic"] = self._aesthetic
        known["accuracy"] = lambda _=None: FunctionReward(self._accuracy, "accuracy")
        return parse_reward(self.pieces.reward or self.default_reward, known)

    @staticmethod
    def _aesthetic(argument: str | None = None) -> Feedback:
        if not argument:
            raise UsageError(
                "the aesthetic reward needs its weights: --reward aesthetic=HEAD.safetensors[,CLIP]"
            )
        head, _, clip = argument.partition(",")
        return Aesthetic(head, clip) if clip else Aesthetic(head)

    def _accuracy(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        return self.correct(images, prompts).astype(np.float32)

    def sampling(self, method: Any) -> dict[str, Any]:
        """The method's own sampling settings, where it has them."""
        return {key: getattr(method, key) for key in ("steps", "guidance") if hasattr(method, key)}

    def monitor(self, traj: Trajectories) -> dict[str, float]:
        """Prompt accuracy by the oracle, where it can judge the prompts."""
        try:
            right = self.correct(traj.images.cpu().numpy(), traj.prompts)
        except (ValueError, DataError):
            return {}
        return {"accuracy": float(right.mean())}

    def measure(self, actor: Role, feedback: Feedback, **sampling: Any) -> Measured:
        """Reward (mean and spread) and prompt accuracy on 256 fresh samples of the training prompts and 64 of
        the held-out ones; 16 samples for a model of the user's, whose images may be large."""
        own = self.pieces.model is not None
        prompts = _cycle(self.prompts(), 16 if own else 256)
        figures, samples = self._measured(actor, feedback, prompts, _MEASURE_SEED, sampling)
        held_out = [] if own or self.pieces.prompts else self.held_out_prompts()
        if held_out:
            unseen, _ = self._measured(actor, feedback, _cycle(held_out, 64), _HELD_OUT_SEED, sampling)
            figures["reward_unseen_prompts"] = unseen["reward"]
            if "accuracy" in unseen:
                figures["accuracy_unseen_prompts"] = unseen["accuracy"]
        return Measured(figures, samples)

    def _measured(
        self, actor: Role, feedback: Feedback, prompts: list[str], seed: int, sampling: dict[str, Any]
    ) -> tuple[dict[str, float], Trajectories]:
        traj = actor.sample(prompts, row_seeds(seed, 0, len(prompts)), **sampling)
        scores = feedback.score(traj)
        figures = {"reward": scores.mean().item(), "reward_std": scores.std().item()}
        return {**figures, **self.monitor(traj)}, traj.judged(scores)

    def report(
        self, before: Measured, after: Measured, folder: Any, records: list[dict[str, Any]]
    ) -> list[str]:
        """``before_after.png``: the same prompts and noise."""
        from guerdon.evaluation.pictures import grid

        folder = Path(folder)
        assert before.samples is not None
        assert after.samples is not None
        rows = self._distinct(before.samples)
        prompts = [before.samples.prompts[i] for i in rows]
        notes = [
            [f"{score:.3g}" for score in m.samples.score()[rows].tolist()]
            for m in (before, after)
            if m.samples is not None
        ]
        picture = grid(
            [before.samples.images[rows].cpu(), after.samples.images[rows].cpu()],
            labels=["before", "after"],
            captions=prompts,
            notes=notes,
        )
        picture.save(folder / "before_after.png")
        return [str(folder / "before_after.png")]

    def _distinct(self, traj: Trajectories) -> list[int]:
        """Rows with different prompts, for the report."""
        seen: dict[str, int] = {}
        for row, prompt in enumerate(traj.prompts):
            seen.setdefault(prompt, row)
        return list(seen.values())[: self.shown]


def _cycle(prompts: Sequence[str], count: int) -> list[str]:
    """``count`` prompts, each as often as the next."""
    return [prompts[i % len(prompts)] for i in range(count)]
