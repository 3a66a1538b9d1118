"""Vector environments: any gymnasium id, module or function, n at a time, behind one small checked class.

``make`` finds the quickest implementation of an id (array operations for all n environments at once, MuJoCo on
threads, EnvPool, or gymnasium's own environments in a row), and `Environments` steps it: clips and checks the
actions, checks what comes back, resets rows that ended in the same step, and keeps the returns and lengths of the
episodes. Arrays are numpy's; float observations are float32, pixels stay uint8.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, SupportsFloat

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from guerdon.errors import CheckpointError, GuerdonError, ShapeError, UsageError, nearest
from guerdon.randomness import mix

Arrays = Any  # an array [n, ...], or for dict observations a dict of them
Backend = Literal["auto", "array", "mujoco", "envpool", "gymnasium"]

_CLASSIC = "guerdon.tasks.classic"
_LOCOMOTION = "guerdon.tasks.locomotion:make_locomotion"

# Named by strings, for tasks stand on a higher floor: they are imported when an id is asked for.
ARRAY = {
    "CartPole-v0": f"{_CLASSIC}:CartPole",
    "CartPole-v1": f"{_CLASSIC}:CartPole",
    "Pendulum-v1": f"{_CLASSIC}:Pendulum",
    "Acrobot-v1": f"{_CLASSIC}:Acrobot",
    "MountainCar-v0": f"{_CLASSIC}:MountainCar",
    "MountainCarContinuous-v0": f"{_CLASSIC}:MountainCarContinuous",
}
MUJOCO = dict.fromkeys(
    (
        "Ant-v5",
        "HalfCheetah-v5",
        "Hopper-v5",
        "Humanoid-v5",
        "HumanoidStandup-v5",
        "InvertedDoublePendulum-v5",
        "InvertedPendulum-v5",
        "Pusher-v5",
        "Reacher-v5",
        "Swimmer-v5",
        "Walker2d-v5",
    ),
    _LOCOMOTION,
)

# Environments of this library's own that gymnasium knows once their module is imported.
OWN = {"guerdon/Warehouse": "guerdon.tasks.warehouse", "guerdon/Series": "guerdon.tasks.series"}


class EnvironmentFailure(GuerdonError):  # noqa: N818
    """An environment that raised, or whose observation or reward has the wrong shape or is not finite."""


class Step(NamedTuple):
    """What followed one action in each of n environments.

    ``observation [n, ...]`` is the one to act on next: after the reset, where an episode ended. ``reward [n]``
    float32, ``terminated [n]`` and ``truncated [n]`` bool, never both. ``final``: None when no episode ended, else
    like ``observation``; its rows are valid where ``terminated | truncated`` and hold the last observation of the
    episode that ended.
    """

    observation: Arrays
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    final: Arrays | None


class Environments:
    """n environments stepped together and checked at every step. Made by `make`.

    ``id``, ``n``, ``backend`` and ``seed`` say what they are; ``observation_space`` and ``action_space`` are those of
    a single environment; ``observation`` is the present one, to act on next (None before the first ``reset``).
    ``env`` is the `gymnasium.vector.VectorEnv` inside, in SAME_STEP autoreset mode.

    Raises:
        UsageError: for observation or action spaces that are not Box, Discrete, MultiDiscrete, MultiBinary or (for
            observations only) a Dict of these.
    """

    def __init__(
        self, env: VectorEnv, env_id: str, seed: int, backend: str, clip_actions: bool = True
    ) -> None:
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise UsageError(
                f"The vector environment {env_id} does not reset in the same step that ends an episode; make it with "
                "autoreset_mode=AutoresetMode.SAME_STEP."
            )
        self.env, self.id, self.n, self.backend, self.seed = env, env_id, env.num_envs, backend, seed
        self.observation_space = _float32(env.single_observation_space, env_id)
        self.action_space = env.single_action_space
        if not isinstance(
            self.action_space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
        ):
            raise UsageError(
                f"{env_id} takes actions from {self.action_space}; a controller gives Box, Discrete, MultiDiscrete or "
                "MultiBinary actions, so wrap the environment to take one of these."
            )
        self.action_space.seed(seed)
        self.observation: Arrays | None = None
        self.saveable = hasattr(env, "state_dict") and hasattr(env, "load_state_dict")

        self._action_shape: tuple[int, ...] = (self.n, *(self.action_space.shape or ()))
        self._action_dtype = np.dtype(np.int64)
        self._start: Any = getattr(
            self.action_space, "start", None
        )  # a discrete space may count from elsewhere
        if not np.any(self._start):
            self._start = None
        self._choices = int(self.action_space.n) if isinstance(self.action_space, spaces.Discrete) else None
        self._range: tuple[np.ndarray, np.ndarray] | None = None
        if isinstance(self.action_space, spaces.Box):
            self._action_dtype = self.action_space.dtype
            if clip_actions:  # a copy for each row: to broadcast takes numpy twice as long
                low, high = self.action_space.low, self.action_space.high
                self._range = np.stack([low] * self.n), np.stack([high] * self.n)
        # the plain case, one float32 array of the right shape, is recognised without a walk through the spaces
        plain = isinstance(self.observation_space, spaces.Box) and self.observation_space.dtype == np.float32
        self._plain_shape = (self.n, *(self.observation_space.shape or ())) if plain else None

        self._resets = 0
        self._steps = 0
        self._clear_episodes()
        self._finished: list[tuple[float, int]] = []

    def _clear_episodes(self) -> None:
        self._return = np.zeros(self.n)
        self._began = np.full(self.n, self._steps)  # the step at which each row's episode began

    def reset(self, seeds: Sequence[int] | None = None) -> Arrays:
        """Begin new episodes in all environments and return their observations ``[n, ...]``.

        Args:
            seeds: ``n`` numbers, one a row; rows with the same one begin alike. None: the random numbers follow from the
                seed and the number of resets so far, the same in every run.

        Raises:
            EnvironmentFailure: an environment raised or returned something that is no observation.
            UsageError: ``seeds`` for environments whose rows cannot be seeded one by one (EnvPool's).
        """
        # rows are seeded with consecutive numbers by gymnasium, and EnvPool wants 31 bits
        seed: Any = mix(self.seed, self._resets) % (2**31 - self.n)
        if seeds is not None:
            if self.backend == "envpool" or len(seeds) != self.n:
                raise UsageError(
                    f"{self.id} ({self.backend}, {self.n} rows) cannot begin from {len(seeds)} seeds, one a row; take "
                    "another backend, or as many seeds as rows"
                )
            seed = list(seeds)
        self._resets += 1
        self._steps = 0
        self._clear_episodes()
        try:
            observation, _ = self.env.reset(seed=seed)
        except Exception as error:
            raise self._failure(error) from error
        self.observation = self._checked(observation, np.ones(self.n, bool), None)
        return self.observation

    def step(self, action: np.ndarray) -> Step:
        """Take ``action [n, ...]``, in the environment's own range (actions beyond a Box are clipped to it; a discrete
        action counts from 0), in all environments.

        Raises:
            ShapeError: the action has the wrong shape.
            UsageError: there was no ``reset`` before, or a discrete action that is out of range.
            EnvironmentFailure: an environment raised, or returned a wrong shape or a number that is not finite.
        """
        if self.observation is None:
            raise UsageError(f"{self.id}: call reset() before step().")
        action = np.asarray(action, self._action_dtype)
        if action.shape != self._action_shape:
            raise ShapeError(
                f"{self.id} takes actions of shape {list(self._action_shape)} but got {list(action.shape)}."
            )
        if self._choices is not None and action.view(np.uint64).max() >= self._choices:  # negative ones too
            raise UsageError(
                f"{self.id} takes actions from 0 to {self._choices - 1} but got {_short(action)}; fit the policy's "
                "number of actions to the environment."
            )
        if self._range is not None:
            action = np.minimum(np.maximum(action, self._range[0]), self._range[1])
        elif self._start is not None:
            action = action + self._start

        try:
            observation, reward, terminated, truncated, infos = self.env.step(action)
        except Exception as error:
            raise self._failure(error, action) from error
        self._steps += 1

        reward = np.asarray(reward, np.float32)
        if reward.shape != (self.n,):
            raise self._failure(f"returned rewards of shape {list(reward.shape)}, not {[self.n]}", action)
        if not math.isfinite(np.vdot(reward, reward)) and not np.isfinite(reward).all():
            row = int(np.flatnonzero(~np.isfinite(reward))[0])
            raise self._failure(f"returned the reward {reward[row]}", action, row)
        self._return += reward

        done = terminated | truncated
        final = None
        if np.count_nonzero(done):
            # An end that the task itself brought is known to be worth nothing after it; that the time ran out in the
            # same step adds nothing. To bootstrap there would be wrong, so terminated wins.
            truncated = truncated & ~terminated
            final = self._checked(_stacked(infos["final_obs"], observation), done, action)
            for ended in np.flatnonzero(done):
                self._finished.append((float(self._return[ended]), int(self._steps - self._began[ended])))
            self._return[done] = 0.0
            self._began[done] = self._steps
        self.observation = self._checked(observation, None, action)
        return Step(self.observation, reward, terminated, truncated, final)

    def finished(self) -> list[tuple[float, int]]:
        """``(return, length)`` of every episode that ended since this was last asked, in order."""
        finished, self._finished = self._finished, []
        return finished

    def render(self) -> np.ndarray:
        """An RGB picture of the first environment, uint8 ``[height, width, 3]``.

        Raises:
            UsageError: it gives none; gymnasium's environments want ``make(..., render_mode="rgb_array")``.
        """
        picture = self.env.envs[0].render() if isinstance(self.env, SyncVectorEnv) else self.env.render()
        if not isinstance(picture, np.ndarray):
            raise UsageError(
                f'{self.id} gives no picture; make it with render_mode="rgb_array" (backend: {self.backend}).'
            )
        return picture

    def close(self) -> None:
        """Give back what the environments hold (windows, threads)."""
        self.env.close()

    def state_dict(self) -> dict[str, Any]:
        """Where the environments stand: theirs, random numbers included, if they are ``saveable``, and the episode
        statistics."""
        state: dict[str, Any] = {
            "id": self.id,
            "n": self.n,
            "resets": self._resets,
            "steps": self._steps,
            "finished": [list(episode) for episode in self._finished],
            "environment": None,
        }
        if self.saveable and self.observation is not None:
            state["environment"] = self.env.state_dict()  # type: ignore[attr-defined]
            state["observation"] = _map(torch.from_numpy, self.observation)
            state["return"] = torch.from_numpy(self._return.copy())
            state["began"] = torch.from_numpy(self._began.copy())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``. Environments that cannot be saved begin new episodes, with random numbers that were
        not used before; in both cases ``observation`` is the one to act on next.

        Raises:
            CheckpointError: the state is of another environment or another number of them.
        """
        if (state["id"], state["n"]) != (self.id, self.n):
            raise CheckpointError(
                f"The checkpoint holds {state['n']} x {state['id']}, and this run has {self.n} x {self.id}; resume it "
                "with the same environments."
            )
        self._resets, self._steps = state["resets"], state["steps"]
        self._finished = [(value, length) for value, length in state["finished"]]
        if state["environment"] is not None and self.saveable:
            self.env.load_state_dict(state["environment"])  # type: ignore[attr-defined]
            self.observation = _map(lambda tensor: tensor.numpy().copy(), state["observation"])
            self._return = state["return"].numpy().copy()
            self._began = state["began"].numpy().copy()
        elif self._resets:
            self.reset()

    def _checked(self, value: Arrays, rows: np.ndarray | None, action: np.ndarray | None) -> Arrays:
        """``value`` as float32 (or integer) arrays of the right shapes, finite in ``rows`` (None: all)."""
        if (
            self._plain_shape is not None
            and isinstance(value, np.ndarray)
            and value.dtype == np.float32
            and value.shape == self._plain_shape
        ):
            # One pass of BLAS. The sum of squares may overflow where the numbers do not, hence the second look.
            if math.isfinite(np.vdot(value, value)):
                return value
        else:
            try:
                value = _as_arrays(self.observation_space, value, self.n)
            except ShapeError as error:
                raise self._failure(str(error), action) from None
        for name, array in _leaves(value):
            if array.dtype.kind == "f":
                bad = ~np.isfinite(array).reshape(self.n, -1).all(1)
                bad = bad if rows is None else bad & rows
                if bad.any():
                    row = int(np.flatnonzero(bad)[0])
                    raise self._failure(
                        f"returned the observation{name} {_short(array[row])}, which is not finite",
                        action,
                        row,
                    )
        return value

    def _failure(
        self, problem: Exception | str, action: np.ndarray | None = None, row: int | None = None
    ) -> EnvironmentFailure:
        if isinstance(problem, _RowError):
            row, problem = problem.row, problem.problem
        if isinstance(problem, Exception):
            problem = f"raised {type(problem).__name__}: {problem}"
        which = "" if row is None else f", row {row}"
        taken = ""
        if action is not None:
            taken = f"; the action taken was {_short(action if row is None else action[row])}"
        return EnvironmentFailure(
            f"The environment {self.id} ({self.backend}, seed {self.seed}{which}) {problem}, after {self._steps} steps "
            f"since its reset{taken}; mend the environment, or leave it out."
        )


