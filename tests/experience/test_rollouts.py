"""Acting in environments: every step where it belongs, ends told apart, statistics, resuming."""

from __future__ import annotations

import json
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from control_for_tests import PaysOne, controller, features
from experience.environments_for_tests import Chooses, ChoosesTwice, Counter, Shows, Terminates, Truncates
from guerdon.credit import gae
from guerdon.critics.state import StateCritic
from guerdon.errors import UsageError
from guerdon.experience.environments import make
from guerdon.experience.rollouts import Rollouts
from guerdon.normalise import ScaleReward
from guerdon.optim import SGD
from guerdon.policies.control import Controller, make_controller
from guerdon.policies.features import Features, describe
from guerdon.roles import Role, RoleSettings

GAMMA = 0.9


def rollouts(
    env: Any, n: int = 3, seed: int = 0, keywords: dict[str, Any] | None = None, **options: Any
) -> Rollouts:
    return Rollouts(make(env, n, seed, **(keywords or {})), seed=seed, **options)


def role_for(experience: Rollouts, which: str, **options: Any) -> Role:
    torch.manual_seed(0)
    env = experience.environments
    policy = make_controller(
        which, Features(describe(env.observation_space), (8,), **options), env.action_space
    )
    for p in policy.parameters():
        p.data.mul_(3.0)
    return Role("actor", policy, RoleSettings(SGD(0.1)))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return all(same(a[k], b[k]) for k in a)
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("env", "which"),
    [
        ("CartPole-v1", "categorical"),
        ("Pendulum-v1", "gaussian"),
        ("Pendulum-v1", "squashed"),
        (PaysOne, "gaussian"),
        (PaysOne, "deterministic"),
        (Chooses, "categorical"),
        (ChoosesTwice, "categorical"),
        (Shows, "gaussian"),
    ],
)
def test_every_step_lies_where_it_happened(env: Any, which: str) -> None:
    """Against the same environments, stepped by hand with the same actions."""
    experience, by_hand = rollouts(env), make(env, 3, 0)
    actor = role_for(experience, which)
    observation = by_hand.reset()
    for _ in range(2):
        traj = experience.collect(actor, 36)
        traj.check()
        assert traj.mask.shape == (3, 12)
        assert traj.mask.all()
        step, finals = traj.inputs["step"], {}
        for t in range(12):
            assert same(observation, _rows(step["observation"], t))
            found = by_hand.step(step["action"][:, t].numpy())
            for name in ("reward", "terminated", "truncated"):
                np.testing.assert_array_equal(getattr(traj, name)[:, t].numpy(), getattr(found, name))
            for row in range(3):
                if found.truncated[row] or found.terminated[row]:
                    finals[row, t] = _row(found.final, row)
                elif t == 11:
                    finals[row, t] = _row(found.observation, row)
            observation = found.observation
        final = traj.inputs["final"]
        for row in range(3):
            at = final["step"][row].tolist()
            assert [t for t in at if t >= 0] == [t for r, t in sorted(finals) if r == row]
            for place, t in enumerate(at):
                if t >= 0:
                    assert same(finals[row, t], _row(final["observation"][row], place))
        torch.testing.assert_close(traj.log_prob, actor.log_prob(traj), rtol=0, atol=0)
        if which != "deterministic":
            assert traj.log_prob.abs().min() > 0
        assert traj.version.tolist() == [0, 0, 0]
    assert experience.taken == 72


def _rows(value: Any, t: int) -> Any:
    return {k: v[:, t] for k, v in value.items()} if isinstance(value, TensorDict) else value[:, t]


def _row(value: Any, row: int) -> Any:
    return {k: value[k][row] for k in value.keys()} if hasattr(value, "keys") else value[row]  # noqa: SIM118


def test_a_row_may_hold_both_kinds_of_end() -> None:
    traj = rollouts(PaysOne).collect(role_for(rollouts(PaysOne), "gaussian"), 90)
    assert traj.terminated.any()
    assert traj.truncated[:, :-1].any()
    assert not (traj.terminated & traj.truncated).any()


