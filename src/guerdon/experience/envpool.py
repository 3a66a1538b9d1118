"""EnvPool's environments (Weng et al., 2022; C++, stepped on threads) as gymnasium's vector environments."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from guerdon.errors import UsageError


class EnvPool(VectorEnv):
    """``num_envs`` environments of EnvPool's ``env_id``, reset in the step that ends an episode.

    EnvPool by itself resets at the step after the end, which then ignores its action; here the environments that
    ended are reset at once, and ``infos["final_obs"]`` has what they showed last. Environments and options are
    EnvPool's own, and need not equal gymnasium's of the same name: its Atari comes preprocessed, and an episode
    that terminates in the very last step that it is allowed is called truncated only.

    Args:
        env_id: one of EnvPool's ids, such as ``Pong-v5``.
        num_envs: how many.
        **options: EnvPool's, such as ``num_threads`` or, for Atari, ``stack_num``.

    Raises:
        UsageError: EnvPool is not installed, does not have the id, or refuses an option.
    """

    def __init__(self, env_id: str, num_envs: int, **options: Any) -> None:
        try:
            import envpool
        except ImportError as error:
            raise UsageError(
                "The envpool backend needs EnvPool, which is not installed: pip install envpool"
            ) from error
        known = envpool.list_all_envs()
        if env_id not in known:
            close = difflib.get_close_matches(env_id, known, n=3)
            raise UsageError(
                f"EnvPool has no {env_id}; {'near it: ' + ', '.join(close) if close else 'see its list'}"
            )
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}
        self._make = lambda seed: envpool.make_gymnasium(env_id, num_envs=num_envs, seed=seed, **options)
        self._pool: Any = None
        try:
            spec = envpool.make_spec(env_id, num_envs=num_envs, **options)
        except (TypeError, ValueError, AssertionError) as error:
            raise UsageError(f"EnvPool cannot make {env_id}: {error}") from error
        # the specification describes a single environment
        self.single_observation_space = spec.gymnasium_observation_space
        self.single_action_space = spec.gymnasium_action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin new episodes everywhere. EnvPool takes its seed (31 bits) when it is made, so a ``seed`` makes a
        new pool."""
        if seed is not None or self._pool is None:
            self._pool = self._make(0 if seed is None else seed)
        return self._pool.reset()[0], {}

    def step(self, actions: np.ndarray) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One step of all environments, and a reset of those that ended."""
        observation, reward, terminated, truncated, _ = self._pool.step(actions)
        ended = np.flatnonzero(terminated | truncated)
        if not len(ended):
            return observation, reward, terminated, truncated, {}
        fresh, _ = self._pool.reset(ended.astype(np.int32))
        return (
            _with_rows(observation, ended, fresh),
            reward,
            terminated,
            truncated,
            {"final_obs": observation},
        )

    def render(self, row: int = 0) -> np.ndarray | None:  # type: ignore[override]
        """Environment ``row`` as EnvPool draws it, where it was made with ``render_mode="rgb_array"``."""
        picture = self._pool.render(row)
        return None if picture is None else np.asarray(picture).reshape(np.shape(picture)[-3:])

    def close_extras(self, **kwargs: Any) -> None:
        """End the pool's threads."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _with_rows(observation: Any, rows: np.ndarray, fresh: Any) -> Any:
    """A copy of ``observation`` with ``fresh`` in ``rows``."""
    if isinstance(observation, dict):
        return {key: _with_rows(part, rows, fresh[key]) for key, part in observation.items()}
    copy = observation.copy()
    copy[rows] = fresh
    return copy
