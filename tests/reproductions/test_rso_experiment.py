"""The figures and checks of RSO's experiment, on results that are made up, and its small problems on few numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.reproductions import rso


def language(gold: float) -> dict[str, Any]:
    return {
        "gold": gold,
        "proxy": 0.8,
        "reward": 1.0,
        "kl": 1.5,
        "acceptance": 0.1,
        "wall_seconds": 3.0,
        **{f"accuracy_{name}": 0.75 for name in ("recorded", "untrained", "best")},
    }


def results(**changed: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    golds = {"direct": 0.6, "sft_sample_rank": 0.65, "rso_sample_rank": 0.7, "random judge": 0.5}
    good: dict[str, dict[str, Any]] = {
        "sampler": {"16": 0.4, "64": 0.05, "256": 0.01, "highest": 1.0, "flat": 0.02, "proposal": 0.6},
        "misspecified": {
            name: [value, value / 2]
            for name, value in zip(
                ("direct", "sft_sample_rank", "rso_sample_rank", "untrained", "best"),
                (4.0, 4.5, 5.0, 0.0, 6.0),
                strict=True,
            )
        },
    }
    for arm in rso.LANGUAGE:
        good[arm] = language(golds.get(arm.rpartition(" ")[0], 0.55))
    return {arm: {0: f, 1: f, 2: f} for arm, f in {**good, **changed}.items()}


def test_every_threshold_is_checked_and_good_results_pass() -> None:
    checks = rso.judge(results())
    assert {c.name for c in checks} == set(rso.THRESHOLDS)
    assert all(c.passed for c in checks)
    assert set(results()) == set(rso.ARMS)


@pytest.mark.parametrize("loss", ["sigmoid_norm", "hinge_norm", "hinge"])
@pytest.mark.parametrize("source", ["direct", "sft_sample_rank", "rso_sample_rank"])
def test_the_grid_has_every_loss_on_every_source(loss: str, source: str) -> None:
    assert f"{source} {loss}" in rso.ARMS


@pytest.mark.parametrize(
    ("arm", "bad", "part"),
    [
        ("sampler", {"64": 0.5, "256": 0.5, "highest": 0.9, "flat": 0.2}, "sampler"),
        ("misspecified", {"sft_sample_rank": [4.5, 2.0], "rso_sample_rank": [4.6, 2.0]}, "misspecified"),
        ("rso_sample_rank hinge_norm", language(0.5), "language model"),
        ("RAFT", language(0.75), "RAFT"),
        ("random judge sigmoid_norm", language(0.95), "random judge"),
    ],
)
def test_each_check_can_fail(arm: str, bad: dict[str, Any], part: str) -> None:
    failed = [c.name for c in rso.judge(results(**{arm: bad})) if not c.passed]
    assert failed
    assert any(part in name for name in failed)


def test_some_arms_alone_are_judged_by_what_is_there() -> None:
    some = {arm: f for arm, f in results().items() if arm in ("sampler", "RAFT")}
    assert {c.name.partition(",")[0] for c in rso.judge(some)} == {"sampler"}


def test_how_often_an_answer_scores_higher_is_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 7, generator=generator).double().log_softmax(1) for _ in range(2))
    score = torch.randint(4, (2, 7), generator=generator).double()
    wins = (score[:, :, None] > score[:, None]).double() + 0.5 * (score[:, :, None] == score[:, None])
    expected = torch.einsum("pi,pj,pij->p", p.exp(), q.exp(), wins).mean()
    assert rso.beats_reference(p, q, score) == pytest.approx(float(expected))


def test_a_policy_that_can_be_the_target_is_fitted_from_any_source() -> None:
    """With a reward that is linear in the features, labels of Bradley and Terry give the same policy from all pairs."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 3, generator=generator).double()
    reward = features @ torch.tensor([1.0, -0.5, 0.2]).double()
    reference = (0.3 * features[:, 0]).log_softmax(0)
    best = (reference + reward / 0.5).log_softmax(0)
    label = torch.sigmoid(reward[:, None] - reward[None])
    for source in (reference, best, torch.zeros(30).double().log_softmax(0)):
        assert rso.fit(features, label, reference, source, 0.5) == pytest.approx(best, abs=1e-3)


def test_more_candidates_come_nearer_to_the_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rso, "REPEATS", 200)
    found = rso.distances(1)
    assert found["16"] > found["256"]
    assert found["highest"] == 1.0


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    table = rso.table(results())
    assert {len(row) for row in table} == {len(table[0])}
    assert all(any(row[0] == arm for row in table) for arm in rso.LANGUAGE)
    rso.draw(results(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
