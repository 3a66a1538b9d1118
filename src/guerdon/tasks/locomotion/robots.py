"""The robots: what is read from the physics, and from it, for all rows at once, observation, reward and end.

Rules, numbers and names are those of gymnasium's v5 environments (https://gymnasium.farama.org/environments/mujoco),
and the models are the XML files in its wheel. Sums are taken in gymnasium's order, so that they round as its do: in
particular what an action costs is float32 where the action is.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import mujoco
import numpy as np
from gymnasium.envs.mujoco.mujoco_env import expand_model_path

from guerdon.errors import UsageError
from guerdon.tasks.locomotion.physics import load

Range = tuple[float, float]


def options(robot: type[Robot]) -> list[str]:
    """The names of a robot's keyword arguments."""
    return [field.name for field in dataclasses.fields(robot)]


@dataclass
class Robot:
    """A kind of robot. Its rows begin with ``qpos`` and ``qvel``; what follows them is up to `extra`.

    Args:
        xml_file: a file of gymnasium's, or a path that starts with ``.``, ``/`` or ``~``.
        frame_skip: physics steps in one step.
    """

    xml_file: str
    frame_skip: int

    contact_forces: ClassVar[bool] = False  # whether cfrc_ext is read
    falls: ClassVar[bool] = True  # whether an episode can end before its time

    def __post_init__(self) -> None:
        try:
            self.model = load(expand_model_path(self.xml_file))
        except (OSError, ValueError) as error:
            raise UsageError(f"The robot's model {self.xml_file} cannot be read: {error}") from error
        self.dt = self.model.opt.timestep * self.frame_skip
        self.nq, self.nv = self.model.nq, self.model.nv
        self.n_state = self.nq + self.nv
        data = mujoco.MjData(self.model)
        self.init_qpos, self.init_qvel = data.qpos.copy(), data.qvel.copy()

    def extra(self, data: mujoco.MjData) -> list[np.ndarray]:
        """Views of what is read besides ``qpos`` and ``qvel``."""
        return []

    def read(self, data: mujoco.MjData) -> list[np.ndarray]:
        """Views of all that is read from one row's data."""
        return [data.qpos, data.qvel, *self.extra(data)]

    def observe(self, rows: np.ndarray) -> np.ndarray:
        """Observations float64 ``[n, ...]`` from rows ``[n, width]``; may be a view."""
        raise NotImplementedError

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reward float64 ``[n]`` and terminated bool ``[n]`` of the step from rows ``before`` to ``rows``."""
        raise NotImplementedError

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """``qpos [nq]`` and ``qvel [nv]`` of a new episode."""
        raise NotImplementedError

    def _noise(
        self, generator: np.random.Generator, scale: float, normal: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """The initial state with uniform noise on positions and normal or uniform noise on velocities."""
        qpos = self.init_qpos + generator.uniform(-scale, scale, self.nq)
        if normal:
            return qpos, self.init_qvel + scale * generator.standard_normal(self.nv)
        return qpos, self.init_qvel + generator.uniform(-scale, scale, self.nv)


def _squared(array: np.ndarray) -> np.ndarray:
    """``[n, k]`` to the sums of squares ``[n]``; the ufunc's own reduction, quicker than ``.sum`` on small arrays."""
    return np.add.reduce(np.square(array), axis=-1)


def _between(array: np.ndarray, limits: Range) -> np.ndarray:
    return (limits[0] < array) & (array < limits[1])


def _clip(array: np.ndarray, low: float, high: float) -> np.ndarray:
    """``np.clip``, at half its overhead."""
    return np.minimum(np.maximum(array, low), high)


@dataclass
class HalfCheetah(Robot):
    """Two legs in a plane; runs. Never falls."""

    xml_file: str = "half_cheetah.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1
    exclude_current_positions_from_observation: bool = True

    falls: ClassVar[bool] = False
    skipped: ClassVar[int] = 1  # coordinates that "current positions" means
    normal: ClassVar[bool] = True  # the noise on initial velocities is normal, not uniform

    def observe(self, rows: np.ndarray) -> np.ndarray:
        return rows[:, self.skipped * self.exclude_current_positions_from_observation : self.n_state]

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        reward = rows[:, 0] - before[:, 0]
        reward /= self.dt
        reward *= self.forward_reward_weight
        reward -= self.ctrl_cost_weight * _squared(action)
        return reward, np.zeros(len(rows), bool)

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._noise(generator, self.reset_noise_scale, self.normal)