def make(
    env_id: str | Callable[..., gymnasium.Env],
    n: int,
    seed: int,
    backend: Backend = "auto",
    clip_actions: bool = True,
    **kwargs: Any,
) -> Environments:
    """``n`` environments of one kind, seeded: two runs with the same seed and actions are identical.

    Args:
        env_id: any id that ``gymnasium.make`` knows (``"module:Name-v0"`` imports the module first), or a function
            that returns a ``gymnasium.Env``.
        n: how many.
        seed: of all their random numbers.
        backend: ``"array"`` steps all n by one set of array operations, ``"mujoco"`` steps them on threads,
            ``"envpool"`` in EnvPool's C++, ``"gymnasium"`` one after the other; ``"auto"`` takes the first that has
            the id and equals gymnasium's own environment.
        clip_actions: clip Box actions to the environment's range before they are taken.
        **kwargs: for the environment itself.

    Raises:
        UsageError: no such id, backend or keyword argument, or spaces that no controller fits.
    """
    if n < 1:
        raise UsageError(f"At least one environment is needed, not {n}.")
    name = env_id if isinstance(env_id, str) else getattr(env_id, "__name__", type(env_id).__name__)
    if not isinstance(env_id, str) and backend not in ("auto", "gymnasium"):
        raise UsageError(f"{name} is a function, which only the gymnasium backend steps, not '{backend}'.")
    for prefix, module in OWN.items():
        if isinstance(env_id, str) and env_id.startswith(prefix):
            importlib.import_module(module)
    if backend == "auto":
        backend, env = _auto(env_id, n, kwargs)
    elif backend in ("array", "mujoco"):
        table = ARRAY if backend == "array" else MUJOCO
        if env_id not in table:
            raise UsageError(f"The {backend} backend has no {env_id}; {nearest(name, table)}")
        env = _fast(env_id, n, table[env_id], kwargs)
    elif backend == "envpool":
        from guerdon.experience.envpool import EnvPool

        env = EnvPool(name, n, **kwargs)
    elif backend == "gymnasium":
        env = _in_a_row(env_id, n, kwargs)
    else:
        raise UsageError(
            f"There is no backend '{backend}'; {nearest(backend, ('auto', 'array', 'mujoco', 'envpool', 'gymnasium'))}"
        )
    return Environments(env, name, seed, backend, clip_actions)


