"""Running statistics of a stream, and what is scaled by them: observations, rewards, the time left.

Everything is NumPy in float64, works on one sample or on a batch of environments, and can be saved and
loaded so that a resumed run goes on with the same numbers, bit for bit.

    normalise = NormaliseObservation(shape=(17,))          # one set of statistics for all environments
    observation = normalise(observation)                   # [17] or [n, 17]; counted first, then normalised
    final = normalise(final, update=False)                 # normalised, not counted
    scale = ScaleReward(gamma=0.99, n=8)                   # n=None: one environment, plain numbers
    reward = scale(reward, done)                           # [n]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from guerdon.errors import ShapeError, UsageError

EPSILON = 1e-8  # added to the variance before its root


class RunningMeanStd:
    """Mean and sample variance of everything seen so far (Welford, 1962; batches are merged as in Chan et al.,
    1979), in float64.

    Args:
        shape: of one sample; ``()`` for plain numbers.

    Attributes:
        count: samples seen.
        mean: ``[*shape]``, a float for ``()``; 0 before the first sample.
    """

    def __init__(self, shape: Sequence[int] = ()) -> None:
        self.shape = tuple(shape)
        self.count = 0
        self.mean: Any = np.zeros(self.shape) if self.shape else 0.0
        self._squares: Any = np.zeros(self.shape) if self.shape else 0.0  # sum of squared deviations

    @property
    def var(self) -> Any:
        """Sample variance (divided by ``count - 1``), ``[*shape]``; 1 until there are two samples."""
        if self.count < 2:
            return np.ones(self.shape) if self.shape else 1.0
        return self._squares / (self.count - 1)

    @property
    def std(self) -> Any:
        """``sqrt(var + 1e-8)``, ``[*shape]``: what to divide by."""
        return np.sqrt(self.var + EPSILON) if self.shape else math.sqrt(self.var + EPSILON)

    def push(self, sample: Any) -> None:
        """Count one sample ``[*shape]`` (a float for ``()``). Shapes are not checked here: this is the
        per-step path; `update` checks."""
        self.count += 1
        delta = sample - self.mean
        self.mean = self.mean + delta / self.count
        self._squares = self._squares + delta * (sample - self.mean)

    def update(self, samples: ArrayLike) -> None:
        """Count a batch ``[N, *shape]``, or one sample ``[*shape]``. Raises `ShapeError` for anything else."""
        samples = np.asarray(samples, dtype=np.float64)
        if samples.shape == self.shape:
            return self.push(samples if self.shape else float(samples))
        if samples.shape[1:] != self.shape or samples.ndim == 0:
            raise ShapeError(
                f"the statistics are over samples of shape {list(self.shape)}, but got an array of shape "
                f"{list(samples.shape)}; expected one sample or a batch of them"
            )
        number = len(samples)
        if number == 0:
            return None
        mean = samples.mean(0)
        squares = np.square(samples - mean).sum(0)
        total = self.count + number
        delta = mean - self.mean
        self.mean = self.mean + delta * (number / total)
        self._squares = self._squares + squares + np.square(delta) * (self.count * number / total)
        if not self.shape:
            self.mean, self._squares = float(self.mean), float(self._squares)
        self.count = total
        return None

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs: plain numbers and float64 tensors."""
        return {"count": self.count, "mean": _tensor(self.mean), "squares": _tensor(self._squares)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises `ShapeError` when it is of samples of another shape."""
        mean, squares = _array(state["mean"]), _array(state["squares"])
        if mean.shape != self.shape:
            raise ShapeError(
                f"the saved statistics are over samples of shape {list(mean.shape)}, these over {list(self.shape)}"
            )
        self.count = int(state["count"])
        self.mean, self._squares = (mean, squares) if self.shape else (float(mean), float(squares))


class NormaliseObservation:
    """``(o - mean) / sqrt(var + 1e-8)`` with running statistics, which count the observation first.

    Args:
        shape: of one observation; every entry has statistics of its own.
        clip: cut the result to plus or minus this; None does not.
    """

    def __init__(self, shape: Sequence[int], clip: float | None = None) -> None:
        if clip is not None and clip <= 0:
            raise UsageError(
                f"clip is {clip}; observations are cut to plus or minus it, so it must be above 0"
            )
        self.statistics = RunningMeanStd(shape)
        self.clip = clip

    def __call__(self, observation: ArrayLike, update: bool = True) -> NDArray[np.float32]:
        """``observation`` ``[*shape]`` or ``[n, *shape]``, normalised, float32. ``update=False`` leaves the
        statistics as they are. Raises `ShapeError` for another shape."""
        observation = np.asarray(observation, dtype=np.float64)
        statistics = self.statistics
        if update:
            statistics.update(observation)
        normalised = (observation - statistics.mean) / statistics.std
        if self.clip is not None:
            normalised = normalised.clip(-self.clip, self.clip)
        return np.asarray(normalised, dtype=np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The statistics."""
        return self.statistics.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises `ShapeError` when it does not fit."""
        self.statistics.load_state_dict(state)


class ScaleReward:
    """Rewards divided by the running standard deviation of the discounted sum of past rewards,
    ``u <- gamma (1 - done) u + r``. The mean is not subtracted: that would change what is worth doing.

    Args:
        gamma: discount of the sum.
        n: environments; their sums are apart, their statistics shared. None: one, in plain numbers.
        clip: cut the result to plus or minus this; None does not.
    """

    def __init__(self, gamma: float = 0.99, n: int | None = None, clip: float | None = None) -> None:
        if not 0 <= gamma <= 1:
            raise UsageError(f"gamma is {gamma}; a discount lies between 0 and 1")
        if clip is not None and clip <= 0:
            raise UsageError(f"clip is {clip}; rewards are cut to plus or minus it, so it must be above 0")
        self.gamma = gamma
        self.clip = clip
        self.statistics = RunningMeanStd()
        self.sum: Any = 0.0 if n is None else np.zeros(n)

    def __call__(self, reward: Any, done: Any) -> Any:
        """``reward`` scaled; ``done`` says whether the episode ended with it (terminated or truncated).

        Both are plain numbers for ``n=None`` (the answer is a float), arrays ``[n]`` otherwise (float32).
        Raises `ShapeError` when they are not ``[n]``."""
        if isinstance(self.sum, float):
            self.sum = (0.0 if done else self.gamma * self.sum) + float(reward)
            self.statistics.push(self.sum)
            scaled = float(reward) / self.statistics.std
            return scaled if self.clip is None else min(max(scaled, -self.clip), self.clip)
        reward, done = np.asarray(reward, dtype=np.float64), np.asarray(done, dtype=bool)
        if reward.shape != self.sum.shape or done.shape != self.sum.shape:
            raise ShapeError(
                f"reward {list(reward.shape)} and done {list(done.shape)} must both be [{len(self.sum)}]"
            )
        self.sum = np.where(done, 0.0, self.gamma * self.sum) + reward
        self.statistics.update(self.sum)
        scaled = reward / self.statistics.std
        return (scaled if self.clip is None else scaled.clip(-self.clip, self.clip)).astype(np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the running sums."""
        return {"statistics": self.statistics.state_dict(), "sum": _tensor(self.sum)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state. Raises `ShapeError` when it is of another number of environments."""
        total = _array(state["sum"])
        if total.shape != np.shape(self.sum):
            raise ShapeError(f"the saved sums are {list(total.shape)}, these {list(np.shape(self.sum))}")
        self.statistics.load_state_dict(state["statistics"])
        self.sum = total if total.shape else float(total)


class TimeFeature:
    """Appends the share of the episode that has passed, minus one half: ``t / limit - 0.5``.

    A task with a time limit is only a Markov decision process if the time can be seen.

    Args:
        limit: steps after which an episode is cut.
        n: environments; None: one.
    """

    def __init__(self, limit: int, n: int | None = None) -> None:
        if limit < 1:
            raise UsageError(f"the time limit is {limit} steps; expected at least 1")
        self.limit = limit
        self.steps: Any = 0 if n is None else np.zeros(n, dtype=np.int64)

    def reset(self, ended: Any = True) -> None:
        """Start anew: the only environment, all of them, or those where ``ended`` ``[n]`` is true."""
        if isinstance(self.steps, int):
            self.steps = 0 if ended else self.steps
        else:
            self.steps = np.where(ended, 0, self.steps)

    def advance(self) -> None:
        """One step has passed, in every environment."""
        self.steps = self.steps + 1

    def __call__(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """``observation`` ``[D]`` or ``[n, D]`` with the feature as a further last entry, float32."""
        feature = np.asarray(self.steps / self.limit - 0.5, dtype=np.float32)
        return np.concatenate([observation, feature[..., None]], -1, dtype=np.float32)

    def state_dict(self) -> dict[str, Any]:
        """The steps since each episode began."""
        return {"steps": self.steps if isinstance(self.steps, int) else torch.as_tensor(self.steps.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self.steps = int(state["steps"]) if isinstance(self.steps, int) else state["steps"].numpy().copy()


def _tensor(value: Any) -> torch.Tensor:
    return torch.as_tensor(np.array(value, dtype=np.float64))


def _array(value: torch.Tensor) -> NDArray[np.float64]:
    return value.detach().cpu().to(torch.float64).numpy().copy()
