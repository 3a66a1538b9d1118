"""The experiment of A-LoL: what it demands, its data sets, and two of its arms cut short."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.reproductions import a_lol as experiment
from guerdon.tasks.reviews import world


def reviews(reward: float, **more: Any) -> dict[str, Any]:
    figures = {"reward": reward, "grammatical": 0.9, "length": 10.0, "kept": 0.15, "updates": 60, "rho": 1.2}
    figures |= {"distinct_1": 0.02, "distinct_2": 0.15, "distinct_3": 0.4, "wall_seconds": 9.0}
    return figures | more


BANDIT = {"pi_ref": 0.35, "best": 0.91, "NLL": 0.35, "wBC": 0.57, "R-GOLD": 0.6, "R-LoL": 0.7, "A-LoL": 0.8}
GOOD: dict[str, dict[int, dict[str, Any]]] = {
    "bandit": {s: {**{k: [v] * 2 for k, v in BANDIT.items()}, "wall_seconds": 9.0} for s in (0, 1)},
    "reference": {0: reviews(0.5), 1: reviews(0.5)},
    **{f"noisy {form}": {0: reviews(0.85), 1: reviews(0.9)} for form in experiment.OURS},
    **{f"noisy {form}": {0: reviews(0.5, kept=1.0), 1: reviews(0.5)} for form in ("wBC", "R-GOLD", "R-LoL")},
    "noisy NLL": {0: reviews(0.3), 1: reviews(0.35)},
    "clean NLL": {0: reviews(0.7), 1: reviews(0.7)},
    "clean A-LoL": {0: reviews(0.9), 1: reviews(0.9)},
    "constant A-LoL": {0: reviews(0.3), 1: reviews(0.3)},
}


def test_the_thresholds_are_all_judged_and_can_fail() -> None:
    checks = experiment.judge(GOOD)
    assert {check.name for check in checks} == set(experiment.THRESHOLDS)
    assert all(check.passed for check in checks)
    spoiled = (
        ("noisy wBC", reviews(0.89), "noisy, best A-LoL over weighted behaviour cloning"),
        ("noisy NLL", reviews(0.89), "noisy, best A-LoL over likelihood"),
        ("clean A-LoL", reviews(1.2), "gap between clean and noisy, A-LoL's over likelihood's"),
        (
            "reference",
            reviews(0.5, distinct_2=0.3),
            "noisy, distinct bigrams of the best A-LoL over the reference's",
        ),
        ("noisy A-LoL KL", reviews(0.9, kept=0.05), "noisy, least share of answers kept"),
        ("noisy A-LoL KL", reviews(0.9, kept=0.95), "noisy, largest share of answers kept"),
        ("constant A-LoL", reviews(0.4), "constant reward, A-LoL over likelihood"),
        ("bandit", {**BANDIT, "A-LoL": [0.5, 0.8]}, "bandit, A-LoL over weighted behaviour cloning"),
        ("bandit", {**BANDIT, "A-LoL": [0.5, 1.2]}, "bandit, least lead over weighted behaviour cloning"),
        ("bandit", {**BANDIT, "NLL": [0.7, 0.7]}, "bandit, A-LoL over likelihood"),
    )
    for arm, bad, name in spoiled:
        if arm == "bandit":
            bad = {k: v if isinstance(v, list) else [v] * 2 for k, v in bad.items()}
        results = copy.deepcopy(GOOD)
        results[arm] = {0: bad, 1: bad}
        assert name in {check.name for check in experiment.judge(results) if not check.passed}, name


def test_the_table_has_every_arm_and_the_picture_is_drawn(tmp_path: Path) -> None:
    rows = experiment.table(GOOD)
    assert len(rows) == 1 + len(GOOD) - 1 + len(BANDIT)
    assert {len(row) for row in rows} == {len(rows[0])}
    experiment.draw(GOOD, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A small set of records, written by the grammar instead of the model."""

    def written(count: int, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
        prompts = (world.training_prompts() * 2)[:count]
        return tuple(prompts), tuple(world.write(prompts, seed))

    monkeypatch.setattr(experiment.reviews, "answers", written)
    monkeypatch.setattr(experiment, "ANSWERS", 400)
    monkeypatch.setattr(experiment, "VALUE_PROMPTS", 16)
    monkeypatch.setattr(experiment, "TEST_PROMPTS", 16)
    small = {**experiment._LEARN, "steps": 8, "value_answers": 16, "value_epochs": 1}
    monkeypatch.setattr(experiment, "_LEARN", small)
    experiment.records.cache_clear()
    yield
    experiment.records.cache_clear()


def test_the_data_sets_are_what_they_are_called(few: None) -> None:
    rewards = {kind: torch.tensor(experiment.records(kind, 7)[2]) for kind in ("clean", "noisy", "constant")}  # type: ignore[arg-type]
    assert {len(r) for r in rewards.values()} == {200}
    least = rewards["clean"].min()
    assert (rewards["noisy"] > least).float().mean() <= 0.15
    assert (rewards["noisy"] <= least).sum() >= 170
    assert rewards["noisy"].mean() < rewards["clean"].mean() - 0.2
    assert (rewards["constant"] == experiment.CONSTANT).all()
    assert experiment.records("constant", 7)[1] == experiment.records("noisy", 7)[1]


@pytest.mark.parametrize("arm", ["noisy A-LoL", "clean NLL"])
def test_an_arm_trains(few: None, tmp_path: Path, arm: str) -> None:
    found = experiment.ARMS[arm](3, tmp_path / "run")
    assert 0 < found["reward"] < 1
    assert found["updates"] == max(1, round(8 * found["kept"]))
    assert (found["kept"] == 1) == (arm == "clean NLL")
    assert ("rho" in found) == (arm == "noisy A-LoL")


def test_the_bandit_has_a_known_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "PROBLEMS", 1)
    monkeypatch.setattr(experiment, "FORMS", {k: experiment.FORMS[k] for k in ("NLL", "A-LoL")})
    found = experiment.bandit(3, tmp_path / "run")
    assert found["NLL"][0] == pytest.approx(found["pi_ref"][0], abs=0.05)
    assert found["pi_ref"][0] + 0.2 < found["A-LoL"][0] < found["best"][0]
