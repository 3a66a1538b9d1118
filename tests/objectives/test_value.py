"""Value regression: closed forms, clipping, missing fields."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.value import ValueRegression, clipped_value, explained_variance, huber, mse

LENGTHS = [3, 1, 4, 0, 2]


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def value(self, traj: Any) -> Tensor:
        return self.net(traj.inputs["step", "picture"])[..., 0]


def test_per_step_losses() -> None:
    value, target = torch.tensor([[0.0, 3.0]]), torch.tensor([[0.5, 0.0]])
    torch.testing.assert_close(mse(value, target), torch.tensor([[0.25, 9.0]]))
    torch.testing.assert_close(huber(value, target), torch.tensor([[0.125, 2.5]]))
    torch.testing.assert_close(huber(value, target, 2.0), torch.tensor([[0.125, 4.0]]))
    torch.testing.assert_close(clipped_value(value, target, 0.2), torch.tensor([[0.3, 0.2]]))


def test_clipped_loss_is_the_published_one_and_stops_far_moves(batch: Any) -> None:
    torch.manual_seed(0)
    traj, critic = batch(LENGTHS), Critic()
    loss, metrics = ValueRegression(clip=0.2)(critic, traj)
    value = critic.value(traj)
    near = traj.value + torch.clamp(value - traj.value, -0.2, 0.2)
    expected = torch.max((value - traj.target) ** 2, (near - traj.target) ** 2)[traj.mask].mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        metrics["clip_fraction"], ((value - traj.value).abs() > 0.2)[traj.mask].float().mean()
    )
    # value rose by 1 towards a target above: no gradient any more; away from the target: full gradient
    for target, still in ((5.0, True), (-5.0, False)):
        moved = torch.ones(1, 1, requires_grad=True)
        step = torch.max(
            mse(moved, torch.full((1, 1), target)),
            mse(clipped_value(moved, torch.zeros(1, 1), 0.2), torch.full((1, 1), target)),
        )
        step.sum().backward()
        assert moved.grad is not None
        assert (moved.grad.item() == 0) == still


def test_gradients_by_finite_differences() -> None:
    value = torch.randn(
        3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    old, target = torch.zeros(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: mse(v, target), value)
    assert torch.autograd.gradcheck(lambda v: huber(v, target, 0.7), value)
    assert torch.autograd.gradcheck(lambda v: mse(clipped_value(v, old, 0.3), target), value)


@pytest.mark.parametrize(
    "objective",
    [
        ValueRegression(),
        ValueRegression(0.2, "huber", reduction="trajectory"),
        ValueRegression(coefficient=0.5),
    ],
    ids=str,
)
def test_micro_batches_give_the_same_gradient(objective: Any, batch: Any, gradient: Any) -> None:
    torch.manual_seed(0)
    traj, critic = batch(LENGTHS), Critic()
    for a, b in zip(
        gradient(objective, critic, traj),
        gradient(objective, critic, traj, list(traj.minibatches(2))),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert pickle.loads(pickle.dumps(objective)) == objective


def test_coefficient_scales_and_masked_steps_do_not_count(batch: Any) -> None:
    torch.manual_seed(0)
    traj, critic = batch(LENGTHS), Critic()
    plain = ValueRegression()(critic, traj)[0]
    torch.testing.assert_close(ValueRegression(coefficient=0.5)(critic, traj)[0], 0.5 * plain)
    torch.testing.assert_close(plain, ((critic.value(traj) - traj.target) ** 2)[traj.mask].mean())


def test_explained_variance() -> None:
    target = torch.tensor([[1.0, 2.0, 3.0, 99.0]])
    mask = torch.tensor([[True, True, True, False]])
    assert explained_variance(target, target, mask) == 1
    assert explained_variance(torch.full((1, 4), 7.0), target, mask) == 0
    assert explained_variance(target, torch.ones(1, 4), mask) == 0
    assert explained_variance(target, target, torch.zeros_like(mask)) == 0
    assert explained_variance(-target, target, mask) == -3


@pytest.mark.usefixtures("unchecked")
def test_errors_are_one_sentence(batch: Any) -> None:
    with pytest.raises(ShapeError, match=r"needs batch.target, which is missing"):
        ValueRegression()(Critic(), batch(LENGTHS, target=None))
    with pytest.raises(ShapeError, match=r"needs batch.value, which is missing"):
        ValueRegression(clip=0.2)(Critic(), batch(LENGTHS, value=None))
    with pytest.raises(UsageError, match="did you mean 'huber'"):
        ValueRegression(loss="hubber")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be positive"):
        ValueRegression(clip=0.0)
