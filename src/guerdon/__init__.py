"""guerdon: any policy learns from any feedback.

    import guerdon

    result = guerdon.train("rlcm", task="shapes", reward="compressibility", name="first", rounds=60)
    print(result.before["reward"], "->", result.after["reward"], result.pictures)

Nothing heavy is imported until it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load", "resume", "train"]

if TYPE_CHECKING:
    from guerdon.launch import load, resume, train


def __getattr__(name: str) -> Any:
    if name in ("train", "resume", "load"):
        from guerdon import launch

        return getattr(launch, name)
    raise AttributeError(f"module 'guerdon' has no attribute '{name}'")
