"""Repeated actions, sequences in environments, and the replay's runs of rows."""

import gymnasium
import numpy as np
import pytest
import torch
from tests.experience.environments_for_tests import Counter, Terminates, Truncates

from guerdon.errors import UsageError
from guerdon.experience.action_repeat import SequenceSteps, make_repeating
from guerdon.experience.environments import make
from guerdon.experience.replay import Replay
from guerdon.experience.rollouts import Rollouts
from guerdon.policies.action_sequence import SequenceGaussian
from guerdon.policies.features import Features, describe
from guerdon.roles import Role


def test_repeating_sums_the_rewards_and_stops_at_the_end():
    gymnasium.register("guerdon-test/Truncates-v0", Truncates, kwargs={"length": 5})
    try:
        env = make_repeating("guerdon-test/Truncates-v0", 3, 2, seed=0)
        env.reset()
        first, second = (env.step(np.full((2, 1), 0.5, np.float32)) for _ in range(2))
    finally:
        del gymnasium.registry["guerdon-test/Truncates-v0"]
    assert first.reward.tolist() == [6, 6]  # 1 + 2 + 3
    assert first.observation[:, 0].tolist() == [3, 3]
    assert not first.truncated.any()
    assert second.reward.tolist() == [9, 9]  # 4 + 5, and no third
    assert second.truncated.all()
    assert second.final[:, 0].tolist() == [5, 5]
    assert env.finished() == [(15.0, 2)] * 2


def test_repeating_once_is_the_environment_itself():
    assert make_repeating("Pendulum-v1", 1, 2, seed=0).backend == "array"
    with pytest.raises(UsageError, match="at least once"):
        make_repeating("Pendulum-v1", 0, 2, seed=0)


def sequences(env, n=1, length=3, seed=0):
    environments = make(env, n, seed)
    torch.manual_seed(seed)
    space = environments.action_space
    policy = SequenceGaussian(
        Features(describe(environments.observation_space), (8,), "relu"), space.low, space.high
    )
    rollouts = Rollouts(environments, seed)
    return rollouts, SequenceSteps(rollouts, Role("actor", policy), length)


@pytest.mark.parametrize("kind", [Terminates, Truncates])
def test_every_single_step_is_remembered_and_a_sequence_ends_with_its_episode(kind):
    rollouts, acting = sequences(kind, n=2, length=3)  # episodes of 5 steps: 3 actions, then 2 of 3
    replay = rollouts.replay(100)
    acting.advance(10, into=replay)
    assert len(replay) == 20
    assert rollouts.taken == 20
    assert acting.decisions == 2 * 4
    first = replay._flat["observation"].view(-1, 2, 3)[:10, :, 0]
    assert first[:, 0].tolist() == [0, 1, 2, 3, 4] * 2
    ended = replay._flat["terminated" if kind is Terminates else "truncated"].view(-1, 2)[:10]
    assert ended[:, 0].tolist() == ([False] * 4 + [True]) * 2
    assert replay._flat["next_observation"].view(-1, 2, 3)[4, 0, 0] == 5  # not the reset one
    previous = replay.previous_action(torch.arange(20)).view(10, 2)
    taken = replay._flat["action"].view(-1, 2)[:10]
    assert torch.equal(previous[0], torch.zeros(2))  # zero at first
    assert torch.equal(previous[5], torch.zeros(2))  # and after an episode
    assert torch.equal(previous[1:5], taken[:4])


def test_sequences_are_those_of_the_policy_from_the_observation_it_looked_at():
    rollouts, acting = sequences(Counter, length=3)
    replay = rollouts.replay(100)
    acting.advance(6, into=replay)
    policy = acting.act
    seen = replay._flat["observation"].view(-1, 3)[:6]
    taken = replay._flat["action"].view(-1, 1)[:6]
    noise = np.random.Generator(np.random.PCG64())
    noise.bit_generator.state = sequences(Counter, length=3)[1].random.bit_generator.state
    drawn = np.stack([noise.standard_normal((1, 3), dtype=np.float32) for _ in range(6)])
    first = policy.plan(seen[:1].numpy(), np.zeros((1, 1), np.float32), drawn[0].reshape(1, 3, 1))
    second = policy.plan(seen[3:4].numpy(), first[:, 2], drawn[3].reshape(1, 3, 1))
    np.testing.assert_allclose(taken, np.concatenate([first[0], second[0]]), atol=1e-6)


