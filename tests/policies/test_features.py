"""Features: which parts of an observation are read and how, running statistics, and the same net in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn

from control_for_tests import features
from guerdon.errors import UsageError
from guerdon.policies.features import (
    ACTIVATIONS,
    Entry,
    Features,
    Scaler,
    describe,
    numpy_perceptron,
    orthogonal,
    to_tensor,
)

PIXELS = spaces.Box(0, 255, (40, 40, 3), np.uint8)


def vector_space(*shape: int) -> spaces.Box:
    return spaces.Box(-np.inf, np.inf, shape, np.float32)


@pytest.mark.parametrize(
    ("space", "entries"),
    [
        (vector_space(4), {"": Entry((4,))}),
        (spaces.Discrete(5), {"": Entry((5,), "one_hot")}),
        (PIXELS, {"": Entry((40, 40, 3), "image")}),
        (spaces.Box(0, 255, (4, 84, 84), np.uint8), {"": Entry((4, 84, 84), "image")}),
        (spaces.Box(0, 255, (7,), np.uint8), {"": Entry((7,))}),  # a memory dump, no picture
        (spaces.MultiBinary(3), {"": Entry((3,))}),
        (
            spaces.Dict({"camera": PIXELS, "gear": spaces.Discrete(3), "body": vector_space(2, 3)}),
            {"body": Entry((2, 3)), "camera": Entry((40, 40, 3), "image"), "gear": Entry((3,), "one_hot")},
        ),
    ],
    ids=["vector", "discrete", "colours", "stack", "bytes", "binary", "dict"],
)
def test_spaces_are_described(space: spaces.Space, entries: dict[str, Entry]) -> None:
    assert describe(space) == entries


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Tuple([vector_space(2)]), "cannot read observations of Tuple"),
        (spaces.Dict({"a": spaces.Dict({"b": vector_space(2)})}), "'a' is a dictionary inside a dictionary"),
    ],
)
def test_spaces_that_cannot_be_read_are_refused(space: spaces.Space, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        describe(space)


def test_a_dictionary_is_read_whole_at_any_lead() -> None:
    entries = {"body": Entry((2, 3)), "gear": Entry((4,), "one_hot"), "camera": Entry((9, 9, 1), "image")}
    net = Features(entries, hidden=())
    one = TensorDict(
        {
            "body": torch.randn(5, 6, 2, 3),
            "gear": torch.randint(4, (5, 6)),
            "camera": torch.randint(256, (5, 6, 9, 9, 1), dtype=torch.uint8),
        },
        batch_size=[5, 6],
    )
    out = net(one)
    assert out.shape == (5, 6, net.width)
    torch.testing.assert_close(out[..., :6], one["body"].flatten(2))
    torch.testing.assert_close(out[..., 6:10], nn.functional.one_hot(one["gear"], 4).float())
    picture = net.images["camera"](one["camera"].flatten(0, 1)).reshape(5, 6, -1)
    torch.testing.assert_close(out[..., 10:], picture)
    torch.testing.assert_close(net(one.reshape(30)), out.flatten(0, 1))


@pytest.mark.parametrize("shape", [(40, 40, 3), (4, 40, 40), (40, 40), (9, 9, 2)])
def test_pixels_of_every_layout_are_convolved(shape: tuple[int, ...]) -> None:
    net = Features({"": Entry(shape, "image")}, hidden=(5,))
    picture = torch.randint(256, (2, *shape), dtype=torch.uint8)
    assert net(picture).shape == (2, 5)
    first = next(m for m in net.modules() if isinstance(m, nn.Conv2d))
    channels_first = len(shape) == 3 and shape[0] < shape[2]
    assert first.in_channels == (1 if len(shape) == 2 else shape[0] if channels_first else shape[2])
    frames = net.images["image"][0](picture)
    assert frames.shape[1] == first.in_channels
    assert float(frames.max()) <= 1.0
    if shape == (9, 9, 2):  # the colour of a pixel is at its place
        torch.testing.assert_close(frames[0, 1, 3, 5], picture[0, 3, 5, 1] / 255.0)


# --- statistics -------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 10_000))
def test_statistics_are_those_of_all_vectors_however_they_came(parts: list[int], seed: int) -> None:
    data = [
        torch.randn(n, 3, generator=torch.Generator().manual_seed(seed + i)) * 5 + 2
        for i, n in enumerate(parts)
    ]
    scaler = Scaler(3)
    for part in data:
        scaler.update(part)
    everything = torch.cat(data).double()
    assert float(scaler.count) == len(everything)
    if len(everything):
        torch.testing.assert_close(scaler.mean, everything.mean(0))
        torch.testing.assert_close(scaler.variance, everything.var(0, correction=0))
    else:
        assert torch.equal(scaler.mean, torch.zeros(3, dtype=torch.float64))
        assert torch.equal(scaler.variance, torch.ones(3, dtype=torch.float64))


def test_normalised_values_are_clipped() -> None:
    scaler = Scaler(2, limit=2.0)
    scaler.update(torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    torch.testing.assert_close(
        scaler(torch.tensor([[1.0, 100.0], [-9.0, 2.5]])), torch.tensor([[0.0, 2.0], [-2.0, 0.5]])
    )


def test_a_scaler_may_be_shared() -> None:
    one = features(normalise=True)
    other = features(scaler=one.scaler)
    assert other.scaler is one.scaler
    before = other(torch.ones(1, 3))
    one.scaler.update(torch.full((10, 3), 40.0))
    assert not torch.equal(other(torch.ones(1, 3)), before)


# --- initialisation, settings -----------------------------------------------------------------------------


def test_orthogonal_weights() -> None:
    net = features(size=8)
    orthogonal(net, gain=2.0)
    weight = net.layers[0].weight
    torch.testing.assert_close(weight @ weight.T, 4.0 * torch.eye(8))
    assert not net.layers[0].bias.any()


def test_settings_make_the_same_net_again() -> None:
    entries = {"body": Entry((3,)), "camera": Entry((9, 9, 1), "image")}
    net = Features(entries, (8, 4), "elu", normalise=True, layer_norm=True)
    again = Features.from_settings(net.settings())
    assert again.settings() == net.settings()
    assert [(n, p.shape) for n, p in again.state_dict().items()] == [
        (n, p.shape) for n, p in net.state_dict().items()
    ]
    again.load_state_dict(net.state_dict())


# --- in NumPy ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("normalise", [False, True])
def test_numpy_gives_what_torch_gives(activation: str, normalise: bool) -> None:
    torch.manual_seed(0)
    net = features(activation=activation, normalise=normalise).requires_grad_(False)
    head = nn.Linear(net.width, 2).requires_grad_(False)
    forward = numpy_perceptron(net, [(head.weight.T, head.bias)])
    observation = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32) * 5
    kept = observation.copy()
    expected = head(net(torch.from_numpy(observation)))
    np.testing.assert_allclose(forward(observation)[0], expected.numpy(), atol=2e-6)
    np.testing.assert_array_equal(observation, kept)  # not worked on in place
    for p in net.parameters():
        p.mul_(1.5)
    if normalise:
        net.scaler.update(torch.randn(20, 3))
    newest = head(net(torch.from_numpy(observation)))
    assert not torch.allclose(newest, expected, atol=1e-4)
    np.testing.assert_allclose(forward(observation)[0], newest.numpy(), atol=2e-6)


def test_integers_become_floats_as_in_torch() -> None:
    net = features().requires_grad_(False)
    observation = np.array([[1, -2, 3]], dtype=np.int64)
    found = numpy_perceptron(net, [])
    assert found(observation) == []
    head = nn.Linear(8, 1).requires_grad_(False)
    out = numpy_perceptron(net, [(head.weight.T, head.bias)])(observation)[0]
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, head(net(torch.from_numpy(observation))).numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("entries", "options", "plain"),
    [
        ({"": Entry((3,))}, {}, True),
        ({"": Entry((3,))}, {"normalise": True}, True),
        ({"": Entry((3,))}, {"layer_norm": True}, False),
        ({"": Entry((2, 3))}, {}, False),
        ({"": Entry((3,), "one_hot")}, {}, False),
        ({"a": Entry((3,))}, {}, False),
        ({"": Entry((9, 9), "image")}, {}, False),
    ],
)
def test_only_one_flat_vector_is_plain(
    entries: dict[str, Entry], options: dict[str, bool], plain: bool
) -> None:
    assert Features(entries, (4,), **options).plain is plain


def test_arrays_become_tensors_that_share_their_memory() -> None:
    array = np.zeros((2, 3), dtype=np.float32)
    to_tensor(array)[0, 0] = 5.0
    assert array[0, 0] == 5.0
    both = to_tensor({"a": array, "b": np.arange(2)})
    assert both.batch_size == torch.Size([2])
    assert both["b"].tolist() == [0, 1]
    tensor = torch.ones(2)
    assert to_tensor(tensor) is tensor
