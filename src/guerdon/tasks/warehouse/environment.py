"""The warehouse: n vehicles, each alone in its own copy of a scene, stepped together by array operations.

The task is that of Yin et al., "Random Network Distillation Based Deep Reinforcement Learning for AGV Path
Planning" (IEEE IV 2024): a vehicle with continuous pose and continuous actions must reach a target that pays
only on arrival. The physics are guerdon's own, written to be exact and quick:

* The vehicle is a disc (radius 0.4 m) with unicycle kinematics. An action is (speed, turn rate) in
  `[0, 1.5] m/s x [-1, 1] rad/s`; values outside saturate. Both follow the command with a first-order lag of
  0.2 s. A step lasts 0.2 s and is integrated in four parts of 0.05 s, so that the disc moves at most 0.075 m
  between two tests for contact: nothing is tunnelled and no corner is cut.
* A part that would end inside a box or an outer wall ends touching it (the nearest free point: the disc slides
  along), or does not happen where it is wedged; of its speed it keeps what the contact let through. A
  patrolling disc that would run into the vehicle waits. So no two bodies ever overlap.
* Lidar rays leave the vehicle's centre at equal angles, the first straight ahead, and see 6 m far.

Reward: +1 on arrival, less `collision_penalty` whenever a contact begins, less `step_cost` every step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from guerdon.errors import CheckpointError, ShapeError, UsageError
from guerdon.tasks.warehouse.scene import MAX_SPEED, MAX_TURN, RADIUS, TARGET_RADIUS, Scene

DT = 0.2  # of a step [s]
LAG = 0.2  # time constant of speed and turn rate [s]
RANGE = 6.0  # of the lidar [m]
PARTS = 4  # tests for contact in a step
CELLS = 40  # coverage is counted on a grid of CELLS x CELLS
TOUCHING = 1e-9  # overlaps up to this [m²] are rounding, not contact

_ARRAYS = (
    "x",
    "y",
    "heading",
    "speed",
    "turn",
    "target",
    "along",
    "steps",
    "touching",
    "length",
    "collisions",
)


def exploration_features(observation: Any, n_rays: int = 16) -> Any:
    """The part of a `Warehouse` observation on which novelty should be judged: pose and static lidar.

    `[..., D]` (NumPy or torch) -> `[..., 4 + n_rays]`, a view. Moving obstacles and everything else that would
    look new for ever are left out."""
    return observation[..., : 4 + n_rays]


class Warehouse(VectorEnv):
    """`num_envs` independent vehicles in one scene, with gymnasium's vector interface (SAME_STEP autoreset).

    Observation, float32 `[num_envs, D]`; R is `n_rays`:

    | columns         | what                                                                              |
    |-----------------|-----------------------------------------------------------------------------------|
    | 0, 1            | x and y of the centre / 20 m                                                      |
    | 2, 3            | sine and cosine of the heading                                                    |
    | 4 ... 3+R       | static lidar: distances to boxes and outer walls / 6 m, at most 1                 |
    | 4+R, 5+R        | speed / 1.5 m/s, turn rate / 1 rad/s                                              |
    | 6+R             | distance to the target / 20 m                                                     |
    | 7+R, 8+R        | sine and cosine of the bearing of the target (seen from the heading)              |
    | 9+R ... 8+2R    | lidar of everything, moving discs included (only in scenes that have any)         |

    `exploration_features` gives columns 0 ... 3+R.

    Arrival terminates; the scene's time limit (or `time_limit` steps) truncates. Where an episode ended, the
    observation is that after the reset, `infos["final_obs"]` holds the one before it, and `infos["final_info"]`
    arrays `[num_envs]` that are valid in these rows: `success` (bool), `path_length` (metres driven),
    `collisions` (contacts that began), `steps`.

    Args:
        num_envs: how many vehicles.
        scene: a `Scene`, the name of a built-in one, or a JSON file.
        n_rays: lidar rays.
        collision_penalty: taken off the reward whenever a contact begins.
        terminate_on_collision: end the episode there. (With a penalty this can teach a vehicle to stand still.)
        step_cost: taken off the reward at every step.
        time_limit: in steps, instead of the scene's own.
        unit_actions: take actions in [-1, 1] x [-1, 1] and stretch them to the physical ranges: -1 is standing still,
            0 half the top speed. A Gaussian policy that begins at mean 0 needs this to move at all.
        render_mode: "rgb_array" or None.

    Raises `UsageError` for a scene that does not exist or an option out of range, `ShapeError` for actions of
    another shape or that are not finite.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        scene: Scene | str | Path = "simple_static",
        *,
        n_rays: int = 16,
        collision_penalty: float = 0.01,
        terminate_on_collision: bool = False,
        step_cost: float = 0.0,
        time_limit: int | None = None,
        unit_actions: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if num_envs < 1 or n_rays < 1 or collision_penalty < 0 or step_cost < 0:
            raise UsageError(
                "Warehouse needs num_envs and n_rays of at least 1 and costs that are not negative"
            )
        if render_mode not in (None, "rgb_array"):
            raise UsageError(f"Warehouse renders 'rgb_array' or nothing (None), not '{render_mode}'")
        self.num_envs = num_envs
        self.scene = scene if isinstance(scene, Scene) else Scene.load(scene)
        self.n_rays = n_rays
        self.collision_penalty = collision_penalty
        self.terminate_on_collision = terminate_on_collision
        self.step_cost = step_cost
        self.time_limit = self.scene.time_limit if time_limit is None else time_limit
        if self.time_limit < 1:
            raise UsageError(f"Warehouse's time_limit is {self.time_limit}, it must be at least 1")
        self.render_mode = render_mode
        self.scene_moves = bool(self.scene.patrols)

        low, high = self._observation_bounds()
        self._width = len(low)
        self.single_observation_space = spaces.Box(low, high, dtype=np.float32)
        self.unit_actions = unit_actions
        least = [-1.0, -1.0] if unit_actions else [0.0, -MAX_TURN]
        most = [1.0, 1.0] if unit_actions else [MAX_SPEED, MAX_TURN]
        self.single_action_space = spaces.Box(np.array(least, np.float32), np.array(most, np.float32))
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

        # Only the boxes that a body or a ray could meet from somewhere in a square metre are looked at there.
        self._columns = int(np.ceil(self.scene.width))
        self._near = _neighbours(self.scene, RADIUS + MAX_SPEED * DT, np.float64)  # [4, K, squares]
        self._seen = _neighbours(self.scene, RANGE, np.float32)
        angle = 2 * np.pi * np.arange(n_rays) / n_rays
        self._ray_cos, self._ray_sin = np.cos(angle)[:, None], np.sin(angle)[:, None]  # [R, 1]
        time = (np.arange(PARTS + 1) * (DT / PARTS))[:, None]
        self._time, self._decay = time, np.exp(-time / LAG)
        self._middle = time[1:] - DT / PARTS / 2
        self._middle_decay = np.exp(-self._middle / LAG)

        patrols = self.scene.patrols
        self._patrol_start = np.array([p.start for p in patrols]).reshape(-1, 2)
        end = np.array([p.end for p in patrols]).reshape(-1, 2)
        self._patrol_line = np.hypot(*(end - self._patrol_start).T)  # [M]
        self._patrol_direction = (end - self._patrol_start) / self._patrol_line[:, None]
        self._patrol_radius = np.array([p.radius for p in patrols])
        self._patrol_speed = np.array([p.speed for p in patrols])

        n = num_envs
        self._rows = np.arange(n)
        self.x, self.y, self.heading, self.speed, self.turn, self.length = (np.zeros(n) for _ in range(6))
        self.target = np.zeros((n, 2))
        self.along = np.zeros((n, len(patrols)))  # metres gone on the way from start to end and back
        self.steps = np.zeros(n, np.int64)
        self.collisions = np.zeros(n, np.int64)
        self.touching = np.zeros(n, bool)
        self.visited = np.zeros((n, CELLS, CELLS), bool)
        self._picture: Any = None

    def _observation_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        rays = [(0.0, 1.0)] * self.n_rays
        far = float(np.hypot(self.scene.width, self.scene.height)) / 20
        columns = [(0.0, self.scene.width / 20), (0.0, self.scene.height / 20), (-1.0, 1.0), (-1.0, 1.0)]
        columns += [*rays, (0.0, 1.0), (-1.0, 1.0), (0.0, far), (-1.0, 1.0), (-1.0, 1.0)]
        columns += rays if self.scene_moves else []
        low, high = np.array(columns, np.float32).T
        return low, high

    # ------------------------------------------------------------------------------------------ episodes

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in every row; with `seed` all later randomness follows from it. Coverage is kept."""
        if seed is not None:
            self._np_random, self._np_random_seed = seeding.np_random(seed)
        self._begin(self._rows)
        return self._observe(self._rows), {}

    def _begin(self, rows: np.ndarray) -> None:
        random, m = self.np_random, len(rows)
        start, target = np.array(self.scene.start), np.array(self.scene.target)
        place = random.uniform(size=(m, 5 + len(self.scene.patrols)))
        self.x[rows] = start[0] + (start[2] - start[0]) * place[:, 0]
        self.y[rows] = start[1] + (start[3] - start[1]) * place[:, 1]
        self.heading[rows] = np.pi * (2 * place[:, 2] - 1)
        self.target[rows] = target[:2] + (target[2:] - target[:2]) * place[:, 3:5]
        self.along[rows] = 2 * self._patrol_line * place[:, 5:]
        for name in ("speed", "turn", "length", "steps", "collisions", "touching"):
            getattr(self, name)[rows] = 0
        self._visit(rows)

    def step(
        self, actions: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Actions `[num_envs, 2]` -> observation, reward (float64), terminated, truncated, infos."""
        actions = np.asarray(actions, np.float64)
        if actions.shape != (self.num_envs, 2):
            raise ShapeError(f"Warehouse.step: actions have shape {actions.shape}, not {(self.num_envs, 2)}")
        if not np.isfinite(actions).all():
            raise ShapeError("Warehouse.step: an action is not finite; look at the policy that made it")
        if self.unit_actions:
            actions = actions * [MAX_SPEED / 2, MAX_TURN] + np.array([MAX_SPEED / 2, 0.0])
        old_x, old_y = self.x, self.y
        touched = self._move(actions)
        self.length += np.hypot(self.x - old_x, self.y - old_y)
        self.steps += 1
        begun = touched & ~self.touching
        self.touching = touched
        self.collisions += begun
        self._visit(self._rows)

        arrived = (self.target[:, 0] - self.x) ** 2 + (self.target[:, 1] - self.y) ** 2 < TARGET_RADIUS**2
        reward = arrived - self.collision_penalty * begun - self.step_cost
        terminated = arrived | begun if self.terminate_on_collision else arrived
        truncated = (self.steps >= self.time_limit) & ~terminated
        observation = self._observe(self._rows)
        ended = terminated | truncated
        if not ended.any():
            return observation, reward, terminated, truncated, {}
        rows = np.flatnonzero(ended)
        final_info = {
            "success": arrived.copy(),
            "path_length": self.length.copy(),
            "collisions": self.collisions.copy(),
            "steps": self.steps.copy(),
        }
        infos = {
            "final_obs": observation.copy(),
            "_final_obs": ended,
            "final_info": final_info,
            "_final_info": ended,
        }
        self._begin(rows)
        observation[rows] = self._observe(rows)
        return observation, reward, terminated, truncated, infos

    # ------------------------------------------------------------------------------------------ physics

    def _move(self, command: np.ndarray) -> np.ndarray:
        """Advance every body by one step; `[n]` bool: which vehicles touched something."""
        want_speed = np.minimum(np.maximum(command[:, 0], 0.0), MAX_SPEED)
        want_turn = np.minimum(np.maximum(command[:, 1], -MAX_TURN), MAX_TURN)
        slower, turn = self.speed - want_speed, self.turn - want_turn
        # the lag's exact solution: the way driven and the angle turned since the step began
        way = want_speed * self._time + slower * (LAG * (1 - self._decay))
        way = way[1:] - way[:-1]
        middle = self.heading + want_turn * self._middle + turn * (LAG * (1 - self._middle_decay))
        move_x, move_y = way * np.cos(middle), way * np.sin(middle)  # [PARTS, n]
        heading = self.heading + want_turn * DT + turn * (LAG * (1 - self._decay[-1]))
        self.heading = (heading + np.pi) % (2 * np.pi) - np.pi
        self.speed = want_speed + slower * self._decay[-1]
        self.turn = want_turn + turn * self._decay[-1]

        touched = np.zeros(self.num_envs, bool)
        old_x, old_y = self.x, self.y
        boxes = self._near.take(self._square(self.x, self.y), axis=2)  # [4, K, n]
        discs = self._discs(self.along) if self.scene_moves else None  # [2, M, n]
        for part in range(PARTS):
            x, y = self.x + move_x[part], self.y + move_y[part]
            hit = self._overlaps(x, y, boxes)
            if discs is not None:
                hit |= self._meets(x, y, discs)
            if hit.any():
                rows = np.flatnonzero(hit)
                some = None if discs is None else discs[:, :, rows]
                x[rows], y[rows] = self._resolve(
                    x[rows], y[rows], self.x[rows], self.y[rows], boxes[:, :, rows], some
                )
                touched |= hit
            self.x, self.y = x, y
            if discs is not None:
                along = (self.along + self._patrol_speed * (DT / PARTS)) % (2 * self._patrol_line)
                blocked = self._distances(x, y, self._discs(along))[2] < self._reach()  # [M, n]
                self.along = np.where(blocked.T, self.along, along)
                discs = self._discs(self.along)
                touched |= blocked.any(0)
        if touched.any():  # of the speed remains what the contact let through
            moved, meant = np.hypot(self.x - old_x, self.y - old_y), np.maximum(way.sum(0), 1e-9)
            self.speed = np.where(touched, self.speed * np.minimum(moved / meant, 1.0), self.speed)
        return touched

    def _resolve(
        self,
        x: np.ndarray,
        y: np.ndarray,
        old_x: np.ndarray,
        old_y: np.ndarray,
        boxes: np.ndarray,
        discs: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The nearest free place to `x, y`; where two pushes do not find one, the old (free) place."""
        every = np.arange(len(x))
        for _ in range(2):
            x = np.minimum(np.maximum(x, RADIUS), self.scene.width - RADIUS)
            y = np.minimum(np.maximum(y, RADIUS), self.scene.height - RADIUS)
            dx = x - np.minimum(np.maximum(x, boxes[0]), boxes[2])
            dy = y - np.minimum(np.maximum(y, boxes[1]), boxes[3])
            reach = np.full((boxes.shape[1], 1), RADIUS)
            if discs is not None:
                dx, dy = np.concatenate([dx, x - discs[0]]), np.concatenate([dy, y - discs[1]])
                reach = np.concatenate([reach, RADIUS + self._patrol_radius[:, None]])
            distance = np.hypot(dx, dy)
            deepest = (reach - distance).argmax(0)
            depth, apart = (reach - distance)[deepest, every], distance[deepest, every]
            push = np.where(depth > 0, depth / np.maximum(apart, 1e-12), 0.0)
            x, y = x + push * dx[deepest, every], y + push * dy[deepest, every]
        stuck = self._overlaps(x, y, boxes)
        if discs is not None:
            stuck |= self._meets(x, y, discs)
        return np.where(stuck, old_x, x), np.where(stuck, old_y, y)

    def _overlaps(self, x: np.ndarray, y: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Which discs at `x, y` overlap one of their boxes `[4, K, n]` or leave the plane."""
        dx = x - np.minimum(np.maximum(x, boxes[0]), boxes[2])
        dy = y - np.minimum(np.maximum(y, boxes[1]), boxes[3])
        hit = (dx * dx + dy * dy < RADIUS**2 - TOUCHING).any(0)
        hit |= np.minimum(x, y) < RADIUS
        hit |= (x > self.scene.width - RADIUS) | (y > self.scene.height - RADIUS)
        return hit

    def _meets(self, x: np.ndarray, y: np.ndarray, discs: np.ndarray) -> np.ndarray:
        return np.any(self._distances(x, y, discs)[2] < self._reach(), axis=0)

    def _reach(self) -> np.ndarray:
        return (RADIUS + self._patrol_radius[:, None]) ** 2 - TOUCHING

    def _distances(self, x: np.ndarray, y: np.ndarray, discs: np.ndarray) -> tuple[np.ndarray, ...]:
        """From each vehicle to its moving discs: dx, dy and the squared distance, each `[M, n]`."""
        dx, dy = discs[0] - x, discs[1] - y
        return dx, dy, dx * dx + dy * dy

    def _discs(self, along: np.ndarray) -> np.ndarray:
        """Where the patrols `[n, M]` are: `[2, M, n]`."""
        out = (self._patrol_line - np.abs(along - self._patrol_line)).T  # out and back again
        return self._patrol_start.T[:, :, None] + self._patrol_direction.T[:, :, None] * out

    def _square(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return y.astype(np.int64) * self._columns + x.astype(np.int64)

    # ------------------------------------------------------------------------------------------ senses

    def _observe(self, rows: np.ndarray) -> np.ndarray:
        """The observations `[m, D]` of some rows."""
        every = len(rows) == self.num_envs
        x, y, heading, target = (v if every else v[rows] for v in (self.x, self.y, self.heading, self.target))
        sin, cos = np.sin(heading), np.cos(heading)
        to_x, to_y = target[:, 0] - x, target[:, 1] - y
        distance = np.hypot(to_x, to_y)
        scale = 1 / np.maximum(distance, 1e-9)
        ray_x = (self._ray_cos * cos - self._ray_sin * sin).astype(np.float32)  # [R, m]
        ray_y = (self._ray_sin * cos + self._ray_cos * sin).astype(np.float32)
        lidar = self._static_lidar(x, y, ray_x, ray_y)
        R = self.n_rays
        observation = np.empty((len(rows), self._width), np.float32)
        columns = observation.T
        columns[0], columns[1], columns[2], columns[3] = x / 20, y / 20, sin, cos
        columns[4 : 4 + R] = lidar * np.float32(1 / RANGE)
        columns[4 + R] = self.speed[rows] / MAX_SPEED
        columns[5 + R] = self.turn[rows] / MAX_TURN
        columns[6 + R] = distance / 20
        columns[7 + R] = (to_y * cos - to_x * sin) * scale
        columns[8 + R] = (to_x * cos + to_y * sin) * scale
        if self.scene_moves:
            moving = self._moving_lidar(x, y, ray_x, ray_y, self._discs(self.along[rows]))
            columns[9 + R :] = np.minimum(moving, lidar) * np.float32(1 / RANGE)
        return observation

    def _static_lidar(self, x: np.ndarray, y: np.ndarray, ray_x: np.ndarray, ray_y: np.ndarray) -> np.ndarray:
        """Distances `[R, m]` along the rays to the nearest box or outer wall, at most `RANGE`: slab tests."""
        boxes = self._seen.take(self._square(x, y), axis=2)  # [4, K, m]
        x, y = x.astype(np.float32), y.astype(np.float32)
        # a ray parallel to an axis is turned by a hundred-thousandth of a radian: no division by zero
        tiny = np.float32(1e-5)
        ray_x = np.where(np.abs(ray_x) < tiny, tiny, ray_x)
        ray_y = np.where(np.abs(ray_y) < tiny, tiny, ray_y)
        over_x, over_y = 1 / ray_x, 1 / ray_y
        low_x, high_x = (boxes[0] - x)[:, None] * over_x, (boxes[2] - x)[:, None] * over_x  # [K, R, m]
        low_y, high_y = (boxes[1] - y)[:, None] * over_y, (boxes[3] - y)[:, None] * over_y
        enter = np.maximum(np.minimum(low_x, high_x), np.minimum(low_y, high_y))
        leave = np.minimum(
            np.maximum(low_x, high_x, out=high_x), np.maximum(low_y, high_y, out=high_y), out=high_x
        )
        # the centre is outside every box: a box that is ahead is entered at a positive distance
        hit = (enter <= leave) & (enter >= 0)
        nearest = np.where(hit, enter, np.float32(RANGE)).min(0, initial=np.float32(RANGE))
        width, height = np.float32(self.scene.width), np.float32(self.scene.height)
        outer_x = np.maximum(-x * over_x, (width - x) * over_x)
        outer_y = np.maximum(-y * over_y, (height - y) * over_y)
        return np.minimum(nearest, np.minimum(outer_x, outer_y))

    def _moving_lidar(
        self, x: np.ndarray, y: np.ndarray, ray_x: np.ndarray, ray_y: np.ndarray, discs: np.ndarray
    ) -> np.ndarray:
        """Distances `[R, m]` along the rays to the nearest moving disc, at most `RANGE`."""
        dx, dy, squared = self._distances(x, y, discs)  # [M, m]
        along = (
            dx[:, None] * ray_x + dy[:, None] * ray_y
        )  # [M, R, m]: to the point nearest to the disc's centre
        half = (
            along * along + (self._patrol_radius[:, None] ** 2 - squared)[:, None]
        )  # half the chord, squared
        distance = along - np.sqrt(np.maximum(half, 0))
        return np.where((half >= 0) & (distance >= 0), distance, RANGE).min(0).clip(max=RANGE)

    # ------------------------------------------------------------------------------------------ coverage

    def _visit(self, rows: np.ndarray) -> None:
        x = self.x if rows is self._rows else self.x[rows]
        y = self.y if rows is self._rows else self.y[rows]
        column = (x * (CELLS / self.scene.width)).astype(np.int64)
        row = (y * (CELLS / self.scene.height)).astype(np.int64)
        self.visited[rows, row, column] = True

    def coverage(self) -> int:
        """How many cells of the 40 x 40 grid any vehicle has visited since the environment was made or
        `reset_coverage` was called. `visited [num_envs, 40, 40]` (y first) holds each row's own set."""
        return int(self.visited.any(0).sum())

    def reset_coverage(self) -> None:
        """Forget which cells were visited."""
        self.visited[:] = False

    # ------------------------------------------------------------------------------------------ the rest

    def render(self) -> np.ndarray | None:  # type: ignore[override]  # of row 0 alone
        """Row 0 as an RGB picture `[H, W, 3]` uint8, or None without `render_mode="rgb_array"`."""
        if self.render_mode is None:
            return None
        from guerdon.tasks.warehouse.render import Picture

        self._picture = self._picture or Picture(self.scene)
        discs = self._discs(self.along[:1])[:, :, 0].T
        return self._picture.frame(
            (self.x[0], self.y[0], self.heading[0]), self.target[0], discs, bool(self.touching[0])
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes, as tensors and plain values; a loaded run goes on bit-exactly."""
        import torch

        state: dict[str, Any] = {name: torch.from_numpy(getattr(self, name).copy()) for name in _ARRAYS}
        state["visited"] = torch.from_numpy(self.visited.copy())
        state["random"] = self.np_random.bit_generator.state
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of an environment with the same scene and as many rows.

        Raises `CheckpointError` if it does not fit."""
        for name in (*_ARRAYS, "visited"):
            mine, theirs = getattr(self, name), state.get(name)
            if theirs is None or tuple(theirs.shape) != mine.shape:
                shape = None if theirs is None else tuple(theirs.shape)
                raise CheckpointError(
                    f"Warehouse: the saved '{name}' has shape {shape}, this one needs {mine.shape}; "
                    "make it with the same scene and number of environments"
                )
        for name in (*_ARRAYS, "visited"):
            mine = getattr(self, name)
            setattr(self, name, state[name].numpy().astype(mine.dtype))
        self.np_random.bit_generator.state = state["random"]


def _neighbours(scene: Scene, reach: float, dtype: type) -> np.ndarray:
    """For every square metre (row by row) the boxes within `reach` of it: `[4, K, squares]`.

    Squares with fewer than K are filled up with a box that is far away from everything."""
    near: list[list[tuple[float, ...]]] = []
    for row in range(int(np.ceil(scene.height))):
        for column in range(int(np.ceil(scene.width))):
            near.append(
                [
                    b
                    for b in scene.boxes
                    if np.hypot(
                        max(b[0] - column - 1, column - b[2], 0.0), max(b[1] - row - 1, row - b[3], 0.0)
                    )
                    <= reach
                ]
            )
    most = max(1, *(len(boxes) for boxes in near))
    table: np.ndarray = np.full((4, most, len(near)), 1e4, dtype)
    for square, boxes in enumerate(near):
        if boxes:
            table[:, : len(boxes), square] = np.array(boxes).T
    return table
