"""PPO, A2C, REINFORCE, SAC, TD3 and DQN on controllers: each learns, and does what its paper says it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import control_for_tests  # noqa: F401 (registers the environments)
from control_for_tests import features
from guerdon import launch
from guerdon.critics.state import StateCritic
from guerdon.engine.local import LocalEngine
from guerdon.experience.environments import make
from guerdon.experience.replay import Replay
from guerdon.experience.rollouts import Rollouts
from guerdon.methods.online.a2c import A2C
from guerdon.methods.online.dqn import DQN
from guerdon.methods.online.ppo import PPO
from guerdon.optim import SGD
from guerdon.policies.control import make_controller
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.tasks.control import EnvironmentReward

OFF_POLICY = {
    "steps": 1000,
    "start": 200,
    "environments": 4,
    "gamma": 0.1,
    "hidden": (32, 32),
    "batch_size": 64,
}
DISCRETE = {"discrete": True}


def train(slug: str, folder: Path, env: str = "Match-v0", **options: Any) -> launch.Result:
    quiet = {"compile": False, "progress": False, "threads": 1, "checkpoint_every": 1e9}
    return launch.train(slug, env=env, runs=folder, name="run", **quiet, **options)


# --- learning ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slug", "discrete", "options"),
    [
        ("ppo", False, {"rounds": 8, "samples": 256, "lr": 1e-2, "gamma": 0.1, "value_clip": 0.5}),
        ("ppo", True, {"rounds": 8, "samples": 256, "lr": 1e-2, "gamma": 0.1, "target_kl": 0.1}),
        ("ppo", True, {"rounds": 8, "samples": 256, "lr": 1e-2, "gamma": 0.1, "head": "hl_gauss"}),
        (
            "ppo",
            False,
            {"rounds": 8, "samples": 256, "lr": 1e-2, "gamma": 0.1, "normalise_observation": True},
        ),
        (
            "ppo",
            True,
            {"rounds": 12, "samples": 256, "lr": 1e-2, "gamma": 0.1, "critic": False, "entropy": 0.01},
        ),
        ("a2c", False, {"rounds": 150, "lr": 1e-2, "critic_lr": 1e-2, "gamma": 0.1}),
        (
            "a2c",
            True,
            {"rounds": 150, "lr": 1e-2, "critic_lr": 1e-2, "gamma": 0.1, "normalise_advantage": True},
        ),
        ("reinforce", True, {"rounds": 60, "samples": 256, "lr": 2e-2}),
        ("sac", False, {**OFF_POLICY, "lr": 3e-3}),
        ("sac", False, {**OFF_POLICY, "lr": 3e-3, "head": "hl_gauss", "n_step": 2}),
        ("sac", True, {**OFF_POLICY, "lr": 3e-3, "target_entropy": 0.2, "alpha": 0.2}),
        ("sac", False, {**OFF_POLICY, "lr": 3e-3, "learn_temperature": False, "alpha": 0.01}),
        ("td3", False, {**OFF_POLICY, "lr": 3e-3}),
        ("td3", False, {**OFF_POLICY, "lr": 3e-3, "head": "two_hot", "every": 5, "updates": 10}),
    ],
)
def test_every_method_learns_to_match(
    slug: str, discrete: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    result = train(slug, tmp_path, env_options={"discrete": discrete}, **options)
    before, after = result.before["reward"], result.after["reward"]
    assert before < 5.0
    assert after > (5.5 if slug == "reinforce" else 6.2), (before, after)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_step": 3, "double": False, "huber": False},
        {"prioritised": True},
        {"head": "hl_gauss"},
        {"head": "two_hot", "prioritised": True},
        {"head": "c51", "n_step": 2},
        {"head": "mse_softmax"},
    ],
    ids=str,
)
def test_dqn_with_every_head_learns_to_match(options: dict[str, Any], tmp_path: Path) -> None:
    support = {"low": -1.0, "high": 2.0, "bins": 16} if "head" in options else {}
    settings = {
        "steps": 1000,
        "lr": 1e-2,
        "target_every": 100,
        "gamma": 0.1,
        "environments": 4,
        "exploration": 0.5,
    }
    result = train("dqn", tmp_path, env_options=DISCRETE, **settings, **support, **options)
    assert result.before["reward"] < 5.0
    assert result.after["reward"] > 6.2, result.after


# --- bookkeeping ------------------------------------------------------------------------------------------


class Counted:
    """How often roles followed, and by how much."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taus: dict[str, list[float]] = {}
        follow = Role.follow

        def counted(role: Role, other: Role, tau: float) -> None:
            self.taus.setdefault(role.name, []).append(tau)
            follow(role, other, tau)

        monkeypatch.setattr(Role, "follow", counted)


def test_sac_updates_and_follows_after_every_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = Counted(monkeypatch)
    result = train("sac", tmp_path, **{**OFF_POLICY, "start": 960, "environments": 2, "updates": 3})
    assert result.actor.updates == 3 * 20  # 40 steps of two environments
    assert seen.taus == {"critic_reference": [0.005] * 60}


def test_td3_delays_its_actor_and_its_targets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = Counted(monkeypatch)
    result = train("td3", tmp_path, **{**OFF_POLICY, "start": 900, "environments": 1, "delay": 4})
    assert result.actor.updates == 25  # of 100 updates of the critic
    assert seen.taus == {"critic_reference": [0.005] * 25, "actor_reference": [0.005] * 25}


