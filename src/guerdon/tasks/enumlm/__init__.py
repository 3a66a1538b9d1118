"""EnumLM: a small language model whose every answer is known, so that figures are exact."""

from guerdon.tasks.enumlm.alphabet import ALPHABET, ANSWERS, HORIZON, LETTERS, PROMPTS, load_policy, place
from guerdon.tasks.enumlm.worlds import Judge, World, world

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
