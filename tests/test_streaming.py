"""Traces, bounded steps and sparse weights against the formulas written out, one tensor at a time; small networks by
hand against autograd."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from guerdon.compiled import FlatWeights
from guerdon.errors import DataError, NonFiniteError, UsageError
from guerdon.policies.control import load_controller
from guerdon.policies.small import (
    Choice,
    Normal,
    NumpyNetwork,
    SmallController,
    SmallNetwork,
    TorchNetwork,
    differentiable,
)
from guerdon.streaming import AdaptiveObGD, Learner, ObGD, TraceSGD, make_rule, sparse_init


def network(shape=(5,), outputs=3, hidden=(16, 8), layer_norm=True, sparsity=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = SmallNetwork(shape, outputs, hidden, layer_norm, sparsity, generator)
    with torch.no_grad():
        for parameter in made.parameters():  # biases too
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return made


def both(module):
    """The same network by hand and by autograd, on the same weights."""
    flat = FlatWeights(module)
    return NumpyNetwork(module, flat), TorchNetwork(module, flat)


def norm_by_hand(x, dims):
    mean = x.mean(dims, keepdim=True)
    return (x - mean) / ((x - mean).square().mean(dims, keepdim=True) + 1e-5).sqrt()


# --- the network ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("hidden", [(16, 8), (32,), (8, 8, 8)])
def test_gradients_by_hand_equal_autograd(layer_norm, hidden):
    module = network(hidden=hidden, layer_norm=layer_norm)
    by_hand, by_autograd = both(module)
    generator = np.random.default_rng(0)
    for _ in range(5):
        x, cotangent = (generator.normal(size=n).astype(np.float32) for n in (5, 3))
        output, tape = by_hand.forward(x)
        expected, graph = by_autograd.forward(x)
        np.testing.assert_allclose(output, expected, atol=1e-6)
        np.testing.assert_allclose(by_hand.predict(x), expected, atol=1e-6)
        onto, expected_onto = np.ones_like(by_hand.weights), torch.ones_like(by_autograd.weights)
        by_hand.pull_back(tape, cotangent, onto)
        by_autograd.pull_back(graph, cotangent, expected_onto)
        np.testing.assert_allclose(onto, expected_onto.numpy(), atol=1e-5)
    assert by_hand.weights.dtype == onto.dtype == output.dtype == np.float32


def test_layer_norm_has_no_weights_stands_before_the_leaky_relu_and_not_after_the_head():
    module = network()
    assert {name for name, _ in module.named_parameters()} == {
        f"{layer}.{part}" for layer in ("hidden.0", "hidden.1", "head") for part in ("weight", "bias")
    }
    x = torch.randn(5)
    h = x
    for linear in module.hidden:
        h = F.leaky_relu(norm_by_hand(linear(h), -1), 0.01)
    expected = module.head(h)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module(x.expand(2, 3, 5)), expected.expand(2, 3, 3))


@pytest.mark.parametrize("shape", [(10, 10, 4), (4, 84, 84)])
def test_pixels_are_normalised_over_channels_height_and_width_together(shape):
    module = network(shape, hidden=(16,))
    x = torch.rand(shape)
    image = x.movedim(-1, 0) if shape[-1] == 4 else x
    for convolution in module.convolutions:
        image = F.leaky_relu(norm_by_hand(convolution(image[None])[0], (0, 1, 2)), 0.01)
    assert image.numel() == (1024 if shape[-1] == 4 else 256)
    expected = module.head(F.leaky_relu(norm_by_hand(module.hidden[0](image.flatten()), -1), 0.01))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(module(x.expand(2, *shape)), expected.expand(2, 3), atol=1e-5, rtol=1e-4)
    assert isinstance(differentiable(module, FlatWeights(module)), TorchNetwork)
    with pytest.raises(UsageError, match="vector or pixels"):
        SmallNetwork((3, 3), 1)


def test_weights_are_shared_with_the_torch_module():
    module = network()
    by_hand = differentiable(module, FlatWeights(module))
    assert isinstance(by_hand, NumpyNetwork)
    x = np.ones(5, dtype=np.float32)
    before = by_hand.predict(x)
    by_hand.weights *= 0.5
    after = by_hand.predict(x)
    assert not np.allclose(before, after)
    np.testing.assert_allclose(module(torch.ones(5)).detach().numpy(), after, atol=1e-6)


# --- sparse weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.9, 0.5, 0.0])
def test_sparse_init_zeroes_exactly_ceil_of_each_row_heads_included(sparsity):
    for module in (
        SmallNetwork((10, 10, 4), 3, (16,), sparsity=sparsity),
        SmallNetwork((7,), 3, (32, 32), sparsity=sparsity),
    ):
        layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        assert module.head in layers
        for layer in layers:
            rows = layer.weight.detach().flatten(1)
            fan_in = rows.shape[1]
            assert ((rows == 0).sum(1) == math.ceil(sparsity * fan_in)).all()
            assert rows.abs().max() <= fan_in**-0.5
            assert not layer.bias.any()
    spread = nn.Linear(400, 50)
    sparse_init(spread, sparsity, torch.Generator().manual_seed(0))
    kept = spread.weight[spread.weight != 0]
    assert kept.std().item() == pytest.approx(
        (1 / 400 / 3) ** 0.5, rel=0.05
    )  # that of the uniform distribution
    if sparsity:
        assert len({tuple(row.tolist()) for row in spread.weight == 0}) == 50  # every row has its own zeros


def test_sparsity_out_of_range_is_refused():
    with pytest.raises(UsageError, match="sparsity"):
        sparse_init(nn.Linear(2, 2), 1.0)


# --- traces and steps -------------------------------------------------------------------------------------


def naive(module, sequence, decay, alpha, kappa, adaptive=False):
    """The algorithm with lists of tensors and autograd, as the paper writes it; the step sizes."""
    parameters = list(module.parameters())
    traces = [torch.zeros_like(p) for p in parameters]
    squares = [torch.zeros_like(p) for p in parameters]
    sizes = []
    for t, (x, cotangent, delta, reset) in enumerate(sequence, 1):
        prediction = (module(torch.from_numpy(x)) * torch.from_numpy(cotangent)).sum()
        gradients = torch.autograd.grad(prediction, parameters)
        traces = [decay * z + g for z, g in zip(traces, gradients, strict=True)]
        followed = traces
        if adaptive:
            squares = [0.999 * v + 0.001 * (delta * z) ** 2 for v, z in zip(squares, traces, strict=True)]
            followed = [z / (v / (1 - 0.999**t) + 1e-8).sqrt() for z, v in zip(traces, squares, strict=True)]
        norm = sum(z.abs().sum().item() for z in followed)
        bound = alpha * kappa * max(abs(delta), 1.0) * norm
        sizes.append(alpha / bound if bound > 1 else alpha)
        with torch.no_grad():
            for p, z in zip(parameters, followed, strict=True):
                p += sizes[-1] * delta * z
        if reset:
            traces = [torch.zeros_like(p) for p in parameters]
    return torch.cat([p.detach().flatten() for p in parameters]), sizes


def sequence(length=40):
    generator = np.random.default_rng(3)
    for t in range(length):
        x, cotangent = (generator.normal(size=n).astype(np.float32) for n in (5, 3))
        yield x, cotangent, float(generator.normal() * 3), t % 7 == 6


@pytest.mark.parametrize("rule", [ObGD(1.0, 2.0), ObGD(1e-4, 0.5), AdaptiveObGD(1.0, 2.0)], ids=str)
@pytest.mark.parametrize("by_hand", [True, False])
def test_one_norm_over_the_whole_network_and_delta_multiplies_the_trace_at_the_step(rule, by_hand):
    adaptive = isinstance(rule, AdaptiveObGD)
    expected, sizes = naive(network(), sequence(), 0.8, rule.alpha, rule.kappa, adaptive)
    module = network()
    learner = Learner(both(module)[0 if by_hand else 1], rule, 0.8)
    for (x, cotangent, delta, reset), size in zip(sequence(), sizes, strict=True):
        _, tape = learner.forward(x)
        learner.accumulate(tape, cotangent)
        learner.step(delta)
        assert learner.step_size == pytest.approx(size, rel=1e-4)
        if reset:
            learner.reset()
    got = torch.cat([p.detach().flatten() for p in module.parameters()])
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_the_bound_takes_at_least_one_for_delta_and_the_step_is_never_larger_than_alpha():
    rule = ObGD(alpha=0.5, kappa=2.0)
    assert rule.size(norm=100.0, delta=0.1) == pytest.approx(1 / (2.0 * 100.0))  # |delta| < 1 counts as 1
    assert rule.size(norm=100.0, delta=-4.0) == pytest.approx(1 / (2.0 * 4.0 * 100.0))
    assert rule.size(norm=0.01, delta=1.0) == 0.5
    assert rule.size(norm=0.0, delta=0.0) == 0.5


def test_plain_steps():
    weights, trace = np.ones(3), np.array([1.0, -2.0, 0.0])
    assert TraceSGD(0.1).step(weights, trace, 2.0, {}) == 0.1
    np.testing.assert_allclose(weights, [1.2, 0.6, 1.0])


def test_a_bounded_step_does_not_overshoot_where_a_plain_one_does():
    """With a fixed target, the error after the step has the sign that it had before."""

    def overshoots(rule):
        count = 0
        generator = np.random.default_rng(0)
        for seed in range(100):
            module = network(outputs=1, sparsity=0.9, seed=seed)
            learner = Learner(both(module)[0], rule, 0.8)
            x = generator.normal(size=5).astype(np.float32)
            target = float(generator.normal() * 10)
            output, tape = learner.forward(x)
            delta = target - float(output[0])
            learner.accumulate(tape, np.ones(1, dtype=np.float32))
            learner.step(delta)
            count += (target - float(learner.predict(x)[0])) * delta < 0
        return count

    assert overshoots(ObGD(1.0, 2.0)) == 0
    assert overshoots(TraceSGD(1.0)) > 50


def test_an_error_that_is_not_finite_changes_nothing():
    module = network()
    learner = Learner(both(module)[0], ObGD(), 0.8)
    _, tape = learner.forward(np.ones(5, dtype=np.float32))
    learner.accumulate(tape, np.ones(3, dtype=np.float32))
    before = learner.network.weights.copy()
    for delta in (math.nan, math.inf):
        with pytest.raises(NonFiniteError, match="TD error"):
            learner.step(delta)
    np.testing.assert_array_equal(learner.network.weights, before)


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_saved_learner_goes_on_bit_for_bit(by_hand):
    def run(learner, steps):
        for x, cotangent, delta, _ in steps:
            _, tape = learner.forward(x)
            learner.accumulate(tape, cotangent)
            learner.step(delta)

    steps = list(sequence())
    first, second = (Learner(both(network())[0 if by_hand else 1], AdaptiveObGD(), 0.8) for _ in range(2))
    run(first, steps[:20])
    second.load_state_dict(first.state_dict())
    second.network.weights[:] = first.network.weights
    run(first, steps[20:])
    run(second, steps[20:])
    np.testing.assert_array_equal(np.asarray(first.network.weights), np.asarray(second.network.weights))
    np.testing.assert_array_equal(np.asarray(first.trace), np.asarray(second.trace))


def test_rules_by_name():
    assert make_rule("obgd", 1.0, 3.0) == ObGD(1.0, 3.0)
    assert make_rule("adaptive", 1.0, 3.0) == AdaptiveObGD(1.0, 3.0)
    assert make_rule("sgd", 0.1, 3.0) == TraceSGD(0.1)
    with pytest.raises(UsageError, match="did you mean 'adaptive'"):
        make_rule("adaptiv", 1.0, 3.0)
    with pytest.raises(UsageError):
        ObGD(alpha=0.0)
    with pytest.raises(UsageError):
        Learner(both(network())[0], ObGD(), 1.2)


# --- distributions of an action ---------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [0.0, 0.3, -0.3])
def test_gradient_of_a_choice_equals_autograd(entropy):
    generator = np.random.default_rng(0)
    head = Choice(4)
    for _ in range(5):
        output = generator.normal(size=4).astype(np.float32) * 2
        action, drawn = head.draw(output, generator.random(1).astype(np.float32))
        leaf = torch.from_numpy(output.copy()).requires_grad_()
        p = torch.distributions.Categorical(logits=leaf)
        (p.log_prob(torch.tensor(action)) + entropy * p.entropy()).backward()
        np.testing.assert_allclose(head.gradient(drawn, entropy), leaf.grad.numpy(), atol=1e-5)


@pytest.mark.parametrize("entropy", [0.0, 0.3, -0.3])
def test_gradient_of_a_gaussian_with_softplus_equals_autograd(entropy):
    generator = np.random.default_rng(0)
    head = Normal(3)
    for _ in range(5):
        output = generator.normal(size=6).astype(np.float32) * 2
        action, drawn = head.draw(output, generator.normal(size=3).astype(np.float32))
        leaf = torch.from_numpy(output.copy()).requires_grad_()
        p = torch.distributions.Normal(leaf[:3], F.softplus(leaf[3:]))
        (p.log_prob(torch.from_numpy(action)) + entropy * p.entropy()).sum().backward()
        np.testing.assert_allclose(head.gradient(drawn, entropy), leaf.grad.numpy(), atol=1e-3, rtol=1e-4)


def test_choices_are_drawn_as_often_as_the_softmax_says():
    output = np.array([0.0, 1.0, -1.0], dtype=np.float32)
    noise = (np.arange(1000, dtype=np.float32) + 0.5) / 1000
    drawn = [Choice(3).draw(output, noise[i : i + 1])[0] for i in range(1000)]
    share = np.bincount(drawn, minlength=3) / 1000
    np.testing.assert_allclose(share, torch.softmax(torch.from_numpy(output), 0).numpy(), atol=2e-3)
    assert Choice(3).draw(output, np.ones(1, dtype=np.float32))[0] == 2


@pytest.mark.parametrize(("head", "outputs"), [("choice", 3), ("normal", 4), ("greedy", 3)])
def test_controllers_normalise_act_and_survive_saving(tmp_path, head, outputs):
    controller = SmallController(network((4,), outputs), head, timed=True)
    with torch.no_grad():
        controller.mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
        controller.variance.copy_(torch.tensor([4.0, 1.0, 0.25]))
    observation = torch.tensor([[3.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
    seen = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, -1.0, -4.0, 0.0]])
    output = controller.features(seen)
    torch.testing.assert_close(controller.outputs(observation), output, atol=1e-5, rtol=1e-5)
    mode = controller.mode(observation)
    torch.testing.assert_close(mode, output[:, :2] if head == "normal" else output.argmax(1))
    torch.testing.assert_close(controller.act(observation, None)["action"], mode)
    if head == "greedy":
        controller.epsilon = 1.0
        noise = torch.tensor([[0.5, 0.1], [0.5, 0.9]])
        assert controller.act(observation, noise)["action"].tolist() == [0, 2]
    fast = controller.actor()(observation.numpy(), None)["action"]
    np.testing.assert_array_equal(fast, mode.detach().numpy())
    controller.save_pretrained(tmp_path)
    loaded = load_controller(tmp_path)
    torch.testing.assert_close(loaded.mode(observation), mode)
    assert loaded.kind == controller.kind
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError):
        load_controller(tmp_path)
