"""EnumLM: a small language model whose every answer is known, so that figures are exact."""

from guerdon.tasks.enumlm.worlds import (
    ALPHABET,
    ANSWERS,
    HORIZON,
    LETTERS,
    PROMPTS,
    Judge,
    World,
    load_policy,
    place,
    world,
)

__all__ = [
    "ALPHABET",
    "ANSWERS",
    "HORIZON",
    "LETTERS",
    "PROMPTS",
    "Judge",
    "World",
    "load_policy",
    "place",
    "world",
]
