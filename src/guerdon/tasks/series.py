"""A seeded series to predict: slow and fast waves with autoregressive noise, one value a step.

What is to be predicted at each step is the discounted sum of all values still to come; nothing is to be done
about it. The observation holds three signals (the value, and two that run ahead of it and behind), each as
exponential averages over several horizons, so that the phase of every wave can be read off.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from guerdon.errors import UsageError
from guerdon.experience.environments import Environments

_PERIODS = (50.0, 200.0, 700.0)  # steps
_AMPLITUDES = (0.6, 1.0, 0.8)
_LEVEL = 2.0  # mean of the values
_NOISE, _MEMORY = 0.3, 0.9  # deviation of the noise, and how much of it stays from one step to the next
_SHIFTS = (0, 15, -40)  # steps by which the three signals lag behind the value
_AFTER = 2000  # values beyond the last step, for its discounted sum


class Series(VectorEnv):
    """The series as a vector environment with one row, whose action does nothing; the reward is the value.

    Args:
        seed: of phases and noise: the whole series follows from it, whatever the reset's seed.
        length: steps until it terminates.
        averages: decay of each exponential average (corrected for its start at 0); 0 is the signal itself.

    Attributes:
        values: ``[length + ...]``, where ``values[t]`` is the reward of step ``t``.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self, seed: int, length: int = 68_000, averages: Sequence[float] = (0.0, 0.9, 0.99, 0.999)
    ) -> None:
        if length < 1:
            raise UsageError(f"the series has {length} steps; expected at least 1")
        if not all(0 <= a < 1 for a in averages) or not averages:
            raise UsageError(f"averages decay by a factor from 0 up to below 1, not by {list(averages)}")
        generator = np.random.default_rng(seed)
        before = max(_SHIFTS)
        time = np.arange(-before, length + _AFTER, dtype=np.float64)
        phases = generator.uniform(0, 2 * np.pi, len(_PERIODS))
        waves = zip(_PERIODS, _AMPLITUDES, phases, strict=True)
        clean = sum(size * np.sin(2 * np.pi * time / period + phase) for period, size, phase in waves)
        noise = np.zeros(len(time))
        shocks = generator.normal(0, _NOISE * np.sqrt(1 - _MEMORY**2), len(time))
        for t in range(1, len(time)):
            noise[t] = _MEMORY * noise[t - 1] + shocks[t]
        whole = _LEVEL + clean + noise
        self.values: NDArray[np.float64] = whole[before + 1 :]
        # at time t the signals are the present value, an earlier one, and a later one under fresh noise
        signals = np.stack([whole[before - shift : before - shift + length + 1] for shift in _SHIFTS], 1)
        signals[:, 2] += generator.normal(0, 2 * _NOISE, length + 1)
        self._signals = signals
        self.length, self.averages = length, np.asarray(averages)

        self.num_envs = 1
        size = len(_SHIFTS) * len(averages)
        self.single_observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        self.single_action_space = spaces.Discrete(1)
        self.observation_space = batch_space(self.single_observation_space, 1)
        self.action_space = batch_space(self.single_action_space, 1)
        self._begin()

    def returns(self, gamma: float) -> NDArray[np.float64]:
        """``[length + 1]``: at time ``t``, the sum over ``k`` of ``gamma^k values[t + k]``: what is to be predicted."""
        sums, total = np.empty(len(self.values)), 0.0
        for t in reversed(range(len(self.values))):
            total = self.values[t] + gamma * total
            sums[t] = total
        return sums[: self.length + 1]

    def _begin(self) -> NDArray[np.float32]:
        self._t = 0
        self._sums = np.zeros((len(self.averages), len(_SHIFTS)))
        return self._observe()

    def _observe(self) -> NDArray[np.float32]:
        decay = self.averages[:, None]
        self._sums = decay * self._sums + (1 - decay) * self._signals[self._t]
        return (self._sums / (1 - decay ** (self._t + 1))).reshape(1, -1).astype(np.float32)

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Back to the beginning of the same series."""
        return self._begin(), {}

    def step(self, actions: Any) -> tuple[NDArray[np.float32], NDArray, NDArray, NDArray, dict[str, Any]]:
        """One step on, whatever the action."""
        reward = self.values[self._t : self._t + 1].copy()
        self._t += 1
        over = self._t == self.length
        observation, infos = self._observe(), {}
        if over:
            infos["final_obs"] = observation
            observation = self._begin()
        return observation, reward, np.array([over]), np.array([False]), infos

    def state_dict(self) -> dict[str, Any]:
        """The time and the averages; the series follows from its seed."""
        return {"time": self._t, "sums": torch.from_numpy(self._sums.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._t, self._sums = state["time"], state["sums"].numpy().copy()


def make_series(seed: int, length: int = 68_000, **settings: Any) -> Environments:
    """The series as `Environments`, ready for a stream."""
    return Environments(Series(seed, length, **settings), "series", seed, "array")


def series(num_envs: int = 1, seed: int = 0, length: int = 68_000, **settings: Any) -> Series:
    """`Series` as gymnasium makes vector environments: ``--env guerdon/Series-v0``. Raises `UsageError` for more
    than one."""
    if num_envs != 1:
        raise UsageError(f"there is one series, not {num_envs}; leave out --environments")
    return Series(seed, length, **settings)


if "guerdon/Series-v0" not in gymnasium.registry:
    gymnasium.register("guerdon/Series-v0", entry_point=None, vector_entry_point=series)
