"""MuJoCo locomotion: gymnasium's v5 robots, all n of them stepped together, equal to gymnasium's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guerdon.errors import UsageError, nearest

if TYPE_CHECKING:
    from guerdon.tasks.locomotion.vector import Locomotion

# gymnasium's id -> class in robots.py: names, so that they can be listed without importing MuJoCo
ROBOTS = {
    "Ant-v5": "Ant",
    "HalfCheetah-v5": "HalfCheetah",
    "Hopper-v5": "Hopper",
    "Humanoid-v5": "Humanoid",
    "HumanoidStandup-v5": "HumanoidStandup",
    "InvertedDoublePendulum-v5": "InvertedDoublePendulum",
    "InvertedPendulum-v5": "InvertedPendulum",
    "Pusher-v5": "Pusher",
    "Reacher-v5": "Reacher",
    "Swimmer-v5": "Swimmer",
    "Walker2d-v5": "Walker2d",
}


def make_locomotion(env_id: str, num_envs: int, threads: int | None = None, **kwargs: Any) -> Locomotion:
    """``num_envs`` robots as one `gymnasium.vector.VectorEnv` in SAME_STEP autoreset mode.

    Args:
        env_id: one of `ROBOTS`.
        num_envs: how many.
        threads: that step the physics, the calling one among them; they are beside torch's own. None: as many as
            there are processors, and at most one for every two robots. Results do not depend on it.
        **kwargs: those of `vector.Locomotion` (``max_episode_steps``, ``dtype``, ``width``, ``height``) and of the
            robot in `robots`, which are gymnasium's.

    Raises:
        UsageError: no such id or keyword argument, or a number below one.
        ImportError: gymnasium or MuJoCo is not installed.
    """
    from guerdon.tasks.locomotion import robots
    from guerdon.tasks.locomotion.vector import Locomotion

    if env_id not in ROBOTS:
        raise UsageError(f"There is no robot {env_id}; {nearest(env_id, ROBOTS)}")
    own = ("max_episode_steps", "dtype", "width", "height", "render_mode")
    options = {name: kwargs.pop(name) for name in own if name in kwargs}
    robot = getattr(robots, ROBOTS[env_id])
    names = robots.options(robot)
    for name in kwargs:
        if name not in names:
            raise UsageError(f"{env_id} has no option '{name}'; {nearest(name, [*names, *own])}")
    return Locomotion(env_id, robot(**kwargs), num_envs, threads, **options)
