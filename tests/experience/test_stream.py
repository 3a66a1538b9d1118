"""The stream against the same steps with the formulas written out."""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from guerdon.errors import UsageError
from guerdon.experience.environments import make
from guerdon.experience.stream import Stream, time_limit


class Walk(gymnasium.Env):
    """Three steps to the end, or six to the limit; pays 1, 2, 3, ..."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.taken = 0, np.zeros(2)
        return self.show(), {}

    def show(self):
        return 100.0 + self.steps + self.np_random.normal(size=2)

    def step(self, action):
        self.steps, self.taken = self.steps + 1, action
        return self.show(), float(self.steps), bool(self.steps == 3 and action[0] > 0), self.steps == 6, {}


def written_out(seed, actions, gamma, limit):
    """What a stream should give, from the same environment and plain lists."""
    environment = make(Walk, 1, seed)
    seen, sums, total, time = [], [], 0.0, 0

    def normalised(raw, time):
        seen.append(np.asarray(raw, dtype=np.float64))
        variance = np.var(seen, axis=0, ddof=1) if len(seen) > 1 else 1.0
        value = (seen[-1] - np.mean(seen, axis=0)) / np.sqrt(variance + 1e-8)
        return np.append(value, time / limit - 0.5)

    acting, moves = [normalised(environment.reset()[0], 0)], []
    for action in actions:
        step = environment.step(action[None])
        done = step.terminated[0] or step.truncated[0]
        total = gamma * (1 - done) * total + step.reward[0]
        sums.append(total)
        scale = np.sqrt((np.var(sums, ddof=1) if len(sums) > 1 else 1.0) + 1e-8)
        time += 1
        led_to = normalised((step.final if done else step.observation)[0], time)
        moves.append((led_to, step.reward[0] / scale, step.terminated[0], step.truncated[0]))
        time = 0 if done else time
        acting.append(normalised(step.observation[0], 0) if done else led_to)
    return acting, moves


def test_steps_are_counted_normalised_scaled_and_timed_in_the_published_order():
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 2)).astype(np.float32)
    acting, moves = written_out(5, actions, 0.9, 6)
    stream = Stream(make(Walk, 1, 5), gamma=0.9, time_limit=6)
    ends = set()
    for action, act_on, (led_to, reward, terminated, truncated) in zip(actions, acting, moves, strict=False):
        np.testing.assert_allclose(stream.observation, act_on, atol=1e-4)
        move = stream.step(action)
        np.testing.assert_allclose(move.observation, led_to, atol=1e-4)
        assert move.observation.dtype == np.float32
        assert move.reward == pytest.approx(reward, rel=1e-5)
        assert (move.terminated, move.truncated) == (terminated, truncated)
        assert stream.fresh == (terminated or truncated)
        ends.add((move.terminated, move.truncated))
    assert ends == {(False, False), (True, False), (False, True)}
    assert stream.unit == "step"


def test_nothing_is_clipped_and_no_mean_is_taken_from_rewards():
    stream = Stream(make(Walk, 1, 0), gamma=0.0)
    rewards = [stream.step(np.array([-1.0, 0.0])).reward for _ in range(12)]
    assert min(rewards) > 0  # rewards 1 to 6: centred ones would be negative as often
    values = np.concatenate([stream.step(np.array([-1.0, 0.0])).observation for _ in range(3000)])
    assert np.abs(values).max() > 2
    assert stream.reward_scale == pytest.approx(np.std([1, 2, 3, 4, 5, 6]), rel=0.01)


def test_each_part_can_be_left_out():
    stream = Stream(make(Walk, 1, 3), normalise=False, scale_reward=False)
    raw = make(Walk, 1, 3)
    np.testing.assert_array_equal(stream.observation, raw.reset()[0])
    action = np.array([-0.5, 0.5], dtype=np.float32)
    move, step = stream.step(action), raw.step(action[None])
    np.testing.assert_array_equal(move.observation, step.observation[0])
    assert move.reward == 1.0
    assert stream.reward_scale == 1.0
    assert stream.shape == (2,)


def test_actions_are_clipped_by_the_environment():
    environments = make(Walk, 1, 0)
    stream = Stream(environments)
    stream.step(np.array([5.0, -5.0]))
    np.testing.assert_array_equal(environments.env.envs[0].unwrapped.taken, [1.0, -1.0])


def test_returns_are_the_environments_own():
    stream = Stream(make(Walk, 1, 0))
    assert stream.returns() == []
    for _ in range(14):
        stream.step(np.array([-1.0, 0.0]))
    assert stream.returns() == [21.0, 21.0]
    assert stream.returns() == []


def test_what_is_no_stream_is_refused():
    with pytest.raises(UsageError, match="made 2 times"):
        Stream(make(Walk, 2, 0))
    with pytest.raises(UsageError, match="Box"):
        Stream(make("FrozenLake-v1", 1, 0))


def test_the_time_limit_is_the_registrys():
    assert time_limit(make("CartPole-v1", 1, 0)) == 500
    assert time_limit(make("CartPole-v1", 1, 0, "gymnasium")) == 500
    assert time_limit(make(Walk, 1, 0)) is None


@pytest.mark.parametrize("backend", ["array", "gymnasium"])
def test_a_saved_stream_goes_on(backend):
    actions = np.random.default_rng(0).integers(0, 2, 120)

    def opened():
        environments = make("CartPole-v1", 1, 7, backend)
        return environments, Stream(environments, time_limit=500)

    environments, stream = opened()
    for action in actions[:50]:
        stream.step(action)
    saved = environments.state_dict(), stream.state_dict()
    again, resumed = opened()
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    if not again.saveable:  # a new episode, with the statistics as they were and one observation more
        assert resumed.fresh
        assert resumed.observation[-1] == -0.5
        assert resumed.normalise.statistics.count == stream.normalise.statistics.count + 1
        return
    for action in actions[50:]:
        a, b = stream.step(action), resumed.step(action)
        np.testing.assert_array_equal(a.observation, b.observation)
        assert a[1:] == b[1:]
        np.testing.assert_array_equal(stream.observation, resumed.observation)
    assert torch.equal(stream.state_dict()["observation"], resumed.state_dict()["observation"])
