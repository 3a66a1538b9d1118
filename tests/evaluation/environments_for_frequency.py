"""An environment in which it matters when an action is chosen."""

import gymnasium
import numpy as np
from gymnasium import spaces


class Chase(gymnasium.Env):
    """A moving point ``x`` that is to be held at 0: ``x' = 0.9 x + 0.5 a + drift``. Seven steps, then the time is up;
    it also ends, for good, beyond 2.5."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.drift = self.np_random.uniform(-2, 2), self.np_random.uniform(-0.3, 0.3)
        self.steps = 0
        return self._show(), {}

    def step(self, action):
        self.x = 0.9 * self.x + 0.5 * float(action[0]) + self.drift
        self.steps += 1
        reward = -(self.x**2)
        return self._show(), reward, abs(self.x) > 2.5, self.steps >= 7, {}

    def _show(self):
        return np.array([self.x, self.drift], np.float32)
