"""Train the small models that ShapesWorld ships.

    python -m guerdon.tasks.shapes.train all

writes ``clip/``, ``diffusion/`` and ``consistency/`` (weights, config, log, measured quality) into the
package's ``fixtures`` folder, or where ``--out`` says. The whole takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from guerdon.policies.denoiser import WordTokenizer
from guerdon.tasks.fixtures import World, distil_consistency, train_diffusion
from guerdon.tasks.shapes import oracles, world
from guerdon.tasks.shapes.clip import train_clip

FIXTURES = Path(__file__).parent / "fixtures"


def tokenizer() -> WordTokenizer:
    """The words of ShapesWorld; at most 16 a prompt (a video caption has 13)."""
    return WordTokenizer.from_words(world.vocabulary(), 16, world.ALIASES)


def shapes_world(partial: float = 0.1) -> World:
    """ShapesWorld as something to train a generator on. A share ``partial`` of the captions says only some
    of the attributes ("a red circle"), so that a generator also serves prompts shorter than the
    full sentence."""
    training = world.training_captions()
    names = list(world.ATTRIBUTES)

    def draw(count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        captions = [training[at] for at in rng.integers(len(training), size=count)]
        pictures = world.render(captions, rng=rng)
        for at in np.flatnonzero(rng.random(count) < partial):
            keep = rng.random(len(names)) < 0.6
            said = world.parse(captions[at])
            captions[at] = world.caption(
                **{name: said[name] for name, kept in zip(names, keep, strict=True) if kept}
            )
        return pictures, captions

    def show(prompts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        return world.render(prompts, rng=rng)

    prompts = {"training": training, "held out": world.held_out_captions()}
    return World(draw, show, oracles.accuracy, prompts, tokenizer())


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m guerdon.tasks.shapes.train", description=__doc__.split("\n")[0]
    )
    parser.add_argument("what", choices=("clip", "diffusion", "consistency", "all"))
    parser.add_argument("--minutes", type=float, help="end each training after this long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=FIXTURES)
    options = parser.parse_args(arguments)
    if options.what in ("diffusion", "all"):
        train_diffusion(shapes_world(), options.out / "diffusion", 4000, options.minutes, options.seed)
    if options.what in ("consistency", "all"):
        teacher = options.out / "diffusion"
        distil_consistency(
            shapes_world(), teacher, options.out / "consistency", 2000, options.minutes, options.seed
        )
    if options.what in ("clip", "all"):
        train_clip(shapes_world(), options.out / "clip", minutes=options.minutes, seed=options.seed)


if __name__ == "__main__":
    main()
