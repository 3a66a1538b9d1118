"""Small environments that each do one thing, right or wrong: ``make(Terminates, 3, seed=0)``."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Counter(gymnasium.Env):
    """Shows ``[steps of this episode, last action, a random number of this episode]`` as float64 and pays the number
    of steps. It never ends by itself, and misbehaves nowhere."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, length: int = 5) -> None:
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps, self.luck = 0, self.np_random.random()
        return self.show(0.0), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.steps += 1
        terminated, truncated = self.end()
        return self.show(float(np.ravel(action)[0])), self.reward(), terminated, truncated, {}

    def show(self, action: float) -> Any:
        return np.array([self.steps, action, self.luck])

    def reward(self) -> float:
        return float(self.steps)

    def end(self) -> tuple[bool, bool]:
        return False, False


class Terminates(Counter):
    """Only terminates, at ``length``."""

    def end(self) -> tuple[bool, bool]:
        return self.steps >= self.length, False


class Truncates(Counter):
    """Is only truncated, at ``length``."""

    def end(self) -> tuple[bool, bool]:
        return False, self.steps >= self.length


class EndsTwice(Counter):
    """Says both terminated and truncated at ``length``."""

    def end(self) -> tuple[bool, bool]:
        return self.steps >= self.length, self.steps >= self.length


class Raises(Counter):
    """Raises a ValueError at ``length``."""

    def end(self) -> tuple[bool, bool]:
        if self.steps >= self.length:
            raise ValueError("the arm left the table")
        return False, False


class GivesNaN(Counter):
    """Shows NaN at ``length``."""

    def show(self, action: float) -> Any:
        return np.array([self.steps, np.nan if self.steps >= self.length else action, self.luck])


class EndsInNaN(Terminates):
    """Terminates at ``length`` and shows an infinite number in that last observation."""

    def show(self, action: float) -> Any:
        return np.array([self.steps, np.inf if self.steps >= self.length else action, self.luck])


class PaysInfinity(Counter):
    """Pays an infinite reward at ``length``."""

    def reward(self) -> float:
        return np.inf if self.steps >= self.length else 0.0


class WrongShape(Counter):
    """Shows two numbers instead of three from ``length`` on."""

    def show(self, action: float) -> Any:
        return super().show(action)[: 2 if self.steps >= self.length else 3]


class Shows(Terminates):
    """Terminates at ``length``; observations are dicts of a float64 vector, uint8 pixels and an integer."""

    observation_space = spaces.Dict(
        {
            "body": spaces.Box(-np.inf, np.inf, (2,), np.float64),
            "camera": spaces.Box(0, 255, (4, 4, 3), np.uint8),
            "gear": spaces.Discrete(9),
        }
    )

    def show(self, action: float) -> Any:
        return {
            "body": np.array([self.steps, self.luck]),
            "camera": np.full((4, 4, 3), self.steps, np.uint8),
            "gear": self.steps,
        }


class Chooses(Terminates):
    """Terminates at ``length``; its three actions are called 2, 3 and 4."""

    action_space = spaces.Discrete(3, start=2)


class ChoosesTwice(Terminates):
    """Terminates at ``length``; an action is two choices, of 3 and of 4."""

    action_space = spaces.MultiDiscrete([3, 4])
