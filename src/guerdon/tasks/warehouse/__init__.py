"""A warehouse vehicle with continuous pose and actions that is paid only when it reaches its target.

`Warehouse` steps many at once; importing this package registers its scenes with gymnasium:

    gymnasium.make_vec("guerdon.tasks.warehouse:guerdon/Warehouse-complex-static-v0", num_envs=64)
"""

import gymnasium

from guerdon.tasks.warehouse.environment import Warehouse, exploration_features
from guerdon.tasks.warehouse.planner import Path, PathFollower, shortest_path
from guerdon.tasks.warehouse.scene import SCENES, Patrol, Scene

__all__ = [
    "SCENES",
    "Path",
    "PathFollower",
    "Patrol",
    "Scene",
    "Warehouse",
    "exploration_features",
    "shortest_path",
]

for _scene in SCENES:
    gymnasium.register(
        f"guerdon/Warehouse-{_scene.replace('_', '-')}-v0",
        vector_entry_point="guerdon.tasks.warehouse.environment:Warehouse",
        kwargs={"scene": _scene},
    )
