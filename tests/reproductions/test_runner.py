"""The reproduction runner: verdicts, exit status, results that outlast an interruption."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from guerdon import catalog
from guerdon.cli import ReproduceOptions, main
from guerdon.errors import UsageError
from guerdon.reproductions import rlcm, runner, tables
from guerdon.reproductions.runner import Check


def _experiment(values: dict[int, float], calls: list[int]) -> types.ModuleType:
    module = types.ModuleType("guerdon.reproductions.ppo")
    module.TITLE, module.CLAIM, module.NOTES, module.SEEDS = "toy", "larger than one", "", 2
    module.THRESHOLDS = {"value": 1.0}

    def arm(seed: int, folder: Path) -> dict[str, Any]:
        calls.append(seed)
        return {"value": values[seed]}

    module.ARMS = {"arm": arm}
    module.judge = lambda results: [
        Check("value", f["value"], ">=", 1.0, seed) for seed, f in results["arm"].items()
    ]
    module.table = lambda results: [["seed"], *[[str(s)] for s in results["arm"]]]
    module.draw = lambda results, path: path.write_bytes(b"png")
    return module


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    calls: list[int] = []

    def install(values: dict[int, float]) -> list[int]:
        module = _experiment(values, calls)
        monkeypatch.setattr(runner, "find", lambda slug: module)
        return calls

    monkeypatch.chdir(tmp_path)
    return install


def test_the_exit_status_tells_whether_the_claim_holds(toy: Any) -> None:
    toy({0: 2.0, 1: 3.0})
    assert runner.main("ppo", ReproduceOptions()) == 0
    record = json.loads(Path("results/ppo.json").read_text())
    assert record["holds"]
    assert record["complete"]
    assert record["seeds"] == [0, 1]
    assert record["thresholds"] == {"value": 1.0}
    assert record["machine"]["torch"]
    toy({0: 2.0, 1: 0.5})
    assert runner.main("ppo", ReproduceOptions(fresh=True)) == 1
    record = json.loads(Path("results/ppo.json").read_text())
    assert not record["holds"]
    assert [c["passed"] for c in record["checks"]] == [True, False]


def test_what_was_measured_is_not_measured_again(toy: Any) -> None:
    calls = toy({0: 2.0, 1: 2.0, 2: 2.0})
    runner.main("ppo", ReproduceOptions(seeds=1))
    runner.main("ppo", ReproduceOptions(seeds=3))
    assert calls == [0, 1, 2]
    runner.main("ppo", ReproduceOptions(seeds=1, fresh=True))
    assert calls == [0, 1, 2, 0]


def test_nan_fails_a_check() -> None:
    assert not Check("x", float("nan"), ">=", 0.0).passed
    assert not Check("x", float("nan"), "<=", 0.0).passed


def test_a_system_without_an_experiment_is_refused() -> None:
    with pytest.raises(UsageError, match="'grpo' has no reproduction yet"):
        runner.find("grpo")


def test_an_unknown_arm_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "rlcm", "--arms", "nonsense"]) == 2
    assert "rlcm 30 s" in capsys.readouterr().err


def _figures(gain: float, course: list[list[float]], accuracy: float = 1.0) -> dict[str, Any]:
    before = {"reward": 0.0, "reward_std": 1.0, "accuracy": 1.0}
    after = {"reward": gain, "reward_std": 1.0, "accuracy": accuracy}
    return {"before": before, "after": after, "gain": gain, "rounds": len(course), "course": course}


def _good() -> runner.Results:
    fast = [[float(s), 0.5 * s, 1.0] for s in range(20)]
    flat = [[float(s), 0.0, 1.0] for s in range(90)]
    swept = _figures(5.0, fast) | {"steps": {"tuned 2": {"reward": 3.0}, "untuned 8": {"reward": 0.1}}}
    return {
        "rlcm 30 s": {0: _figures(3.0, fast)},
        "rlcm 60 s": {0: swept},
        "redness 90 s": {0: _figures(2.0, fast)},
        "ddpo 60 s": {0: _figures(0.0, flat)},
        "shuffled 60 s": {0: _figures(-0.5, flat)},
        "kl 60 s": {0: _figures(1.7, fast, 0.97)},
        "rebel 20 s": {0: _figures(3.0, fast)},
    }


def test_rlcms_checks_cover_every_threshold_and_pass_on_good_figures() -> None:
    checks = rlcm.judge(_good())
    assert {c.name for c in checks} == set(rlcm.THRESHOLDS)
    assert all(c.passed for c in checks), [str(c) for c in checks]


@pytest.mark.parametrize(
    ("arm", "change"),
    [
        ("rlcm 30 s", {"gain": 1.4}),
        ("rlcm 60 s", {"gain": 2.4}),
        ("redness 90 s", {"gain": 1.4}),
        ("shuffled 60 s", {"gain": 0.4}),
        ("kl 60 s", {"gain": 0.9}),
        ("kl 60 s", {"after": {"reward": 1.7, "reward_std": 1.0, "accuracy": 0.8}}),
        ("ddpo 60 s", {"course": [[float(s), 0.5 * s, 1.0] for s in range(20)]}),
        ("rlcm 60 s", {"steps": {"tuned 2": {"reward": 0.0}, "untuned 8": {"reward": 0.1}}}),
    ],
)
def test_every_one_of_rlcms_checks_can_fail(arm: str, change: dict[str, Any]) -> None:
    results = _good()
    results[arm][0] = results[arm][0] | change
    assert sum(not c.passed for c in rlcm.judge(results)) == 1


def test_seconds_to_a_level_waits_for_the_mean_of_several_rounds() -> None:
    course = [[float(s), 10.0 if s == 3 else 0.0 if s < 10 else 1.0, 1.0] for s in range(20)]
    assert (
        rlcm.seconds_to(_figures(0.0, course), 0.9, window=5) == 3.0 + 1.0
    )  # one outlier of ten counts for its mean
    assert rlcm.seconds_to(_figures(0.0, course), 3.0, window=5) == float("inf")


def test_tables_are_made_from_results(tmp_path: Path) -> None:
    record = {
        "table": [["arm", "gain"], ["rlcm", "+2"]],
        "checks": [
            {"name": "gain", "value": 2.0, "sense": ">=", "threshold": 1.5, "seed": 0, "passed": True}
        ],
        "holds": True,
        "date": "2026-01-01",
        "machine": {"gpu": None, "cores": 2, "cpu": "a CPU", "torch": "2", "python": "3.11"},
    }
    (tmp_path / "toy.json").write_text(json.dumps(record))
    text = (
        "before\n<!-- results: toy -->\nstale text\n<!-- end -->\nafter <!-- results: none -->\n<!-- end -->"
    )
    filled = tables.fill(text, tmp_path)
    assert "| rlcm | +2 |" in filled
    assert "stale text" not in filled
    assert "The claim holds." in filled
    assert "not measured yet" in filled
    assert tables.fill(filled, tmp_path) == filled
    assert "shapes, consistency" in tables.fill("<!-- results: fixtures -->\n<!-- end -->", tmp_path)


def test_the_docs_tables_are_up_to_date() -> None:
    root = Path(__file__).parents[2]
    for page in ("results.md", "language.md", "matrix.md", "planner.md"):
        text = (root / "docs" / page).read_text(encoding="utf-8")
        assert tables.fill(text, root / "results") == text, "run: make tables"


def test_catalog_rows_that_are_ready_and_have_a_paper_have_an_experiment() -> None:
    for system in catalog.systems(status="ready"):
        if system.paper is not None:
            assert runner.find(system.slug).THRESHOLDS