# --- values of ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("how", [1, 2, None])
def test_values_of_a_reward_of_one(how: int | None, lam: float) -> None:
    """V = 1 / (1 - gamma) where nothing ends; cuts keep it, and before an end for good k steps are worth
    (1 - gamma^k) / (1 - gamma)."""
    experience = rollouts(PaysOne, keywords={"how": how})
    actor = role_for(experience, "gaussian")
    value = 1 / (1 - GAMMA)
    critic = StateCritic(features())
    with torch.no_grad():
        critic.head.weight.zero_()
        critic.head.bias.fill_(value)
    judge = Role("critic", critic)
    traj = experience.collect(actor, 60)
    traj.value = judge.value(traj)
    _, target = gae(
        traj.reward,
        traj.value,
        traj.mask,
        traj.terminated,
        traj.truncated,
        next_value=judge.next_value(traj),
        gamma=GAMMA,
        lam=lam,
    )
    for row in range(3):
        for t in range(20):
            ends = [s for s in range(t, 20) if traj.terminated[row, s] or traj.truncated[row, s]]
            expected = value
            if ends and traj.terminated[row, ends[0]]:
                k = ends[0] - t + 1
                # lambda-return of a constant value: each of the k one-step errors is 0 but the last
                expected = value - (GAMMA * lam) ** (k - 1) * (value - 1.0)
            assert float(target[row, t]) == pytest.approx(expected, rel=1e-4), (row, t)
    if how == 2:
        assert not traj.terminated.any()
        torch.testing.assert_close(target, torch.full_like(target, value))


def test_what_follows_a_cut_is_what_was_seen_there() -> None:
    """A critic that reads the episode's clock tells the last observation of an episode from the first of the next."""
    experience = rollouts(Truncates, n=2, keywords={"length": 3})
    actor = role_for(experience, "gaussian")
    critic = StateCritic(features(hidden=()))
    with torch.no_grad():  # the value is the number of steps so far
        critic.head.weight.zero_()
        critic.head.weight[0, 0] = 1.0
        critic.head.bias.zero_()
    traj = experience.collect(actor, 16)
    found = Role("critic", critic).next_value(traj)
    torch.testing.assert_close(found, torch.tensor([[1.0, 2, 3, 1, 2, 3, 1, 2]]).expand(2, 8))


# --- acting -----------------------------------------------------------------------------------------------


def test_the_newest_weights_act() -> None:
    experience = rollouts("Pendulum-v1")
    actor = role_for(experience, "deterministic")
    experience.collect(actor, 3)
    with torch.no_grad():
        actor.model.head.weight.zero_()
        actor.model.head.bias.fill_(20.0)  # saturated
    assert float(experience.collect(actor, 30).inputs["step", "action"].min()) > 1.0


def test_the_same_seed_does_the_same() -> None:
    def first(seed: int) -> torch.Tensor:
        experience = rollouts("CartPole-v1", seed=seed)
        return experience.collect(role_for(experience, "categorical"), 60).inputs["step", "action"]

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


# --- observation statistics -------------------------------------------------------------------------------


def test_observation_statistics_move_only_between_rollouts() -> None:
    experience = rollouts(PaysOne, warm_up=30)
    actor = role_for(experience, "gaussian", normalise=True)
    scaler = actor.model.features.scaler
    first = experience.collect(actor, 30)
    assert float(scaler.count) == 33  # the warm-up alone
    assert experience.taken == 30  # which is no experience
    assert experience.statistics()["episodes"] < 30
    torch.testing.assert_close(actor.log_prob(first), first.log_prob, rtol=0, atol=0)
    assert torch.equal(
        first.inputs["step", "observation"][:, 0, 0], torch.zeros(3)
    )  # as it came, of a new episode
    before = scaler.mean.clone()
    second = experience.collect(actor, 30)
    assert float(scaler.count) == 63
    seen = first.inputs["step", "observation"].reshape(-1, 3).double().mean(0)
    torch.testing.assert_close(scaler.mean, (before * 33 + seen * 30) / 63)
    torch.testing.assert_close(actor.log_prob(second), second.log_prob, rtol=0, atol=0)


