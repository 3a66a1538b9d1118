"""What the classic control problems share: reset, autoreset, time limit, seed, saving, pictures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike

from guerdon.errors import UsageError, nearest

_NEVER = 2**62  # steps


class Classic(VectorEnv):
    """``num_envs`` environments whose states are the columns of one array, stepped together.

    A family: every physical parameter in ``defaults`` (gymnasium's names and values) may be given as a number or as
    an array ``[num_envs]``, one for each environment. An environment that ends is reset in the same step:
    ``step`` returns the observation after the reset, and ``infos["final_obs"] [n, ...]`` holds the last ones, valid
    in the rows that ended (the key is absent when none did). Rewards are float32 ``[n]``. Returned arrays are fresh.

    A subclass sets the spaces in ``_prepare`` and gives ``_start``, ``_advance`` and ``_observe``.

    Args:
        num_envs: how many environments.
        max_episode_steps: when an episode is truncated; None: when gymnasium's is; -1: never.
        render_mode: accepted for the sake of code written for gymnasium; `render` always gives an RGB array.
        **parameters: numbers or arrays ``[num_envs]`` in place of the ``defaults``.

    Raises:
        UsageError: an unknown parameter, or one that is no number and has no entry for each environment.
    """

    gymnasium_id: ClassVar[str]  # the environment that this equals at default parameters, and that draws it
    defaults: ClassVar[dict[str, float]]
    default_steps: ClassVar[int]

    state: np.ndarray  # [k, n], float64 except where gymnasium keeps float32

    def __init__(
        self,
        num_envs: int,
        *,
        max_episode_steps: int | None = None,
        render_mode: str | None = "rgb_array",
        **parameters: ArrayLike,
    ) -> None:
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP, "render_modes": ["rgb_array"]}
        steps = self.default_steps if max_episode_steps is None else max_episode_steps
        self.max_episode_steps = None if steps == -1 else steps
        self._limit = _NEVER if steps == -1 else steps
        for name, value in parameters.items():
            if name not in self.defaults:
                raise UsageError(
                    f"{type(self).__name__} has no parameter '{name}'; {nearest(name, self.defaults)}"
                )
            if np.shape(value) not in ((), (num_envs,)):
                raise UsageError(
                    f"{type(self).__name__}: '{name}' must be a number or an array [{num_envs}], one for each "
                    f"environment, but its shape is {list(np.shape(value))}."
                )
        self.parameters = {
            name: np.full(num_envs, parameters.get(name, default), np.float64)
            for name, default in self.defaults.items()
        }
        self._prepare(SimpleNamespace(**self.parameters))
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._clock = 0  # steps since the reset
        self._deadline = np.full(num_envs, self._limit)  # the step at which each row is truncated
        self._renderer: gymnasium.Env | None = None

    def _prepare(self, p: SimpleNamespace) -> None:
        """Set the single spaces, and keep the constants ``[n]`` that the equations need, from the parameters."""
        raise NotImplementedError

    def _start(self, count: int) -> np.ndarray:
        """``[k, count]`` states to begin with, drawn from ``self.np_random``."""
        raise NotImplementedError

    def _advance(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Move ``self.state`` on by one step; the reward float32 ``[n]`` and terminated ``[n]``, both fresh."""
        raise NotImplementedError

    def _observe(self) -> np.ndarray:
        """The observations of ``self.state``, a fresh float32 ``[n, ...]``."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | list[int] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """Begin new episodes everywhere; a ``seed`` starts the random numbers anew. With a list of them, one for each
        environment, those with the same one begin in the same state."""
        if isinstance(seed, list):
            starts: dict[int, np.ndarray] = {}
            for value in dict.fromkeys(seed):
                super().reset(seed=value)
                starts[value] = self._start(1)
            self.state = np.concatenate([starts[value] for value in seed], axis=1)
        else:
            super().reset(seed=seed)
            self.state = self._start(self.num_envs)
        self._clock = 0
        self._deadline[:] = self._limit
        return self._observe(), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of all environments; see the class for what comes back."""
        reward, terminated = self._advance(actions)
        self._clock += 1
        truncated = self._deadline <= self._clock
        observation = self._observe()
        if not (np.count_nonzero(terminated) or np.count_nonzero(truncated)):
            return observation, reward, terminated, truncated, {}
        truncated &= ~terminated
        ended = np.flatnonzero(terminated | truncated)
        self.state[:, ended] = self._start(len(ended))
        self._deadline[ended] = self._clock + self._limit
        return self._observe(), reward, terminated, truncated, {"final_obs": observation}

    def render(self, row: int = 0) -> np.ndarray:  # type: ignore[override]
        """Environment ``row`` as gymnasium draws it: ``uint8 [height, width, 3]``.

        Raises:
            UsageError: pygame, with which gymnasium draws, is not installed.
        """
        if self._renderer is None:
            self._renderer = gymnasium.make(self.gymnasium_id, render_mode="rgb_array").unwrapped
        for name, value in self.parameters.items():
            setattr(self._renderer, self._gymnasium_name(name), float(value[row]))
        self._show(self._renderer, row)
        try:
            return np.asarray(self._renderer.render())
        except gymnasium.error.DependencyNotInstalled as error:
            raise UsageError(
                'Pictures of classic control need pygame: pip install "gymnasium[classic-control]".'
            ) from error

    def _gymnasium_name(self, parameter: str) -> str:
        return parameter

    def _show(self, renderer: Any, row: int) -> None:
        """Put ``row`` into gymnasium's single environment, to be drawn."""
        renderer.state = self.state[:, row]

    def close_extras(self, **kwargs: Any) -> None:
        """Close the window that drew."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def state_dict(self) -> dict[str, Any]:
        """States, deadlines and the random generator's state."""
        return {
            "state": torch.from_numpy(self.state.copy()),
            "clock": self._clock,
            "deadline": torch.from_numpy(self._deadline.copy()),
            "random": self.np_random.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly from a ``state_dict`` of environments with the same parameters."""
        self.state = state["state"].numpy().copy()
        self._clock, self._deadline = state["clock"], state["deadline"].numpy().copy()
        self.np_random.bit_generator.state = state["random"]
