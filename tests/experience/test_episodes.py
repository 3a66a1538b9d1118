"""Whole episodes in groups."""

from __future__ import annotations

import pytest
import torch

from guerdon.errors import UsageError
from guerdon.experience.base import wants_groups
from guerdon.experience.environments import make
from guerdon.experience.episodes import Episodes
from guerdon.methods.online.grpo import GRPO
from guerdon.methods.online.ppo import PPO
from guerdon.policies.control import make_controller
from guerdon.policies.features import Features, describe
from guerdon.roles import Role


def actor(env_id: str, kind: str, **features) -> Role:
    environment = make(env_id, 1, 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Features(describe(environment.observation_space), (16,), "tanh", **features)
        return Role("actor", make_controller(kind, made, environment.action_space))


@pytest.mark.parametrize(
    ("env_id", "kind"),
    [
        ("CartPole-v1", "categorical"),  # arrays
        ("Pendulum-v1", "gaussian"),
        ("InvertedPendulum-v5", "gaussian"),  # MuJoCo
        ("CliffWalking-v1", "categorical"),  # gymnasium's own, one after the other
    ],
)
def test_groups_begin_alike_and_differ_from_one_another(env_id, kind):
    traj = Episodes(env_id, group_size=3, seed=1, limit=12).collect(actor(env_id, kind), 6)
    first = traj.inputs["step", "observation"][:, 0].float()
    assert torch.equal(first[:3], first[:1].expand_as(first[:3]))
    assert torch.equal(first[3:], first[3:4].expand_as(first[3:]))
    if env_id != "CliffWalking-v1":  # which always begins in the same place
        assert not torch.equal(first[0], first[3])
    assert traj.group.tolist() == [0, 0, 0, 1, 1, 1]
    actions = traj.inputs["step", "action"].flatten(1).float()
    assert not torch.equal(actions[0], actions[1])


def test_an_episode_ends_once_and_nothing_follows():
    traj = Episodes("CartPole-v1", seed=0, limit=30).collect(actor("CartPole-v1", "categorical"), 16)
    length = traj.lengths
    assert length.min() < length.max() <= 30
    ends = (traj.terminated | traj.truncated).sum(1)
    assert (ends == 1).all()
    assert (traj.terminated | traj.truncated).gather(1, length[:, None] - 1).all()
    assert torch.equal(traj.score(), length.float())  # one a step
    assert (traj.log_prob[~traj.mask] == 0).all()
    assert (traj.truncated.any(1) == (length == 30)).logical_or(traj.terminated.any(1)).all()


def test_what_is_collected_is_what_gymnasium_does():
    """The stored actions, taken again in gymnasium's own environment from the same state, give the same steps."""
    import gymnasium

    traj = Episodes("Pendulum-v1", seed=3, limit=20).collect(actor("Pendulum-v1", "gaussian"), 2)
    env = gymnasium.make("Pendulum-v1").unwrapped
    env.reset(seed=0)
    cos, sin, speed = traj.inputs["step", "observation"][0, 0].tolist()
    env.state = [torch.atan2(torch.tensor(sin), torch.tensor(cos)).item(), speed]
    for t in range(20):
        _, reward, *_ = env.step(traj.inputs["step", "action"][0, t].numpy())
        assert traj.reward[0, t].item() == pytest.approx(reward, abs=2e-3)


def test_resuming_goes_on_with_the_same_episodes():
    role = actor("CartPole-v1", "categorical")
    whole = Episodes("CartPole-v1", 2, seed=5)
    whole.collect(role, 4)
    state = whole.state_dict()
    expected = whole.collect(role, 4)
    resumed = Episodes("CartPole-v1", 2, seed=5)
    resumed.load_state_dict(state)
    again = resumed.collect(role, 4)
    assert torch.equal(expected.inputs["step", "action"], again.inputs["step", "action"])
    assert torch.equal(expected.group, again.group)


@pytest.mark.parametrize(
    ("make_it", "says"),
    [
        (lambda: Episodes("CartPole-v1", 0), "group_size"),
        (lambda: Episodes("CartPole-v1", limit=0), "at least one step"),
        (lambda: Episodes("CartPole-v1", 2).collect(actor("CartPole-v1", "categorical"), 3), "multiple"),
        (
            lambda: Episodes("CartPole-v1").collect(actor("CartPole-v1", "categorical", normalise=True), 2),
            "normalises",
        ),
        (lambda: make("CartPole-v1", 2, 0).reset([1, 2, 3]), "3 seeds"),
    ],
)
def test_refusals_say_what_to_do(make_it, says):
    with pytest.raises(UsageError, match=says):
        make_it()


def test_methods_that_compare_answers_say_so():
    assert wants_groups(GRPO)
    assert wants_groups(GRPO())
    assert not wants_groups(PPO)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("grpo", {}),
        ("rloo", {}),
        ("rebel", {"rounds": 12}),
        ("copg", {"rounds": 30}),
        ("rejection_sampling", {}),
    ],
)
def test_methods_made_for_language_models_train_a_controller(method, options, tmp_path):
    """Group-relative, leave-one-out, pairs, contrastive, best of n: the method files as they are, CartPole above twice
    the untrained length (22 steps) in a few rounds."""
    from guerdon.launch import train

    result = train(
        method,
        env="CartPole-v1",
        env_options={"max_episode_steps": 100},
        runs=tmp_path,
        progress=False,
        **{"rounds": 12, **options},
    )
    assert result.after["reward"] > 50, result.after


def test_a_compiled_update_of_episodes_is_refused(tmp_path):
    from guerdon.launch import train

    with pytest.raises(UsageError, match="cannot be compiled"):
        train("grpo", env="CartPole-v1", runs=tmp_path, progress=False, compile=True)


def test_samplers_are_refused(tmp_path):
    from guerdon.launch import train

    with pytest.raises(UsageError, match="leave out --samplers"):
        train("grpo", env="CartPole-v1", runs=tmp_path, progress=False, samplers=2)
