"""The yardstick for paths: A* on a grid on which every box is grown by the vehicle's radius, and a driver.

Source of the search: Hart, Nilsson and Raphael (1968). The path found on the grid is then pulled taut, so that
its length is close to the true shortest way and not to the grid's detours.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from guerdon.errors import UsageError
from guerdon.tasks.warehouse.environment import Warehouse
from guerdon.tasks.warehouse.scene import MAX_SPEED, MAX_TURN, RADIUS, Point, Scene


@dataclass(frozen=True)
class Path:
    """A way from start to target: its corners `[P, 2]` and its length in metres."""

    points: np.ndarray
    length: float


def shortest_path(
    scene: Scene, start: Point, target: Point, *, margin: float = 0.0, resolution: float = 0.25
) -> Path:
    """The shortest way for the vehicle's disc among the boxes and walls (patrols are not looked at).

    Args:
        start, target: (x, y).
        margin: free space to keep beside the vehicle, in metres.
        resolution: of the grid, in metres.

    Raises `UsageError` if there is no way."""
    width, height = int(scene.width / resolution), int(scene.height / resolution)
    xs, ys = (np.arange(width) + 0.5) * resolution, (np.arange(height) + 0.5) * resolution
    free = scene.clearance(np.stack(np.meshgrid(xs, ys), -1)) >= RADIUS + margin  # [height, width]

    def cell(point: Point) -> tuple[int, int]:
        """The free cell nearest to a point that may itself lie closer to a box than the grid resolves."""
        distance = np.hypot(xs[None] - point[0], ys[:, None] - point[1])
        row, column = np.unravel_index(np.where(free, distance, np.inf).argmin(), free.shape)
        return int(row), int(column)

    if not free.any():
        raise UsageError(f"scene '{scene.name}' has no free place for the vehicle")
    first, last = cell(start), cell(target)
    cost, parent, settled = {first: 0.0}, {first: first}, set()
    queue = [(0.0, first)]
    while queue:
        here = heapq.heappop(queue)[1]
        if here == last:
            break
        if here in settled:
            continue
        settled.add(here)
        row, column = here
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                there = (row + down, column + right)
                if not (0 <= there[0] < height and 0 <= there[1] < width and free[there]):
                    continue
                if not (free[row, there[1]] and free[there[0], column]):  # no cutting of corners
                    continue
                total = cost[here] + float(np.hypot(down, right))
                if total < cost.get(there, np.inf):
                    cost[there], parent[there] = total, here
                    a, b = abs(last[0] - there[0]), abs(last[1] - there[1])
                    heapq.heappush(queue, (total + max(a, b) + (2**0.5 - 1) * min(a, b), there))
    else:
        raise UsageError(f"scene '{scene.name}' has no way from {start} to {target} for the vehicle")

    cells = [last]
    while cells[-1] != first:
        cells.append(parent[cells[-1]])
    points = [start, *((xs[column], ys[row]) for row, column in reversed(cells)), target]
    corners = _taut(scene, np.array(points), RADIUS + margin)
    return Path(corners, float(np.hypot(*np.diff(corners, axis=0).T).sum()))


def _taut(scene: Scene, points: np.ndarray, clearance: float) -> np.ndarray:
    """Leave out every point that a straight, free line can skip."""
    kept, here = [0], 0
    while here < len(points) - 1:
        for there in range(len(points) - 1, here, -1):
            ends = points[here], points[there]
            n = 2 + int(np.hypot(*(ends[1] - ends[0])) / 0.05)
            line = ends[0] + np.linspace(0, 1, n)[:, None] * (ends[1] - ends[0])
            if there == here + 1 or (scene.clearance(line) >= clearance).all():
                kept.append(there)
                here = there
                break
    return points[kept]


class PathFollower:
    """Drives every vehicle of a `Warehouse` along its shortest path: proof that a scene can be driven.

    It reads the environment itself (pose and target), and looks at neither lidar nor patrols.

        driver = PathFollower(environment)
        observation, *_ = environment.step(driver.act())
    """

    def __init__(self, environment: Warehouse, *, margin: float = 0.15, ahead: float = 1.0) -> None:
        self.environment, self.margin, self.ahead = environment, margin, ahead
        self._paths: list[np.ndarray | None] = [None] * environment.num_envs

    def act(self) -> np.ndarray:
        """Actions `[num_envs, 2]`: steer at the point `ahead` metres further on the path, slow down to turn."""
        env = self.environment
        actions = np.zeros((env.num_envs, 2))
        for row in range(env.num_envs):
            place, target = np.array([env.x[row], env.y[row]]), env.target[row]
            path = self._paths[row]
            if env.steps[row] == 0 or path is None:
                way = shortest_path(
                    env.scene, (place[0], place[1]), (target[0], target[1]), margin=self.margin
                )
                path = _dense(way.points)
            # only the near part: where two stretches of a path pass each other closely it must not jump over
            reached = int(np.hypot(*(path[:40] - place).T).argmin())
            self._paths[row] = path = path[reached:]
            goal = path[min(int(self.ahead / 0.1), len(path) - 1)] - place
            error = (np.arctan2(goal[1], goal[0]) - env.heading[row] + np.pi) % (2 * np.pi) - np.pi
            actions[row] = MAX_SPEED * max(0.0, np.cos(1.5 * error)), np.clip(2 * error, -MAX_TURN, MAX_TURN)
        if env.unit_actions:
            actions = actions / [MAX_SPEED / 2, MAX_TURN] - np.array([1.0, 0.0])
        return actions


def _dense(points: np.ndarray, spacing: float = 0.1) -> np.ndarray:
    """Points every `spacing` metres along the corners of a path."""
    lengths = np.hypot(*np.diff(points, axis=0).T)
    at = np.concatenate([[0.0], lengths.cumsum()])
    s = np.append(np.arange(0, at[-1], spacing), at[-1])
    return np.stack([np.interp(s, at, points[:, 0]), np.interp(s, at, points[:, 1])], 1)
