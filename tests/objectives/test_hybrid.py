"""Pairs and samples in one update: the sum of two losses, splitting, errors."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch

from guerdon.batch import Preferences
from guerdon.errors import ShapeError
from guerdon.objectives.hybrid import HybridPreference, PairsAndSamples
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.reverse_kl import ReverseKL


def both(batch: Any, answers: int = 4) -> tuple[Preferences, Any, PairsAndSamples]:
    pairs = Preferences(chosen=batch([3, 1, 4], seed=1), rejected=batch([2, 5, 1], seed=2))
    samples = batch([1 + i % 4 for i in range(3 * answers)], seed=3)
    return pairs, samples, PairsAndSamples.joined(pairs, samples, 2)


def test_the_loss_is_that_of_the_pairs_plus_kl_times_that_of_the_samples(
    batch: Any, token_policy: Any, gradient: Any
) -> None:
    pairs, samples, data = both(batch)
    objective = HybridPreference(PairwiseObjective(beta=0.2), ReverseKL(), kl=0.3)
    a = gradient(PairwiseObjective(beta=0.2), token_policy, pairs)[0]
    b = gradient(ReverseKL(), token_policy, samples)[0]
    assert b.abs().max() > 1e-3
    torch.testing.assert_close(gradient(objective, token_policy, data)[0], a + 0.3 * b)
    _, metrics = objective(token_policy, data)
    dpo, kl = PairwiseObjective(beta=0.2)(token_policy, pairs)[1], ReverseKL()(token_policy, samples)[1]
    torch.testing.assert_close(metrics["loss"], dpo["loss"] + 0.3 * kl["kl"])
    torch.testing.assert_close(metrics["kl"], kl["kl"])
    assert metrics["accuracy"] == dpo["accuracy"]


@pytest.mark.parametrize("size", [1, 2])
def test_a_batch_may_be_split_anywhere(size: int, batch: Any, token_policy: Any, gradient: Any) -> None:
    _, _, data = both(batch)
    objective = HybridPreference(kl=0.3)
    whole = gradient(objective, token_policy, data)[0]
    parts = gradient(objective, token_policy, data, list(data.minibatches(size)))[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_groups_are_by_place_whatever_the_prompts(batch: Any) -> None:
    """Two pairs may share a prompt: their samples stay two groups."""
    pairs, samples, _ = both(batch)
    data = PairsAndSamples.joined(pairs, samples.with_(group=torch.zeros(12, dtype=torch.int64)), 2)
    assert data.samples.group.tolist() == [[0, 0, 1, 1], [2, 2, 3, 3], [4, 4, 5, 5]]


def test_samples_that_cannot_be_dealt_out_are_refused(batch: Any) -> None:
    pairs, samples, _ = both(batch)
    with pytest.raises(ShapeError, match="8 samples in groups of 2 cannot be dealt out to 3 pairs"):
        PairsAndSamples.joined(pairs, samples[:8], 2)


def test_objectives_are_picklable() -> None:
    objective = HybridPreference(PairwiseObjective(beta=0.2), ReverseKL(credit="step"), kl=0.3)
    assert pickle.loads(pickle.dumps(objective)) == objective
