"""Noise belongs to a row's seed, not to the batch the row happens to be in."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from guerdon.randomness import mix, normal, row_seeds, uniform

SEEDS = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=8)
DRAWS = [normal, uniform]


@pytest.mark.parametrize("draw", DRAWS)
@given(seeds=SEEDS, data=st.data())
def test_a_row_does_not_depend_on_the_others(draw: object, seeds: list[int], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(seeds) - 1), min_size=1, max_size=6))
    whole = draw(seeds, (2, 3))
    part = draw([seeds[row] for row in rows], (2, 3))
    assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("draw", DRAWS)
def test_nothing_else_moves_the_numbers(draw: object) -> None:
    torch.manual_seed(0)
    first = draw(row_seeds(1, 0, 4), (5,))
    torch.manual_seed(99)
    torch.rand(10)
    state = torch.random.get_rng_state()
    assert torch.equal(draw(row_seeds(1, 0, 4), (5,)), first)
    assert torch.equal(torch.random.get_rng_state(), state)  # and they move nothing else
    assert torch.equal(draw(row_seeds(1, 0, 4).tolist(), (5,)), first)


@pytest.mark.parametrize("draw", DRAWS)
def test_the_first_numbers_do_not_depend_on_how_many_are_drawn(draw: object) -> None:
    """A consistency sampler of two steps starts from the same latents as one of eight."""
    seeds = row_seeds(5, 0, 3)
    assert torch.equal(draw(seeds, (8, 4, 4))[:, :2], draw(seeds, (2, 4, 4)))


def test_shapes() -> None:
    seeds = row_seeds(0, 0, 3)
    assert normal(seeds, ()).shape == (3,)
    assert normal(seeds, (2, 1)).shape == (3, 2, 1)
    assert normal([], (2,)).shape == (0, 2)
    assert normal(seeds, (2,)).dtype == torch.float32


@given(seed=st.integers(-(2**70), 2**70), start=st.integers(0, 10**9), cut=st.integers(0, 6))
def test_seeds_of_rows_do_not_depend_on_where_a_round_starts(seed: int, start: int, cut: int) -> None:
    whole = row_seeds(seed, start, 6)
    assert torch.equal(torch.cat([row_seeds(seed, start, cut), row_seeds(seed, start + cut, 6 - cut)]), whole)
    assert whole.dtype == torch.int64
    assert (whole >= 0).all()


def test_seeds_differ_between_rows_and_runs() -> None:
    many = torch.cat([row_seeds(seed, 0, 2000) for seed in range(10)])
    assert len(many.unique()) == len(many)
    assert mix(1, 2) != mix(2, 1)
    assert mix(3) != mix(3, 0)


def test_seeds_are_well_mixed() -> None:
    """Neighbouring seeds differ in half of their bits, and no bit is constant."""
    seeds = [mix(0, i) for i in range(2000)]
    flips = [(a ^ b).bit_count() for a, b in itertools.pairwise(seeds)]
    assert abs(sum(flips) / len(flips) - 31.5) < 0.5
    for bit in range(63):
        assert 0.4 < sum(seed >> bit & 1 for seed in seeds) / len(seeds) < 0.6


def test_normal_numbers_are_normal() -> None:
    values = normal(row_seeds(3, 0, 400), (100,))
    n = values.numel()
    assert abs(values.mean()) < 5 / math.sqrt(n)
    assert abs(values.var() - 1) < 5 * math.sqrt(2 / n)
    assert abs((values.abs() < 1.0).float().mean() - 0.6827) < 0.012
    assert abs(values.mean(0).std() * math.sqrt(400) - 1) < 0.3  # rows are independent of one another
    assert torch.corrcoef(values[:2])[0, 1].abs() < 0.4


def test_uniform_numbers_are_uniform() -> None:
    values = uniform(row_seeds(3, 0, 400), (100,))
    assert values.min() >= 0
    assert values.max() < 1
    counts = torch.histc(values, bins=10, min=0, max=1) / values.numel()
    assert (counts - 0.1).abs().max() < 0.01