def _auto(env_id: str | Callable, n: int, kwargs: dict) -> tuple[Backend, VectorEnv]:
    if env_id in ARRAY:
        return "array", _fast(env_id, n, ARRAY[env_id], kwargs)
    if env_id in MUJOCO:
        try:
            return "mujoco", _fast(env_id, n, MUJOCO[env_id], kwargs)
        except ImportError:  # not installed: gymnasium says what to install
            pass
    if _only_vector(env_id):
        try:
            return "array", gymnasium.make_vec(
                str(env_id), n, vectorization_mode="vector_entry_point", **kwargs
            )
        except TypeError as error:
            raise UsageError(f"The environment {env_id} cannot be made: {error}") from error
    return "gymnasium", _in_a_row(env_id, n, kwargs)


def _only_vector(env_id: str | Callable) -> bool:
    """Whether an id was registered with a vector environment and no single one."""
    if not isinstance(env_id, str):
        return False
    module, colon, name = env_id.rpartition(":")
    if colon:
        with contextlib.suppress(ImportError):  # gymnasium will say so
            importlib.import_module(module)
    spec = gymnasium.registry.get(name)
    return spec is not None and spec.entry_point is None and spec.vector_entry_point is not None


def _fast(env_id: str, n: int, entry: str, kwargs: dict) -> VectorEnv:
    module, _, name = entry.partition(":")
    factory = getattr(importlib.import_module(module), name)
    if entry == _LOCOMOTION:
        return factory(env_id, n, **kwargs)
    return factory(n, **{"max_episode_steps": gymnasium.spec(env_id).max_episode_steps, **kwargs})


