"""MDPO, on and off policy: its loop, and what it learns."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

from guerdon.critics.action import ActionCritic
from guerdon.engine.local import LocalEngine
from guerdon.experience.environments import make
from guerdon.experience.rollouts import Rollouts
from guerdon.methods.online import mdpo_off, ppo, sac, trpo
from guerdon.methods.online.mdpo_off import MDPOOff
from guerdon.methods.online.mdpo_on import MDPOOn
from guerdon.objectives.mirror_descent import MirrorDescent, SoftMirrorDescent
from guerdon.policies.control import SquashedGaussian
from guerdon.policies.features import Features, describe
from guerdon.roles import Role
from guerdon.run import Run
from guerdon.tasks.bandit import Bandit
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import Control


class Watched(Role):
    """A role that keeps each objective it was trained on, with the metrics and the weights before and after."""

    def update(self, batch: Any, objective: Any, **others: Any) -> Any:
        self.calls = getattr(self, "calls", [])
        before = [p.detach().clone() for p in self.model.parameters()]
        metrics = super().update(batch, objective, **others)
        after = [p.detach().clone() for p in self.model.parameters()]
        call = {"batch": batch, "weight": float(objective.kl), "before": before, "after": after}
        self.calls.append(call | metrics)
        return metrics


def learn(method: Any, task: Any, folder: Path) -> tuple[dict[str, Any], dict[str, float], dict[str, float]]:
    """The roles, and figures before and after training."""
    engine, settings = LocalEngine("cpu", threads=1), method.roles()
    torch.manual_seed(0)
    policy = task.policy(task.policy_kinds()[0])
    roles = {
        "actor": Watched("actor", policy, settings["actor"]),
        "critic": engine.role("critic", task.critic(policy), settings=settings["critic"]),
    }
    before = task.measure(roles["actor"], task.feedback()).figures
    with Run(folder / "run", engine=engine, seed=0, progress=False, checkpoint_every=1e9) as run:
        for name, role in roles.items():
            run.adopt(name, role)
        method.train(run, experience=task.experience(0), feedback=task.feedback(), **roles)
    engine.close()
    return roles, before, task.measure(roles["actor"], task.feedback()).figures


# --- on policy --------------------------------------------------------------------------------------------


def test_the_step_size_falls_to_almost_nothing_and_never_to_zero() -> None:
    method = MDPOOn(rounds=200)
    sizes = [method.step_size(k) for k in range(200)]
    assert sizes[0] == 1.0
    assert sizes[100] == pytest.approx(0.5)
    assert sizes[-1] == 0.01  # 1/200 would weigh the KL by 200
    assert sizes == sorted(sizes, reverse=True)
    assert {MDPOOn(rounds=9, t=0.3, schedule="constant").step_size(k) for k in range(9)} == {0.3}
    assert 1 / MDPOOn(rounds=9, t=math.inf).step_size(8) == 0.0  # no KL at all


def test_m_steps_a_round_start_at_the_old_policy_which_stays(tmp_path: Path) -> None:
    method = MDPOOn(rounds=3, samples=64, m=4, lr=0.05)
    roles, _, _ = learn(method, Bandit(), tmp_path)
    calls = roles["actor"].calls
    assert len(calls) == 12
    for k in range(3):
        steps = calls[4 * k : 4 * k + 4]
        assert [c["weight"] for c in steps] == pytest.approx([1 / method.step_size(k)] * 4)
        # the first gradient is taken at pi_k: no divergence, ratio 1; then it moves
        assert float(steps[0]["ratio_deviation_max"]) < 1e-5
        assert float(steps[3]["ratio_deviation_max"]) > 1e-3
        table = steps[0]["before"][0]
        for call in steps:
            assert call["batch"].batch_size[0] == 64  # the whole batch each time
            context = call["batch"].inputs["step", "context"]
            assert torch.equal(call["batch"].reference["logits"], table[context])
        if k:
            assert torch.equal(table, calls[4 * k - 1]["after"][0])


@pytest.mark.parametrize("reverse", [False, True])
def test_a_bandit_is_solved(reverse: bool, tmp_path: Path) -> None:
    method = MDPOOn(rounds=30, samples=128, m=5, lr=0.1, critic_lr=0.05, value_epochs=2, reverse=reverse)
    _, before, after = learn(method, Bandit(), tmp_path)
    assert before["expected"] == pytest.approx(Bandit.uniform, abs=1e-5)
    assert after["expected"] > Bandit.uniform + 0.9 * (Bandit.best - Bandit.uniform)


def test_a_pole_is_balanced_longer_by_ten_steps_a_round_than_by_one(tmp_path: Path) -> None:
    returns = {}
    for m in (1, 10):
        method = MDPOOn(rounds=8, samples=1024, m=m, lr=2e-3, critic_lr=1e-3, environments=8)
        task = Control(Pieces(env="CartPole-v1"), method)
        _, before, after = learn(method, task, tmp_path / str(m))
        returns[m] = after["reward"]
    assert returns[10] > 80
    assert returns[10] > 4 * before["reward"]
    assert returns[10] > 1.2 * returns[1]


def test_the_baselines_share_the_parts() -> None:
    assert "MirrorDescent(kl=0.0, reverse=True)" in inspect.getsource(trpo.TRPO.train)
    assert trpo.MirrorDescent is MirrorDescent
    for name in ("advantages", "normalise", "ValueRegression"):
        assert getattr(trpo, name) is getattr(ppo, name) is getattr(inspect.getmodule(MDPOOn), name)
    assert mdpo_off.MDPOOff.controllers == sac.SAC.controllers
    assert mdpo_off.MDPOOff.critic_kind == sac.SAC.critic_kind


# --- off policy -------------------------------------------------------------------------------------------


class Aim(gymnasium.Env):
    """Shows a number, and pays minus twice the squared distance of the action from half of it; cut after ten steps."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.steps = 0
        return self._show(), {}

    def _show(self) -> np.ndarray:
        self.goal = float(self.np_random.uniform(-1, 1))
        return np.array([self.goal], dtype=np.float32)

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        reward = -2.0 * (float(np.ravel(action)[0]) - 0.5 * self.goal) ** 2
        self.steps += 1
        return self._show(), reward, False, self.steps >= 10, {}


