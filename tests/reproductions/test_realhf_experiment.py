"""The figures and checks of ReaLHF's experiment: on results that are made up, and the smallest real runs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guerdon.engine.ppo_calls import PPOCalls
from guerdon.reproductions import realhf


def results(change: Callable[[dict[str, Any]], None] | None = None) -> dict[str, dict[int, dict[str, Any]]]:
    """Good results of three seeds, but for what ``change`` does to the second one's."""
    plans = {
        name: {"estimated": 1.0 + i, "measured": 1.2 + i, "calls": {}, "micro_batches": {}}
        for i, name in enumerate((*realhf.plans_of_two(), "searched"))
    }
    setting = {
        "searched": 40.0,
        "others": {"symmetric": 44.0, "megatron_heuristic": 60.0, "disjoint": None},
        "greedy": 90.0,
        "greedy_fits": False,
        "trace": [[1, 50.0], [100, 40.0]],
    }
    good: dict[str, dict[str, Any]] = {
        "correctness": {
            "moves": 36,
            "wrong": 0,
            "differ": 0,
            "own": 0,
            "bytes": 10**7,
            "apart": {"mixed": 1e-6, "apart": 1e-6},
            "moved": 0.01,
        },
        "clock": {"plans": plans, "correlation": 0.9, "error": 0.2, "others": 0.1},
        "search (simulated)": {
            "tiny": {"exhaustive": 10.0, "searched": 10.0},
            "settings": {f"{gpus} GPUs, {a} + {b}": setting for gpus, a, b in realhf.SETTINGS},
        },
    }
    seeds = [copy.deepcopy(good) for _ in range(3)]
    if change is not None:
        change(seeds[1])
    return {arm: {seed: seeds[seed][arm] for seed in range(3)} for arm in good}


def failed(change: Callable[[dict[str, Any]], None]) -> set[str]:
    return {check.name.split(": ", 1)[1] for check in realhf.judge(results(change)) if not check.passed}


def test_every_threshold_is_checked_and_good_results_pass() -> None:
    checks = realhf.judge(results())
    assert {c.name for c in checks} == set(realhf.THRESHOLDS)
    assert all(c.passed for c in checks), [str(c) for c in checks]
    assert set(results()) == set(realhf.ARMS)


FIRST = f"{realhf.SETTINGS[0][0]} GPUs, 7B + 7B"


def _set(*path: str, to: float) -> Callable[[dict[str, Any]], None]:
    def change(found: dict[str, Any]) -> None:
        at: Any = found
        for key in path[:-1]:
            at = at[key]
        at[path[-1]] = to

    return change


SEARCH = "search (simulated)"
BROKEN = {
    "weights that are not": _set("correctness", "wrong", to=1),
    "ranks whose bytes": _set("correctness", "differ", to=1),
    "slices that a rank": _set("correctness", "own", to=1),
    "largest difference of weights": _set("correctness", "apart", "mixed", to=1e-3),
    "rank correlation": _set("clock", "correlation", to=0.5),
    "mean relative error": _set("clock", "error", to=0.5),
    "searched over exhaustive": _set(SEARCH, "tiny", "searched", to=10.1),
    "searched over best symmetric": _set(SEARCH, "settings", FIRST, "others", "symmetric", to=39.0),
    "heuristic over searched, least": _set(
        SEARCH, "settings", FIRST, "others", "megatron_heuristic", to=45.0
    ),
    "cost of the greedy": _set(SEARCH, "settings", FIRST, "greedy", to=39.0),
    "largest over smallest searched": _set(SEARCH, "settings", FIRST, "searched", to=43.0),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_claim_can_fail(what: str) -> None:
    names = failed(BROKEN[what])
    assert any(name.startswith(what) for name in names), names


def test_table_and_picture(tmp_path: Path) -> None:
    rows = realhf.table(results())
    assert {len(row) for row in rows} == {5}
    said = {row[2] for row in rows}
    assert {"weights that came out wrong", "s, by the clock", "s, searched", "s, disjoint"} <= said
    assert [row[3] for row in rows if row[2] == "s, disjoint"] == ["does not fit"] * 4
    realhf.draw(results(), tmp_path / "all.png")
    realhf.draw({"clock": results()["clock"]}, tmp_path / "one.png")
    assert (tmp_path / "all.png").stat().st_size > 10_000


def test_rank_correlation_is_spearmans() -> None:
    assert realhf.spearman([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert realhf.spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 sum d^2 / (n (n^2 - 1)), without ties
    assert realhf.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert realhf.spearman([1, 1, 2], [1, 1, 2]) == pytest.approx(1)


def test_work_of_others_is_told_from_ones_own() -> None:
    import math
    import os
    import time

    before, end = realhf._cores_busy([]), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    mine = realhf._cores_busy([]) - before
    assert math.isnan(mine) or -0.1 < mine < 0.3 * 5 * (os.cpu_count() or 1)


def test_plans_are_six_and_place_every_call() -> None:
    graph = PPOCalls().graph()
    plans = realhf.plans_of_two()
    assert len(plans) == 6
    for plan in plans.values():
        plan.check(graph)
    for meshes in realhf.plans_of_four().values():
        assert set(meshes) == {call.name for call in graph.calls}


def test_a_small_search(tmp_path: Path) -> None:
    found = realhf.searching(100, tmp_path, evaluations=2000, settings=realhf.SETTINGS[:1], keep=3)
    assert found["tiny"]["searched"] >= found["tiny"]["exhaustive"] * (1 - 1e-9)
    (row,) = found["settings"].values()
    assert row["searched"] < row["others"]["symmetric"]
    assert row["trace"][-1][1] == pytest.approx(row["searched"])


@pytest.mark.slow
def test_layouts_and_plans_for_real(tmp_path: Path) -> None:
    found = realhf.correctness(100, tmp_path)
    assert (found["wrong"], found["differ"], found["own"]) == (0, 0, 0)
    assert found["moves"] == 36
    assert max(found["apart"].values()) < 1e-4 < found["moved"]
