"""Label chess moves with Stockfish.

    python -m guerdon.tasks.chess_values.make

writes ``labels.npz`` and ``make.log`` into this folder, or where ``--out`` says. Needs the package ``chess``
and Stockfish on the path or in /usr/games (Debian's package ``stockfish``). The same Stockfish gives the same
labels: one thread, a fixed number of nodes, an empty hash table before every search.
"""

from __future__ import annotations

import argparse
import random
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from guerdon.errors import UsageError
from guerdon.randomness import mix
from guerdon.tasks.chess_values.labels import (
    ARRIVES,
    CAPTURED,
    CASTLING,
    CHECK,
    DATA,
    DEFENDED,
    EXPOSED,
    LEAVES,
    OF_MOVE,
    OF_POSITION,
    PADDING,
    PIECES,
    THREATENED,
)

if TYPE_CHECKING:
    import chess
    import chess.engine

MOVES = 8  # labelled moves a position
WINDOWS = ((8, 18), (19, 29), (30, 40))  # plies; one position of a game from each
MATE = 32_000  # centipawns that stand for a forced mate: a win probability of 1
HELD_OUT = 0.2  # share of the games


def find_stockfish() -> str:
    """The engine's path. Raises `UsageError` when there is none."""
    path = shutil.which("stockfish") or shutil.which("/usr/games/stockfish")
    if path is None:
        raise UsageError(
            "Stockfish was not found: install it ('apt install stockfish') or put it on the path"
        )
    return path


class Labeller:
    """Stockfish on one thread with a fixed number of nodes and nothing remembered between searches."""

    def __init__(self) -> None:
        import chess.engine

        self.engine = chess.engine.SimpleEngine.popen_uci(find_stockfish())
        self.engine.configure({"Threads": 1, "Hash": 1})

    def __enter__(self) -> Labeller:
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.quit()

    def best(self, board: chess.Board, nodes: int) -> chess.Move:
        """The move it would play."""
        import chess.engine

        move = self.engine.play(board, chess.engine.Limit(nodes=nodes), game=object()).move
        assert move is not None
        return move

    def centipawns(self, board: chess.Board, move: chess.Move, nodes: int) -> int:
        """What ``move`` is worth to the player who makes it; ``MATE`` and ``-MATE`` for forced mates."""
        import chess.engine

        after = board.copy(stack=False)
        after.push(move)
        if after.is_checkmate():
            return MATE
        if after.is_stalemate() or after.is_insufficient_material():
            return 0
        found = self.engine.analyse(after, chess.engine.Limit(nodes=nodes), game=object())
        score = found["score"].pov(board.turn)
        mate = score.mate()
        if mate is not None:
            return MATE if mate > 0 else -MATE
        return int(np.clip(score.score() or 0, -MATE, MATE))


def board_facts(board: chess.Board) -> list[int]:
    """The facts of a position, padded; the board is turned so that the player to move plays upwards."""
    import chess

    turn = 0 if board.turn else 56  # xor: flips the ranks
    facts = [
        ((piece.piece_type - 1) + 6 * (piece.color != board.turn)) * 64 + (square ^ turn)
        for square, piece in sorted(board.piece_map().items())
    ]
    rights = [
        right(colour)
        for colour in (board.turn, not board.turn)
        for right in (board.has_kingside_castling_rights, board.has_queenside_castling_rights)
    ]
    facts += [PIECES * 64 + i for i, has in enumerate(rights) if has]
    assert len(rights) == CASTLING
    assert chess.PAWN == 1
    return facts + [PADDING] * (OF_POSITION - len(facts))


