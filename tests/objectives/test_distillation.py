"""Consistency distillation's pure losses."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.objectives.distillation import consistency_loss, guided, pseudo_huber


def test_pseudo_huber_is_the_closed_form() -> None:
    for d in (-2.0, -0.3, 0.0, 0.01, 5.0):
        for c in (0.001, 0.5):
            value = pseudo_huber(torch.tensor(d, dtype=torch.float64), c).item()
            assert value == pytest.approx(math.sqrt(d * d + c * c) - c, abs=1e-12)


def test_pseudo_huber_keeps_its_digits_near_zero_and_is_linear_far_away() -> None:
    tiny = torch.tensor(1e-6)
    assert pseudo_huber(tiny, 0.1).item() == pytest.approx(1e-12 / 0.2, rel=1e-4)  # the naive form gives 0
    slope = torch.tensor(3.0, requires_grad=True)
    pseudo_huber(slope, 0.001).backward()
    assert slope.grad.item() == pytest.approx(1.0, abs=1e-5)


def test_pseudo_huber_gradient_by_finite_differences() -> None:
    d = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: pseudo_huber(d, 0.2), d)


def test_guidance_extrapolates_with_a_scale_for_each_example() -> None:
    conditional, unconditional = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)
    assert torch.allclose(guided(conditional, unconditional, 1.0), conditional, atol=1e-6)
    scales = torch.tensor([1.0, 3.0, 6.0])
    each = torch.stack([u + s * (c - u) for c, u, s in zip(conditional, unconditional, scales, strict=True)])
    assert torch.allclose(guided(conditional, unconditional, scales), each, atol=1e-6)


def test_consistency_loss_is_the_mean_distance_and_teaches_only_the_student() -> None:
    online, target = torch.randn(4, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 5, 5, requires_grad=True)
    loss = consistency_loss(online, target, c=0.3)
    assert loss.item() == pytest.approx(pseudo_huber(online - target, 0.3).mean().item(), rel=1e-6)
    loss.backward()
    assert online.grad is not None
    assert target.grad is None
    assert consistency_loss(online, online).item() == 0


def test_weights_count_examples() -> None:
    online, target = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    only_first = consistency_loss(online, target, weight=torch.tensor([4.0, 0, 0, 0]))
    assert only_first.item() == pytest.approx(consistency_loss(online[:1], target[:1]).item(), rel=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="one shape"):
        consistency_loss(torch.zeros(2, 3), torch.zeros(2, 1))
