"""The experiment of DPO: what it demands, and its arms cut short."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from guerdon.reproductions import dpo as experiment


def point(kl: float, reward: float, label: str = "", **more: float) -> dict[str, Any]:
    return {
        "label": label,
        "kl": kl,
        "reward": reward,
        "gap": 0.9,
        "kl_to_optimum": 0.2,
        "win_rate": 0.7,
        **more,
    }


GOOD: dict[str, Any] = {
    "DPO": {
        "points": [point(2.5, 1.9, "0.25"), point(1.3, 1.5, "0.5"), point(0.4, 0.9, "1"), point(0.1, 0.45, "2")],
        "start": point(0.0, 0.0, kl_to_optimum=1.8),
        "best": [[0.1, 0.47], [1.0, 1.4], [3.0, 2.1]],
    },
    "DPO with turned labels": {"points": [point(1.0, -1.2)]},
    "Preferred-FT": {"points": [point(0.1, 0.4, gap=0.3)]},
    "unlikelihood": {"points": [point(0.1, 0.4, "0.1", gap=0.4), point(4.0, 1.9, "1", gap=-0.3)]},
    # the last one lies beyond DPO's largest KL, where nothing can be compared
    "policy gradient on learned reward": {"points": [point(1.0, 1.2, "0.5"), point(0.1, 0.4, "2"), point(2.9, 9.0, "0.25")]},
    "best of 16 by learned reward": {"points": [point(1.8, 1.5, "16")]},
    "policy gradient on gold reward": {"points": [point(1.5, 1.6, "0.5")]},
    "reviews DPO": {"points": [point(0.5, 0.7, "2"), point(1.0, 0.8, "0.5")]},
    "reviews Preferred-FT": {"points": [point(0.3, 0.55)], "start": point(0.0, 0.5)},
}  # fmt: skip
SPOILED = [
    ("DPO", 1, {"kl_to_optimum": 0.5}, "DPO, KL to the optimum over that of the reference"),
    ("DPO", 1, {"gap": 0.7}, "DPO, share of the way to the optimum"),
    ("DPO with turned labels", 0, {"reward": 0.1}, "DPO with turned labels, reward minus the reference's"),
    ("unlikelihood", 1, {"gap": 0.6}, "unlikelihood with alpha 1, share of the way to the optimum"),
    ("Preferred-FT", 0, {"gap": 0.6}, "Preferred-FT, share of the way to the optimum"),
    ("Preferred-FT", 0, {"reward": 0.6}, "at equal KL, DPO's reward minus that of Preferred-FT"),
    (
        "policy gradient on learned reward",
        1,
        {"reward": 0.6},
        "at equal KL, DPO's reward minus that of policy gradient on the learned reward (least)",
    ),
    (
        "reviews DPO",
        1,
        {"reward": 0.58},
        "reviews, DPO's reward with beta 0.5 minus that of Preferred-FT",
    ),
    (
        "reviews Preferred-FT",
        0,
        {"reward": 0.65},
        "reviews, at equal KL, DPO's reward minus that of Preferred-FT",
    ),
]


def results() -> Any:
    return {arm: {seed: copy.deepcopy(figures) for seed in (0, 1)} for arm, figures in GOOD.items()}


def test_all_baselines_of_the_paper_are_arms() -> None:
    assert set(GOOD) == set(experiment.ARMS)
    assert set(experiment.BETAS) >= {0.25, 0.5, 1.0, 2.0}


def test_the_thresholds_are_all_judged_on_each_seed() -> None:
    checks = experiment.judge(results())
    assert {check.name for check in checks} == set(experiment.THRESHOLDS)
    assert len(checks) == 2 * len(experiment.THRESHOLDS)
    assert all(check.passed for check in checks)


@pytest.mark.parametrize(("arm", "place", "figures", "name"), SPOILED)
def test_each_statement_can_fail(arm: str, place: int, figures: dict[str, float], name: str) -> None:
    found = results()
    found[arm][1]["points"][place] |= figures
    assert [(c.name, c.seed) for c in experiment.judge(found) if not c.passed] == [(name, 1)]


def test_what_cannot_be_compared_does_not_pass() -> None:
    found = results()
    found["policy gradient on learned reward"][0]["points"] = [point(9.0, 0.1, "0.25")]
    assert [c.seed for c in experiment.judge(found) if not c.passed] == [0]


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    rows = experiment.table(results())
    assert len(rows) == 1 + sum(len(figures["points"]) for figures in GOOD.values())
    assert {len(row) for row in rows} == {len(rows[0])}
    experiment.draw(results(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    experiment.draw({"Preferred-FT": results()["Preferred-FT"]}, tmp_path / "part.png")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "PAIRS", 320)
    monkeypatch.setattr(experiment, "BETAS", (0.25, 0.5))
    monkeypatch.setattr(experiment, "ALPHAS", (1.0,))
    monkeypatch.setattr(experiment, "_RLOO", {**experiment._RLOO, "rounds": 3})
    monkeypatch.setattr(experiment, "_REWARD", {**experiment._REWARD, "epochs": 1})


@pytest.mark.parametrize("arm", [name for name in experiment.ARMS if not name.startswith("reviews")])
def test_an_arm_trains(arm: str, short: None, tmp_path: Path) -> None:
    figures = experiment.ARMS[arm](7, tmp_path / "arm-7")
    for found in figures["points"]:
        assert 0 < found["kl"] < 4
        assert abs(found["reward"]) < 2.5
        assert found["gap"] < 1
    if arm == "DPO":
        assert [p["label"] for p in figures["points"]] == ["0.25", "0.5"]
        assert figures["start"]["kl"] == 0
        kl, reward = zip(*figures["best"], strict=True)
        assert list(kl) == sorted(kl, reverse=True)  # from the smallest beta on
        assert list(reward) == sorted(reward, reverse=True)


def test_the_arms_on_reviews(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from guerdon.tasks.reviews import task

    monkeypatch.setattr(task, "PAIRS", 128)
    monkeypatch.setattr(experiment, "SAMPLES", 64)
    monkeypatch.setattr(experiment, "REVIEW_BETAS", (0.5,))
    for arm in ("reviews DPO", "reviews Preferred-FT"):
        (found,) = experiment.ARMS[arm](7, tmp_path / "arm-7")["points"]
        assert 0 < found["kl"] < 10
        assert 0.3 < found["reward"] < 0.8
        assert found["reward_error"] < 0.1
