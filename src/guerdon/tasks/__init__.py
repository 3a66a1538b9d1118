"""Ready problems. `find` gives one by name; modules are imported only when asked for."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from guerdon.errors import UsageError, nearest

if TYPE_CHECKING:
    from guerdon.tasks.base import Task

# name -> (module, class, kinds of policy it supplies, one line): a plain table, so that the command line can
# speak of tasks without importing torch
TASKS: dict[str, tuple[str, str, tuple[str, ...], str]] = {
    "shapes": (
        "guerdon.tasks.shapes.task",
        "Shapes",
        ("consistency", "diffusion"),
        "text to image: coloured shapes from captions such as 'a large red circle ...'",
    ),
    "digits": (
        "guerdon.tasks.digits.task",
        "Digits",
        ("consistency", "diffusion"),
        "text to image: handwritten digits from prompts such as 'a handwritten seven'",
    ),
    "control": (
        "guerdon.tasks.control",
        "Control",
        ("categorical", "gaussian", "deterministic"),
        "any gymnasium environment (--env ID; CartPole-v1 or Pendulum-v1 when none is named)",
    ),
    "bandit": (
        "guerdon.tasks.bandit",
        "Bandit",
        ("categorical",),
        "a contextual bandit with known means",
    ),
    "reviews": (
        "guerdon.tasks.reviews.task",
        "Reviews",
        ("language",),
        "a tiny language model writes film reviews; the judge likes praise",
    ),
    "text": (
        "guerdon.tasks.text",
        "Text",
        ("language",),
        "your own language model: --model M with --data, or with --prompts and --reward",
    ),
    "enumlm": (
        "guerdon.tasks.enumlm.task",
        "EnumLM",
        ("language",),
        "answers of four letters, all 4096 of them enumerable: every figure is exact",
    ),
    "topics": (
        "guerdon.tasks.topics",
        "Topics",
        ("language",),
        "a tiny language model keeps to a topic, at length or in few words",
    ),
    "tokens": (
        "guerdon.tasks.tokens",
        "Tokens",
        ("language",),
        "a tiny language model learns to echo the letter it was given",
    ),
}


def find(name: str) -> type[Task]:
    """The class of the task called ``name``. Raises `UsageError` with the nearest name."""
    if name not in TASKS:
        raise UsageError(f"unknown task '{name}'; {nearest(name, TASKS)}")
    module, cls, _, _ = TASKS[name]
    return getattr(importlib.import_module(module), cls)


def with_kind(kinds: tuple[str, ...]) -> list[str]:
    """Names of the tasks that supply one of the ``kinds`` of policy."""
    return [name for name, row in TASKS.items() if set(row[2]) & set(kinds)]
