"""The recurrent sequence policy against its equations written out, and the carrying out of sequences."""

import numpy as np
import pytest
import torch
from torch.distributions import AffineTransform, Normal, TanhTransform, TransformedDistribution

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.policies.action_sequence import Encoder, OpenLoop, SequenceGaussian, repeated
from guerdon.policies.control import Deterministic
from guerdon.policies.features import Entry, Features

LOW, HIGH = [-2.0, -1.0], [2.0, 3.0]


def features(kind="vector", shape=(3,)):
    return Features({"": Entry(shape, kind)}, (8,), "relu")


def sequence_policy(seed=0, **options):
    torch.manual_seed(seed)
    return SequenceGaussian(features(), LOW, HIGH, **options)


def by_hand(policy, observation, previous, noise, length=None):
    """The equations one row and one action at a time; without noise, the means."""
    rows = []
    for row in range(len(observation)):
        w = dict(policy.named_parameters())
        h = torch.relu(w["features.layers.0.weight"] @ observation[row] + w["features.layers.0.bias"])
        h = w["start.weight"] @ h + w["start.bias"]
        a, actions, logs = previous[row], [], []
        for j in range(length or noise.shape[1]):
            x = w["cell.weight_ih"] @ a + w["cell.bias_ih"]
            y = w["cell.weight_hh"] @ h + w["cell.bias_hh"]
            if policy.cell_kind == "rnn":
                h = torch.tanh(x + y)
            else:
                (xr, xz, xn), (yr, yz, yn) = x.chunk(3), y.chunk(3)
                update = torch.sigmoid(xz + yz)
                h = (1 - update) * torch.tanh(xn + torch.sigmoid(xr + yr) * yn) + update * h
            mean = w["mean.weight"] @ h + w["mean.bias"]
            std = (w["log_std.weight"] @ h + w["log_std.bias"]).clamp(-20, 2).exp()
            raw = mean if noise is None else mean + std * noise[row, j]
            squashed = TransformedDistribution(
                Normal(mean, std), [TanhTransform(), AffineTransform(policy.centre, policy.scale)]
            )
            a = raw.tanh() * policy.scale + policy.centre
            actions.append(a)
            logs.append(squashed.log_prob(a).sum())
        rows.append((torch.stack(actions), torch.stack(logs)))
    return torch.stack([a for a, _ in rows]), torch.stack([p for _, p in rows])


@pytest.mark.parametrize("cell", ["gru", "rnn"])
def test_gru_actor_is_conditioned_on_the_previous_action_and_gives_any_length(cell):
    policy = sequence_policy(cell=cell)
    observation, previous, noise = torch.randn(4, 3), torch.rand(4, 2), torch.randn(4, 6, 2)
    actions, log_probs = policy.draw_sequence(observation, previous, noise)
    expected, expected_log_probs = by_hand(policy, observation, previous, noise)
    torch.testing.assert_close(actions, expected)
    torch.testing.assert_close(log_probs, expected_log_probs, atol=1e-4, rtol=1e-4)
    for length in (1, 3, 30):  # the beginning of a longer sequence is the shorter one
        shorter = policy.mode_sequence(observation, previous, length)
        assert shorter.shape == (4, length, 2)
        torch.testing.assert_close(shorter, by_hand(policy, observation, previous, None, length)[0])
    assert not torch.allclose(actions, policy.draw_sequence(observation, -previous, noise)[0], atol=1e-3)


def test_log_probs_are_given_per_action_and_differentiable_through_the_recurrence():
    policy = sequence_policy()
    actions, log_probs = policy.draw_sequence(torch.randn(5, 3), torch.zeros(5, 2), torch.randn(5, 4, 2))
    assert actions.shape == (5, 4, 2)
    assert log_probs.shape == (5, 4)
    (through,) = torch.autograd.grad(log_probs[:, 3].sum(), policy.cell.weight_ih, retain_graph=True)
    (first,) = torch.autograd.grad(log_probs[:, 0].sum(), policy.cell.weight_ih, retain_graph=True)
    assert through.abs().sum() > 0
    assert first.abs().sum() == 0  # the previous action was zero
    assert (actions >= torch.tensor(LOW)).all()
    assert (actions <= torch.tensor(HIGH)).all()


@pytest.mark.parametrize("options", [{}, {"cell": "rnn"}, {"latent": 5}])
def test_acting_in_numpy_is_acting_in_torch_and_sees_new_weights(options):
    policy = sequence_policy(**options)
    observation, previous = torch.randn(6, 3), torch.rand(6, 2)
    plan, noise = policy.planner(4), torch.randn(6, 4, 2)
    for _ in range(2):
        with torch.no_grad():
            drawn, mode = (
                policy.draw_sequence(observation, previous, noise)[0],
                policy.mode_sequence(observation, previous, 4),
            )
            seen, before = observation.numpy(), previous.numpy()
            np.testing.assert_allclose(plan(seen, before, noise.numpy()), drawn, atol=2e-6)
            np.testing.assert_allclose(plan(seen, before, None), mode, atol=2e-6)
            for weight in policy.parameters():
                weight.add_(0.1 * torch.randn_like(weight))


