"""Values as classification: the labelled moves, the measures, and short runs of the three experiments."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from guerdon.critics.heads import HeadKind
from guerdon.errors import DataError
from guerdon.reproductions.studies import value_classification as study
from guerdon.tasks.chess_values import labels

# -- labels ------------------------------------------------------------------------------------------------


def test_win_probability_is_the_published_curve() -> None:
    centipawns = np.array([-32_000.0, -100.0, 0.0, 100.0, 32_000.0])
    expected = 0.5 + 0.5 * (2 / (1 + np.exp(-0.00368208 * centipawns)) - 1)
    np.testing.assert_allclose(labels.win_probability(centipawns), expected, atol=1e-12)
    np.testing.assert_allclose(expected, [0, 0.409, 0.5, 0.591, 1], atol=5e-4)


def test_shipped_moves_are_whole_and_games_do_not_cross_the_split() -> None:
    train, test = labels.load("train"), labels.load("test")
    assert len(train.value) > 4000
    assert len(test.value) > 1000
    for part in (train, test):
        assert part.facts.shape == (*part.value.shape, labels.WIDTH)
        assert part.facts.dtype == torch.int64
        assert 0 <= part.facts.min() <= part.facts.max() == labels.PADDING == labels.FACTS
        assert 0 <= part.value.min() <= part.value.max() <= 1
        own_king = (part.facts >= 5 * 64) & (part.facts < 6 * 64)
        assert (own_king.sum(-1) == 1).all()
    with np.load(labels.DATA) as file:
        held_out = file["held_out"]
        positions = [text.split(b" ")[0] for text in file["position"]]
    assert (np.diff(held_out.astype(int)) >= 0).all()  # games are in order: the last ones are held out
    assert not set(positions[: (~held_out).sum()]) & set(positions[(~held_out).sum() :])


def test_unreadable_labels_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"guerdon\.tasks\.chess_values\.make"):
        labels.load("train", tmp_path / "none.npz")
    np.savez(tmp_path / "other.npz", board=np.zeros(3))
    with pytest.raises(DataError, match="held_out"):
        labels.load("train", tmp_path / "other.npz")


def test_facts_are_those_of_the_stored_positions() -> None:
    chess = pytest.importorskip("chess")
    from guerdon.tasks.chess_values import make

    with np.load(labels.DATA) as file:
        board, move, position = file["board"], file["move"], file["position"]
    for row in range(0, len(position), 200):
        words = position[row].decode().split()
        at = chess.Board(" ".join(words[:6]))
        assert make.board_facts(at) == board[row].tolist()
        assert [make.move_facts(at, chess.Move.from_uci(text)) for text in words[6:]] == move[row].tolist()


def test_facts_by_hand() -> None:
    chess = pytest.importorskip("chess")
    from guerdon.tasks.chess_values import make

    # Black's queen d8 takes d2, which the king defends: check, exposed to a king (6), undefended
    board = chess.Board("3qk3/8/8/8/8/8/3P4/4K3 b - - 0 1")
    facts = make.move_facts(board, chess.Move.from_uci("d8d2"))
    start, end = chess.D1, chess.D7  # turned: Black plays upwards
    assert facts == [
        labels.LEAVES + 4 * 64 + start,
        labels.ARRIVES + 4 * 64 + end,
        labels.THREATENED + 4 * 7,
        labels.EXPOSED + 4 * 7 + 6,
        labels.CAPTURED + 0 * 64 + end,
        labels.CHECK,
        labels.PADDING,
    ]
    mirrored = board.mirror()
    assert sorted(make.board_facts(mirrored)) == sorted(make.board_facts(board))
    assert make.move_facts(mirrored, chess.Move.from_uci("d1d7")) == facts
    promotion = make.move_facts(chess.Board("4k3/P7/8/8/8/8/8/4K3 w - - 0 1"), chess.Move.from_uci("a7a8q"))
    assert labels.LEAVES + chess.A7 in promotion
    assert labels.ARRIVES + 4 * 64 + chess.A8 in promotion
    passant = chess.Board("4k3/8/8/3pP3/8/8/8/4K3 w - d6 0 1")
    assert labels.CAPTURED + chess.D6 in make.move_facts(passant, chess.Move.from_uci("e5d6"))


def test_stockfish_gives_the_shipped_labels_again() -> None:
    chess = pytest.importorskip("chess")
    from guerdon.errors import UsageError
    from guerdon.tasks.chess_values import make

    try:
        make.find_stockfish()
    except UsageError:
        pytest.skip("no Stockfish here")
    with np.load(labels.DATA) as file:
        position, centipawns = file["position"], file["centipawns"]
    log = labels.DATA.with_name("make.log").read_text(encoding="utf-8")
    with make.Labeller() as labeller:
        mate = chess.Board("6k1/5ppp/8/8/8/8/8/R5K1 w - - 0 1")
        assert labeller.centipawns(mate, chess.Move.from_uci("a1a8"), 1000) == make.MATE
        assert (
            labeller.centipawns(chess.Board("7k/5K2/8/6Q1/8/8/8/8 w - - 0 1"), chess.Move.from_uci("g5g6"), 1)
            == 0
        )
        if not log.startswith(labeller.engine.id["name"] + ","):
            pytest.skip("another Stockfish than the one that labelled")
        for row in (3000, 7, 1234):  # in another order than they were made in: nothing is remembered
            words = position[row].decode().split()
            board = chess.Board(" ".join(words[:6]))
            again = [labeller.centipawns(board, chess.Move.from_uci(text), 1000) for text in words[6:]]
            assert again == centipawns[row].tolist()


# -- measures ----------------------------------------------------------------------------------------------


def test_kendall_tau_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20, 8, generator=generator)
    b = torch.randint(5, (20, 8), generator=generator).float()  # with ties
    expected = [stats.kendalltau(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    np.testing.assert_allclose(study.kendall_tau(a, b).numpy(), expected, rtol=1e-5)
    assert study.kendall_tau(a[:1], torch.ones(1, 8)).isnan().all()


def test_ranking_of_moves() -> None:
    value = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.3, 0.2, 0.0, 0.1]])
    perfect = study.rank_moves(value, value)
    assert perfect["tau"] == pytest.approx(1)
    assert (perfect["top1"], perfect["regret"], perfect["error"]) == (1, 0, 0)
    assert perfect["random_regret"] == pytest.approx((0.4 + 0.15) / 2)
    worst = study.rank_moves(-value, value)
    assert worst["tau"] == pytest.approx(-1)
    assert worst["regrets"] == pytest.approx([0.8, 0.3])
    assert worst["top1"] == 0


def test_linear_probe_sees_what_is_linear_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=generator)
    linear, other = x @ torch.tensor([1.0, 2.0, 0.0, -1.0, 0.5]) + 7, torch.randn(600, generator=generator)
    assert study.linear_probe(x[:300], linear[:300], x[300:], linear[300:]) > 0.999
    assert abs(study.linear_probe(x[:300], other[:300], x[300:], other[300:])) < 0.1


def test_paired_interval() -> None:
    a, b = [[0.5, 0.7, 0.2, 0.4], [0.3, 0.5, 0.2, 0.4]], [[0.1, 0.1, 0.2, 0.2], [0.1, 0.1, 0.2, 0.2]]
    difference = np.array([0.3, 0.5, 0.0, 0.2])
    margin = 1.96 * difference.std(ddof=1) / math.sqrt(4)
    assert study.compare(a, b) == pytest.approx(
        {"difference": 0.25, "low": 0.25 - margin, "high": 0.25 + margin}
    )


# -- short runs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mse", "hl_gauss"])
def test_chess_learns_to_rank_moves_in_one_epoch(kind: HeadKind) -> None:
    figures = study.chess(100, kind, rate=3e-3, epochs=1, bins=64, calibrate=True)
    assert figures["tau"] > 0.1
    assert figures["regret"] < 0.95 * figures["random_regret"]
    assert figures["probe"] > 0.2
    assert (
        len(figures["regrets"]) == len(labels.load("train").value) - len(labels.load("train").value) * 4 // 5
    )


@pytest.mark.parametrize("kind", ["mse", "mse_softmax", "two_hot", "hl_gauss"])
def test_nonstationary_targets_are_fitted_and_repeatable(kind: HeadKind) -> None:
    once, again = (
        study.nonstationary(100, kind, rounds=2, steps=150, growth=0.0, bins=51, count=256) for _ in range(2)
    )
    assert once == again
    assert len(once["errors"]) == 2
    assert max(once["errors"]) < 0.3
    assert study.nonstationary(101, kind, rounds=1, steps=1, count=256)["errors"] != once["errors"][:1]


def test_targets_grow_every_second_round() -> None:
    """A network that is hardly trained is off by the offset: 0, 0, 8, 8, over the sine's variance."""
    figures = study.nonstationary(100, "mse", rate=1e-9, rounds=4, steps=1)
    assert figures["errors"][0] == pytest.approx(1, abs=0.5)
    assert min(figures["errors"][2:]) > 60


def test_noise_hides_the_target() -> None:
    clean, noisy = (study.noisy(100, "hl_gauss", noise, rate=3e-3, steps=150) for noise in (0.0, 1.0))
    assert clean["error"] < 0.1
    assert clean["error"] < noisy["error"] < 0.5  # against the mean, half the noise up
    assert clean["held_out"] > clean["error"]