def off_policy(method: MDPOOff, folder: Path, env: Any = Aim, resume: bool = False) -> Any:
    """Train in ``env``; the actor."""
    engine, settings = LocalEngine("cpu", threads=1), method.roles()
    torch.manual_seed(0)
    environments = make(env, method.environments, 0)
    entries, space = describe(environments.observation_space), environments.action_space
    policy = SquashedGaussian(
        Features(entries, method.hidden, "relu"), space.low.tolist(), space.high.tolist()
    )
    actor = Watched("actor", policy, settings["actor"])
    critic = engine.role(
        "critic", ActionCritic(Features(entries, ()), 1, hidden=method.hidden), settings=settings["critic"]
    )
    experience = Rollouts(environments, seed=0)
    with Run(
        folder / "run", engine=engine, seed=0, progress=False, checkpoint_every=1e9, resume=resume
    ) as run:
        run.adopt("actor", actor)
        run.adopt("critic", critic)
        run.track("experience", experience)
        method.train(run, actor=actor, experience=experience, critic=critic)
    engine.close()
    return actor


SMALL: dict[str, Any] = {"hidden": (32,), "batch_size": 32, "buffer_size": 5000, "lr": 3e-3}


def error(actor: Role) -> float:
    """Root mean squared distance of the likeliest action from the best one."""
    goal = torch.linspace(-1, 1, 41)[:, None]
    with torch.no_grad():
        return float((actor.model.mode(goal) - 0.5 * goal).square().mean().sqrt())  # type: ignore[operator]


@pytest.mark.parametrize("q", [1.0, 1.5])
def test_an_aim_is_learned_from_replay(q: float, tmp_path: Path) -> None:
    method = MDPOOff(steps=1000, start=500, m=100, kl=0.3, entropy=0.02, q=q, gamma=0.5, **SMALL)
    actor = off_policy(method, tmp_path)
    assert math.isfinite(error(actor))
    assert error(actor) < 0.12  # an action of zero is off by 0.29


