"""The controller that is its own critic."""

from __future__ import annotations

import math

import pytest
import torch

from control_for_tests import acted, controller, features
from guerdon.critics.greedy import Greedy
from guerdon.policies.control import controller_class


@pytest.mark.parametrize("head", ["mse", "hl_gauss", "two_hot", "c51", "mse_softmax"])
def test_every_head_gives_values_and_acts_on_them(head: str) -> None:
    torch.manual_seed(0)
    options = {} if head == "mse" else {"low": -1.0, "high": 1.0, "bins": 7}
    policy = Greedy(features(), 4, head, options).requires_grad_(False)
    policy.head.weight.normal_()
    observation = torch.randn(30, 3)
    q = policy.q(observation)
    assert q.shape == (30, 4)
    assert policy.q_raw(observation).shape == ((30, 4) if head == "mse" else (30, 4, 7))
    assert torch.equal(policy.mode(observation), q.argmax(1))
    assert policy.actor()(observation.numpy(), None)["action"].tolist() == q.argmax(1).tolist()
    if head != "mse":
        centres = policy.head.centres
        torch.testing.assert_close(q, policy.q_raw(observation).softmax(-1) @ centres)


def test_probabilities_are_epsilon_greedy() -> None:
    policy = controller("greedy")
    traj = acted(policy)
    observation = traj.inputs["step", "observation"]
    best = policy.q(observation).argmax(-1)
    for epsilon in (0.0, 0.4, 1.0):
        policy.epsilon = epsilon
        p = policy.distribution(traj)["logits"].exp()
        torch.testing.assert_close(p.sum(-1), torch.ones(5, 4))
        chosen = p.gather(-1, best[..., None])
        torch.testing.assert_close(chosen, torch.full_like(chosen, 1 - epsilon + epsilon / 4))
        traj.inputs["step", "action"] = best
        log_prob = policy.log_prob(traj)
        torch.testing.assert_close(log_prob, torch.full((5, 4), math.log(1 - epsilon + epsilon / 4)))


def test_it_is_known_by_name() -> None:
    assert controller_class("greedy") is Greedy
