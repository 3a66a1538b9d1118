"""Mountain car: rock an underpowered car out of a valley (Moore, 1990), by three pushes or by a force."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
from gymnasium import spaces

from guerdon.tasks.classic.base import Classic

_TRACK = {"min_position": -1.2, "max_position": 0.6, "max_speed": 0.07}


class _Car(Classic):
    """A car on a hilly track; its state is position and velocity."""

    def _track(self, p: SimpleNamespace, dtype: type[np.floating]) -> None:
        speed = p.max_speed.max()
        self.single_observation_space = spaces.Box(
            np.array([p.min_position.min(), -speed], np.float32),
            np.array([p.max_position.max(), speed], np.float32),
        )
        self._left, self._right = p.min_position.astype(dtype), p.max_position.astype(dtype)
        self._speed, self._least_speed = p.max_speed.astype(dtype), -p.max_speed.astype(dtype)
        self._goal = p.goal_position, p.goal_velocity

    def _start(self, count: int) -> np.ndarray:
        state = np.zeros((2, count))
        state[0] = self.np_random.uniform(-0.6, -0.4, count)
        return state

    def _roll(self, velocity: np.ndarray) -> np.ndarray:
        """Move by ``velocity [n]``, within the limits; a wall on the left stops the car. Returns who is there."""
        velocity = np.minimum(np.maximum(velocity, self._least_speed), self._speed)
        position = np.minimum(np.maximum(self.state[0] + velocity, self._left), self._right)
        np.maximum(velocity, 0, out=velocity, where=position == self._left)
        self.state[0] = position
        self.state[1] = velocity
        return (position >= self._goal[0]) & (velocity >= self._goal[1])

    def _observe(self) -> np.ndarray:
        return self.state.T.astype(np.float32, order="C")


class MountainCar(_Car):
    """gymnasium's MountainCar-v0; actions 0, 1, 2 push left, not at all, right; the reward is -1 a step.

    ``defaults``: ``min_position``, ``max_position``, ``goal_position``, ``max_speed``, ``goal_velocity``, ``force`` and
    ``gravity`` (per step).
    """

    gymnasium_id = "MountainCar-v0"
    default_steps = 200
    defaults: ClassVar = {
        **_TRACK,
        "goal_position": 0.5,
        "goal_velocity": 0.0,
        "force": 0.001,
        "gravity": 0.0025,
    }

    def _prepare(self, p: SimpleNamespace) -> None:
        self._track(p, np.float64)
        self.single_action_space = spaces.Discrete(3)
        self._force, self._gravity = p.force, p.gravity

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position, velocity = self.state
        push = (action - 1) * self._force - np.cos(3 * position) * self._gravity
        return np.full(self.num_envs, -1, np.float32), self._roll(velocity + push)


class MountainCarContinuous(_Car):
    """gymnasium's MountainCarContinuous-v0; the action is a force ``[1]`` in [-1, 1], the reward 100 at the goal less
    a tenth of the squared force.

    ``defaults``: as for `MountainCar`, with ``power``, the acceleration that a force of 1 gives per step.
    """

    gymnasium_id = "MountainCarContinuous-v0"
    default_steps = 999
    defaults: ClassVar = {
        **_TRACK,
        "goal_position": 0.45,
        "goal_velocity": 0.0,
        "power": 0.0015,
        "gravity": 0.0025,
    }

    def _prepare(self, p: SimpleNamespace) -> None:
        # gymnasium keeps this car's state in float32, and after 999 steps it shows
        self._track(p, np.float32)
        self.single_action_space = spaces.Box(-1, 1, (1,), np.float32)
        self._power, self._gravity = p.power.astype(np.float32), p.gravity

    def _start(self, count: int) -> np.ndarray:
        return super()._start(count).astype(np.float32)

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        position, velocity = self.state
        force = action[:, 0]
        slope = (np.cos(3 * position.astype(np.float64)) * self._gravity).astype(np.float32)
        push = np.minimum(np.maximum(force, -1), 1).astype(np.float32) * self._power - slope
        terminated = self._roll(velocity + push)
        return (100 * terminated - 0.1 * np.square(force, dtype=np.float64)).astype(np.float32), terminated
