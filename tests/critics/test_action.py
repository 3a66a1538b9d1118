"""Ensembles of action values: members apart, initialised as torch's layers, continuous and discrete."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from control_for_tests import features
from guerdon.critics.action import ActionCritic, EnsembleLinear
from guerdon.policies.features import Entry, Features

CATEGORICAL = {"low": -2.0, "high": 2.0, "bins": 5}


def critic(members: int = 3, head: str = "mse", discrete: bool = False, seed: int = 0) -> ActionCritic:
    torch.manual_seed(seed)
    options: dict[str, Any] = {} if head == "mse" else CATEGORICAL
    sizes = {"actions": 4} if discrete else {"action": 2}
    return ActionCritic(features(hidden=()), hidden=(16, 8), members=members, head=head, **sizes, **options)


@pytest.mark.parametrize("members", [1, 3])
def test_each_member_is_a_perceptron_of_its_own(members: int) -> None:
    net = critic(members)
    observation, action = torch.randn(5, 3), torch.randn(5, 2)
    q = net.q(observation, action)
    assert q.shape == (members, 5)
    joined = torch.cat([observation, action], 1)
    first, _, second, _ = net.layers
    for i in range(members):
        hidden = (joined @ first.weight[i] + first.bias[i]).relu()
        hidden = (hidden @ second.weight[i] + second.bias[i]).relu()
        expected = (hidden @ net.head.weight[i] + net.head.bias[i]).squeeze(1)
        torch.testing.assert_close(q[i], expected)
    q[0].sum().backward()
    for i in range(1, members):
        assert not first.weight.grad[i].any()


@pytest.mark.parametrize("head", ["mse", "hl_gauss", "two_hot"])
@pytest.mark.parametrize("members", [1, 2])
def test_shapes_of_every_head(head: str, members: int) -> None:
    observation, action = torch.randn(5, 3), torch.randn(5, 2)
    bins = () if head == "mse" else (5,)
    one, each = critic(members, head), critic(members, head, discrete=True)
    assert one.raw(observation, action).shape == (members, 5, *bins)
    assert one.q(observation, action).shape == (members, 5)
    assert each.raw(observation).shape == (members, 5, 4, *bins)
    assert each.q(observation).shape == (members, 5, 4)
    chosen = torch.tensor([0, 3, 1, 2, 0])
    taken = each.head.mean(each.head.select(each.raw(observation), chosen))
    torch.testing.assert_close(taken, each.q(observation)[:, torch.arange(5), chosen])


def test_layers_begin_as_torchs_linear_layers_do() -> None:
    torch.manual_seed(0)
    layer, usual = EnsembleLinear(8, 64, 200), nn.Linear(64, 1600)
    for found, expected in ((layer.weight, usual.weight), (layer.bias, usual.bias)):
        bound = 1 / math.sqrt(64)
        assert found.abs().max().item() <= bound
        assert float(found.std()) == pytest.approx(float(expected.std()), rel=0.05)
    # the values of an untrained critic are as large as published code's, not near zero
    assert float(critic(2).head.weight.abs().max()) == pytest.approx(1 / math.sqrt(8), rel=0.2)


def test_pixels_are_convolved_once_for_all_members() -> None:
    pictures = Features({"": Entry((9, 9, 1), "image")}, hidden=())
    net = ActionCritic(pictures, actions=3, hidden=(8,), members=2)
    calls = []
    pictures.register_forward_hook(lambda *_: calls.append(1))
    assert net.q(torch.zeros(4, 9, 9, 1, dtype=torch.uint8)).shape == (2, 4, 3)
    assert len(calls) == 1


@pytest.mark.parametrize("head", ["mse", "hl_gauss"])
def test_the_first_member_alone_is_the_first_of_all(head: str) -> None:
    critic = ActionCritic(features(hidden=()), action=2, hidden=(8, 8), members=3, head=head)
    with torch.no_grad():
        critic.head.weight.normal_()
    observation, action = torch.randn(5, 3), torch.randn(5, 2)
    torch.testing.assert_close(critic.first_q(observation, action), critic.q(observation, action)[0])
