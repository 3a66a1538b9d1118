"""Where steps come from."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from guerdon.batch import Trajectories


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
