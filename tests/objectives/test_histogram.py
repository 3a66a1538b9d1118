"""Histograms of values: closed forms, a brute-force projection, borders, far targets, tracing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from guerdon.objectives.histogram import (
    atoms,
    border_share,
    centres,
    cross_entropy,
    edges,
    hl_gauss,
    mean,
    one_hot,
    project,
    two_hot,
)


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def slow_projection(values: np.ndarray, probabilities: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """One atom after another, in float64, searching for the neighbours."""
    found = np.zeros(len(grid))
    for value, mass in zip(values, probabilities, strict=True):
        value = min(max(value, grid[0]), grid[-1])
        for i, atom in enumerate(grid):
            if value == atom:
                found[i] += mass
                break
            if value < atom:
                share = (value - grid[i - 1]) / (atom - grid[i - 1])
                found[i - 1] += mass * (1 - share)
                found[i] += mass * share
                break
    return found


def test_edges_are_one_more_than_centres_and_atoms_touch_the_borders() -> None:
    grid = edges(-10.0, 10.0, 4)
    torch.testing.assert_close(grid, torch.tensor([-10.0, -5.0, 0.0, 5.0, 10.0]))
    torch.testing.assert_close(centres(grid), torch.tensor([-7.5, -2.5, 2.5, 7.5]))
    torch.testing.assert_close(atoms(-10.0, 10.0, 5), torch.tensor([-10.0, -5.0, 0.0, 5.0, 10.0]))


@pytest.mark.parametrize("ratio", [0.4, 0.75, 2.0])
def test_hl_gauss_is_the_truncated_normal_of_the_paper(ratio: float) -> None:
    grid = edges(-2.0, 3.0, 10)
    sigma = ratio * 0.5  # the ratio counts in bin widths
    for y in (-2.0, -1.9, 0.1, 0.5, 2.99):
        mass = [normal_cdf((float(e) - y) / sigma) for e in grid]
        expected = [(b - a) / (mass[-1] - mass[0]) for a, b in itertools.pairwise(mass)]
        torch.testing.assert_close(
            hl_gauss(torch.tensor(y), grid, ratio), torch.tensor(expected), atol=2e-6, rtol=1e-5
        )


@given(st.floats(-10, 10), st.sampled_from([21, 51, 101, 201]), st.floats(0.5, 1.5))
def test_hl_gauss_sums_to_one_and_its_mean_is_the_target_away_from_the_borders(
    y: float, bins: int, ratio: float
) -> None:
    grid = edges(-10.0, 10.0, bins)
    width = 20.0 / bins
    p = hl_gauss(torch.tensor(y), grid, ratio)
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert (p >= 0).all()
    if min(y + 10, 10 - y) > 4 * ratio * width:
        assert (p * centres(grid)).sum().item() == pytest.approx(y, abs=0.02 * width)


@pytest.mark.parametrize("y", [-1e30, -1e4, -11.0, -10.0, 10.0, 11.0, 1e4, 1e30])
def test_far_targets_are_clipped_not_divided_zero_by_zero(y: float) -> None:
    grid, border = edges(-10.0, 10.0, 51), math.copysign(10.0, y)
    for transform in (
        lambda t: hl_gauss(t, grid),
        lambda t: one_hot(t, grid),
        lambda t: two_hot(t, atoms(-10.0, 10.0, 51)),
    ):
        p = transform(torch.tensor([y]))
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p, transform(torch.tensor([border])))
        assert p.argmax().item() == (50 if y > 0 else 0)


def test_low_precision_targets_are_transformed_in_float32() -> None:
    grid = edges(-10.0, 10.0, 51)
    p = hl_gauss(torch.tensor([0.5], dtype=torch.bfloat16), grid)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, hl_gauss(torch.tensor([0.5]), grid))
    assert hl_gauss(torch.tensor([0.5], dtype=torch.float64), grid.double()).dtype == torch.float64
    logits = torch.randn(1, 51, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert cross_entropy(logits, p).dtype == mean(logits, centres(grid)).dtype == torch.float32


@given(st.floats(-12, 12), st.integers(2, 101))
def test_two_hot_is_exact_in_the_mean(y: float, bins: int) -> None:
    for grid in (atoms(-10.0, 10.0, bins), centres(edges(-10.0, 10.0, bins))):
        p = two_hot(torch.tensor(y), grid)
        clipped = min(max(y, grid[0].item()), grid[-1].item())
        assert (p * grid).sum().item() == pytest.approx(clipped, abs=5e-5)
        assert p.sum().item() == pytest.approx(1, abs=1e-5)
        assert 1 <= (p > 0).sum() <= 2


def test_two_hot_on_an_atom_is_one_hot() -> None:
    grid = atoms(-8.0, 8.0, 17)  # representable: no rounding
    torch.testing.assert_close(two_hot(grid, grid), torch.eye(17), rtol=0, atol=0)


def test_one_hot_bins_own_their_lower_edge() -> None:
    grid = edges(0.0, 1.0, 4)
    target = torch.tensor([[-1.0, 0.0, 0.24], [0.25, 0.999, 1.0]])
    torch.testing.assert_close(one_hot(target, grid).argmax(-1), torch.tensor([[0, 0, 0], [1, 3, 3]]))
    many = edges(0.0, 1.0, 49)
    torch.testing.assert_close(one_hot(many[:-1], many).argmax(-1), torch.arange(49))
    assert (one_hot(target, grid).sum(-1) == 1).all()


@given(
    st.lists(st.floats(-30, 30), min_size=1, max_size=6),
    st.sampled_from([0.0, 0.25, 0.5, 0.99, 1.0]),
    st.integers(0, 10_000),
)
def test_projection_equals_brute_force(rewards: list[float], discount: float, seed: int) -> None:
    grid = atoms(-10.0, 10.0, 21).double()
    p = torch.rand(
        len(rewards), 21, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).softmax(-1)
    values = torch.tensor(rewards, dtype=torch.float64)[:, None] + discount * grid
    found = project(values, p, grid)
    for row, v, mass in zip(found, values, p, strict=True):
        np.testing.assert_allclose(
            row.numpy(), slow_projection(v.numpy(), mass.numpy(), grid.numpy()), atol=1e-9
        )
    assert found.sum(-1).tolist() == pytest.approx([1.0] * len(rewards))


def test_projection_leaves_mass_that_lies_on_atoms() -> None:
    grid = atoms(-8.0, 8.0, 17)
    p = torch.randn(3, 17, generator=torch.Generator().manual_seed(0)).softmax(-1)
    torch.testing.assert_close(project(grid.expand(3, 17), p, grid), p, rtol=0, atol=0)
    shifted = project(grid.expand(3, 17) + 2.0, p, grid)  # two atoms up, the last three pile up
    torch.testing.assert_close(shifted[:, 2:-1], p[:, :-3])
    torch.testing.assert_close(shifted[:, -1], p[:, -3:].sum(-1))
    # a point mass projects to two-hot, in the mean exactly the Bellman target
    ended = project((torch.tensor([1.3]) + 0.0 * grid)[None], p[:1], grid)
    torch.testing.assert_close(ended, two_hot(torch.tensor([1.3]), grid))


def test_cross_entropy_is_torchs_and_its_gradient_is_the_difference_of_histograms() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 11, generator=generator, requires_grad=True)
    p = torch.randn(5, 3, 11, generator=generator).softmax(-1).requires_grad_()
    loss = cross_entropy(logits, p)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), p.flatten(0, 1), reduction="none")
    torch.testing.assert_close(loss, expected.reshape(5, 3))
    loss.sum().backward()
    torch.testing.assert_close(logits.grad, (logits.softmax(-1) - p).detach())
    assert p.grad is None  # targets are targets
    # the same target for several heads
    torch.testing.assert_close(cross_entropy(logits, p[:1])[0], loss[0])


def test_round_trip_through_fitted_logits() -> None:
    grid = edges(-10.0, 10.0, 51)
    y = torch.tensor([-8.0, -0.3, 0.0, 4.21])
    logits = hl_gauss(y, grid).clamp(min=1e-30).log()
    torch.testing.assert_close(mean(logits, centres(grid)), y, atol=0.02 * 20 / 51, rtol=0)


def test_border_share_counts_targets_on_and_beyond_the_borders() -> None:
    target = torch.tensor([[-11.0, -10.0, 0.0], [9.9, 10.0, 200.0]])
    assert border_share(target, -10.0, 10.0).item() == pytest.approx(4 / 6)
    assert border_share(target, torch.tensor(-1e9), torch.tensor(1e9)).item() == 0


def test_everything_can_be_traced() -> None:
    def step(logits: Tensor, target: Tensor, reward: Tensor) -> Tensor:
        bins, grid = edges(-10.0, 10.0, 21), atoms(-10.0, 10.0, 21)
        losses = [
            cross_entropy(logits, f(target, g))
            for f, g in ((hl_gauss, bins), (one_hot, bins), (two_hot, grid))
        ]
        losses.append(cross_entropy(logits, project(reward[:, None] + 0.9 * grid, logits.softmax(-1), grid)))
        return sum(x.mean() for x in losses) + mean(logits, grid).mean() + border_share(target, -10.0, 10.0)

    def arguments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        return torch.randn(7, 21, generator=g), 6 * torch.randn(7, generator=g), torch.randn(7, generator=g)

    traced = make_fx(torch.func.grad(step), tracing_mode="fake")(*arguments(0))
    torch.testing.assert_close(traced(*arguments(1)), torch.func.grad(step)(*arguments(1)))
