"""Intrinsic rewards: what an observation is worth because it is new.

`RNDBonus` is random network distillation (Burda et al., 2019, arXiv 1810.12894): a predictor learns what a random,
never trained network says about the observations met so far; where it still errs, few have been met. It judges
observations, not trajectories, so it serves rollouts and replays alike:

    bonus.observe(following)            # statistics of observations: once a rollout, before use
    reward = bonus.reward(following)    # [B, T]: with what the predictor knows now, and no more changed afterwards
    ...                                 # learn from it
    bonus.learn(following, ...)         # then the predictor sees the same observations
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.batch import Batch, Trajectories
from guerdon.errors import ShapeError, UsageError, nearest
from guerdon.normalise import ScaleReward
from guerdon.objectives.base import Metrics
from guerdon.policies.features import Entry, Features, Scaler, orthogonal
from guerdon.roles import Role

Control = Literal["none", "shuffled", "noise"]
CLIP = 5.0  # normalised observations are cut to plus or minus this, as published


class IntrinsicReward(Protocol):
    """A judge of how new observations are, which learns from what it has judged."""

    def observe(self, observation: Tensor) -> None:
        """Take observations ``[..., D]`` into its statistics."""
        ...

    def reward(self, following: Tensor) -> Tensor:
        """``[B, T]`` normalised rewards of steps, from the observations ``[B, T, D]`` that followed them."""
        ...

    def at(self, following: Tensor) -> Tensor:
        """``[...]`` rewards of any observations ``[..., D]`` (a replay's), on the scale that `reward` has found."""
        ...

    def learn(self, following: Tensor, **settings: Any) -> Metrics:
        """Make observations ``[..., D]`` less new."""
        ...


class Sights(Batch):
    """``N`` observations for a predictor: ``observation [N, D]``, and ``kept [N]`` bool, which of them count."""

    observation: Tensor
    kept: Tensor


class RandomNetwork(nn.Module):
    """A random network that never trains, a predictor of it, one layer deeper, and the statistics by which both see
    their observations: each entry normalised by its own mean and deviation and cut to plus or minus 5.

    The random network's weights are buffers. So no optimiser can reach them, and every checkpoint has them.

    Args:
        size: entries of an observation.
        hidden: widths of the random network's hidden layers; the predictor has the last once more.
        embedding: numbers that the random network gives.
    """

    def __init__(self, size: int, hidden: Sequence[int] = (128, 128), embedding: int = 64) -> None:
        super().__init__()
        deeper = (*hidden, hidden[-1])
        self.features = Features({"": Entry((size,))}, deeper, "leaky_relu", scaler=Scaler(size, CLIP))
        self.head = nn.Linear(deeper[-1], embedding)
        orthogonal(self)
        self.depth = len(hidden) + 1
        for i, (inputs, outputs) in enumerate(zip((size, *hidden), (*hidden, embedding), strict=True)):
            weight = nn.init.orthogonal_(torch.empty(outputs, inputs), math.sqrt(2))
            self.register_buffer(f"target_weight{i}", weight)
            self.register_buffer(f"target_bias{i}", torch.zeros(outputs))

    def target(self, observation: Tensor) -> Tensor:
        """``[..., embedding]``, what the random network says about observations ``[..., size]``."""
        assert self.features.scaler is not None
        hidden = self.features.scaler(observation)
        for i in range(self.depth):
            hidden = F.linear(hidden, getattr(self, f"target_weight{i}"), getattr(self, f"target_bias{i}"))
            if i + 1 < self.depth:
                hidden = F.leaky_relu(hidden)
        return hidden

    def forward(self, observation: Tensor) -> Tensor:
        """``[...]``: the squared distance of prediction and target for observations ``[..., size]``; gradients reach
        the predictor alone."""
        with torch.no_grad():
            target = self.target(observation)
        return (self.head(self.features(observation)) - target).square().sum(-1)


@dataclass
class Distil:
    """The predictor's objective: its mean squared distance from the random network over the `Sights` that are kept
    (Burda et al., 2019, section 2.2). Metrics: ``loss``."""

    def weight(self, batch: Sights) -> Tensor:
        """How many are kept."""
        return batch.kept.sum()

    def __call__(self, model: RandomNetwork, batch: Sights) -> tuple[Tensor, Metrics]:
        kept = batch.kept.float()
        loss = (model(batch.observation) * kept).sum() / kept.sum().clamp(min=1.0)
        return loss, {"loss": loss.detach()}


class RNDBonus:
    """Random network distillation as a reward.

    Rewards are divided by the running deviation of their discounted sum, which runs on across the ends of episodes
    and of rollouts. They are not centred: all are positive.

    Args:
        role: holds a `RandomNetwork`.
        n: environments whose steps are judged side by side.
        gamma: discount of that sum.
        columns: first and past-the-last entry of the observation that are judged; None judges all. Leave out what
            never repeats (clocks, noise, things that move by themselves): it would look new for ever.
        control: what an honest comparison needs: ``"shuffled"`` deals the rewards of a rollout out to its steps at
            random, ``"noise"`` pays squared normal numbers. Both are scaled as the real bonus is.
        generator: of the controls' randomness.

    Raises `UsageError` for a control that does not exist or columns that do not fit the network.
    """

    name = "rnd"

    def __init__(
        self,
        role: Role,
        n: int,
        gamma: float = 0.99,
        columns: tuple[int, int] | None = None,
        control: Control = "none",
        generator: torch.Generator | None = None,
    ) -> None:
        if control not in get_args(Control):
            raise UsageError(f"RNDBonus: control is '{control}'; {nearest(control, get_args(Control))}")
        size = role.model.features.vectors  # type: ignore[union-attr]
        if columns is not None and columns[1] - columns[0] != size:
            raise UsageError(
                f"RNDBonus: columns {tuple(columns)} are {columns[1] - columns[0]} entries, but the network of "
                f"'{role.name}' sees {size}"
            )
        self.role, self.control, self.generator = role, control, generator
        self.columns = slice(None) if columns is None else slice(*columns)
        self.scale = ScaleReward(gamma, n)

    def judged(self, observation: Tensor) -> Tensor:
        """The judged entries ``[..., size]`` of observations ``[..., D]``."""
        return observation[..., self.columns].to(self.role.device)

    def observe(self, observation: Tensor) -> None:
        """Take observations ``[..., D]`` into the statistics that normalise them: once a rollout, before `reward`,
        and some random steps before the first."""
        self.role.observe(self.judged(observation))

    def novelty(self, observation: Tensor) -> Tensor:
        """``[...]``, the predictor's squared error at observations ``[..., D]``, without gradient and as it is."""
        return self.role.evaluate(lambda model, seen: model(seen), self.judged(observation))

    def reward(self, following: Tensor) -> Tensor:
        """``[n, T]`` rewards of a rollout's steps, from the observations ``[n, T, D]`` that followed them, which
        count towards the scale.

        Raises `ShapeError` when there are not ``n`` rows."""
        if following.shape[0] != len(self.scale.sum):
            raise ShapeError(
                f"RNDBonus.reward: {following.shape[0]} rows of observations, but it was made for "
                f"{len(self.scale.sum)} environments"
            )
        raw = self.novelty(following)
        if self.control == "shuffled":
            order = torch.randperm(raw.numel(), generator=self.generator).to(raw.device)
            raw = raw.flatten()[order].view_as(raw)
        elif self.control == "noise":
            raw = torch.randn(raw.shape, generator=self.generator).square().to(raw.device)
        never = np.zeros(len(raw), dtype=bool)  # the stream of novelty has no episodes
        for column in raw.cpu().numpy().T:
            self.scale(column, never)
        return raw / self.scale.statistics.std

    def at(self, following: Tensor) -> Tensor:
        """``[...]`` rewards of observations ``[..., D]`` that came from anywhere, such as a replay: judged by the
        predictor of now, on the scale of the rollouts that `reward` has seen."""
        return self.novelty(following) / self.scale.statistics.std

    def learn(
        self,
        following: Tensor,
        proportion: float = 1.0,
        epochs: int = 1,
        minibatch: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Metrics:
        """Train the predictor on observations ``[..., D]``.

        Args:
            proportion: the probability with which each of them counts. Less than 1 makes the bonus fade slowly
                where many environments bring much alike at once.
            epochs, minibatch: as for `Role.fit`; many epochs use the bonus up at once.
            generator: draws which count, and shuffles.
        """
        seen = self.judged(following)
        seen = seen.reshape(-1, seen.shape[-1])
        kept = torch.rand(len(seen), generator=generator).to(seen.device) < proportion
        sights = Sights(observation=seen, kept=kept, batch_size=[len(seen)])
        return self.role.fit(sights, Distil(), epochs, minibatch, generator)

    def state_dict(self) -> dict[str, Any]:
        """The scale and its running sums; networks and statistics of observations are saved by the role."""
        return {"scale": self.scale.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises `ShapeError` when it is of another number of environments."""
        self.scale.load_state_dict(state["scale"])


def next_observation(traj: Trajectories, present: Tensor) -> Tensor:
    """``[B, T, ...]``, the observation that followed each step.

    It is the next column, or where the row was cut that of ``inputs["final"]``. Where neither is known (a terminated
    step whose last observation was not kept) it is the first one of the next episode, as in the published code.

    Args:
        present: ``[B, ...]``, the observation to act on after the rows' last steps.
    """
    observation = traj.inputs["step", "observation"]
    following = torch.cat([observation[:, 1:], present[:, None].to(observation)], 1)
    final = traj.inputs["final"]
    used = final["step"] >= 0
    rows = torch.arange(len(used), device=used.device)[:, None].expand_as(used)
    following[rows[used], final["step"][used]] = final["observation"][used]
    return following