def test_dictionaries_are_normalised_too() -> None:
    experience = rollouts(Shows, warm_up=10)
    actor = role_for(experience, "gaussian", normalise=True)
    experience.collect(actor, 12)
    experience.collect(actor, 12)
    assert float(actor.model.features.scaler.count) == 3 * 5 + 12


# --- rewards and figures ----------------------------------------------------------------------------------


def test_rewards_are_scaled_for_learning_and_not_for_the_book() -> None:
    experience = rollouts(Terminates, scale_reward=0.9)
    actor = role_for(experience, "gaussian")
    plain = rollouts(Terminates)
    raw, scaled = plain.collect(actor, 36).reward, experience.collect(actor, 36).reward
    by_hand = ScaleReward(0.9, 3, clip=10.0)
    done = np.arange(1, 13) % 5 == 0
    expected = np.stack([by_hand(raw[:, t].numpy(), np.full(3, done[t])) for t in range(12)], 1)
    np.testing.assert_allclose(scaled.numpy(), expected, rtol=1e-6)
    assert experience.statistics()["reward"] == 1 + 2 + 3 + 4 + 5


def test_figures_are_of_whole_episodes() -> None:
    experience = rollouts(Terminates)
    actor = role_for(experience, "gaussian")
    experience.collect(actor, 12)
    assert experience.statistics() == {"steps": 12.0, "episodes": 0.0}
    experience.collect(actor, 12)
    assert experience.statistics() == {"steps": 24.0, "episodes": 3.0, "episode_length": 5.0, "reward": 15.0}
    assert experience.statistics() == {"steps": 24.0, "episodes": 0.0, "reward": 15.0}


@pytest.mark.parametrize(
    ("n", "group", "message"), [(0, None, "multiple"), (4, None, "multiple"), (6, 2, "groups of answers")]
)
def test_what_cannot_be_collected_is_refused(n: int, group: int | None, message: str) -> None:
    experience = rollouts(Terminates)
    with pytest.raises(UsageError, match=message):
        experience.collect(role_for(experience, "gaussian"), n, group)


# --- into a replay ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", ["CartPole-v1", PaysOne, Shows, Chooses])
def test_steps_into_a_replay(env: Any) -> None:
    experience, by_hand = rollouts(env), make(env, 3, 0)
    which = "greedy" if env in ("CartPole-v1", Chooses) else "squashed"
    actor = role_for(experience, which)
    replay = experience.replay(300, gamma=GAMMA)
    experience.advance(None, 5, into=replay)
    experience.advance(actor, 15, into=replay)
    assert len(replay) == 60
    assert experience.taken == 60
    observation = by_hand.reset()
    data = replay.state_dict()["data"]
    for t in range(20):
        assert same(observation, _at(data["observation"], t))
        found = by_hand.step(data["action"][t].numpy())
        following = _at(data["next_observation"], t)
        for row in range(3):
            ended = found.terminated[row] or found.truncated[row]
            assert same(_row(found.final if ended else found.observation, row), _row(following, row))
        for name in ("reward", "terminated", "truncated"):
            np.testing.assert_array_equal(data[name][t].numpy(), getattr(found, name))
        observation = found.observation


def _at(value: Any, t: int) -> Any:
    return {k: v[t].numpy() for k, v in value.items()} if isinstance(value, dict) else value[t].numpy()


