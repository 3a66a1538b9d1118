"""Train the small models that the handwritten digits ship.

    python -m guerdon.tasks.digits.train all

writes ``reader/``, ``diffusion/``, ``consistency/`` and ``clip/`` (weights, config, log, measured quality)
into the package's ``fixtures`` folder, or where ``--out`` says. Needs scikit-learn for the pictures.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from guerdon.policies.denoiser import WordTokenizer
from guerdon.tasks.digits import oracles, world
from guerdon.tasks.fixtures import World, distil_consistency, train_diffusion
from guerdon.tasks.shapes.clip import train_clip

FIXTURES = Path(__file__).parent / "fixtures"


def tokenizer() -> WordTokenizer:
    """The words of the digit prompts; at most 8 a prompt."""
    return WordTokenizer.from_words(world.vocabulary(), 8, world.ALIASES)


def digits_world(partial: float = 0.1) -> World:
    """Handwritten digits as something to train a generator on; a share ``partial`` of the prompts does not
    say which digit."""
    prompts = world.all_prompts()

    def draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        chosen = [prompts[at] for at in rng.integers(len(prompts), size=count)]
        pictures = world.draw(chosen, rng)
        for at in np.flatnonzero(rng.random(count) < partial):
            chosen[at] = world.prompt()
        return pictures, chosen

    def show(wanted: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        return world.draw(wanted, rng, split="test", jitter=False)

    return World(draw, show, oracles.accuracy, {"training": prompts}, tokenizer())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m guerdon.tasks.digits.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("what", choices=("reader", "diffusion", "consistency", "clip", "all"))
    parser.add_argument("--minutes", type=float, help="end each training after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FIXTURES)
    options = parser.parse_args(arguments)
    if options.what in ("reader", "all"):
        oracles.train_reader(options.out / "reader", minutes=options.minutes, seed=options.seed)
    if options.what in ("diffusion", "all"):
        train_diffusion(digits_world(), options.out / "diffusion", 2500, options.minutes, options.seed)
    if options.what in ("consistency", "all"):
        teacher = options.out / "diffusion"
        distil_consistency(
            digits_world(), teacher, options.out / "consistency", 1500, options.minutes, options.seed
        )
    if options.what in ("clip", "all"):
        train_clip(digits_world(), options.out / "clip", 400, minutes=options.minutes, seed=options.seed)


if __name__ == "__main__":
    main()
