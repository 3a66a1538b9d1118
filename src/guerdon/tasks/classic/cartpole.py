"""Cart-pole: balance a pole on a cart (Barto, Sutton and Anderson, 1983; equations of Florian, 2007)."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
from gymnasium import spaces

from guerdon.tasks.classic.base import Classic


class CartPole(Classic):
    """gymnasium's CartPole-v1; actions 0 (push left) and 1 (push right).

    ``defaults``: ``gravity`` (m/s²), ``masscart``, ``masspole`` (kg), ``length`` (m, half the pole), ``force_mag``
    (N), ``tau`` (s), ``theta_threshold_radians``, ``x_threshold`` (m), ``sutton_barto_reward`` (true: 0 a step and -1
    for falling, instead of 1 a step).
    """

    gymnasium_id = "CartPole-v1"
    default_steps = 500
    defaults: ClassVar = {
        "gravity": 9.8,
        "masscart": 1.0,
        "masspole": 0.1,
        "length": 0.5,
        "force_mag": 10.0,
        "tau": 0.02,
        "theta_threshold_radians": 12 * 2 * math.pi / 360,
        "x_threshold": 2.4,
        "sutton_barto_reward": 0.0,
    }

    def _prepare(self, p: SimpleNamespace) -> None:
        high = np.array(
            [p.x_threshold.max() * 2, np.inf, p.theta_threshold_radians.max() * 2, np.inf], dtype=np.float32
        )
        self.single_observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(2)
        total = p.masscart + p.masspole
        self._gravity, self._tau = p.gravity, p.tau
        self._lever = p.masspole * p.length / total  # the pole's share in the cart's acceleration, m
        self._push, self._twice = p.force_mag / total, 2 * p.force_mag / total  # m/s²
        self._inertia = 4 / 3 * p.length
        self._relief = p.length * p.masspole / total
        self._limits = np.stack([p.x_threshold, p.theta_threshold_radians])
        original = p.sutton_barto_reward != 0
        self._standing = np.where(original, 0, 1).astype(np.float32)
        self._fallen = np.where(original, -1, 1).astype(np.float32)
        self._falling_counts = bool(original.any())
        self._slope = np.empty((4, self.num_envs))

    def _start(self, count: int) -> np.ndarray:
        return self.np_random.uniform(-0.05, 0.05, (4, count))

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        state, slope, lever = self.state, self._slope, self._lever
        velocity, angle, spin = state[1], state[2], state[3]
        sin, cos = np.sin(angle), np.cos(angle)
        push = action * self._twice - self._push + lever * spin * spin * sin
        slope[0] = velocity
        slope[2] = spin
        bend = (self._gravity * sin - cos * push) / (self._inertia - self._relief * cos * cos)
        slope[3] = bend
        np.subtract(push, lever * bend * cos, out=slope[1])
        slope *= self._tau
        state += slope
        out = np.abs(state[::2]) > self._limits
        terminated = out[0] | out[1]
        if self._falling_counts:
            return np.where(terminated, self._fallen, self._standing), terminated
        return self._standing.copy(), terminated

    def _observe(self) -> np.ndarray:
        return self.state.T.astype(np.float32, order="C")