@dataclass
class Swimmer(HalfCheetah):
    """Three links in a viscous plane."""

    xml_file: str = "swimmer.xml"
    frame_skip: int = 4
    ctrl_cost_weight: float = 1e-4

    skipped: ClassVar[int] = 2
    normal: ClassVar[bool] = False


@dataclass
class Hopper(Robot):
    """One leg in a plane."""

    xml_file: str = "hopper.xml"
    frame_skip: int = 4
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_state_range: Range = (-100.0, 100.0)
    healthy_z_range: Range = (0.7, math.inf)
    healthy_angle_range: Range = (-0.2, 0.2)
    reset_noise_scale: float = 5e-3
    exclude_current_positions_from_observation: bool = True

    def observe(self, rows: np.ndarray) -> np.ndarray:
        observation = rows[:, int(self.exclude_current_positions_from_observation) : self.n_state].copy()
        velocity = observation[:, -self.nv :]
        np.maximum(velocity, -10, out=velocity)
        np.minimum(velocity, 10, out=velocity)
        return observation

    def healthy(self, rows: np.ndarray) -> np.ndarray:
        """bool ``[n]``: upright, and nothing flew apart."""
        sane = np.logical_and.reduce(_between(rows[:, 2 : self.n_state], self.healthy_state_range), axis=-1)
        upright = _between(rows[:, 1], self.healthy_z_range) & _between(rows[:, 2], self.healthy_angle_range)
        return sane & upright

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        healthy = self.healthy(rows)
        velocity = (rows[:, 0] - before[:, 0]) / self.dt
        reward = self.forward_reward_weight * velocity + healthy * self.healthy_reward
        reward -= self.ctrl_cost_weight * _squared(action)
        return reward, ~healthy & self.terminate_when_unhealthy

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._noise(generator, self.reset_noise_scale, normal=False)


@dataclass
class Walker2d(Robot):
    """Two legs in a plane; walks upright."""

    xml_file: str = "walker2d_v5.xml"
    frame_skip: int = 4
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 1e-3
    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (0.8, 2.0)
    healthy_angle_range: Range = (-1.0, 1.0)
    reset_noise_scale: float = 5e-3
    exclude_current_positions_from_observation: bool = True

    observe = Hopper.observe
    judge = Hopper.judge
    start = Hopper.start

    def healthy(self, rows: np.ndarray) -> np.ndarray:
        """bool ``[n]``: upright."""
        return _between(rows[:, 1], self.healthy_z_range) & _between(rows[:, 2], self.healthy_angle_range)


@dataclass
class Ant(Robot):
    """Four legs in space; contact forces are observed."""

    xml_file: str = "ant.xml"
    frame_skip: int = 5
    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    healthy_reward: float = 1.0
    main_body: int | str = 1
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (0.2, 1.0)
    contact_force_range: Range = (-1.0, 1.0)
    reset_noise_scale: float = 0.1
    exclude_current_positions_from_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    contact_forces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.n_force = 6 * self.model.nbody
        try:
            self.body = self.model.body(self.main_body).id
        except (KeyError, IndexError) as error:
            raise UsageError(f"{self.xml_file} has no body {self.main_body!r} for main_body.") from error

    def extra(self, data: mujoco.MjData) -> list[np.ndarray]:
        return [data.cfrc_ext, data.xpos[self.body, :1]]

    def _forces(self, rows: np.ndarray) -> np.ndarray:
        """Clipped contact forces ``[n, 6 nbody]``, the world's first."""
        return _clip(rows[:, self.n_state : self.n_state + self.n_force], *self.contact_force_range)

    def observe(self, rows: np.ndarray) -> np.ndarray:
        state = rows[:, 2 * self.exclude_current_positions_from_observation : self.n_state]
        if not self.include_cfrc_ext_in_observation:
            return state
        return np.concatenate((state, self._forces(rows)[:, 6:]), axis=1)

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        height = rows[:, 2]
        low, high = self.healthy_z_range
        finite = np.logical_and.reduce(np.isfinite(rows[:, : self.n_state]), axis=-1)
        healthy = finite & (low <= height) & (height <= high)
        velocity = (rows[:, -1] - before[:, -1]) / self.dt  # of the main body
        reward = velocity * self.forward_reward_weight + healthy * self.healthy_reward
        contact_cost = self.contact_cost_weight * _squared(self._forces(rows))
        reward -= self.ctrl_cost_weight * _squared(action) + contact_cost
        return reward, ~healthy & self.terminate_when_unhealthy

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._noise(generator, self.reset_noise_scale, normal=True)


