"""Soft mixture of experts: the whole layer against naive loops, the softmax axes, shapes, learning."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guerdon.critics.soft_moe import SoftMoE
from guerdon.errors import ShapeError, UsageError


def naive(layer: SoftMoE, x: Tensor) -> Tensor:
    """One row, slot, expert and token at a time."""
    experts, slots, tokens = layer.phi.shape[1], layer.slots, x.shape[1]
    rows = []
    for row in x:
        score = {
            (m, n, p): (row[m] * layer.phi[:, n, p]).sum().exp()
            for m in range(tokens)
            for n in range(experts)
            for p in range(slots)
        }
        answers = {}
        for n in range(experts):
            for p in range(slots):
                over_tokens = sum(score[m, n, p] for m in range(tokens))
                given = sum(score[m, n, p] / over_tokens * row[m] for m in range(tokens))
                inner = (given @ layer.weight_in[n] + layer.bias_in[n, 0]).clamp(min=0)
                answers[n, p] = inner @ layer.weight_out[n] + layer.bias_out[n, 0]
        out = []
        for m in range(tokens):
            over_slots = sum(score[m, n, p] for n, p in answers)
            out.append(sum(score[m, n, p] / over_slots * answer for (n, p), answer in answers.items()))
        rows.append(torch.stack(out))
    return torch.stack(rows)


@pytest.mark.parametrize(("tokens", "experts", "slots"), [(6, 2, 3), (7, 3, 3), (4, 8, 1), (5, 1, 5)])
def test_equals_naive_loops(tokens: int, experts: int, slots: int) -> None:
    torch.manual_seed(0)
    layer = SoftMoE(4, tokens, experts, hidden=5)
    torch.nn.init.normal_(layer.bias_in)
    torch.nn.init.normal_(layer.bias_out)
    assert layer.slots == slots  # ceil(tokens / experts)
    x = torch.randn(3, tokens, 4)
    torch.testing.assert_close(layer(x), naive(layer, x))


def test_softmax_axes() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(4, 6, 2, 5)
    dispatch, combine = layer.weights(3 * torch.randn(2, 6, 4))
    torch.testing.assert_close(dispatch.sum(1), torch.ones(2, 2, 3))  # over the tokens of a slot
    torch.testing.assert_close(combine.sum((2, 3)), torch.ones(2, 6))  # over the slots of a token
    assert (dispatch.sum((2, 3)) - 1).abs().max() > 0.1
    assert (combine.sum(1) - 1).abs().max() > 0.1


def test_rows_do_not_mix_and_tokens_are_a_set() -> None:
    torch.manual_seed(0)
    layer, x = SoftMoE(4, 6, 2, 5), torch.randn(3, 6, 4)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_every_weight_gets_a_gradient() -> None:
    torch.manual_seed(0)
    layer = SoftMoE(4, 6, 2, 5)
    layer(torch.randn(3, 6, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\[B, 6, 4\]"):
        SoftMoE(4, 6)(torch.zeros(2, 5, 4))
    with pytest.raises(UsageError, match="at least 1"):
        SoftMoE(4, 6, experts=0)
