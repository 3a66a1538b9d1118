"""Handwritten digits with prompts: "a handwritten seven".

The pictures are scikit-learn's copy of the UCI "optical recognition of handwritten digits" test set (1,797
grey pictures of 8x8), enlarged to 16x16. Only drawing needs scikit-learn; prompts, the shipped generators and
the shipped reader do not.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np

from guerdon.errors import UsageError

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

#: Other spellings that `parse` (and the tokenizer) understands.
ALIASES: dict[str, str] = {str(value): name for value, name in enumerate(DIGITS)} | {"number": "digit"}

_TEST_EVERY = 5  # each fifth picture is for testing


def prompt(digit: int | None = None) -> str:
    """ "a handwritten seven" for 7, "a handwritten digit" for None."""
    return f"a handwritten {'digit' if digit is None else DIGITS[digit]}"


def all_prompts() -> list[str]:
    """The ten prompts, zero to nine."""
    return [prompt(digit) for digit in range(10)]


def vocabulary() -> list[str]:
    """Every word that a prompt can have."""
    return sorted({"a", "handwritten", "digit", *DIGITS})


def parse(text: str) -> int | None:
    """The digit that a prompt names first, as a word or a numeral; None if it names none."""
    blanks = str.maketrans(dict.fromkeys(string.punctuation, " "))
    for word in text.lower().translate(blanks).split():
        word = ALIASES.get(word, word)
        if word in DIGITS:
            return DIGITS.index(word)
    return None


def labels(prompts: Sequence[str]) -> np.ndarray:
    """``[N]`` int64: each prompt's digit, -1 where it names none."""
    parsed = [parse(text) for text in prompts]
    return np.array([-1 if digit is None else digit for digit in parsed], dtype=np.int64)


@lru_cache(maxsize=1)
def _data() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            "pictures of digits come with scikit-learn; run: pip install 'guerdon[digits]'"
        ) from error
    data = load_digits()
    pictures = enlarge(data.images.astype(np.float32) / 8 - 1)
    return pictures[:, None].repeat(3, axis=1), data.target.astype(np.int64)


def load(split: Literal["train", "test"] = "train") -> tuple[np.ndarray, np.ndarray]:
    """Pictures ``[N, 3, 16, 16]`` float32 in [-1, 1] (grey, white ink on black) and digits ``[N]`` int64.

    Every fifth picture is "test" (360), the rest "train" (1,437).
    Raises `UsageError` if scikit-learn is not installed, ``ValueError`` for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    pictures, digits = _data()
    test = np.arange(len(digits)) % _TEST_EVERY == 0
    chosen = test if split == "test" else ~test
    return pictures[chosen], digits[chosen]


def enlarge(pictures: np.ndarray) -> np.ndarray:
    """Twice the height and width (the last two axes), bilinearly."""
    for axis in (-2, -1):
        edge = np.concatenate([pictures.take([0], axis), pictures, pictures.take([-1], axis)], axis)
        length = pictures.shape[axis]
        before, after = edge.take(range(length), axis), edge.take(range(2, length + 2), axis)
        halves = np.stack([0.75 * pictures + 0.25 * before, 0.75 * pictures + 0.25 * after], axis=-1)
        # interleave: the new axis becomes the fast half of the doubled one
        halves = np.moveaxis(halves, -1, pictures.ndim + axis + 1)
        shape = list(pictures.shape)
        shape[axis] *= 2
        pictures = halves.reshape(shape)
    return pictures


def draw(
    prompts: Sequence[str],
    rng: np.random.Generator | int | None = None,
    split: Literal["train", "test"] = "train",
    jitter: bool = True,
) -> np.ndarray:
    """A picture for each prompt, drawn with replacement from the data; ``jitter`` moves it by up to one
    pixel.

    ``rng`` is a generator or a seed. A prompt that names no digit gets any.
    Returns ``[N, 3, 16, 16]`` float32 in [-1, 1].
    """
    rng = np.random.default_rng(rng)
    pictures, digits = load(split)
    places = [np.flatnonzero(digits == digit) for digit in range(10)]
    wanted = labels(prompts)
    wanted = np.where(wanted < 0, rng.integers(10, size=wanted.shape), wanted)
    chosen = np.array([places[digit][rng.integers(len(places[digit]))] for digit in wanted], dtype=np.int64)
    result = pictures[chosen]
    if jitter:
        padded = np.pad(result, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-1.0)
        windows = np.lib.stride_tricks.sliding_window_view(padded, result.shape[-2:], axis=(-2, -1))
        move = rng.integers(3, size=(2, len(result)))
        result = windows[np.arange(len(result)), :, move[0], move[1]]
    return np.ascontiguousarray(result)
