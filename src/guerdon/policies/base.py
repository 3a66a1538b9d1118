"""What every policy can do. Nothing above this floor asks for more, so that a method written against these
verbs trains a controller, a language model and an image generator alike."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories


class Policy(nn.Module, abc.ABC):
    """A policy takes steps and tells how likely they were.

    Attributes:
        kind: what it is ("categorical", "gaussian", "language", "diffusion", "consistency", ...).
        markov: whether the steps of a trajectory are independent given ``inputs["step"]``, so that they may
            be shuffled, selected and split into micro-batches. Tokens of a language model are not.
        event_reduction: how the log-densities of one step's components (pixels, action dimensions) are
            joined: summed, or averaged as published for image generators.
    """

    kind: ClassVar[str] = "policy"
    markov: ClassVar[bool] = True
    event_reduction: Literal["sum", "mean"] = "sum"

    @property
    def core(self) -> nn.Module:
        """The module that learns. Parts outside it (text encoder, VAE) stay as they are; LoRA goes in here."""
        return self

    def core_changed(self) -> None:
        """Called after the core's weights moved (an update, a load): forget what was computed from them."""

    @abc.abstractmethod
    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: object
    ) -> Trajectories:
        """Answer each prompt (or context) once, without gradient.

        Args:
            prompts: ``B`` prompts or names of contexts.
            seeds: ``int64 [B]``; all randomness of row ``i`` comes from ``seeds[i]`` (see `guerdon.randomness`).
            group: ``int64 [B]``, carried into the trajectories.
            options: settings of the sampler (``steps``, ``guidance``, ``temperature``, ...).
        """

    @abc.abstractmethod
    def distribution(self, traj: Trajectories) -> TensorDict:
        """The step distributions at the states of ``traj``, differentiable: a TensorDict ``[B, T]`` with
        ``logits [B, T, A]`` (categorical) or ``mean`` and ``std`` (Gaussian, ``[B, T, ...]``; ``std``
        broadcasts against ``mean``). `guerdon.objectives.divergence` reads these."""

    @abc.abstractmethod
    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        """``[B, T]`` float32 log-probability of the stored steps, differentiable, zero where masked.
        Pass the ``distribution`` if it is already at hand."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights and settings in the format of the policy's ecosystem."""
        raise NotImplementedError(f"{type(self).__name__} has no file format")


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """``values`` where ``mask``, exact zeros elsewhere (also where ``values`` is not finite)."""
    return torch.where(mask, values, 0.0)
