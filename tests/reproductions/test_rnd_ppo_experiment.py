"""The figures and checks of the warehouse experiment, on results that are made up and on a policy that knows nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from guerdon.batch import Trajectories
from guerdon.policies.control import make_controller
from guerdon.policies.features import Features, describe
from guerdon.reproductions import rnd_ppo
from guerdon.tasks.warehouse import Warehouse


def figures(success: float, cells: float = 100.0, reached: int | None = None) -> dict[str, Any]:
    course = [
        [s, cells, 1.0 if reached is not None and s >= reached else 0.0]
        for s in range(50_000, 250_000, 50_000)
    ]
    return {"success": success, "path_ratio": 1.2 if success else math.nan, "course": course}


def results(**changed: dict[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    good = {
        "maze random": {"success": 0.0},
        "maze RND-PPO": figures(0.9, 150.0),
        "maze PPO": figures(0.0),
        "maze shuffled": figures(0.1),
        "aisles RND-PPO": figures(1.0, reached=100_000),
        "aisles PPO": figures(1.0, reached=200_000),
        "room RND-PPO": figures(0.9, 150.0),
        "room PPO": figures(0.0),
        "mountain car RND-PPO": figures(1.0),
        "mountain car PPO": figures(0.0),
    }
    return {arm: {0: f, 1: f, 2: f} for arm, f in {**good, **changed}.items()}


def test_every_threshold_is_checked_and_good_results_pass() -> None:
    checks = rnd_ppo.judge(results())
    assert {c.name for c in checks} == set(rnd_ppo.THRESHOLDS)
    assert all(c.passed for c in checks)
    assert set(results()) == set(rnd_ppo.ARMS)


@pytest.mark.parametrize(
    ("arm", "bad", "name"),
    [
        ("maze random", {"success": 0.02}, "maze, uniformly random actions, success"),
        ("maze RND-PPO", figures(0.4, 150.0), "maze, RND-PPO, mean success"),
        ("maze RND-PPO", figures(0.9, 110.0), "maze, coverage at 100k steps, RND-PPO over PPO (ratio)"),
        (
            "maze RND-PPO",
            {**figures(0.9, 150.0), "path_ratio": 2.0},
            "maze, RND-PPO's path over the shortest",
        ),
        ("maze PPO", figures(0.5), "maze, PPO, mean success"),
        ("maze shuffled", figures(0.8), "maze, RND-PPO's success over the shuffled bonus's"),
        ("aisles RND-PPO", figures(0.0), "aisles, steps to 80 %, RND-PPO over PPO (ratio)"),
        ("room PPO", figures(0.0, 150.0), "room, coverage, RND-PPO over PPO (ratio)"),
        ("mountain car RND-PPO", figures(0.0), "mountain car, RND-PPO, solved seeds (share)"),
        ("mountain car PPO", figures(1.0), "mountain car, PPO, mean success"),
    ],
)
def test_each_check_can_fail(arm: str, bad: dict[str, Any], name: str) -> None:
    failed = {c.name for c in rnd_ppo.judge(results(**{arm: bad})) if not c.passed}
    assert name in failed


def test_no_arrival_is_no_short_path() -> None:
    check = next(c for c in rnd_ppo.judge(results(**{"maze RND-PPO": figures(0.0)})) if "path" in c.name)
    assert not check.passed


def test_steps_to_a_share_and_coverage_at_a_time() -> None:
    f = {"course": [[10, 5, 0.0], [20, 7, 0.85], [30, 9, 0.5]]}
    assert rnd_ppo.steps_to(f) == 20
    assert rnd_ppo.steps_to(f, 0.9) == 30
    assert rnd_ppo.coverage_at(f, 25) == 7
    assert rnd_ppo.coverage_at(f) == 9


def test_arrivals_are_the_ends_that_no_time_limit_made() -> None:
    terminated = torch.tensor([[False, True, False], [False, False, False]])
    truncated = torch.tensor([[False, False, True], [True, False, False]])
    traj = Trajectories(
        inputs=TensorDict({}, batch_size=[2]),
        log_prob=torch.zeros(2, 3),
        mask=torch.ones(2, 3, dtype=torch.bool),
        reward=torch.full((2, 3), 7.0),
        terminated=terminated,
        truncated=truncated,
    )
    judge = rnd_ppo.Arrivals(only=True)
    assert judge.score(traj).tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert list(judge.last) == [False, True, False]  # in the order of time
    assert rnd_ppo.Arrivals().score(traj).eq(7.0).all()


def test_a_policy_that_knows_nothing_does_not_arrive() -> None:
    environment = Warehouse(1, "room")
    torch.manual_seed(0)
    features = Features(describe(environment.single_observation_space), (8,))
    policy = make_controller("squashed", features, environment.single_action_space)
    driven = rnd_ppo.drive(policy, "room", episodes=4)
    assert driven["success"] == 0.0
    assert math.isnan(driven["path_ratio"])


def test_the_table_and_the_picture(tmp_path: Path) -> None:
    table = rnd_ppo.table(results())
    assert {len(row) for row in table} == {len(table[0])}
    assert len(table) == 1 + 3 * len(rnd_ppo.ARMS)
    rnd_ppo.draw(results(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
