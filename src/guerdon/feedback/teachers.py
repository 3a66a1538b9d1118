"""Made-up teachers whose preferences are known exactly: they compare, make mistakes, skip and call ties, by seed.

Some come from a score (`BradleyTerry`), some are games whose preferences run in circles (`MatrixOracle`, `GameOracle`).
`label` draws what such a teacher would say about pairs of answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Preferences, Trajectories, concatenate
from guerdon.dynamics import games
from guerdon.errors import FeedbackError, ShapeError, UsageError
from guerdon.feedback.base import Feedback, PairFeedback, compare
from guerdon.randomness import row_seeds, uniform

Place = Callable[[Trajectories], Tensor]
"""``traj -> int64 [B]``: which option of a game each answer is."""


# --- teachers ---------------------------------------------------------------------------------------------


@dataclass
class BradleyTerry:
    """A teacher that prefers a to b with probability ``sigmoid(scale (score(a) - score(b)))`` (Bradley and Terry, 1952).

    Args:
        feedback: what scores.
        scale: how sure it is: 0 tosses a coin, infinity always names the higher score.
    """

    feedback: Feedback
    scale: float = 1.0
    name: str = "bradley_terry"

    def __post_init__(self) -> None:
        if not self.scale >= 0:
            raise UsageError(f"BradleyTerry: scale is {self.scale}; it must not be negative")

    def score(self, traj: Trajectories) -> Tensor:
        """``[B]``, the scores themselves."""
        return self.feedback.score(traj)

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``; equal scores give 1/2 at any scale."""
        difference = self.score(a) - self.score(b)
        if self.scale == float("inf"):
            return (difference.sign() + 1) / 2
        return torch.sigmoid(self.scale * difference)


def action_place(traj: Trajectories) -> Tensor:
    """``[B]``, the action of a one-step trajectory. Raises `FeedbackError` where there is none."""
    if traj.outputs is None or "action" not in traj.outputs:
        raise FeedbackError(
            "this teacher plays a game over actions, but the trajectories hold none; give it a 'place' function"
        )
    return traj.outputs["action"].reshape(traj.batch_size[0], -1)[:, 0]


@dataclass
class MatrixOracle:
    """A teacher that plays a matrix game: option i is preferred to option j with probability ``matrix[i, j]``.

    Args:
        matrix: ``[K, K]`` probabilities with ``matrix + matrix.T = 1``, so 1/2 on the diagonal.
        place: which option an answer is; the action of a one-step policy if nothing is said.

    Raises `ShapeError` when the matrix is no such game.
    """

    matrix: Tensor
    place: Place = action_place
    name: str = "matrix"

    def __post_init__(self) -> None:
        self.matrix = games.checked(self.matrix)

    @classmethod
    def dice(cls, **options: Any) -> MatrixOracle:
        """Three dice of which each beats the next with 5/9 (Munos et al., 2024, NLHF; `games.dice`)."""
        return cls(games.dice(), **options)

    @classmethod
    def raters(cls, epsilon: float = 0.0, **options: Any) -> MatrixOracle:
        """Three kinds of raters who each care for one pair of options (Munos et al., 2024, NLHF; `games.raters`)."""
        return cls(games.raters(epsilon), **options)

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``."""
        return self.matrix.to(a.log_prob)[self.place(a), self.place(b)]


@dataclass
class GameOracle:
    """A teacher to whom an answer's class decides, and within a class its quality.

    Between classes ``matrix`` holds, which may run in circles; within one class Bradley and Terry's
    ``sigmoid(quality(a) - quality(b))``. Every answer is looked up in arrays, so that exact win rates over all answers
    need class masses only.

    Args:
        matrix: ``[C, C]``, as for `MatrixOracle`.
        classes: ``int64 [N]``, the class of each possible answer.
        quality: ``[N]``; None makes answers of one class equal.
        place: which of the N answers a trajectory is.
    """

    matrix: Tensor
    classes: Tensor
    quality: Tensor | None = None
    place: Place = action_place
    name: str = "game"

    def __post_init__(self) -> None:
        self.matrix = games.checked(self.matrix)
        if self.quality is not None and self.quality.shape != self.classes.shape:
            raise ShapeError(
                f"GameOracle: {list(self.classes.shape)} classes need as many qualities, not {list(self.quality.shape)}"
            )
        if len(self.classes) and not 0 <= int(self.classes.min()) <= int(self.classes.max()) < len(
            self.matrix
        ):
            raise ShapeError(f"GameOracle: a class lies outside the game's {len(self.matrix)}")

    def between(self, a: Tensor, b: Tensor) -> Tensor:
        """The probability that answer ``a`` beats answer ``b``, for int64 tensors of places that broadcast."""
        first, second = self.classes[a], self.classes[b]
        p = self.matrix[first, second]
        if self.quality is None:
            return p
        return torch.where(first == second, torch.sigmoid(self.quality[a] - self.quality[b]).to(p.dtype), p)

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``."""
        home = self.classes.device
        return self.between(self.place(a).to(home), self.place(b).to(home)).to(a.log_prob)


