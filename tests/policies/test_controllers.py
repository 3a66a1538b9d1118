"""Controllers: acting in NumPy and in torch, log-probabilities against torch's distributions, files, spaces."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as D

from control_for_tests import HIGH, KINDS, LOW, acted, controller, features, noise_for
from guerdon.errors import DataError, UsageError
from guerdon.objectives import divergence
from guerdon.policies.control import (
    Categorical,
    Controller,
    Deterministic,
    Gaussian,
    SquashedGaussian,
    controller_class,
    kinds_for,
    load_controller,
    make_controller,
)
from guerdon.policies.features import Entry, Features

BOX = spaces.Box(np.array(LOW, np.float32), np.array(HIGH, np.float32))


def observations(rows: int = 64) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((rows, 3)).astype(np.float32)


def _torch_acts(
    policy: Controller, observation: np.ndarray, noise: np.ndarray | None
) -> dict[str, np.ndarray]:
    drawn = None if noise is None else torch.from_numpy(noise)
    return {k: v.numpy() for k, v in policy.act(torch.from_numpy(observation), drawn).items()}


@pytest.mark.parametrize("with_noise", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_acting_in_numpy_is_acting_in_torch(kind: str, normalise: bool, with_noise: bool) -> None:
    policy = controller(kind, normalise=normalise)
    observation = observations()
    noise = noise_for(policy, 64) if with_noise else None
    act = policy.actor()
    for _ in range(2):  # the second time with other weights, through the same function
        found, expected = act(observation, noise), _torch_acts(policy, observation, noise)
        assert found.keys() == expected.keys()
        for name in expected:
            assert found[name].shape == expected[name].shape
            assert found[name].dtype == expected[name].dtype, name
            np.testing.assert_allclose(found[name], expected[name], atol=3e-6)
        if noise is None:
            np.testing.assert_allclose(
                found["action"], policy.mode(torch.from_numpy(observation)).numpy(), atol=3e-6
            )
        for p in policy.parameters():
            p.mul_(-1.3)


def test_a_greedy_controller_explores_with_its_newest_epsilon() -> None:
    policy = controller("greedy")
    act, observation, noise = policy.actor(), observations(2000), noise_for(policy, 2000)
    best = act(observation, None)["action"]
    for epsilon, share in (
        (0.0, 0.0),
        (0.4, 0.3),
        (1.0, 0.75),
    ):  # a random action is the best one now and then
        policy.epsilon = epsilon
        other = (act(observation, noise)["action"] != best).mean()
        assert other == pytest.approx(share, abs=0.03)
        np.testing.assert_array_equal(
            act(observation, noise)["action"], _torch_acts(policy, observation, noise)["action"]
        )


@pytest.mark.parametrize("kind", ["categorical", "dials", "greedy"])
def test_actions_are_drawn_as_often_as_their_probability_says(kind: str) -> None:
    policy = controller(kind)
    observation = np.repeat(observations(1), 40_000, 0)
    action = policy.actor()(observation, noise_for(policy, 40_000))["action"]
    traj = acted(policy, 1, 1)
    traj.inputs["step", "observation"] = torch.from_numpy(observation[:1])[None]
    p = policy.distribution(traj)["logits"].softmax(-1)[0, 0]
    if kind == "dials":
        assert p[1, 2] == 0.0  # the second dial has two positions
        for dial in range(2):
            shares = np.bincount(action[:, dial], minlength=3) / len(action)
            np.testing.assert_allclose(shares, p[dial].numpy(), atol=0.01)
    else:
        np.testing.assert_allclose(np.bincount(action, minlength=4) / len(action), p.numpy(), atol=0.01)


# --- log-probabilities ------------------------------------------------------------------------------------


def _reference(policy: Controller, observation: torch.Tensor) -> D.Distribution:
    """The same distribution, put together from torch's."""
    if isinstance(policy, SquashedGaussian):
        hidden = policy.features(observation)
        base = D.Normal(policy.mean(hidden), policy.log_std(hidden).clamp(-20, 2).exp())
        moved = [D.TanhTransform(cache_size=1), D.AffineTransform(policy.centre, policy.scale)]
        return D.Independent(D.TransformedDistribution(base, moved), 1)
    mean = policy.mode(observation)
    if isinstance(policy, Gaussian):
        return D.Independent(D.Normal(mean, policy.log_std.exp()), 1)
    assert isinstance(policy, Deterministic)
    return D.Independent(D.Normal(mean, policy.exploration * policy.scale), 1)


