"""The experiment of SequenceSAC: what it demands, and two of its arms cut short."""

import copy

import pytest

from guerdon import compiled
from guerdon.evaluation.frequency import LENGTHS, score_of
from guerdon.reproductions import sequence_sac as experiment


def figures(level, updates=1875):
    returns = {str(length): level - 10.0 * length for length in LENGTHS}
    score = score_of("Pendulum-v1", {int(k): v for k, v in returns.items()})
    return {"score": score, "returns": returns, "actor_updates": updates, "critic_updates": 15_000}


GOOD = {
    "J = 8": {0: {**figures(-150), "planner": figures(-200)}, 1: figures(-160)},
    "SAC-1": {0: figures(-500), 1: figures(-520)},
    "SAC-4": {0: figures(-450), 1: figures(-400)},
    "no recall": {0: figures(-300), 1: figures(-320)},
}


def test_the_thresholds_are_all_judged_and_can_fail():
    checks = experiment.judge(GOOD)
    assert {check.name for check in checks} == set(experiment.THRESHOLDS)
    assert all(check.passed for check in checks)
    spoiled = (
        (
            "J = 8",
            figures(-900),
            {"frequency-averaged score, J = 8", "return when deciding every step, J = 8"},
        ),
        ("SAC-1", figures(-200), {"score, J = 8 over SAC-1"}),
        ("SAC-4", figures(-200), {"score, J = 8 over SAC-4"}),
        ("no recall", figures(-160), {"score, J = 8 over no recall"}),
        ("J = 8", figures(-150, 1876), {"actor updates of J = 8, times J, over critic updates"}),
    )
    for arm, bad, names in spoiled:
        results = copy.deepcopy(GOOD)
        results[arm] = {0: bad, 1: bad}
        assert names <= {check.name for check in experiment.judge(results) if not check.passed}


def test_the_table_has_the_planner_and_the_picture_is_drawn(tmp_path):
    rows = experiment.table(GOOD)
    assert [row[0] for row in rows[1:]] == [*GOOD, "planner, model of J = 8"]
    assert {len(row) for row in rows} == {len(rows[0])}
    experiment.draw(GOOD, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("arm", ["SAC-4", "no model"])
def test_an_arm_trains_and_sweeps_all_lengths(tmp_path, monkeypatch, arm):
    monkeypatch.setattr(compiled, "available", lambda: "to be quick")
    steps = 4000 if arm == "SAC-4" else 1000  # a thousand decisions
    monkeypatch.setattr(experiment, "STEPS", steps)
    monkeypatch.setattr(experiment, "START", steps - 80)
    found = experiment.ARMS[arm](3, tmp_path / "run")
    assert list(found["returns"]) == [str(length) for length in LENGTHS]
    assert 0 < found["score"] < 0.6
    assert found["actor_updates"] == (20 if arm == "SAC-4" else 10)
    assert found["course"][-1][0] == steps
