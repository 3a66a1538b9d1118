"""Per-step values to one number: closed forms, loops, padding, splits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guerdon.errors import UsageError
from guerdon.objectives.reduction import reduce, reduction_weight

HOWS = ["step", "trajectory", "sum", "constant"]


def ragged(lengths: list[int], steps: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    mask = torch.arange(steps)[None] < torch.tensor(lengths)[:, None]
    values = torch.randn(
        len(lengths), steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return values, mask


def naive(values: Tensor, mask: Tensor, how: str) -> float:
    rows = [
        [v for v, m in zip(vs, ms, strict=True) if m]
        for vs, ms in zip(values.tolist(), mask.tolist(), strict=True)
    ]
    real = [row for row in rows if row]
    flat = [v for row in real for v in row]
    if not flat:
        return 0.0
    return {
        "step": sum(flat) / len(flat),
        "trajectory": sum(sum(row) / len(row) for row in real) / len(real),
        "sum": sum(sum(row) for row in real) / len(real),
        "constant": sum(flat) / values.numel(),
    }[how]


def test_closed_forms() -> None:
    values = torch.tensor([[1.0, 2.0, 99.0], [6.0, 99.0, 99.0], [99.0, 99.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert reduce(values, mask, "step").item() == 3.0
    assert reduce(values, mask, "trajectory").item() == (1.5 + 6.0) / 2
    assert reduce(values, mask, "sum").item() == (3.0 + 6.0) / 2
    assert reduce(values, mask, "constant").item() == 1.0
    assert [int(reduction_weight(mask, how)) for how in HOWS] == [3, 2, 2, 9]


@pytest.mark.parametrize("how", HOWS)
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=7), seed=st.integers(0, 99))
def test_equals_the_loop(how: Any, lengths: list[int], seed: int) -> None:
    values, mask = ragged(lengths, 6, seed)
    assert reduce(values, mask, how).item() == pytest.approx(naive(values, mask, how), abs=1e-12)


@pytest.mark.parametrize("how", HOWS)
@given(lengths=st.lists(st.integers(0, 5), min_size=2, max_size=8), data=st.data())
def test_row_splits_are_exact(how: Any, lengths: list[int], data: st.DataObject) -> None:
    values, mask = ragged(lengths, 5)
    size = data.draw(st.integers(1, len(lengths)))
    parts = list(zip(values.split(size), mask.split(size), strict=True))
    weights = [reduction_weight(m, how) for _, m in parts]
    total = reduction_weight(mask, how)
    assert sum(w.item() for w in weights) == total.item()
    joined = sum(reduce(v, m, how).item() * w.item() for (v, m), w in zip(parts, weights, strict=True))
    assert joined / max(total.item(), 1) == pytest.approx(reduce(values, mask, how).item(), abs=1e-12)


@pytest.mark.parametrize("how", ["step", "constant"])
@given(lengths=st.lists(st.integers(0, 6), min_size=1, max_size=5), size=st.integers(1, 6))
def test_step_splits_are_exact(how: Any, lengths: list[int], size: int) -> None:
    values, mask = ragged(lengths, 6)
    parts = list(zip(values.split(size, 1), mask.split(size, 1), strict=True))
    joined = sum(reduce(v, m, how).item() * reduction_weight(m, how).item() for v, m in parts)
    total = max(reduction_weight(mask, how).item(), 1)
    assert joined / total == pytest.approx(reduce(values, mask, how).item(), abs=1e-12)


@pytest.mark.parametrize("how", ["step", "trajectory", "sum"])
@given(lengths=st.lists(st.integers(0, 4), min_size=1, max_size=5), extra=st.integers(1, 4))
def test_padding_changes_nothing(how: Any, lengths: list[int], extra: int) -> None:
    values, mask = ragged(lengths, 4)
    wide = torch.full((len(lengths) + extra, 4 + extra), math.nan, dtype=torch.float64)
    wide_mask = torch.zeros(wide.shape, dtype=torch.bool)
    wide[: len(lengths), :4], wide_mask[: len(lengths), :4] = values, mask
    assert reduce(wide, wide_mask, how).item() == pytest.approx(reduce(values, mask, how).item(), abs=1e-12)
    assert reduction_weight(wide_mask, how) == reduction_weight(mask, how)


@pytest.mark.parametrize("how", HOWS)
def test_masked_infinities_reach_neither_loss_nor_gradient(how: Any) -> None:
    values = torch.tensor([[1.0, math.inf], [math.nan, math.nan]], requires_grad=True)
    mask = torch.tensor([[True, False], [False, False]])
    reduce(values, mask, how).backward()
    assert values.grad is not None
    assert values.grad[0, 0] > 0
    assert values.grad.flatten()[1:].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("how", HOWS)
def test_nothing_to_count_is_zero_with_zero_gradient(how: Any) -> None:
    values = torch.randn(3, 2, requires_grad=True)
    loss = reduce(values, torch.zeros(3, 2, dtype=torch.bool), how)
    loss.backward()
    assert loss.item() == 0.0
    assert values.grad is not None
    assert not values.grad.any()


@pytest.mark.parametrize("how", HOWS)
def test_gradient_by_finite_differences(how: Any) -> None:
    values, mask = ragged([3, 1, 0, 4], 4)
    values.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda v: reduce(v, mask, how), values)


def test_the_runtime_checker_is_on() -> None:
    from jaxtyping import TypeCheckError

    with pytest.raises(TypeCheckError):
        reduce(torch.zeros(2, 3), torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_reduction_names_the_nearest() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    for call in (
        lambda: reduce(torch.zeros(1, 1), mask, "trajectories"),
        lambda: reduction_weight(mask, "steps"),
    ):
        with pytest.raises(UsageError, match=r"did you mean '(trajectory|step)'"):
            call()