def _in_a_row(env_id: str | Callable, n: int, kwargs: dict) -> VectorEnv:
    """gymnasium's own vector environment over n single ones."""

    def single(row: int) -> gymnasium.Env:
        return _Row(gymnasium.make(env_id, **kwargs) if isinstance(env_id, str) else env_id(**kwargs), row)

    try:
        return SyncVectorEnv(
            [partial(single, row) for row in range(n)], autoreset_mode=AutoresetMode.SAME_STEP
        )
    except gymnasium.error.UnregisteredEnv as error:
        raise UsageError(
            f"gymnasium has no environment {env_id}; {nearest(str(env_id), gymnasium.registry)} (EnvPool's ids want "
            'backend="envpool")'
        ) from error
    except GuerdonError:
        raise
    except Exception as error:
        raise UsageError(f"{env_id} cannot be made: {type(error).__name__}: {error}") from error


class _RowError(Exception):
    """What went wrong in which row."""

    def __init__(self, row: int, problem: Exception | str) -> None:
        super().__init__(row, problem)
        self.row, self.problem = row, problem


class _Row(gymnasium.Wrapper):
    """One of the environments in a row: its errors say which. Its infos, of whatever form, go no further."""

    def __init__(self, env: gymnasium.Env, row: int) -> None:
        super().__init__(env)
        self.row = row

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        try:
            observation, _ = self.env.reset(**kwargs)
        except Exception as error:
            raise _RowError(self.row, error) from error
        return self._fitting(observation), {}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict]:
        try:
            observation, reward, terminated, truncated, _ = self.env.step(action)
        except Exception as error:
            raise _RowError(self.row, error) from error
        return self._fitting(observation), reward, terminated, truncated, {}

    def _fitting(self, observation: Any) -> Any:
        space = self.observation_space
        if isinstance(space, spaces.Box) and np.shape(observation) != space.shape:
            raise _RowError(
                self.row,
                f"returned an observation of shape {list(np.shape(observation))}, not {list(space.shape)}",
            )
        return observation