def move_facts(board: chess.Board, move: chess.Move) -> list[int]:
    """The facts of a move, padded."""
    import chess

    turn = 0 if board.turn else 56
    start, end = move.from_square ^ turn, move.to_square ^ turn
    before = board.piece_type_at(move.from_square)
    assert before is not None
    kind = move.promotion or before
    taken = chess.PAWN if board.is_en_passant(move) else board.piece_type_at(move.to_square)
    after = board.copy(stack=False)
    after.push(move)
    facts = [
        LEAVES + (before - 1) * 64 + start,
        ARRIVES + (kind - 1) * 64 + end,
        THREATENED + (before - 1) * 7 + _least_attacker(board, not board.turn, move.from_square),
        EXPOSED + (kind - 1) * 7 + _least_attacker(after, not board.turn, move.to_square),
    ]
    if taken is not None:
        facts.append(CAPTURED + (taken - 1) * 64 + end)
    if after.is_attacked_by(board.turn, move.to_square):
        facts.append(DEFENDED)
    if after.is_check():
        facts.append(CHECK)
    return facts + [PADDING] * (OF_MOVE - len(facts))


def _least_attacker(board: chess.Board, colour: bool, square: int) -> int:
    """The least type of piece of ``colour`` that attacks ``square``; 0 for none."""
    return min((board.piece_type_at(at) or 0 for at in board.attackers(colour, square)), default=0)


def play(seed: int, labeller: Labeller, engine_share: float, nodes: int) -> list[chess.Board]:
    """Positions of one game, one from each of `WINDOWS` that it reaches: moves are random, or the engine's
    with probability ``engine_share``. Positions with fewer than `MOVES` legal moves are left out."""
    import chess

    rng = random.Random(seed)
    wanted = {rng.randint(*window) for window in WINDOWS}
    board, found = chess.Board(), []
    while board.ply() < max(wanted) and not board.is_game_over():
        if rng.random() < engine_share:
            board.push(labeller.best(board, nodes))
        else:
            board.push(rng.choice(list(board.legal_moves)))
        if board.ply() in wanted and board.legal_moves.count() >= MOVES:
            found.append(board.copy(stack=False))
    return found


def make(out: Path, games: int = 2000, nodes: int = 1000, engine_share: float = 0.5, seed: int = 0) -> None:
    """Play ``games``, label `MOVES` random legal moves of each position, write the files.

    Args:
        out: the ``.npz`` file; a log of the same name is put beside it.
        nodes: that Stockfish searches for each label; it plays with a twentieth of them.
        engine_share: share of the engine's moves in the games; the rest are random.
    """
    start = time.monotonic()
    board, move, centipawns, held_out, fens = [], [], [], [], []
    seen: set[str] = set()
    with Labeller() as labeller:
        name = labeller.engine.id["name"]
        for game in range(games):
            for position in play(mix(seed, game), labeller, engine_share, max(1, nodes // 20)):
                if position.epd() in seen:
                    continue
                seen.add(position.epd())
                rng = random.Random(mix(seed, game, position.ply()))
                moves = rng.sample(list(position.legal_moves), MOVES)
                board.append(board_facts(position))
                move.append([move_facts(position, m) for m in moves])
                centipawns.append([labeller.centipawns(position, m, nodes) for m in moves])
                held_out.append(game >= games * (1 - HELD_OUT))
                fens.append(f"{position.fen()} {' '.join(m.uci() for m in moves)}")
            if game % 100 == 99:
                print(
                    f"{game + 1} games, {len(board)} positions, {time.monotonic() - start:.0f} s", flush=True
                )
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out,
        board=np.array(board, dtype=np.int16),
        move=np.array(move, dtype=np.int16),
        centipawns=np.array(centipawns, dtype=np.int16),
        held_out=np.array(held_out),
        position=np.array(fens, dtype=np.bytes_),
    )
    lines = [
        f"{name}, 1 thread, 1 MB hash cleared before every search, {nodes} nodes a label",
        f"{games} games from seed {seed}, {engine_share:.0%} of the moves Stockfish's at {max(1, nodes // 20)} nodes",
        f"{len(board)} positions ({sum(held_out)} held out, whole games), {MOVES} random legal moves each",
        f"{time.monotonic() - start:.0f} s",
    ]
    out.with_name("make.log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m guerdon.tasks.chess_values.make", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=DATA)
    parser.add_argument("--games", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    make(options.out, options.games, options.nodes, seed=options.seed)


if __name__ == "__main__":
    main()
