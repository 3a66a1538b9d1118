"""One environment, one step at a time, nothing kept: what streaming methods learn from.

The observation is normalised, the reward scaled, and the time left in the episode appended, all by running
statistics that see each number once (`guerdon.normalise`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray

from guerdon.errors import UsageError
from guerdon.experience.environments import Environments
from guerdon.normalise import NormaliseObservation, ScaleReward, TimeFeature


class Move(NamedTuple):
    """What followed an action: ``observation [D]`` (or pixels), the state that it led to, also where the episode
    ended there; ``reward``, scaled; and how it ended, if it did."""

    observation: NDArray[np.float32]
    reward: float
    terminated: bool
    truncated: bool


class Stream:
    """Steps of one environment, each given out once.

    Order: the reward is scaled, the observation counted and normalised, the time appended. Where an episode ends,
    its last observation is counted before the first one of the next.

    Args:
        environments: a single one (``n=1``). They are saved by whoever made them; this object saves only
            its statistics, so track it after them.
        gamma: discount of the sum by whose deviation rewards are divided.
        normalise: normalise observations by running statistics.
        scale_reward: scale rewards.
        time_limit: steps of an episode; appends ``t / limit - 0.5`` to vector observations. None does not.

    Attributes:
        unit: what one of its steps is, for logs.
        observation: ``[D]`` or pixels, float32: what to act on.
        fresh: whether `observation` begins an episode.

    Raises `UsageError` for several environments, for observations that are no plain array, and for a time
    feature beside pixels.
    """

    unit = "step"

    def __init__(
        self,
        environments: Environments,
        gamma: float = 0.99,
        normalise: bool = True,
        scale_reward: bool = True,
        time_limit: int | None = None,
    ) -> None:
        if environments.n != 1:
            raise UsageError(
                f"a stream has one environment, but {environments.id} was made {environments.n} times"
            )
        space = environments.observation_space
        if not isinstance(space, gymnasium.spaces.Box):
            raise UsageError(
                f"{environments.id} has observations from {space}; a stream takes plain arrays (Box), so flatten them"
            )
        if time_limit is not None and len(space.shape) != 1:
            raise UsageError(
                f"the time is appended to vectors, and {environments.id} shows pixels; leave it out"
            )
        self.environments = environments
        self.normalise = NormaliseObservation(space.shape) if normalise else None
        self.scale_reward = ScaleReward(gamma) if scale_reward else None
        self.time = TimeFeature(time_limit) if time_limit is not None else None
        self.shape = (space.shape[0] + 1,) if self.time is not None else tuple(space.shape)
        self._return, self._returns = 0.0, list[float]()
        self._begin(environments.reset())

    def _begin(self, raw: NDArray[Any]) -> None:
        if self.time is not None:
            self.time.reset()
        self.observation = self._seen(raw[0])
        self.fresh, self._return = True, 0.0

    def _seen(self, raw: NDArray[Any]) -> NDArray[np.float32]:
        seen = self.normalise(raw) if self.normalise is not None else np.asarray(raw, dtype=np.float32)
        return self.time(seen) if self.time is not None else seen

    def step(self, action: Any) -> Move:
        """Take ``action`` (an integer, or ``[A]``; the environment clips it to its range) and move on: `observation`
        is then the next one to act on. Raises `EnvironmentFailure` when the environment misbehaves."""
        raw, reward, terminated, truncated, final = self.environments.step(np.asarray(action)[None])
        ended = final is not None
        scaled = float(reward[0])
        self._return += scaled
        if self.scale_reward is not None:
            scaled = self.scale_reward(scaled, ended)
        if self.time is not None:
            self.time.advance()
        led_to = self._seen(final[0] if final is not None else raw[0])
        if ended:
            self._returns.append(self._return)
            self._begin(raw)
        else:
            self.observation, self.fresh = led_to, False
        return Move(led_to, scaled, bool(terminated[0]), bool(truncated[0]))

    @property
    def reward_scale(self) -> float:
        """What rewards are divided by at present; predictions times this are in the environment's own units."""
        return 1.0 if self.scale_reward is None else self.scale_reward.statistics.std

    def returns(self) -> list[float]:
        """Those of the episodes that ended since this was last asked, in the environment's own rewards."""
        returns, self._returns = self._returns, []
        return returns

    def state_dict(self) -> dict[str, Any]:
        """The statistics and the present observation."""
        parts = {"normalise": self.normalise, "scale_reward": self.scale_reward, "time": self.time}
        state: dict[str, Any] = {n: None if part is None else part.state_dict() for n, part in parts.items()}
        seen = torch.from_numpy(self.observation.copy())
        episode = {"return": self._return, "returns": list(self._returns), "fresh": self.fresh}
        return {**state, "observation": seen, **episode}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, after the environments were loaded. Those that cannot be saved have begun a new
        episode, and so does the stream."""
        for name, part in (
            ("normalise", self.normalise),
            ("scale_reward", self.scale_reward),
            ("time", self.time),
        ):
            if part is not None:
                part.load_state_dict(state[name])
        self._returns = list(state["returns"])
        if self.environments.saveable:
            self.observation, self.fresh = state["observation"].numpy().copy(), state["fresh"]
            self._return = state["return"]
        else:
            assert self.environments.observation is not None
            self._begin(self.environments.observation)


def time_limit(environments: Environments) -> int | None:
    """Steps after which an episode is cut, as far as the environment or gymnasium's registry says."""
    limit = getattr(environments.env, "max_episode_steps", None)
    if limit is None:
        spec = gymnasium.registry.get(environments.id)
        limit = None if spec is None else spec.max_episode_steps
    return limit