@dataclass
class _Human(Robot):
    """What the two humanoids share: everything about the body is observed."""

    xml_file: str
    frame_skip: int = 5
    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True

    contact_forces: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        bodies = self.model.nbody
        sizes = (self.n_state, 10 * (bodies - 1), 6 * (bodies - 1), self.nv - 6, 6 * bodies, 3 * bodies)
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        _, inertia, velocity, actuator, force, centre = (
            slice(end - size, end) for end, size in zip(ends, sizes, strict=True)
        )
        self.force, self.centre = force, centre
        # the world's body has no part in the observation
        observed = slice(force.start + 6, force.stop)
        parts = (
            (True, slice(2 * self.exclude_current_positions_from_observation, self.n_state)),
            (self.include_cinert_in_observation, inertia),
            (self.include_cvel_in_observation, velocity),
            (self.include_qfrc_actuator_in_observation, actuator),
            (self.include_cfrc_ext_in_observation, observed),
        )
        self.observed = [part for included, part in parts if included]

    def extra(self, data: mujoco.MjData) -> list[np.ndarray]:
        return [data.cinert[1:], data.cvel[1:], data.qfrc_actuator[6:], data.cfrc_ext, data.xipos]

    def observe(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate([rows[:, part] for part in self.observed], axis=1)

    def _contact_cost(self, rows: np.ndarray, weight: float, limits: Range) -> np.ndarray:
        return _clip(weight * _squared(rows[:, self.force]), *limits)

    def _control_cost(self, action: np.ndarray) -> np.ndarray:
        return self.ctrl_cost_weight * _squared(action.astype(np.float64))  # of MuJoCo's copy, a double

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._noise(generator, self.reset_noise_scale, normal=False)


@dataclass
class Humanoid(_Human):
    """A person who walks."""

    xml_file: str = "humanoid.xml"
    forward_reward_weight: float = 1.25
    contact_cost_weight: float = 5e-7
    contact_cost_range: Range = (-math.inf, 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: Range = (1.0, 2.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.mass = self.model.body_mass.copy()
        self.total_mass = self.mass.sum()

    def _centre_x(self, rows: np.ndarray) -> np.ndarray:
        """x of the centre of mass, ``[n]``."""
        return np.einsum("b,nb->n", self.mass, rows[:, self.centre][:, ::3]) / self.total_mass

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        healthy = _between(rows[:, 2], self.healthy_z_range)
        velocity = (self._centre_x(rows) - self._centre_x(before)) / self.dt
        reward = self.forward_reward_weight * velocity + healthy * self.healthy_reward
        contact_cost = self._contact_cost(rows, self.contact_cost_weight, self.contact_cost_range)
        reward -= self._control_cost(action) + contact_cost
        return reward, ~healthy & self.terminate_when_unhealthy


@dataclass
class HumanoidStandup(_Human):
    """A person who lies and is to stand up. The episode goes on for its full time."""

    xml_file: str = "humanoidstandup.xml"
    uph_cost_weight: float = 1.0  # gymnasium takes it and does not use it; so does this
    impact_cost_weight: float = 5e-7
    impact_cost_range: Range = (-math.inf, 10.0)

    falls: ClassVar[bool] = False

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        height = rows[:, 2] / self.model.opt.timestep
        impact = self._contact_cost(rows, self.impact_cost_weight, self.impact_cost_range)
        return height - self._control_cost(action) - impact + 1, np.zeros(len(rows), bool)


@dataclass
class InvertedPendulum(Robot):
    """A pole on a cart."""

    xml_file: str = "inverted_pendulum.xml"
    frame_skip: int = 2
    reset_noise_scale: float = 0.01

    def observe(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        upright = np.logical_and.reduce(np.isfinite(rows), axis=-1) & (np.abs(rows[:, 1]) <= 0.2)
        return upright.astype(np.float64), ~upright

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._noise(generator, self.reset_noise_scale, normal=False)


@dataclass
class InvertedDoublePendulum(Robot):
    """Two poles, one on the other, on a cart."""

    xml_file: str = "inverted_double_pendulum.xml"
    frame_skip: int = 5
    healthy_reward: float = 10.0
    reset_noise_scale: float = 0.1

    def extra(self, data: mujoco.MjData) -> list[np.ndarray]:
        return [data.qfrc_constraint[:1], data.site_xpos[0]]

    def observe(self, rows: np.ndarray) -> np.ndarray:
        angles = rows[:, 1 : self.nq]
        rates = _clip(rows[:, self.nq : self.n_state + 1], -10, 10)  # and the force on the cart
        return np.concatenate((rows[:, :1], np.sin(angles), np.cos(angles), rates), axis=1)

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        x, y = rows[:, -3], rows[:, -1]  # of the tip
        fell = y <= 1
        rate, upper_rate = rows[:, self.nq + 1], rows[:, self.nq + 2]
        distance = 0.01 * x**2 + (y - 2) ** 2
        speed = 1e-3 * rate**2 + 5e-3 * upper_rate**2
        return self.healthy_reward * ~fell - distance - speed, fell

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self._noise(generator, self.reset_noise_scale, normal=True)


@dataclass
class Reacher(Robot):
    """An arm of two links in a plane; its tip is to reach a random target."""

    xml_file: str = "reacher.xml"
    frame_skip: int = 2
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0

    falls: ClassVar[bool] = False

    def extra(self, data: mujoco.MjData) -> list[np.ndarray]:
        return [data.body("fingertip").xpos, data.body("target").xpos]

    def observe(self, rows: np.ndarray) -> np.ndarray:
        angles, rest = rows[:, :2], rows[:, 2 : self.nq + 2]  # rest: the target, then the joints' rates
        offset = rows[:, -6:-4] - rows[:, -3:-1]
        return np.concatenate((np.cos(angles), np.sin(angles), rest, offset), axis=1)

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        distance = np.sqrt(_squared(rows[:, -6:-3] - rows[:, -3:]))
        reward = -distance * self.reward_dist_weight - _squared(action) * self.reward_control_weight
        return reward, np.zeros(len(rows), bool)

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = generator.uniform(-0.1, 0.1, self.nq) + self.init_qpos
        goal = generator.uniform(-0.2, 0.2, 2)
        while np.linalg.norm(goal) >= 0.2:
            goal = generator.uniform(-0.2, 0.2, 2)
        qpos[-2:] = goal
        qvel = self.init_qvel + generator.uniform(-0.005, 0.005, self.nv)
        qvel[-2:] = 0
        return qpos, qvel


@dataclass
class Pusher(Robot):
    """An arm that pushes a cylinder to a goal."""

    xml_file: str = "pusher_v5.xml"
    frame_skip: int = 5
    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 0.1

    falls: ClassVar[bool] = False

    def extra(self, data: mujoco.MjData) -> list[np.ndarray]:
        return [data.body(name).xpos for name in ("tips_arm", "object", "goal")]

    def observe(self, rows: np.ndarray) -> np.ndarray:
        return np.concatenate((rows[:, :7], rows[:, self.nq : self.nq + 7], rows[:, -9:]), axis=1)

    def judge(
        self, before: np.ndarray, rows: np.ndarray, action: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        arm, thing, goal = rows[:, -9:-6], rows[:, -6:-3], rows[:, -3:]
        near = -np.sqrt(_squared(thing - arm)) * self.reward_near_weight
        distance = -np.sqrt(_squared(thing - goal)) * self.reward_dist_weight
        return distance - _squared(action) * self.reward_control_weight + near, np.zeros(len(rows), bool)

    def start(self, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        qpos = self.init_qpos.copy()
        thing = np.zeros(2)
        while np.linalg.norm(thing) <= 0.17:  # not on the goal already
            thing = np.array([generator.uniform(-0.3, 0), generator.uniform(-0.2, 0.2)])
        qpos[-4:-2] = thing
        qpos[-2:] = 0
        qvel = self.init_qvel + generator.uniform(-0.005, 0.005, self.nv)
        qvel[-4:] = 0
        return qpos, qvel
