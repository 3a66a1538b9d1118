"""Where steps come from."""

from __future__ import annotations

import inspect
from typing import Any, Literal, Protocol

from guerdon.batch import Trajectories
from guerdon.errors import UsageError


class Experience(Protocol):
    """What a method asks for behaviour.

    Attributes:
        unit: what ``collect`` counts: whole trajectories (answers to prompts), or steps (environments, whose
            episodes rows may cut anywhere).
    """

    unit: Literal["trajectory", "step"]

    def collect(self, actor: Any, n: int, group_size: int | None = None, **options: Any) -> Trajectories:
        """``n`` trajectories, or rows that hold ``n`` steps together."""
        ...

    def statistics(self, traj: Trajectories) -> dict[str, Any]:
        """Figures to log about judged trajectories, ``reward`` among them."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Grouped(Experience, Protocol):
    """Experience of whole trajectories, some to each prompt (or starting state), for methods that compare them:
    `guerdon.experience.prompts.Prompted`, `guerdon.experience.episodes.Episodes`.

    ``collect(actor, n, group_size)`` gives ``n`` trajectories, those of a group side by side and with one number in
    ``group``.
    """

    unit: Literal["trajectory"]  # type: ignore[assignment]


def check_groups(n: int, size: int) -> None:
    """Raise `UsageError` where ``n`` trajectories are no whole groups of ``size``."""
    if n < 1 or n % size:
        raise UsageError(f"cannot collect {n} trajectories in groups of {size}; use a multiple")


def wants_groups(method: Any) -> bool:
    """Whether a method (or its class) compares whole trajectories: the ``experience`` of its ``train`` is `Grouped`."""
    parameter = inspect.signature(method.train).parameters.get("experience")
    return parameter is not None and "Grouped" in str(parameter.annotation)