def _float32(space: spaces.Space, env_id: str) -> spaces.Space:
    """The space with every floating Box as float32."""
    if isinstance(space, spaces.Dict):
        return spaces.Dict({key: _float32(part, env_id) for key, part in space.spaces.items()})
    if isinstance(space, spaces.Box):
        if space.dtype.kind != "f" or space.dtype == np.float32:
            return space
        with np.errstate(over="ignore"):  # bounds such as float64's largest become infinite
            return spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        return space
    raise UsageError(
        f"{env_id} has observations from {space}, which are no arrays; wrap it, for instance in "
        "gymnasium.wrappers.FlattenObservation."
    )


def _as_arrays(space: spaces.Space, value: Arrays, n: int) -> Arrays:
    """``value`` in the dtypes of ``space``; ShapeError where it is not ``[n, *space.shape]``."""
    if isinstance(space, spaces.Dict):
        if not isinstance(value, dict) or set(value) != set(space.spaces):
            raise ShapeError(f"returned an observation that is no dict of {', '.join(space.spaces)}")
        return {key: _as_arrays(part, value[key], n) for key, part in space.spaces.items()}
    array = np.asarray(value, space.dtype)
    shape = (n, *(space.shape or ()))
    if array.shape != shape:
        raise ShapeError(f"returned observations of shape {list(array.shape)}, not {list(shape)}")
    return array


def _stacked(final: Any, like: Arrays) -> Arrays:
    """gymnasium's list of last observations (None where no episode ended) as arrays like ``like``."""
    if not (isinstance(final, np.ndarray) and final.dtype == object):
        return final
    ended = {row: value for row, value in enumerate(final) if value is not None}

    def stack(values: dict[int, Any], like: Arrays) -> Arrays:
        if isinstance(like, dict):
            return {key: stack({row: value[key] for row, value in values.items()}, like[key]) for key in like}
        array = np.zeros_like(like)
        for row, value in values.items():
            array[row] = value
        return array

    return stack(ended, like)


def _leaves(value: Arrays, name: str = "") -> list[tuple[str, np.ndarray]]:
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in _leaves(part, f"{name}['{key}']")]
    return [(name, value)]


def _map(function: Callable, value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _map(function, part) for key, part in value.items()}
    return function(value)


def _short(array: np.ndarray) -> str:
    return np.array2string(np.asarray(array), threshold=20, precision=4).replace("\n", " ")
