"""What experiments share: training a method on pieces made here, without a task."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from guerdon.engine.local import LocalEngine
from guerdon.roles import Role
from guerdon.run import Run


def train(
    method: Any,
    folder: Path,
    seed: int,
    models: Mapping[str, nn.Module],
    after: Any = None,
    **supplies: Any,
) -> dict[str, Role]:
    """Train ``models`` (by role) with ``method`` on one thread and give back the roles.

    Args:
        folder: of the run; what an earlier, unfinished one left there goes.
        after: called as ``after(roles)`` when a step's metrics are logged, for curves over training.
        supplies: what else ``method.train`` asks for (preferences, experience, feedback, ...).
    """
    shutil.rmtree(folder, ignore_errors=True)
    engine = LocalEngine("cpu", 1)
    try:
        with Run(folder, engine=engine, seed=seed, progress=False, checkpoint_every=1e9) as run:
            settings = method.roles()
            roles = {
                name: run.role(name, model, settings=settings.get(name)) for name, model in models.items()
            }
            if "experience" in supplies:
                run.track("experience", supplies["experience"])
            if after is not None:
                run.log = _watched(run.log, roles, after)  # type: ignore[method-assign]
            method.train(run, **roles, **supplies)
        return roles
    finally:
        engine.close()


def _watched(log: Any, roles: dict[str, Role], after: Any) -> Any:
    def watched(**metrics: Any) -> None:
        log(**metrics)
        if "loss" in metrics or "reward" in metrics:
            after(roles)

    return watched
