"""How well a controller does when it decides less often than its environment steps (Patel and Siegelmann, 2025)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from guerdon.dynamics.one_step import Shooting
from guerdon.errors import UsageError, nearest
from guerdon.experience.environments import make
from guerdon.policies.action_sequence import OpenLoop, SequenceGaussian, repeated
from guerdon.policies.control import Controller

LENGTHS: tuple[int, ...] = (1, *range(2, 31, 2))
"""Published lengths of action sequences: 1, 2, 4, ..., 30."""

MAXIMA: Mapping[str, float] = {
    "Pendulum": 1350.0,
    "LunarLanderContinuous": 300.0,
    "Hopper": 3600.0,
    "Walker2d": 5000.0,
    "Ant": 6500.0,
    "HalfCheetah": 17000.0,
    "Humanoid": 10500.0,
    "InvertedPendulum": 1000.0,
    "InvertedDoublePendulum": 9400.0,
    "Reacher": 60.0,
    "Swimmer": 350.0,
}
"""Published returns that count as 1, after `OFFSETS`, by environment without its version. Those of MuJoCo are for
version 2; other versions pay differently."""

OFFSETS: Mapping[str, float] = {"Pendulum": 1550.0, "Reacher": 65.0}
"""Published numbers added to returns that are never positive; 0 for all others."""


def frequency_averaged_score(returns: Mapping[int, float], maximum: float, offset: float = 0.0) -> float:
    """``integral of (return + offset) over the length / (longest length * maximum)``, by the trapezoid rule.

    The published divisor is the longest length, 30, though the integral begins at 1: returns of ``maximum - offset``
    throughout give 29/30.

    Args:
        returns: mean return by length of the action sequences, 1 among them.
        maximum: what counts as 1, after the offset. offset: added to every return.

    Raises `UsageError` for fewer than two lengths, or without the length 1.
    """
    lengths = sorted(returns)
    if len(lengths) < 2 or lengths[0] != 1:
        raise UsageError(f"the score needs returns at length 1 and at longer ones, not at {lengths}")
    values = torch.tensor([returns[length] + offset for length in lengths], dtype=torch.float64)
    area = torch.trapezoid(values, torch.tensor(lengths, dtype=torch.float64))
    return area.item() / (lengths[-1] * maximum)


def score_of(env_id: str, returns: Mapping[int, float]) -> float:
    """`frequency_averaged_score` with the published maximum and offset of an environment.

    Raises `UsageError` where none was published.
    """
    name = env_id.rpartition("-v")[0] or env_id
    if name not in MAXIMA:
        raise UsageError(
            f"no maximum was published for {env_id}; {nearest(name, MAXIMA)}. Give frequency_averaged_score your own"
        )
    return frequency_averaged_score(returns, MAXIMA[name], OFFSETS.get(name, 0.0))


def return_by_length(
    policy: Controller | Shooting,
    env_id: str,
    lengths: Sequence[int] = LENGTHS,
    episodes: int = 10,
    seed: int = 0,
    **kwargs: Any,
) -> dict[int, list[float]]:
    """Returns of ``episodes`` episodes at each length, from the same initial states.

    A sequence policy (or a planner) decides every ``length`` steps and carries its sequence out open loop, its own
    means fed back; a one-step controller repeats its likeliest action. An episode's end ends the sequence.

    Args:
        policy: what acts, without noise.
        env_id: of the environment, made with ``kwargs``.
        seed: of the initial states.
    """
    found = {}
    for length in lengths:
        environments = make(env_id, episodes, seed, **kwargs)
        if isinstance(policy, SequenceGaussian | Shooting):
            act = policy.actor(length)
        else:
            act = repeated(policy, length, environments.action_space)
        found[length] = _first_episodes(act, environments)
        environments.close()
    return found


def _first_episodes(act: OpenLoop, environments: Any) -> list[float]:
    """The return of the first episode in each environment."""
    observation = environments.reset()
    total, running = np.zeros(environments.n), np.ones(environments.n, bool)
    while running.any():
        step = environments.step(act(observation)["action"])
        total += np.where(running, step.reward, 0.0)
        ended = step.terminated | step.truncated
        act.begin(ended)
        running &= ~ended
        observation = step.observation
    return total.tolist()
