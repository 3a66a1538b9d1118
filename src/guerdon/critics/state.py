"""State-value critics: ``value(traj) -> [B, T]``, the expected return from the state before each step."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.critics.heads import ValueHead
from guerdon.policies.base import masked
from guerdon.policies.features import Features, orthogonal
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.matmul import fast_linears
from guerdon.policies.shared_prompts import answer_states


class TableCritic(nn.Module):
    """One value a context, for `CategoricalTable`."""

    def __init__(self, contexts: Sequence[str]) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(len(contexts)))

    def value(self, traj: Trajectories) -> Tensor:
        """``[B, T]``."""
        return masked(self.values[traj.inputs["step", "context"]], traj.mask)


class LanguageCritic(nn.Module):
    """A copy of a language model's backbone with a scalar head on the state before each token.

    The head starts at zero, so the first values are zero and the first advantages are the returns.
    """

    def __init__(self, policy: LanguagePolicy) -> None:
        super().__init__()
        self.backbone = fast_linears(copy.deepcopy(policy.model.base_model))  # type: ignore[arg-type]
        self.head = nn.Linear(policy.model.config.hidden_size, 1)  # type: ignore[union-attr,arg-type]
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def value(self, traj: Trajectories) -> Tensor:
        """``[B, T]``."""
        inputs = traj.inputs
        parts = inputs["prompt_token"], inputs["prompt_mask"], inputs["step", "token"], traj.mask
        states = answer_states(self.backbone, *parts)
        return masked(self.head(states).squeeze(-1).float(), traj.mask)


class DenoisingCritic(nn.Module):
    """A small convolutional critic of noisy images: it sees the latent, its timestep and the caption.

    Args:
        channels: of the latent.
        condition: width of the caption's embedding (averaged over its tokens).
        width: channels of the first convolution.
    """

    def __init__(self, channels: int = 3, condition: int = 64, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.context = nn.Sequential(
            nn.Linear(condition + 2 * width, 128), nn.SiLU(), nn.Linear(128, 2 * (width + 2 * width))
        )
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, 2 * width)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(2 * width, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def value(self, traj: Trajectories) -> Tensor:
        """``[B, T]``."""
        step = traj.inputs["step"]
        state, (rows, steps) = step["state"], traj.mask.shape
        frequency = torch.exp(-math.log(1e4) * torch.arange(self.width, device=state.device) / self.width)
        angle = step["timestep"].reshape(-1, 1).float() * frequency
        caption = traj.inputs["condition"].mean(1).repeat_interleave(steps, 0)
        context = self.context(torch.cat([caption, angle.sin(), angle.cos()], dim=1))
        scale1, shift1, scale2, shift2 = context.split([self.width] * 2 + [2 * self.width] * 2, dim=1)
        hidden = self.norm1(self.first(state.reshape(rows * steps, *state.shape[2:])))
        hidden = nn.functional.silu(hidden * (1 + scale1[..., None, None]) + shift1[..., None, None])
        hidden = self.norm2(self.second(hidden))
        hidden = nn.functional.silu(hidden * (1 + scale2[..., None, None]) + shift2[..., None, None])
        hidden = nn.functional.silu(self.third(hidden)).mean((2, 3))
        return masked(self.head(hidden).reshape(rows, steps), traj.mask)


class StateCritic(nn.Module):
    """Values of observations, for controllers.

    Args:
        features: from observations to feature vectors.
        head: kind of value head (`ValueHead`), with ``options`` for it.
        init: ``"orthogonal"`` (PPO's: gain sqrt 2, head 1) or ``"default"`` (PyTorch's).
    """

    def __init__(
        self,
        features: Features,
        head: str = "mse",
        init: Literal["orthogonal", "default"] = "orthogonal",
        **options: Any,
    ) -> None:
        super().__init__()
        self.features = features
        self.head = ValueHead(features.width, 1, head, **options)  # type: ignore[arg-type]
        if init == "orthogonal":
            orthogonal(features)
            if head == "mse":
                nn.init.orthogonal_(self.head.weight[0], 1.0)
                nn.init.zeros_(self.head.bias)

    def raw(self, observation: Any) -> Tensor:
        """What the head puts out for observations ``[...]``: ``[...]``, or ``[..., bins]``."""
        return self.head.select(self.head(self.features(observation)), 0)

    def values(self, observation: Any) -> Tensor:
        """``[...]``, the values of observations."""
        return self.head.mean(self.raw(observation))

    def value(self, traj: Trajectories) -> Tensor:
        """``[B, T]``."""
        return masked(self.values(traj.inputs["step", "observation"]), traj.mask)

    def losses(self, traj: Trajectories, target: Tensor) -> Tensor:
        """``[B, T]``, the head's loss of each step's value against ``target``."""
        return masked(self.head.loss(self.raw(traj.inputs["step", "observation"]), target), traj.mask)

    def next_value(self, traj: Trajectories) -> Tensor:
        """``[B, T]``, the value of the state after each step: the next column, or where an episode or the row
        ended, that of ``inputs["final"]``. Meaningless (and unread) where a step terminated."""
        value = traj.value if traj.value is not None else self.value(traj)
        following = torch.zeros_like(value)
        following[:, :-1] = value[:, 1:]
        final = traj.inputs["final"]
        at, used = final["step"].clamp(min=0), final["step"] >= 0
        cut = self.values(final["observation"])
        rows = torch.arange(len(at), device=at.device)[:, None].expand_as(at)
        return following.index_put((rows[used], at[used]), cut[used])