@pytest.mark.parametrize("kind", ["gaussian", "squashed", "deterministic"])
def test_continuous_log_probabilities(kind: str) -> None:
    policy = controller(kind)
    traj = acted(policy)
    step = traj.inputs["step"]
    expected = _reference(policy, step["observation"]).log_prob(step["action"])
    torch.testing.assert_close(policy.log_prob(traj), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy.log_prob(traj, policy.distribution(traj)), policy.log_prob(traj))
    traj.mask[2, 1:] = False
    assert not policy.log_prob(traj)[2, 1:].any()


@pytest.mark.parametrize("kind", ["categorical", "dials"])
def test_discrete_log_probabilities(kind: str) -> None:
    policy = controller(kind)
    traj = acted(policy)
    step = traj.inputs["step"]
    p = D.Categorical(logits=policy.logits(step["observation"]))
    expected = p.log_prob(step["action"])
    expected = expected.sum(-1) if kind == "dials" else expected
    torch.testing.assert_close(policy.log_prob(traj), expected)
    entropy = divergence.entropy(policy.distribution(traj))
    assert torch.isfinite(entropy).all()  # positions that a dial does not have count nothing
    if kind == "categorical":
        torch.testing.assert_close(entropy, p.entropy())


def test_a_dial_of_fewer_positions_has_finite_gradients() -> None:
    policy = controller("dials").requires_grad_(True)
    traj = acted(policy)
    (policy.log_prob(traj).sum() + divergence.entropy(policy.distribution(traj)).sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters())


@pytest.mark.parametrize("shift", [0.0, 9.0, -30.0])
def test_squashed_log_probabilities_are_exact_far_out(shift: float) -> None:
    """Against float64: where tanh saturates in float32, ``log(1 - tanh^2)`` would be minus infinity."""
    policy = controller("squashed")
    policy.mean.bias += shift
    observation, noise = torch.from_numpy(observations(8)), torch.randn(8, 2)
    action, raw, log_prob = policy.draw_raw(observation, noise)
    u = raw.double()
    normal = D.Normal(*(v.double() for v in _normal(policy, observation)))
    # log(1 - tanh(u)^2) = -2 log cosh(u)
    slope = -2 * (u.abs() + torch.log1p((-2 * u.abs()).exp()) - math.log(2)) + policy.scale.double().log()
    expected = (normal.log_prob(u) - slope).sum(-1)
    torch.testing.assert_close(log_prob.double(), expected, atol=1e-3, rtol=1e-5)
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    assert ((action >= low) & (action <= high)).all()


def _normal(policy: SquashedGaussian, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = policy.features(observation)
    return policy.mean(hidden), policy.log_std(hidden).clamp(-20, 2).exp()


def test_every_way_to_a_squashed_action_agrees() -> None:
    policy = controller("squashed")
    observation, noise = torch.from_numpy(observations(8)), torch.randn(8, 2)
    action, log_prob = policy.draw(observation, noise)
    action_, raw, log_prob_ = policy.draw_raw(observation, noise)
    out = policy.act(observation, noise)
    assert torch.equal(action, action_)
    assert torch.equal(log_prob, log_prob_)
    assert torch.equal(out["action"], action)
    assert torch.equal(out["raw"], raw)
    torch.testing.assert_close(policy.log_prob_raw(observation, raw), log_prob, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        _reference(policy, observation).log_prob(action), log_prob, atol=1e-3, rtol=1e-3
    )
    assert torch.equal(policy.mode(observation), policy.squash(_normal(policy, observation)[0]))


@pytest.mark.parametrize("kind", ["gaussian", "squashed"])
def test_drawn_actions_are_differentiable_in_the_weights(kind: str) -> None:
    policy = controller(kind).double().requires_grad_(True)
    observation, noise = torch.from_numpy(observations(3)).double(), torch.randn(3, 2).double()

    def value() -> torch.Tensor:
        # features come out in float32; the heads are what is checked
        hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()
        policy.features.forward = lambda _: hidden
        action, log_prob = policy.draw(observation, noise)
        return (action * torch.tensor([1.0, -2.0])).sum() + log_prob.sum()

    head = policy.mean.weight if kind == "squashed" else policy.head.weight
    std = policy.log_std.bias if kind == "squashed" else policy.log_std
    gradient = torch.autograd.grad(value(), [head, std])
    for tensor, found in zip((head, std), gradient, strict=True):
        flat = tensor.data.view(-1)
        for i in range(min(4, len(flat))):
            flat[i] += 1e-5
            up = value().item()
            flat[i] -= 2e-5
            down = value().item()
            flat[i] += 1e-5
            assert found.view(-1)[i].item() == pytest.approx((up - down) / 2e-5, abs=1e-5)


def test_default_target_entropies() -> None:
    assert controller("categorical").default_target_entropy == pytest.approx(0.98 * math.log(4))
    # -dim in units of half the range: the entropy of an action in [-1, 1] plus the log of the scales
    assert controller("squashed").default_target_entropy == pytest.approx(-2 + math.log(2.0) + math.log(0.5))


@pytest.mark.parametrize("kind", ["squashed", "deterministic"])
def test_actions_stay_within_their_range(kind: str) -> None:
    policy = controller(kind)
    for p in policy.parameters():
        p.mul_(30.0)
    action = policy.actor()(observations(500), 5 * noise_for(policy, 500))["action"]
    low, high = np.array(LOW, np.float32), np.array(HIGH, np.float32)
    assert ((action >= low - 1e-6) & (action <= high + 1e-6)).all()
    np.testing.assert_allclose(action.max(0), high, atol=1e-3)
    np.testing.assert_allclose(action.min(0), low, atol=1e-3)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_controller_comes_back(kind: str, normalise: bool, tmp_path: Path) -> None:
    policy = controller(kind, normalise=normalise)
    policy.learn_temperature(0.3)  # serves training, and stays there
    policy.save_pretrained(tmp_path)
    again = load_controller(tmp_path)
    assert type(again) is type(policy)
    assert again.settings() == policy.settings()
    assert "log_temperature" not in again.state_dict()
    observation = observations()
    noise = None if kind.startswith("greedy") else noise_for(policy, 64)  # what is loaded does not explore
    for name, value in policy.actor()(observation, noise).items():
        np.testing.assert_array_equal(again.actor()(observation, noise)[name], value)
    assert json.loads((tmp_path / "config.json").read_text())["policy"] == policy.name


@pytest.mark.parametrize("damage", ["nothing there", "no json", "cut weights", "other size", "no features"])
def test_a_damaged_controller_is_refused(damage: str, tmp_path: Path) -> None:
    if damage != "nothing there":
        controller("gaussian").save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    if damage == "no json":
        config.write_text("{")
    elif damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-50])
    elif damage == "other size":
        config.write_text(config.read_text().replace('"low": [\n  -2.0,\n  0.0\n ]', '"low": [1.0]'))
        content = json.loads(config.read_text())
        content["features"]["hidden"] = [8, 9]
        config.write_text(json.dumps(content))
    elif damage == "no features":
        content = json.loads(config.read_text())
        del content["features"]
        config.write_text(json.dumps(content))
    with pytest.raises(DataError, match="holds no controller that can be read"):
        load_controller(tmp_path)