@pytest.mark.parametrize("env", [PaysOne, Chooses, ChoosesTwice])
def test_random_actions_fill_the_whole_range(env: Any) -> None:
    experience = rollouts(env)
    replay = experience.replay(900)
    experience.advance(None, 300, into=replay)
    action = replay.state_dict()["data"]["action"]
    if env is PaysOne:
        assert float(action.min()) < -0.98
        assert float(action.max()) > 0.98
        assert abs(float(action.mean())) < 0.1
    elif env is Chooses:
        assert np.bincount(action.flatten()).min() > 200  # counted from 0
    else:
        assert np.bincount(action[..., 0].flatten(), minlength=3).min() > 200
        assert np.bincount(action[..., 1].flatten(), minlength=4).min() > 150


# --- resuming ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("env", "which"), [("CartPole-v1", "categorical"), ("Pendulum-v1", "gaussian")])
def test_a_restored_experience_goes_on_bit_for_bit(env: str, which: str, normalise: bool) -> None:
    def pieces() -> tuple[Rollouts, Role]:
        experience = rollouts(env, scale_reward=0.9, warm_up=20)
        return experience, role_for(experience, which, normalise=normalise)

    experience, actor = pieces()
    experience.collect(actor, 30)
    state, weights = experience.state_dict(), {k: v.clone() for k, v in actor.model.state_dict().items()}
    again, actor_again = pieces()
    again.load_state_dict(state)
    actor_again.model.load_state_dict(weights)
    assert json.loads(state["random"])["bit_generator"] == "PCG64"
    for _ in range(2):
        a, b = experience.collect(actor, 300), again.collect(actor_again, 300)
        for name in ("reward", "terminated", "truncated", "log_prob"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        for key in (("step", "observation"), ("step", "action"), ("final", "step"), ("final", "observation")):
            assert torch.equal(a.inputs[key], b.inputs[key]), key
        assert experience.statistics() == again.statistics()


def test_environments_that_cannot_be_saved_begin_new_episodes() -> None:
    experience = rollouts(Counter)
    actor = role_for(experience, "gaussian")
    traj = experience.collect(actor, 12)
    again = rollouts(Counter)
    again.load_state_dict(experience.state_dict())
    new = again.collect(actor, 12)
    clock, luck = (new.inputs["step", "observation"][..., i] for i in (0, 2))
    assert clock[:, 0].tolist() == [0.0, 0.0, 0.0]
    assert again.taken == 24
    assert not set(luck[:, 0].tolist()) & set(traj.inputs["step", "observation"][:, 0, 2].tolist())


def test_statistics_survive_even_where_the_observation_is_a_dictionary() -> None:
    experience = rollouts(Shows, warm_up=10)
    actor = role_for(experience, "gaussian", normalise=True)
    experience.collect(actor, 12)
    again = rollouts(Shows, warm_up=10)
    again.load_state_dict(experience.state_dict())
    again.collect(actor, 12)
    assert float(actor.model.features.scaler.count) == 3 * 5 + 12


class Picture(gymnasium.Env):
    """Shows one grey level, its action's, for ever."""

    observation_space = gymnasium.spaces.Box(0, 255, (12, 12, 1), np.uint8)
    action_space = gymnasium.spaces.Discrete(4)

    def reset(self, **_: Any) -> tuple[Any, dict]:
        return np.zeros((12, 12, 1), np.uint8), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        return np.full((12, 12, 1), 50 * action, np.uint8), 0.0, False, False, {}


def test_pixels_stay_bytes() -> None:
    experience = rollouts(Picture)
    actor = role_for(experience, "categorical")
    traj = experience.collect(actor, 30)
    step = traj.inputs["step"]
    assert step["observation"].dtype == torch.uint8
    assert torch.equal(step["observation"][:, 1:, 0, 0, 0], (50 * step["action"][:, :-1]).to(torch.uint8))
    assert len(set(step["action"].flatten().tolist())) > 1
    replay = experience.replay(60)
    experience.advance(actor, 10, into=replay)
    assert replay.sample(4).observation.dtype == torch.uint8
    assert isinstance(actor.model, Controller)
    assert controller("gaussian").features.plain
    assert not actor.model.features.plain