def test_dqn_copies_its_target_and_lets_epsilon_fall(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = Counted(monkeypatch)
    settings = {"steps": 2000, "start": 100, "target_every": 300, "exploration": 0.5, "final_epsilon": 0.1}
    result = train("dqn", tmp_path, env_options=DISCRETE, **settings)
    assert result.actor.updates == (2000 - 100) // 4
    assert seen.taus == {"actor_reference": [1.0] * 6}  # at 300, 600, ... 1800
    records = launch.read_records(result.folder)
    # epsilon was last set before the last four steps of each record
    assert [r["epsilon"] for r in records] == pytest.approx([1 - 0.9 * 0.996, 0.1])


@pytest.mark.parametrize("slug", ["sac", "td3", "dqn"])
def test_many_environments_take_no_more_steps_than_asked(slug: str, tmp_path: Path) -> None:
    discrete = slug == "dqn"
    settings = {"steps": 2000, "start": 5000, "environments": 64}
    result = train(slug, tmp_path, env_options={"discrete": discrete}, **settings)
    assert 2000 <= launch.read_records(result.folder)[-1]["steps"] <= 3000


def test_dqn_draws_by_the_errors_before_the_update(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    order: list[str] = []
    for cls, name in ((Replay, "prioritise"), (Role, "update")):
        genuine = getattr(cls, name)

        def spy(*args: Any, _genuine: Any = genuine, _name: str = name, **kwargs: Any) -> Any:
            order.append(_name)
            return _genuine(*args, **kwargs)

        monkeypatch.setattr(cls, name, spy)
    train("dqn", tmp_path, env_options=DISCRETE, steps=1000, start=960, prioritised=True)
    assert order == ["prioritise", "update"] * 10


class Listening(Role):
    """A role that keeps what it was asked to learn from."""

    def fit(self, data: Any, objective: Any, **options: Any) -> Any:
        self.heard = data
        return super().fit(data, objective, **options)

    def update(self, batch: Any, objective: Any, **others: Any) -> Any:
        self.heard = batch
        return super().update(batch, objective, **others)


@pytest.mark.parametrize("how", [1, 2, None])
@pytest.mark.parametrize("method", [PPO(1, 60, gamma=0.9, minibatch=60, epochs=1), A2C(1, 60, gamma=0.9)])
def test_what_critics_learn_of_a_reward_of_one(method: Any, how: int | None, tmp_path: Path) -> None:
    """Cut anywhere, it is worth 1 / (1 - gamma); only where it ended for good less."""
    experience = Rollouts(make("PaysOne-v0", 3, 0, how=how))
    critic_model = StateCritic(features())
    with torch.no_grad():
        critic_model.head.weight.zero_()
        critic_model.head.bias.fill_(10.0)
    actor = Listening(
        "actor",
        make_controller("gaussian", features(), experience.environments.action_space),
        RoleSettings(SGD(0.0)),
    )
    critic = Listening("critic", critic_model, RoleSettings(SGD(0.0)))
    engine = LocalEngine("cpu", threads=1)
    with Run(tmp_path / "run", engine=engine, progress=False) as run:
        method.train(run, actor, experience, EnvironmentReward(), critic=critic)
    engine.close()
    data = critic.heard
    assert data.target.shape == (60, 1)
    row, step = data.target.view(3, 20), data.terminated.view(3, 20)
    cut = data.truncated.view(3, 20)
    for i in range(3):
        for t in range(20):
            ends = [s for s in range(t, 20) if step[i, s] or cut[i, s]]
            good = bool(ends) and bool(step[i, ends[0]])
            k = ends[0] - t if ends else 0
            expected = 10.0 - (0.9 * method.lam) ** k * 9.0 if good else 10.0
            assert float(row[i, t]) == pytest.approx(expected, rel=1e-4)
    if how == 2:
        assert not data.terminated.any()
    advantage = actor.heard.advantage
    if isinstance(method, PPO) and how != 2:
        assert abs(float(advantage.mean())) < 1e-5
        assert float(advantage.std()) == pytest.approx(1.0, abs=0.02)
    if isinstance(method, A2C):
        torch.testing.assert_close(advantage.view(3, 20), row - 10.0, atol=1e-4, rtol=1e-4)


def test_ppos_schedule_moves_the_clip_range_and_the_rates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips: list[float] = []
    fit = Role.fit

    def spy(role: Role, data: Any, objective: Any, *args: Any, **kwargs: Any) -> Any:
        if role.name == "actor":
            clips.append(float(objective.clip))
        return fit(role, data, objective, *args, **kwargs)

    monkeypatch.setattr(Role, "fit", spy)
    result = train("ppo", tmp_path, rounds=4, samples=64, schedule="linear", clip=0.4, epochs=2, minibatch=32)
    assert clips == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert result.actor.updates == 16
    assert result.actor._rate() == 0.0


def test_published_defaults() -> None:
    sac, td3, dqn, ppo = (launch.method_class(s)() for s in ("sac", "td3", "dqn", "ppo"))
    assert (sac.tau, sac.lr, sac.gamma, sac.batch_size, sac.hidden) == (0.005, 3e-4, 0.99, 256, (256, 256))
    assert (td3.delay, td3.smoothing, td3.smoothing_clip, td3.exploration) == (2, 0.2, 0.5, 0.1)
    assert isinstance(dqn, DQN)
    assert (dqn.priority, dqn.correction) == (0.6, 0.4)
    assert (ppo.clip, ppo.lam) == (0.2, 0.95)