# --- from spaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "space", "kind"),
    [
        ("categorical", spaces.Discrete(3), Categorical),
        ("categorical", spaces.MultiDiscrete([3, 4]), Categorical),
        ("greedy", spaces.Discrete(3), Controller),
        ("gaussian", BOX, Gaussian),
        ("squashed", BOX, SquashedGaussian),
        ("deterministic", BOX, Deterministic),
    ],
)
def test_controllers_are_made_for_spaces(which: str, space: Any, kind: type[Controller]) -> None:
    policy = make_controller(which, features(), space)
    assert isinstance(policy, kind)
    assert policy.name == which
    action = policy.actor()(observations(2), noise_for(policy, 2))["action"]
    assert action.shape == (2, *space.shape)
    assert kinds_for(space)[0] == (
        "categorical" if hasattr(space, "n") or hasattr(space, "nvec") else "gaussian"
    )


@pytest.mark.parametrize(
    ("which", "space", "message"),
    [
        ("gaussian", spaces.Discrete(3), "a gaussian controller cannot act in Discrete"),
        ("categorical", BOX, "a categorical controller cannot act in Box"),
        ("greedy", spaces.MultiDiscrete([2, 2]), "takes one discrete action"),
        ("squashed", spaces.Box(-np.inf, np.inf, (2,)), "finite range"),
        ("gaussian", spaces.Box(-1, 1, (2, 2)), "no controller for the action space"),
        ("gausian", BOX, "gaussian"),
    ],
)
def test_what_does_not_fit_is_refused(which: str, space: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make_controller(which, features(), space)


def test_controllers_answer_no_prompts() -> None:
    with pytest.raises(UsageError, match="answers no prompts"):
        controller("gaussian").sample(["up"], torch.zeros(1, dtype=torch.int64))


def test_classes_by_name() -> None:
    assert controller_class("gaussian") is Gaussian
    assert controller_class("greedy").name == "greedy"


def test_acting_on_what_is_no_flat_vector() -> None:
    torch.manual_seed(0)
    f = Features({"": Entry((2, 3))}, (8,))
    policy = Gaussian(f, LOW, HIGH).requires_grad_(False)
    observation = observations(10).reshape(5, 2, 3)
    out = policy.actor()(observation, None)["action"]
    np.testing.assert_allclose(out, policy.mode(torch.from_numpy(observation)).numpy())
