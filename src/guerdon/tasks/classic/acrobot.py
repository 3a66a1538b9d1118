"""Acrobot: swing a two-link arm, driven at its elbow alone, above a line (Sutton, 1996)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import numpy as np
from gymnasium import spaces

from guerdon.tasks.classic.base import Classic


class Acrobot(Classic):
    """gymnasium's Acrobot-v1; actions 0, 1, 2 give the elbow a torque of -1, 0, 1 times ``torque``.

    ``defaults``: ``link_length_1``, ``link_com_pos_1``, ``link_com_pos_2`` (m), ``link_mass_1``, ``link_mass_2`` (kg),
    ``link_moi`` (kg m², both links), ``max_vel_1``, ``max_vel_2`` (rad/s), ``gravity`` (m/s²), ``dt`` (s), ``torque``
    (N m). The equations are those of Sutton and Barto's book.
    """

    gymnasium_id = "Acrobot-v1"
    default_steps = 500
    defaults: ClassVar = {
        "link_length_1": 1.0,
        "link_mass_1": 1.0,
        "link_mass_2": 1.0,
        "link_com_pos_1": 0.5,
        "link_com_pos_2": 0.5,
        "link_moi": 1.0,
        "max_vel_1": 4 * np.pi,
        "max_vel_2": 9 * np.pi,
        "gravity": 9.8,
        "dt": 0.2,
        "torque": 1.0,
    }

    def _prepare(self, p: SimpleNamespace) -> None:
        high = np.array([1, 1, 1, 1, p.max_vel_1.max(), p.max_vel_2.max()], dtype=np.float32)
        self.single_observation_space = spaces.Box(-high, high, dtype=np.float32)
        self.single_action_space = spaces.Discrete(3)
        self._dt, self._torque = p.dt, p.torque
        self._speeds = np.stack([p.max_vel_1, p.max_vel_2])
        # the equations' constants: the second link's inertia about the elbow, the links' coupling, what the first
        # link adds about the shoulder (kg m²), and the torques of gravity (N m)
        self._elbow = p.link_mass_2 * p.link_com_pos_2**2 + p.link_moi
        self._coupling = p.link_mass_2 * p.link_length_1 * p.link_com_pos_2
        self._shoulder = (
            p.link_mass_1 * p.link_com_pos_1**2
            + p.link_mass_2 * p.link_length_1**2
            + p.link_moi
            - self._elbow
        )
        self._weight_1 = (p.link_mass_1 * p.link_com_pos_1 + p.link_mass_2 * p.link_length_1) * p.gravity
        self._weight_2 = p.link_mass_2 * p.link_com_pos_2 * p.gravity

    def _start(self, count: int) -> np.ndarray:
        # gymnasium begins with float32 numbers
        return self.np_random.uniform(-0.1, 0.1, (4, count)).astype(np.float32).astype(np.float64)

    def _slope(self, state: np.ndarray, torque: np.ndarray) -> np.ndarray:
        """The time derivative ``[4, n]`` of the state: angles of shoulder and elbow, and their speeds."""
        angle_1, angle_2, speed_1, speed_2 = state
        sin, cos = self._coupling * np.sin(angle_2), self._coupling * np.cos(angle_2)
        cross = self._elbow + cos
        inertia = self._shoulder + self._elbow + cross + cos
        fall_2 = self._weight_2 * np.sin(angle_1 + angle_2)
        fall_1 = self._weight_1 * np.sin(angle_1) + fall_2 - sin * speed_2 * (speed_2 + speed_1 + speed_1)
        share = cross / inertia
        slope = np.empty_like(state)
        slope[:2] = state[2:]
        bend_2 = (torque + share * fall_1 - sin * speed_1 * speed_1 - fall_2) / (self._elbow - share * cross)
        slope[3] = bend_2
        slope[2] = -(share * bend_2) - fall_1 / inertia
        return slope

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        state, dt = self.state, self._dt
        torque = (action - 1) * self._torque
        half = 0.5 * dt
        first = self._slope(state, torque)
        second = self._slope(state + half * first, torque)
        third = self._slope(state + half * second, torque)
        fourth = self._slope(state + dt * third, torque)
        second += third
        second *= 2
        second += first
        second += fourth
        state += dt / 6 * second
        # angles go round once they leave [-pi, pi], several times where the parameters make it turn fast
        state[:2] -= 2 * np.pi * np.rint(state[:2] / (2 * np.pi))
        np.maximum(state[2:], -self._speeds, out=state[2:])
        np.minimum(state[2:], self._speeds, out=state[2:])
        terminated = -np.cos(state[0]) - np.cos(state[0] + state[1]) > 1
        return terminated.astype(np.float32) - np.float32(1), terminated

    def _observe(self) -> np.ndarray:
        observation = np.empty((self.num_envs, 6), np.float32)
        angles = self.state[:2].T
        observation[:, 0:4:2] = np.cos(angles)
        observation[:, 1:4:2] = np.sin(angles)
        observation[:, 4:] = self.state[2:].T
        return observation

    def _gymnasium_name(self, parameter: str) -> str:
        return parameter.upper()