def test_one_step_verbs_are_the_first_action_of_a_sequence():
    policy = sequence_policy()
    observation, noise, zero = torch.randn(4, 3), torch.randn(4, 2), torch.zeros(4, 2)
    actions, log_probs = policy.draw_sequence(observation, zero, noise[:, None])
    action, log_prob = policy.draw(observation, noise)
    torch.testing.assert_close(action, actions[:, 0])
    torch.testing.assert_close(log_prob, log_probs[:, 0])
    torch.testing.assert_close(policy.mode(observation), policy.mode_sequence(observation, zero, 1)[:, 0])
    torch.testing.assert_close(policy.mode_at(observation, zero), policy.mode(observation))

    previous = torch.rand(2, 2, 2)  # and log_prob takes the previous action from the trajectory
    raw = policy.draw_raw(observation, noise)[1].view(2, 2, 2)
    step = {"observation": observation.view(2, 2, 3), "raw": raw, "previous_action": previous}
    from tensordict import TensorDict

    inputs = TensorDict({"step": TensorDict(step, batch_size=[2, 2])}, batch_size=[2])
    traj = Trajectories(inputs=inputs, log_prob=torch.zeros(2, 2), mask=torch.ones(2, 2, dtype=torch.bool))
    flat = observation, previous.view(4, 2)
    mean, log_std = policy.parameters_at(*flat)
    density = TransformedDistribution(
        Normal(mean, log_std.exp()), [TanhTransform(), AffineTransform(policy.centre, policy.scale)]
    )
    expected = density.log_prob(policy.squash(raw.view(4, 2))).sum(-1)
    torch.testing.assert_close(policy.log_prob(traj).flatten(), expected, atol=1e-4, rtol=1e-4)


def test_a_latent_actor_learns_no_encoder_and_takes_the_models():
    policy = sequence_policy(latent=5)
    assert policy.state_size == 5
    names = {name for name, _ in policy.named_parameters()}
    assert not any(name.startswith(("features", "project")) for name in names)
    assert {"features.layers.0.weight", "project.weight"} <= set(policy.state_dict())
    encoder, observation = Encoder(features(), 5), torch.randn(4, 3)
    assert not torch.allclose(policy.state(observation), encoder(observation))
    policy.take_encoder(encoder)
    torch.testing.assert_close(policy.state(observation), encoder(observation))


def test_images_need_a_latent_state():
    image = features("image", (10, 10, 3))
    with pytest.raises(UsageError, match="latent"):
        SequenceGaussian(image, LOW, HIGH)
    policy = SequenceGaussian(image, LOW, HIGH, latent=5)
    pictures = torch.randint(0, 255, (2, 10, 10, 3), dtype=torch.uint8)
    assert policy.mode_sequence(pictures, torch.zeros(2, 2), 3).shape == (2, 3, 2)


def test_wrong_options_are_refused():
    with pytest.raises(UsageError, match="lstm"):
        sequence_policy(cell="lstm")
    with pytest.raises(UsageError, match="hidden"):
        SequenceGaussian(Features({"": Entry((3,))}, ()), LOW, HIGH)
    with pytest.raises(UsageError, match="at least one"):
        sequence_policy().actor(0)


# --- carrying out -----------------------------------------------------------------------------------------


def counting_plan(calls):
    """Plans 100 * observation + 10 * previous + position."""

    def plan(observation, previous, noise):
        calls.append((observation[:, 0].tolist(), previous[:, 0].tolist()))
        return 100 * observation[:, :1, None] + 10 * previous[:, None] + np.arange(3.0)[None, :, None]

    return plan


def test_open_loop_looks_only_when_a_sequence_is_spent_and_begins_anew_after_an_episode():
    calls = []
    act = OpenLoop(counting_plan(calls), 3, np.zeros(1))
    seen = np.array([[1.0], [2.0]])
    first = [act(seen * k)["action"][:, 0].tolist() for k in (1, 7, 7)]
    assert first == [[100, 200], [101, 201], [102, 202]]  # what was seen in between is not looked at
    assert calls == [([1, 2], [0, 0])]
    assert act(seen)["action"][:, 0].tolist() == [100 + 1020, 200 + 2020]
    assert calls[-1] == ([1, 2], [102, 202])
    act.begin(np.array([False, True]))  # the second row's episode ended: it alone looks, after nothing
    assert act(seen)["action"][:, 0].tolist() == [1121, 200]
    assert calls[-1] == ([2], [0])
    assert act.decisions == 5


def test_open_loop_goes_on_from_its_state():
    act, twin = (OpenLoop(counting_plan([]), 3, np.zeros(1)) for _ in range(2))
    seen = np.array([[1.0], [2.0]])
    act(seen)
    act.begin(np.array([True, False]))
    act(seen)
    twin.load_state_dict(act.state_dict())
    for _ in range(4):
        np.testing.assert_array_equal(act(seen)["action"], twin(seen)["action"])
    assert act.decisions == twin.decisions


def test_a_one_step_controller_repeats_its_action():
    from gymnasium.spaces import Box

    policy = Deterministic(features(), LOW, HIGH)
    act = repeated(policy, 3, Box(np.array(LOW, np.float32), np.array(HIGH, np.float32)))
    seen = [np.random.default_rng(i).normal(size=(2, 3)).astype(np.float32) for i in range(6)]
    actions = [act(s)["action"] for s in seen]
    for i, looked in ((0, 0), (1, 0), (2, 0), (3, 3), (5, 3)):
        expected = policy.mode(torch.from_numpy(seen[looked])).detach()
        np.testing.assert_allclose(actions[i], expected, atol=1e-6)
