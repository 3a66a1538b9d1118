"""The labelled moves that come with the package, and boards as inputs of a small network.

`load` needs no chess library: the inputs were written beside the labels by ``make``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import DataError

DATA = Path(__file__).parent / "labels.npz"

PIECES = 12  # own pawn .. king, then the opponent's
CASTLING = 4
# One number a fact, seen by the player to move: a piece on a square, castling rights; of the move, which piece
# leaves which square, which arrives where, what is captured, the opponent's least piece that attacks the mover
# before and after, whether it is defended where it arrives, and whether it gives check.
LEAVES = PIECES * 64 + CASTLING
ARRIVES = LEAVES + 6 * 64
CAPTURED = ARRIVES + 6 * 64
THREATENED = CAPTURED + 6 * 64
EXPOSED = THREATENED + 6 * 7
DEFENDED = EXPOSED + 6 * 7
CHECK = DEFENDED + 1
FACTS = CHECK + 1
PADDING = FACTS  # fills rows up to the longest; not a fact
OF_POSITION, OF_MOVE = 32 + CASTLING, 7  # the most facts of each
WIDTH = OF_POSITION + OF_MOVE


def win_probability(centipawns: np.ndarray) -> np.ndarray:
    """``0.5 + 0.5 (2 / (1 + exp(-0.00368208 cp)) - 1)``, as published by Lichess and used in Ruoss et al.
    (2024)."""
    return 1.0 / (1.0 + np.exp(-0.00368208 * centipawns))


@dataclass
class ChessValues:
    """Positions with some of their legal moves.

    Attributes:
        facts: ``[P, M, WIDTH]`` int64 of ``0 .. FACTS`` for position and move; `PADDING` at the end.
        value: ``[P, M]`` probability that the player who moves wins, in [0, 1].
    """

    facts: Tensor
    value: Tensor


def load(split: str, path: Path = DATA) -> ChessValues:
    """The moves of ``"train"`` or ``"test"``; no game has positions in both.

    Raises `DataError` when the file is missing or is not one that ``make`` wrote.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            held_out = file["held_out"]
            rows = held_out if split == "test" else ~held_out
            board, move, centipawns = file["board"][rows], file["move"][rows], file["centipawns"][rows]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: not readable as labelled chess moves ({error}); make them with "
            "'python -m guerdon.tasks.chess_values.make'"
        ) from error
    boards = np.broadcast_to(board[:, None], (*move.shape[:2], board.shape[-1]))
    facts = np.concatenate([boards, move], axis=-1).astype(np.int64)
    value = win_probability(centipawns.astype(np.float64)).astype(np.float32)
    return ChessValues(torch.from_numpy(facts), torch.from_numpy(value))