def test_a_huge_weight_keeps_the_policy_near_the_old_one(tmp_path: Path) -> None:
    errors = {}
    for c in (0.3, 100.0):
        method = MDPOOff(steps=1000, start=500, m=250, kl=c, entropy=0.02, gamma=0.5, **SMALL)
        actor = off_policy(method, tmp_path / str(c))
        errors[c] = error(actor)
    assert errors[100.0] > 1.5 * errors[0.3]


@pytest.mark.parametrize("environments", [1, 4])
def test_the_old_policy_is_refreshed_every_m_environment_steps(environments: int, tmp_path: Path) -> None:
    method = MDPOOff(steps=1000, start=800, m=40, environments=environments, **{**SMALL, "hidden": (8,)})
    seen: list[tuple[int, Tensor]] = []

    class Recorded(SoftMirrorDescent):
        def __call__(self, actor: Any, batch: Any, critic: Any, old: Any) -> Any:
            seen.append((len(seen), old.mean.weight.detach().clone()))
            return super().__call__(actor, batch, critic, old)

    found = mdpo_off.SoftMirrorDescent
    mdpo_off.SoftMirrorDescent = Recorded  # type: ignore[misc]
    try:
        actor = off_policy(method, tmp_path)
    finally:
        mdpo_off.SoftMirrorDescent = found  # type: ignore[misc]
    changes = [i for i in range(1, len(seen)) if not torch.equal(seen[i][1], seen[i - 1][1])]
    # updates begin with the step that follows the 800th; one for each step, in turns of as many as environments
    expected = [step - environments - 800 for step in (840, 880, 920, 960, 1000)]
    assert len(seen) == 200
    assert changes == expected
    taken = [c["before"] for c in actor.calls]  # and it is the actor's newest weights that it takes
    names = [n for n, _ in actor.model.named_parameters()]
    assert torch.equal(seen[changes[1]][1], taken[changes[1]][names.index("mean.weight")])


def test_it_acts_by_samples_or_by_its_mean(tmp_path: Path) -> None:
    class Spy(SquashedGaussian):
        def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
            drawn.append(noise is not None)
            return super().act(observation, noise)

        def _numpy(self, forward: Any) -> None:
            return None

    for by_mean in (False, True):
        drawn: list[bool] = []
        environments = make(Aim, 1, 0)
        entries = describe(environments.observation_space)
        method = MDPOOff(steps=1000, start=950, act_by_mean=by_mean, **{**SMALL, "hidden": (8,)})
        actor = Role("actor", Spy(Features(entries, (8,)), [-1.0], [1.0]), method.roles()["actor"])
        critic = Role("critic", ActionCritic(Features(entries, ()), 1, hidden=(8,)), method.roles()["critic"])
        engine = LocalEngine("cpu", threads=1)
        with Run(tmp_path / str(by_mean), engine=engine, progress=False, checkpoint_every=1e9) as run:
            method.train(run, actor=actor, experience=Rollouts(environments), critic=critic)
        engine.close()
        assert drawn == [not by_mean] * 50


def test_a_time_limit_is_not_an_end_in_what_it_remembers(tmp_path: Path) -> None:
    method = MDPOOff(steps=1000, start=900, **{**SMALL, "hidden": (8,)})
    actor = off_policy(method, tmp_path)
    batch = actor.calls[-1]["batch"]
    assert bool(batch.truncated.any())
    assert not bool(batch.terminated.any())


def test_a_run_that_stopped_goes_on_bit_exactly(tmp_path: Path) -> None:
    small = {"start": 950, "m": 70, **SMALL, "hidden": (8,)}
    whole = off_policy(MDPOOff(steps=2000, **small), tmp_path / "whole", "Pendulum-v1")
    off_policy(MDPOOff(steps=1000, **small), tmp_path / "parts", "Pendulum-v1")
    parts = off_policy(MDPOOff(steps=2000, **small), tmp_path / "parts", "Pendulum-v1", resume=True)
    assert len(parts.calls) == 1000
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(a, b)
