"""The log-linear policy: closed forms, sampling, files, and that only theta moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.policy_gradient import Reinforce
from guerdon.optim import SGD
from guerdon.policies.loglinear import LogLinear
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings


@pytest.fixture
def policy() -> LogLinear:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 3, generator=generator)
    reference = torch.randn(2, 5, generator=generator)
    return LogLinear(["a", "b"], features, reference)


def test_it_begins_as_its_reference(policy: LogLinear) -> None:
    torch.testing.assert_close(policy.arms(), policy.reference)
    torch.testing.assert_close(policy.arms().exp().sum(1), torch.ones(2))


def test_its_log_probabilities_are_the_closed_form(policy: LogLinear) -> None:
    theta = torch.tensor([0.5, -1.0, 2.0])
    policy.theta.data.copy_(theta)
    scores = policy.reference + (policy.features * theta).sum(-1)
    expected = scores - scores.exp().sum(1, keepdim=True).log()
    traj = policy.sample(["b", "a", "b"], row_seeds(0, 0, 3))
    action = traj.inputs["step", "action"][:, 0]
    rows = torch.tensor([1, 0, 1])
    torch.testing.assert_close(policy.log_prob(traj)[:, 0], expected[rows, action])
    torch.testing.assert_close(traj.log_prob, policy.log_prob(traj))
    torch.testing.assert_close(policy.arms(), expected)


def test_samples_follow_the_probabilities(policy: LogLinear) -> None:
    policy.theta.data.copy_(torch.tensor([1.0, -0.5, 0.3]))
    traj = policy.sample(["a"] * 4000, row_seeds(1, 0, 4000))
    counts = torch.bincount(traj.inputs["step", "action"][:, 0], minlength=5) / 4000
    assert (counts - policy.arms()[0].exp()).abs().max() < 4 * 0.5 / 4000**0.5


def test_only_theta_trains_and_an_arm_moves_those_that_resemble_it() -> None:
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]])
    actor = Role(
        "actor",
        LogLinear(["x"], features, torch.zeros(1, 3)),
        RoleSettings(SGD(1.0), max_grad_norm=None),
    )
    assert sum(p.numel() for p in actor.model.parameters()) == 2
    traj = actor.sample(["x"], row_seeds(0, 0, 1))
    traj.inputs["step", "action"][:] = 0
    before = actor.model.arms()  # type: ignore[operator]
    actor.update(traj.with_(advantage=torch.ones(1, 1)), Reinforce())
    after = actor.model.arms()  # type: ignore[operator]
    assert after[0, 1] > before[0, 1] + 0.1  # never seen, but like the arm that was rewarded
    assert after[0, 2] < before[0, 2]
    assert torch.equal(actor.model.reference, before)


def test_files(policy: LogLinear, tmp_path: Path) -> None:
    policy.theta.data.copy_(torch.tensor([0.5, -1.0, 2.0]))
    policy.save_pretrained(tmp_path / "model")
    again = LogLinear.from_pretrained(tmp_path / "model")
    assert again.contexts == policy.contexts
    torch.testing.assert_close(again.arms(), policy.arms())
    with pytest.raises(UsageError, match="no log-linear policy at"):
        LogLinear.from_pretrained(tmp_path / "nothing")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"the features have shape \[2, 5\], expected \[1, arms, numbers\]"):
        LogLinear(["a"], torch.zeros(2, 5), torch.zeros(2, 5))
    with pytest.raises(ShapeError, match=r"the reference has shape \[1, 4\], expected \[1, 5\]"):
        LogLinear(["a"], torch.zeros(1, 5, 2), torch.zeros(1, 4))
    with pytest.raises(UsageError, match="knows no context 'c'"):
        LogLinear(["a"], torch.zeros(1, 5, 2), torch.zeros(1, 5)).sample(["c"], row_seeds(0, 0, 1))
