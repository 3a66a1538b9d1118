"""The vector environment around any robot of `robots`."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from guerdon.errors import CheckpointError, ShapeError, UsageError
from guerdon.tasks.locomotion.physics import Physics
from guerdon.tasks.locomotion.robots import Robot


class Locomotion(VectorEnv):
    """``num_envs`` robots of one kind, equal to gymnasium's ``SyncVectorEnv`` of the same id in SAME_STEP mode: the
    same seed and actions give the same observations, rewards and ends, bit for bit (the double pendulum's rewards up
    to rounding). Two things differ: a step that ends an episode and is also its last allowed one counts as terminated
    alone, and ``infos`` holds ``final_obs`` and nothing else.

    The physics runs on the calling thread and on ``threads - 1`` of its own, which sleep between steps. They are
    beside torch's: ``torch.set_num_threads`` and ``OMP_NUM_THREADS`` say nothing about them, and in a loop that acts
    and learns by turns the two never work at the same time.

    Args:
        env_id: gymnasium's id, which gives the camera and the length of an episode.
        robot: what the robots are and how they are judged.
        num_envs: how many.
        threads: see `make_locomotion`.
        max_episode_steps: steps after which an episode is cut; None: gymnasium's number for the id.
        dtype: of the observations. Rewards are float64, as gymnasium's.
        width, height: of a picture.
        render_mode: ``"rgb_array"`` or None; pictures can be had in either case.
    """

    def __init__(
        self,
        env_id: str,
        robot: Robot,
        num_envs: int,
        threads: int | None = None,
        max_episode_steps: int | None = None,
        dtype: Any = np.float32,
        width: int = 480,
        height: int = 480,
        render_mode: str | None = "rgb_array",
    ) -> None:
        spec = gymnasium.spec(env_id)
        limit = (spec.max_episode_steps or 0) if max_episode_steps is None else max_episode_steps
        for name, value in (("num_envs", num_envs), ("threads", threads), ("max_episode_steps", limit)):
            if value is not None and value < 1:
                raise UsageError(f"{env_id}: {name} is {value}; it must be at least 1.")
        if render_mode not in (None, "rgb_array"):
            raise UsageError(f"{env_id} has no render mode '{render_mode}'; the only one is 'rgb_array'.")
        self.env_id, self.robot, self.num_envs, self.render_mode = env_id, robot, num_envs, render_mode
        self.max_episode_steps = limit
        self.metadata = {
            "autoreset_mode": AutoresetMode.SAME_STEP,
            "render_modes": ["rgb_array"],
            "render_fps": round(1 / robot.dt),
        }
        self._physics = Physics(
            robot.model, num_envs, robot.frame_skip, robot.read, robot.contact_forces, threads
        )
        self.threads = self._physics.threads
        self._dtype = np.dtype(dtype)
        shape = robot.observe(self._physics.read()).shape[1:]
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, self._dtype.type)
        low, high = robot.model.actuator_ctrlrange.astype(np.float32).T
        self.single_action_space = gymnasium.spaces.Box(low, high, dtype=np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._action_shape = (num_envs, robot.model.nu)
        self._generators = [seeding.np_random(None)[0] for _ in range(num_envs)]
        self._rows: np.ndarray | None = None  # what was read after the last step
        self._clock = 0
        self._began = np.zeros(num_envs, np.int64)  # the clock when each row's episode began
        self._next_cut = limit  # no episode is cut before the clock says so
        self._picture = {"width": width, "height": height, **self._camera(spec)}
        self._renderer: Any = None

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin new episodes everywhere.

        Args:
            seed: row ``i`` is seeded with ``seed + i``, or with ``seed[i]``, as gymnasium's are; None: its random
                numbers go on.
            options: not used.

        Returns:
            Observations ``[n, ...]`` and an empty dict.
        """
        if seed is not None:
            seeds = (
                [seed + row for row in range(self.num_envs)]
                if isinstance(seed, int | np.integer)
                else list(seed)
            )
            if len(seeds) != self.num_envs:
                raise ShapeError(f"{self.env_id}: {len(seeds)} seeds for {self.num_envs} environments.")
            for row, value in enumerate(seeds):
                if value is not None:
                    self._generators[row] = seeding.np_random(int(value))[0]
        return self._begin(range(self.num_envs)), {}

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Take ``actions [n, nu]`` everywhere; rows whose episode ended begin a new one at once.

        Returns:
            Observations ``[n, ...]``, rewards float64 ``[n]``, terminated and truncated bool ``[n]`` (never both),
            and infos: where a row ended, ``final_obs [n, ...]``, valid in the rows that did.

        Raises:
            ShapeError: the actions have the wrong shape.
            UsageError: there was no ``reset`` before.
        """
        actions = np.asarray(actions)
        if actions.shape != self._action_shape:
            raise ShapeError(
                f"{self.env_id}: actions of shape {list(actions.shape)}, expected {list(self._action_shape)}."
            )
        before = self._rows
        if before is None:
            raise UsageError(f"{self.env_id}: call reset before step.")
        self._physics.step(actions)
        self._rows = rows = self._physics.read()
        self._clock += 1
        reward, terminated = self.robot.judge(before, rows, actions)
        observation = self.robot.observe(rows).astype(self._dtype)
        if self._clock < self._next_cut:
            truncated = np.zeros(self.num_envs, bool)
            if not self.robot.falls or not np.count_nonzero(terminated):
                return observation, reward, terminated, truncated, {}
        else:
            truncated = (self._clock - self._began >= self.max_episode_steps) & ~terminated
        ended = np.flatnonzero(terminated | truncated)
        if not len(ended):
            return observation, reward, terminated, truncated, {}
        return self._begin(ended), reward, terminated, truncated, {"final_obs": observation}

    def _begin(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """New episodes in ``rows``; the observations of all."""
        for row in rows:
            self._physics.place(row, *self.robot.start(self._generators[row]))
            self._began[row] = self._clock
        self._next_cut = int(self._began.min()) + self.max_episode_steps
        self._rows = self._physics.read()
        return self.robot.observe(self._rows).astype(self._dtype)

    def _camera(self, spec: EnvSpec) -> dict[str, Any]:
        """The model's camera that follows the robot, which gymnasium 1.4 leaves standing unless it is asked for; of
        models that have none, gymnasium's own view."""
        if mujoco.mj_name2id(self.robot.model, mujoco.mjtObj.mjOBJ_CAMERA, "track") >= 0:
            return {"camera_name": "track"}
        view = inspect.signature(load_env_creator(str(spec.entry_point))).parameters["default_camera_config"]
        return {"default_cam_config": view.default}

    def render(self) -> np.ndarray:  # type: ignore[override]
        """A picture of row 0, uint8 ``[height, width, 3]``, drawn off screen by gymnasium's renderer.

        Raises:
            UsageError: no off-screen OpenGL.
        """
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        if self._renderer is None:
            offscreen = self.robot.model.vis.global_
            offscreen.offwidth = max(offscreen.offwidth, self._picture["width"])
            offscreen.offheight = max(offscreen.offheight, self._picture["height"])
            self._renderer = MujocoRenderer(self.robot.model, self._physics.data[0], **self._picture)
        try:
            return self._renderer.render("rgb_array")
        except Exception as error:  # each OpenGL library fails in a way of its own
            self._renderer = None
            raise UsageError(
                f"{self.env_id} cannot draw: no off-screen OpenGL ({error}); install EGL or OSMesa and set "
                "MUJOCO_GL=egl or MUJOCO_GL=osmesa before Python starts."
            ) from error

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads and the renderer."""
        self._physics.close()
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def state_dict(self) -> dict[str, Any]:
        """Where every row stands: physics with the solver's warm start, time in the episode, random numbers."""
        return {
            "id": self.env_id,
            "physics": torch.from_numpy(self._physics.state()),
            "rows": None if self._rows is None else torch.from_numpy(self._rows.copy()),
            "steps": torch.from_numpy(self._clock - self._began),
            "generators": [generator.bit_generator.state for generator in self._generators],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, to the bit where it was made by the same version of MuJoCo.

        Raises:
            CheckpointError: the state is of another robot or another number of them.
        """
        physics = state["physics"].numpy()
        if state["id"] != self.env_id or physics.shape != self._physics.state().shape:
            raise CheckpointError(
                f"The checkpoint holds {len(physics)} x {state['id']}, and this run has {self.num_envs} x "
                f"{self.env_id}; resume it with the same environments."
            )
        self._physics.set_state(physics)
        self._rows = None if state["rows"] is None else state["rows"].numpy().copy()
        self._clock = 0
        self._began = -state["steps"].numpy()
        self._next_cut = int(self._began.min()) + self.max_episode_steps
        for generator, value in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = value
