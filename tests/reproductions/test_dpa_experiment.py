"""The experiment of DPA: what it demands, and its arms cut short."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.experience.completions import Completions
from guerdon.reproductions import dpa as experiment
from guerdon.tasks import topics


def front(value: float, length: list[float], volume: float = 0.3) -> dict[str, Any]:
    return {
        "value": [value] * 7,
        "helpfulness": [40.0 + i for i in range(7)],
        "verbosity": [10.0 * i for i in range(7)],
        "length": length,
        "hypervolume": volume,
    }


RISING = [8.0, 9.0, 10.0, 12.0, 14.0, 16.0, 18.0]
FLAT = [12.0, 12.1, 11.9, 12.0, 12.2, 11.8, 12.0]
GOOD: dict[str, Any] = {
    "SFT": {"front": front(40, [14.0] * 7), "best of 16": front(60, RISING)},
    "scalar RSF": {"front": front(46, [13.0] * 7)},
    "DPA": {"front": front(54, RISING, 0.4), "fronts": [front(50, RISING, 0.3), front(54, RISING, 0.4)]},
    "DPA with shuffled directions": {"front": front(45, FLAT), "fronts": [front(45, FLAT)]},
}


def results(change: Any = None) -> Any:
    figures = copy.deepcopy(GOOD)
    if change is not None:
        change(figures)
    return {arm: {0: f} for arm, f in figures.items()}


def failed(found: Any) -> set[str]:
    return {check.name for check in experiment.judge(found) if not check.passed}


def test_a_good_result_holds_and_every_threshold_is_used() -> None:
    checks = experiment.judge(results())
    assert all(check.passed for check in checks)
    assert {check.name for check in checks} == set(experiment.THRESHOLDS)


def set_front(arm: str, found: dict[str, Any]) -> Any:
    def change(figures: Any) -> None:
        figures[arm]["front"] = found
        if arm == "DPA":
            figures[arm]["fronts"][-1] = found

    return change


@pytest.mark.parametrize(
    ("arm", "found", "names"),
    [
        (
            "DPA",
            front(54, FLAT, 0.4),
            {
                "DPA, rank correlation of angle and mean length",
                "DPA, mean length at 45 degrees over that at -45",
            },
        ),
        ("DPA", front(54, RISING, 0.2), {"hypervolume after iteration 2 minus that after iteration 1"}),
        (
            "DPA",
            front(47, RISING, 0.4),
            {
                "DPA, share of the way from SFT to best-of-16 (mean over angles)",
                "DPA's share minus that of scalar rejection sampling",
            },
        ),
        ("scalar RSF", front(53, FLAT), {"DPA's share minus that of scalar rejection sampling"}),
        (
            "DPA with shuffled directions",
            front(45, RISING),
            {"shuffled directions, rank correlation of angle and mean length"},
        ),
    ],
)
def test_each_part_of_the_claim_can_fail(arm: str, found: dict[str, Any], names: set[str]) -> None:
    assert failed(results(set_front(arm, found))) == names


def test_table_and_picture_show_every_policy(tmp_path: Path) -> None:
    rows = experiment.table(results())
    assert {row[0] for row in rows[1:]} == {*GOOD, "best of 16 (true reward)", "DPA, iteration 1"}
    assert {len(row) for row in rows} == {10}
    experiment.draw(results(), tmp_path / "dpa.png")
    assert (tmp_path / "dpa.png").stat().st_size > 5_000


def test_shuffled_directions_are_the_same_ones_in_other_places() -> None:
    experience = Completions(topics.prompts()[0][:4], seed=0)
    honest, other = experiment.DPA(**experiment._DPA), experiment.Shuffled(**experiment._DPA)
    direction = honest.sampler.draw(4, 8, torch.Generator().manual_seed(0))
    a, b = (m.written([0, 1, 2, 3], direction, experience) for m in (honest, other))
    assert [t.split("\n")[1] for t in a] == [t.split("\n")[1] for t in b]
    assert sorted(t.split("\n")[0] for t in a) == sorted(t.split("\n")[0] for t in b)
    assert sum(x == y for x, y in zip(a, b, strict=True)) < 6


def test_the_arms_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = topics.fresh_policy(0, 16, 1)
    tiny.max_new_tokens = 8
    monkeypatch.setattr(topics, "base_policy", lambda: copy.deepcopy(tiny))
    monkeypatch.setattr(topics, "RATINGS", 64)
    monkeypatch.setattr(topics, "ANGLES", (-45.0, 45.0))
    train, held_out = topics.prompts()
    monkeypatch.setattr(topics, "prompts", lambda: (train, held_out[:4]))
    monkeypatch.setattr(experiment, "RATING_EPOCHS", 1)
    monkeypatch.setattr(experiment, "_SAMPLES", 1)
    small = {"prompts_per_iteration": 4, "directions": 2, "candidates": 2, "epochs": 1}
    monkeypatch.setattr(experiment, "_DPA", experiment._DPA | small)
    experiment._reward_model.cache_clear()
    for arm, run in experiment.ARMS.items():
        found = run(0, tmp_path / arm)
        assert len(found["front"]["value"]) == 7 if arm == "SFT" else found["front"]["value"]
        assert len(found.get("fronts", [0, 0])) == 2
    experiment._reward_model.cache_clear()
