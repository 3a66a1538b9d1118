"""Values of observations: heads, the value after each step, and a shared scaler."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from control_for_tests import acted, controller, features
from guerdon.critics.state import StateCritic

CATEGORICAL = {"low": -2.0, "high": 2.0, "bins": 5}


@pytest.mark.parametrize("head", ["mse", "hl_gauss", "two_hot", "mse_softmax"])
def test_values_and_losses_of_every_head(head: str) -> None:
    torch.manual_seed(0)
    critic = StateCritic(features(), head, **({} if head == "mse" else CATEGORICAL))
    traj = acted(controller("categorical"))
    traj.mask[1, 2:] = False
    observation = traj.inputs["step", "observation"]
    value = critic.value(traj)
    assert value.shape == (5, 4)
    assert not value[1, 2:].any()
    torch.testing.assert_close(value[0], critic.values(observation[0]))
    losses = critic.losses(traj, traj.target)
    assert losses.shape == (5, 4)
    assert not losses[1, 2:].any()
    if head == "mse":
        torch.testing.assert_close(losses, torch.where(traj.mask, (value - traj.target).square(), 0.0))


def test_it_begins_as_ppos_does() -> None:
    torch.manual_seed(0)
    critic = StateCritic(features(size=8))
    weight = critic.features.layers[0].weight
    torch.testing.assert_close(weight @ weight.T, 2.0 * torch.eye(8), atol=1e-5, rtol=1e-5)
    assert critic.head.weight.norm().item() == pytest.approx(1.0)
    assert not critic.head.bias.any()


@pytest.mark.parametrize("stored", [False, True])
def test_the_value_after_each_step(stored: bool) -> None:
    """The next column; where a row was cut, the value of what was seen there and not of the next episode."""
    critic = StateCritic(features(), init="default").requires_grad_(False)
    traj = acted(controller("categorical"), rows=3, steps=5)
    seen = torch.randn(3, 2, 3)
    at = torch.tensor([[1, 4], [4, -1], [-1, -1]])  # the last row ends for good, and is not bootstrapped
    traj.inputs["final"] = TensorDict({"step": at, "observation": seen}, batch_size=[3])
    traj.value = critic.value(traj) + (100.0 if stored else 0.0) if stored else None
    value = critic.value(traj) + (100.0 if stored else 0.0)  # what is stored is not computed again
    found = critic.next_value(traj)
    expected = torch.cat([value[:, 1:], torch.zeros(3, 1)], 1)
    for row, column, place in ((0, 1, 0), (0, 4, 1), (1, 4, 0)):
        expected[row, column] = critic.values(seen[row, place])
    torch.testing.assert_close(found, expected)


def test_actor_and_critic_may_share_statistics() -> None:
    actor = controller("gaussian", normalise=True)
    critic = StateCritic(features(scaler=actor.features.scaler))
    before = critic.values(torch.ones(1, 3))
    actor.features.scaler.update(torch.full((100, 3), 9.0))
    assert not torch.equal(critic.values(torch.ones(1, 3)), before)
