"""The frequency-averaged score, and returns by the length of action sequences."""

import numpy as np
import pytest
import torch
from tests.evaluation.environments_for_frequency import Chase

from guerdon.errors import UsageError
from guerdon.evaluation.frequency import (
    LENGTHS,
    MAXIMA,
    OFFSETS,
    frequency_averaged_score,
    return_by_length,
    score_of,
)
from guerdon.policies.action_sequence import SequenceGaussian
from guerdon.policies.control import Deterministic
from guerdon.policies.features import Entry, Features


def test_lengths_offsets_and_maxima_are_the_published_ones():
    assert LENGTHS == (1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
    assert OFFSETS == {"Pendulum": 1550, "Reacher": 65}
    assert MAXIMA["Pendulum"] == 1350
    assert MAXIMA["Humanoid"] == 10500
    assert len(MAXIMA) == 11


def test_a_constant_return_at_the_maximum_scores_29_of_30():
    assert frequency_averaged_score(dict.fromkeys(LENGTHS, 3600.0), 3600.0) == pytest.approx(29 / 30)
    assert score_of("Hopper-v5", dict.fromkeys(LENGTHS, 3600.0)) == pytest.approx(29 / 30)
    assert score_of("Pendulum-v1", dict.fromkeys(LENGTHS, -200.0)) == pytest.approx(29 / 30)


def test_the_score_is_the_trapezoid_rule_over_unequal_lengths():
    returns = {4: 2.0, 1: 10.0, 2: 6.0}
    area = 1 * (10 + 6) / 2 + 2 * (6 + 2) / 2
    assert frequency_averaged_score(returns, 10.0) == pytest.approx(area / (4 * 10))
    assert frequency_averaged_score(returns, 10.0, offset=5.0) == pytest.approx((area + 15) / 40)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(UsageError, match="length 1"):
        frequency_averaged_score({2: 1.0, 4: 1.0}, 1.0)
    with pytest.raises(UsageError, match="CartPole"):
        score_of("CartPole-v1", {1: 1.0, 2: 1.0})


# --- sweeps: an environment that pays for the action that was right when it was taken --------------------


def features():
    return Features({"": Entry((2,))}, (8,), "relu")


def test_a_one_step_policy_repeats_its_action_until_the_episode_ends():
    torch.manual_seed(0)
    policy = Deterministic(features(), [-1.0], [1.0])
    returns = return_by_length(policy, Chase, lengths=(1, 2, 5), episodes=3, seed=4)
    for length, found in returns.items():
        assert found == pytest.approx([play(policy, length, row) for row in range(3)], abs=1e-4)
    assert len(set(returns[1])) == 3  # different initial states, the same at each length
    assert returns[1] != returns[5]


def test_a_sequence_policy_feeds_its_means_back_open_loop_and_stops_early():
    torch.manual_seed(0)
    policy = SequenceGaussian(features(), [-1.0], [1.0])
    returns = return_by_length(policy, Chase, lengths=(1, 3, 4), episodes=3, seed=4)
    for length, found in returns.items():
        assert found == pytest.approx([play(policy, length, row) for row in range(3)], abs=1e-4)


@torch.no_grad()
def play(policy, length, row):
    """The first episode of a row, step by step."""
    from guerdon.experience.environments import make

    env = make(Chase, 3, 4)
    observation, total, previous, t = env.reset(), 0.0, torch.zeros(1, 1), 0
    while True:
        if t % length == 0:
            seen = torch.from_numpy(observation[row : row + 1])
            if isinstance(policy, SequenceGaussian):
                actions = policy.mode_sequence(seen, previous, length)[0]
            else:
                actions = policy.mode(seen).expand(length, -1)
        previous = actions[t % length][None]
        step = env.step(np.repeat(previous.numpy(), 3, 0))  # the rows do not meet
        total += float(step.reward[row])
        if step.terminated[row] or step.truncated[row]:
            return total
        observation, t = step.observation, t + 1
