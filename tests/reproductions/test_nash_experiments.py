"""The experiments on games of preference: what they compute exactly, and that their checks can fail."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest

from guerdon.reproductions import dno, nash_md
from guerdon.reproductions.runner import Results


@functools.cache
def nash_exact() -> dict[str, Any]:
    return nash_md.exact(0, Path())


@functools.cache
def dno_exact() -> dict[str, Any]:
    return dno.exact(0, Path())


def nash_results() -> Results:
    measures = {"regularised": 0.02, "exploitability": 0.16, "kl": 0.7, "win_rate": 0.57}
    arms = {arm: {0: {**measures, "course": [[100, 0.05], [200, 0.02]]}} for arm in list(nash_md.ARMS)[1:-1]}
    arms["best response"][0]["regularised"] = 0.15
    arms["RLHF"][0] |= {"regularised": 0.11, "best_exact": 0.06, "exact": {"0.3": 0.11, "1.2": 0.06}}
    arms["Nash-EMA"][0]["average"] = measures
    names = ["reference", *list(nash_md.ARMS)[1:-1]]
    arms["win rates"] = {
        0: {"names": names, "worst": dict.fromkeys(names, 0.49)}
        | dict.fromkeys(("reference", "equilibrium", "exact best response"), measures)
    }
    return {"exact": {0: nash_exact()}, **arms}


def dno_results() -> Results:
    figures = {
        "over_untrained": [0.55, 0.62, 0.68],
        "over_previous": [0.55, 0.6, 0.6],
        "kl": 3.0,
        "exploitability": 0.25,
        "exploitability_of_mean": 0.12,
    }
    arms: dict[str, Any] = {arm: {0: figures} for arm in dno._LEARNED}
    sweep = {str(tau): {"over_untrained": 0.6, "exploitability": 0.23, "kl": 1.0} for tau in dno.TAUS}
    names = ["untrained", *dno._LEARNED]
    matrix = [[0.6] * len(names) for _ in names]
    arms |= {
        "RLHF": {0: {"sweep": sweep, "best": 0.22}},
        "win rates": {0: {"names": names, "matrix": matrix}},
    }
    return {"exact": {0: dno_exact()}, **arms}


@pytest.mark.parametrize(("experiment", "make"), [(nash_md, nash_results), (dno, dno_results)])
def test_every_threshold_is_checked_and_can_fail(experiment: Any, make: Any, tmp_path: Path) -> None:
    results = make()
    checks = experiment.judge(results)
    assert {check.name for check in checks} == set(experiment.THRESHOLDS)
    assert [check.name for check in checks if not check.passed] == []
    rows = experiment.table(results)
    assert all(len(row) == len(rows[0]) for row in rows)
    experiment.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert experiment.judge({}) == []
    assert experiment.table({})


def test_a_nash_policy_no_better_than_a_reward_fails() -> None:
    results = nash_results()
    for arm in ("Nash-MD 0.125", "Nash-MD 0.5"):
        results[arm][0]["regularised"] = 0.1
    failed = {check.name for check in nash_md.judge(results) if not check.passed}
    assert any("over that of the best RLHF" in name for name in failed)
    assert any("minus self-play's" in name for name in failed)
    assert any("over that of the best response" in name for name in failed)


def test_an_iteration_that_falls_back_fails() -> None:
    results = copy.deepcopy(dno_results())
    results["DNO"][0] |= {"over_untrained": [0.6, 0.58, 0.66], "over_previous": [0.6, 0.49, 0.6]}
    failed = [check.name for check in dno.judge(results) if not check.passed]
    assert len(failed) == 2


def test_the_exact_parts_reproduce_the_papers_examples_and_the_regression() -> None:
    exact = nash_exact()
    assert exact["deviation"] < 1e-3
    assert exact["kl"]["0.01"]["10000"] == pytest.approx(3.96e-4, rel=0.01)
    assert dno_exact()["variation"] < 1e-3