# --- labels -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelNoise:
    """How a teacher's labels fall short of its preferences (Lee et al., 2021, B-Pref).

    Args:
        mistaken: the share of labels that are turned round.
        skip: a pair whose better answer scores below this is not labelled at all.
        equal: a pair whose scores differ by less than this is called a tie (strength 1/2).

    ``skip`` and ``equal`` need a teacher that scores.
    """

    mistaken: float = 0.0
    skip: float | None = None
    equal: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.mistaken <= 1:
            raise UsageError(f"LabelNoise: mistaken is {self.mistaken}; it is a share between 0 and 1")


def label(
    a: Trajectories,
    b: Trajectories,
    teacher: Feedback | PairFeedback,
    seed: int,
    *,
    start: int = 0,
    noise: LabelNoise | None = None,
    soft: bool = False,
    annotator: int | None = None,
) -> Preferences:
    """What ``teacher`` says about ``B`` pairs of answers to the same prompts.

    Args:
        a, b: ``B`` rows each.
        teacher: compares, or scores (then as Bradley and Terry say).
        seed: of the labels: row i draws from ``(seed, start + i)``, whatever else is labelled with it.
        noise: see `LabelNoise`.
        soft: instead of drawing labels, put the likelier answer first and its probability into ``strength``.
        annotator: written into every row.

    Drawn labels have no ``strength``, unless ``noise.equal`` may make ties: then 1, and 1/2 for a tie. Raises `ShapeError`
    when the sides differ in length, `FeedbackError` when noise needs scores and the teacher has none.
    """
    rows, noise = a.batch_size[0], noise or LabelNoise()
    if b.batch_size[0] != rows:
        raise ShapeError(f"label: {rows} answers stand against {b.batch_size[0]}")
    p = compare(teacher, a, b)
    kept = torch.ones_like(p, dtype=torch.bool)
    strength = p.new_ones(rows) if noise.equal is not None else None
    if noise.skip is not None or noise.equal is not None:
        if not hasattr(teacher, "score"):
            raise FeedbackError("skipped and equal labels go by scores, but this teacher only compares")
        score_a, score_b = teacher.score(a), teacher.score(b)
        if noise.skip is not None:
            kept = torch.maximum(score_a, score_b) >= noise.skip
        if strength is not None and noise.equal is not None:
            strength = torch.where((score_a - score_b).abs() < noise.equal, 0.5, strength)
    if soft:
        p = p * (1 - noise.mistaken) + (1 - p) * noise.mistaken
        first, certain = p >= 0.5, torch.maximum(p, 1 - p)
        strength = certain if strength is None else torch.where(strength == 0.5, strength, certain)
    else:
        draw = uniform(row_seeds(seed, start, rows), (2,), p.device)
        first = (draw[:, 0] < p) ^ (draw[:, 1] < noise.mistaken)
    both = concatenate([a, b])
    place = torch.arange(rows, device=p.device)
    chosen, rejected = (
        torch.where(first, place, place + rows)[kept],
        torch.where(first, place + rows, place)[kept],
    )
    count = len(chosen)
    return Preferences(
        chosen=both[chosen],
        rejected=both[rejected],
        strength=None if strength is None else strength[kept].to(torch.float32),
        annotator=None if annotator is None else torch.full((count,), annotator, device=p.device),
        batch_size=[count],
    )
