"""Pendulum: swing it up and hold it, by torques too weak to lift it at once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces

from guerdon.tasks.classic.base import Classic


class Pendulum(Classic):
    """gymnasium's Pendulum-v1; the action is a torque ``[1]`` (N m), the reward at most 0.

    ``defaults``: ``max_speed`` (rad/s), ``max_torque`` (N m), ``dt`` (s), ``g`` (m/s²), ``m`` (kg), ``l`` (m). The
    action space spans the greatest ``max_torque``; each environment clips to its own.
    """

    gymnasium_id = "Pendulum-v1"
    default_steps = 200
    defaults: ClassVar = {"max_speed": 8.0, "max_torque": 2.0, "dt": 0.05, "g": 10.0, "m": 1.0, "l": 1.0}

    def _prepare(self, p: SimpleNamespace) -> None:
        high = np.array([1, 1, p.max_speed.max()], dtype=np.float32)
        self.single_observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.single_action_space = spaces.Box(-p.max_torque.max(), p.max_torque.max(), (1,), np.float32)
        self._speed, self._torque, self._dt = p.max_speed, p.max_torque, p.dt
        self._least_speed, self._least_torque = -p.max_speed, -p.max_torque
        self._fall = 3 * p.g / (2 * p.l) * p.dt
        self._lift = 3 / (p.m * p.l**2) * p.dt
        self._last = np.zeros(self.num_envs)

    def _start(self, count: int) -> np.ndarray:
        return self.np_random.uniform(-1, 1, (2, count)) * [[np.pi], [1.0]]

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angle, speed = self.state
        torque = np.minimum(np.maximum(action[:, 0], self._least_torque), self._torque)
        self._last = torque
        upright = (angle + np.pi) % (2 * np.pi) - np.pi
        cost = upright * upright + 0.1 * (speed * speed) + 0.001 * (torque * torque)
        speed = speed + self._fall * np.sin(angle) + self._lift * torque
        speed = np.minimum(np.maximum(speed, self._least_speed), self._speed)
        self.state[1] = speed
        self.state[0] += speed * self._dt
        return np.negative(cost, dtype=np.float32, casting="same_kind"), np.zeros(self.num_envs, bool)

    def _observe(self) -> np.ndarray:
        angle, speed = self.state
        observation = np.empty((self.num_envs, 3), np.float32)
        observation[:, 0] = np.cos(angle)
        observation[:, 1] = np.sin(angle)
        observation[:, 2] = speed
        return observation

    def _show(self, renderer: Any, row: int) -> None:
        super()._show(renderer, row)
        renderer.last_u = float(self._last[row])  # drawn as an arrow