def test_random_steps_are_chosen_one_by_one_and_known_to_what_follows():
    rollouts, acting = sequences(Counter, length=3)
    replay = rollouts.replay(100)
    acting.advance(4, into=replay, random=True)
    actions = replay._flat["action"].view(-1)[:4]
    assert len(set(actions.tolist())) == 4
    assert (actions.abs() <= 1).all()
    assert acting.decisions == 0
    assert acting.act._previous.item() == actions[3]


def test_stepping_goes_on_from_its_state():
    rollouts, acting = sequences("Pendulum-v1", length=3)
    replay = rollouts.replay(100)
    acting.advance(4, into=replay)
    state = acting.state_dict(), rollouts.state_dict(), replay.state_dict()
    acting.advance(5, into=replay)
    others, twin = sequences("Pendulum-v1", length=3)
    copy = others.replay(100)
    others.load_state_dict(state[1])
    twin.load_state_dict(state[0])
    copy.load_state_dict(state[2])
    twin.advance(5, into=copy)
    assert torch.equal(copy._flat["action"][:9], replay._flat["action"][:9])


# --- the replay -------------------------------------------------------------------------------------------


def filled(capacity=40, environments=2, steps=13, ends=(4, 8)):
    """Observations count the steps, actions too; episodes end at ``ends`` (of the first stream)."""
    replay = Replay(capacity, environments)
    for t in range(steps):
        ended = np.array([t in ends, False])
        value = np.array([[t], [100 + t]], np.float32)
        replay.add(value, value[:, :1] + 0.5, value[:, 0], value + 1, ended, np.zeros(2, bool))
    return replay


@pytest.mark.parametrize("capacity", [40, 20])  # with room to spare, and after the oldest were overwritten
def test_runs_follow_each_other_and_stop_counting_at_the_end_of_an_episode(capacity):
    replay = filled(capacity)
    runs = replay.windows(500, 4, draws=3, previous_action=True)
    assert runs.batch_size == (2000,)
    assert runs.noise.shape == (2000, 3, 1)
    start = runs.observation.view(500, 4)
    weight = runs.weight.view(500, 4)
    begun = set()
    for row, real in zip(start.tolist(), weight.tolist(), strict=True):
        stream, t = int(row[0] >= 100), row[0] % 100
        begun.add(row[0])
        ends = [4, 8, 12] if stream == 0 else [12]
        count = min(4, min(e for e in ends if e >= t) - int(t) + 1)
        assert real == [1.0] * count + [0.0] * (4 - count)
        assert row[:count] == [row[0] + k for k in range(count)]
        assert set(row[count:]) <= {row[count - 1]}
    kept = 13 if capacity == 40 else 10
    assert begun == {s * 100.0 + t for s in (0, 1) for t in range(13 - kept, 13)}
    assert torch.equal(runs.next_observation, runs.observation + 1)


def test_a_sample_has_as_many_draws_as_asked_for_and_the_action_before():
    replay = filled()
    batch = replay.sample(300, draws=5, previous_action=True)
    assert batch.noise.shape == (300, 5, 1)
    t = batch.observation[:, 0]
    first = (t % 100 == 0) | ((t < 100) & ((t == 5) | (t == 9)))
    expected = torch.where(first, 0.0, t - 1 + 0.5)
    assert first.any()
    assert torch.equal(batch.previous_action[:, 0], expected)
    assert replay.sample(3).previous_action is None


def test_an_empty_replay_has_no_runs():
    with pytest.raises(UsageError, match="empty"):
        Replay(10).windows(2, 2)
