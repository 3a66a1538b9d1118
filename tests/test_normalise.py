"""Running statistics against NumPy's own, and scaling against the formulas written out."""

import numpy as np
import pytest
import torch

from guerdon.errors import ShapeError, UsageError
from guerdon.normalise import NormaliseObservation, RunningMeanStd, ScaleReward, TimeFeature


@pytest.fixture
def samples():
    """Far from zero, of very different spreads: where the textbook sum of squares would lose all digits."""
    generator = np.random.default_rng(0)
    return 1e6 + generator.normal(size=(200, 3)) * np.array([1e-2, 1.0, 1e3])


def test_welford_one_at_a_time_and_in_batches_equal_numpy(samples):
    single, batched = RunningMeanStd((3,)), RunningMeanStd((3,))
    for sample in samples:
        single.push(sample)
    for start, end in ((0, 1), (1, 2), (2, 50), (50, 50), (50, 200)):
        batched.update(samples[start:end])
    for statistics in (single, batched):
        assert statistics.count == 200
        np.testing.assert_allclose(statistics.mean, samples.mean(0), rtol=1e-12)
        np.testing.assert_allclose(statistics.var, samples.var(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(single.var, batched.var, rtol=1e-6)


def test_plain_numbers(samples):
    single, batched = RunningMeanStd(), RunningMeanStd()
    for value in samples[:, 1]:
        single.push(float(value))
    batched.update(samples[:, 1])
    assert isinstance(single.mean, float)
    assert isinstance(batched.mean, float)
    assert single.var == pytest.approx(samples[:, 1].var(ddof=1), rel=1e-8)
    assert batched.std == pytest.approx(samples[:, 1].std(ddof=1), rel=1e-6)


def test_variance_is_one_until_there_are_two_samples():
    statistics = RunningMeanStd((2,))
    np.testing.assert_array_equal(statistics.var, [1, 1])
    statistics.push(np.array([5.0, 7.0]))
    np.testing.assert_array_equal(statistics.var, [1, 1])
    statistics.push(np.array([7.0, 7.0]))
    np.testing.assert_array_equal(statistics.var, [2, 0])


def test_another_shape_is_refused():
    with pytest.raises(ShapeError, match=r"\[3\].*\[4\]"):
        RunningMeanStd((3,)).update(np.zeros(4))
    with pytest.raises(ShapeError):
        RunningMeanStd((3,)).load_state_dict(RunningMeanStd((4,)).state_dict())
    with pytest.raises(ShapeError, match="must both be"):
        ScaleReward(n=2)(np.zeros(3), np.zeros(2))
    with pytest.raises(UsageError):
        ScaleReward(gamma=1.5)
    with pytest.raises(UsageError):
        NormaliseObservation((2,), clip=0.0)
    with pytest.raises(UsageError):
        TimeFeature(0)


def test_observations_are_counted_first_then_normalised_without_clipping():
    normalise = NormaliseObservation((1,))
    stream = np.array([[3.0], [5.0], [100.0]])
    for t in range(1, 4):
        seen = stream[:t]
        variance = seen.var(0, ddof=1) if t > 1 else 1.0
        expected = (stream[t - 1] - seen.mean(0)) / np.sqrt(variance + 1e-8)
        got = normalise(stream[t - 1])
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6)
    statistics = normalise.state_dict()
    far = normalise(np.array([1e6]), update=False)
    assert far > 1e4  # neither clipped ...
    assert all(
        torch.equal(torch.as_tensor(v), torch.as_tensor(statistics[k]))
        for k, v in normalise.state_dict().items()
    )  # ... nor counted
    assert NormaliseObservation((1,), clip=10.0)(np.array([[0.0], [1.0]])).max() < 10
    clipped = NormaliseObservation((1,), clip=0.5)(np.array([[0.0], [1.0]]))
    np.testing.assert_array_equal(clipped, [[-0.5], [0.5]])


def test_reward_is_divided_by_the_deviation_of_the_discounted_trace_and_not_centred():
    generator = np.random.default_rng(1)
    rewards, done = generator.normal(2.0, 1.0, 60), generator.random(60) < 0.2
    scale = ScaleReward(gamma=0.9)
    trace, traces = 0.0, []
    for reward, end in zip(rewards, done, strict=True):
        trace = 0.9 * (1 - end) * trace + reward
        traces.append(trace)
        deviation = np.sqrt((np.var(traces, ddof=1) if len(traces) > 1 else 1.0) + 1e-8)
        assert scale(reward, end) == pytest.approx(reward / deviation, rel=1e-9)
    assert ScaleReward(clip=0.1)(5.0, False) == 0.1


def test_environments_have_traces_of_their_own_and_share_statistics():
    generator = np.random.default_rng(2)
    rewards, done = generator.normal(size=(20, 3)), generator.random((20, 3)) < 0.2
    scale = ScaleReward(gamma=0.9, n=3)
    trace, traces = np.zeros(3), []
    for reward, end in zip(rewards, done, strict=True):
        trace = 0.9 * (1 - end) * trace + reward
        traces.append(trace)
        got = scale(reward, end)
        np.testing.assert_allclose(got, reward / np.sqrt(np.var(traces, ddof=1) + 1e-8), rtol=1e-6)


def test_time_feature_starts_at_minus_one_half():
    time = TimeFeature(limit=4)
    features = []
    for _ in range(5):
        features.append(time(np.zeros(2))[-1])
        time.advance()
    np.testing.assert_array_equal(features, [-0.5, -0.25, 0, 0.25, 0.5])
    time.reset()
    np.testing.assert_array_equal(time(np.ones(2)), np.array([1, 1, -0.5], dtype=np.float32))

    many = TimeFeature(limit=4, n=2)
    many.advance()
    many.reset(np.array([True, False]))
    np.testing.assert_array_equal(many(np.zeros((2, 1))), [[0, -0.5], [0, -0.25]])


def test_a_saved_state_goes_on_bit_for_bit(samples):
    def parts():
        return NormaliseObservation((3,)), ScaleReward(0.9), ScaleReward(0.9, n=3), TimeFeature(9, n=3)

    def run(parts, rows):
        normalise, one, many, time = parts
        outputs = []
        for row in rows:
            time.advance()
            outputs += [normalise(row), one(row[0], False), many(row, row > 1e6), time(row[:, None])]
        return outputs

    straight, first, second = parts(), parts(), parts()
    expected = run(straight, samples)
    run(first, samples[:120])
    for old, new in zip(first, second, strict=True):
        new.load_state_dict(old.state_dict())
    run(first, samples[:5])  # the saved state must not be shared with the one that goes on
    for a, b in zip(run(second, samples[120:]), expected[480:], strict=True):
        np.testing.assert_array_equal(a, b)
