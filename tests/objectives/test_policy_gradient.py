"""Clipped surrogate and REINFORCE: published forms, any kind of policy, exact splits."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import pad_steps
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives import divergence
from guerdon.objectives.policy_gradient import (
    ClippedSurrogate,
    Reinforce,
    clipped_surrogate,
    drift,
    importance_weight,
    reinforce,
)
from guerdon.objectives.reduction import reduce

LENGTHS = [3, 1, 4, 0, 2, 4]

OBJECTIVES = [
    ClippedSurrogate(),
    ClippedSurrogate(0.1, clip_high=0.3, dual_clip=2.0),
    ClippedSurrogate(1e-4, reduction="trajectory"),
    ClippedSurrogate(reduction="sum", kl=0.3, kl_estimator="k3"),
    ClippedSurrogate(reduction="constant", kl=0.3, kl_estimator="k2"),
    Reinforce(),
    Reinforce(reduction="trajectory", importance="step", importance_cap=2.0),
    Reinforce(reduction="sum", importance="trajectory", importance_cap=5.0, kl=0.1, kl_estimator="k1"),
]


def draw(
    seed: int, shape: tuple[int, int] = (5, 7), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(shape, generator=generator, dtype=dtype) - 1
    new = old + 0.4 * torch.randn(shape, generator=generator, dtype=dtype)
    return new, old, torch.randn(shape, generator=generator, dtype=dtype)


def published(
    new: Tensor, old: Tensor, advantage: Tensor, low: float, high: float, dual: float | None
) -> Tensor:
    """The papers' formulas, word for word."""
    ratio = (new - old).exp()
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    if dual is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -advantage * dual), loss)
    return loss


# --- the pure functions -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 500),
    low=st.sampled_from([1e-4, 0.1, 0.2]),
    high=st.sampled_from([None, 1e-4, 0.28]),
    dual=st.sampled_from([None, 1.2, 3.0]),
)
def test_clipped_surrogate_is_the_published_form(
    seed: int, low: float, high: float | None, dual: float | None
) -> None:
    new, old, advantage = draw(seed)
    advantage[0, 0] = 0.0
    mine, theirs = new.clone().requires_grad_(), new.clone().requires_grad_()
    loss = clipped_surrogate(mine, old, advantage, low, clip_high=high, dual_clip=dual)
    expected = published(theirs, old, advantage, low, low if high is None else high, dual)
    assert torch.equal(loss, expected)
    (slope,) = torch.autograd.grad(loss.sum(), mine)
    (expected_slope,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(slope, expected_slope)


def test_clipped_surrogate_by_hand() -> None:
    ratio = torch.tensor([[0.5, 1.0, 1.5, 0.5, 1.0, 1.5, 9.0]])
    advantage = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0]])
    log_prob = ratio.log().requires_grad_()
    loss = clipped_surrogate(log_prob, torch.zeros(1, 7), advantage, 0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([[-0.5, -1.0, -1.2, 0.8, 1.0, 1.5, 3.0]]))
    loss.sum().backward()
    # no gradient once the ratio has left the range as the advantage asked, or at the dual clip
    assert log_prob.grad is not None
    torch.testing.assert_close(log_prob.grad, torch.tensor([[-0.5, -1.0, 0.0, 0.0, 1.0, 1.5, 0.0]]))


def test_gradients_by_finite_differences() -> None:
    new, old, advantage = draw(3, dtype=torch.float64)
    new.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clipped_surrogate(x, old, advantage, 0.2), new)
    assert torch.autograd.gradcheck(
        lambda x: clipped_surrogate(x, old, advantage, 0.1, clip_high=0.3, dual_clip=1.3), new
    )
    assert torch.autograd.gradcheck(lambda x: reinforce(x, advantage), new)


def test_on_fresh_data_all_have_the_policy_gradient() -> None:
    _, old, advantage = draw(1)
    mask = torch.ones_like(old, dtype=torch.bool)
    slopes = []
    for loss in (
        lambda x: clipped_surrogate(x, old, advantage, 1e-4),
        lambda x: reinforce(x, advantage),
        lambda x: reinforce(x, advantage, importance_weight(x, old, mask, "step")),
        lambda x: reinforce(x, advantage, importance_weight(x, old, mask, "trajectory")),
    ):
        leaf = old.clone().requires_grad_()
        slopes.append(torch.autograd.grad(loss(leaf).sum(), leaf)[0])
    for slope in slopes:
        torch.testing.assert_close(slope, -advantage)


def test_importance_weights() -> None:
    new, old, _ = draw(2, (2, 3))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    new.requires_grad_()
    ratio = (new.detach() - old).exp()
    step = importance_weight(new, old, mask, "step")
    assert not step.requires_grad
    torch.testing.assert_close(step, torch.where(mask, ratio, 1.0))
    whole = importance_weight(new, old, mask, "trajectory")
    torch.testing.assert_close(whole[0], (ratio[0, 0] * ratio[0, 1]).expand(3))
    torch.testing.assert_close(whole[1], ratio[1].prod().expand(3))
    assert importance_weight(new, old, mask, "step", cap=0.9).max() == 0.9
    assert importance_weight(new, old, mask, "none").eq(1).all()


def test_importance_weights_make_stale_data_unbiased() -> None:
    """Over all outcomes of a two-step policy, weighted reinforce has the gradient of fresh data."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    behaviour = torch.randn(2, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    gain = torch.randn(9, generator=generator, dtype=torch.float64)
    outcomes = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    log_pi = theta.log_softmax(-1)
    new = torch.stack([log_pi[0, outcomes[:, 0]], log_pi[1, outcomes[:, 1]]], 1)
    old = torch.stack([behaviour[0, outcomes[:, 0]], behaviour[1, outcomes[:, 1]]], 1)
    mask = torch.ones(9, 2, dtype=torch.bool)
    advantage = gain[:, None].expand(9, 2)
    weight = importance_weight(new, old, mask, "trajectory")
    stale = (old.sum(1).exp()[:, None] * reinforce(new, advantage, weight)).sum()
    value = (new.sum(1).exp() * gain).sum()
    (slope,) = torch.autograd.grad(stale, theta, retain_graph=True)
    (expected,) = torch.autograd.grad(-value, theta)
    torch.testing.assert_close(slope, expected)


def test_drift() -> None:
    new, old, _ = draw(4)
    mask = torch.ones_like(old, dtype=torch.bool)
    mask[1, 3:] = False
    new, old = new * mask, old * mask
    metrics = drift(new, old, mask, (0.2, 0.3))
    ratio = (new - old).exp()[mask]
    assert metrics["ratio_deviation_max"].item() == pytest.approx((ratio - 1).abs().max().item(), rel=1e-5)
    assert metrics["clip_fraction"].item() == pytest.approx(
        ((ratio < 0.8) | (ratio > 1.3)).float().mean().item()
    )
    assert metrics["approx_kl"].item() == pytest.approx((ratio - 1 - ratio.log()).mean().item(), rel=1e-4)
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
    assert "clip_fraction" not in drift(new, old, mask)


# --- the objectives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_two_kinds_of_policy_with_the_same_log_probabilities_get_the_same_gradient(
    objective: Any, batch: Any, token_policy: Any, denoising_policy: Any, same_log_probs: Any
) -> None:
    traj = batch(LENGTHS, log_prob=torch.full((6, 4), -1.5))
    traj = same_log_probs(token_policy, denoising_policy, traj)
    losses, slopes = [], []
    for policy in (token_policy, denoising_policy):
        kept: list[Tensor] = []

        class Listening(nn.Module):
            event_reduction = policy.event_reduction

            def log_prob(self, traj: Any, policy: Any = policy, kept: list[Tensor] = kept) -> Tensor:
                kept.append(policy.log_prob(traj))
                kept[0].retain_grad()
                return kept[0]

        loss, _ = objective(Listening(), traj)
        loss.backward()
        losses.append(loss.item())
        assert kept[0].grad is not None
        slopes.append(kept[0].grad)
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in policy.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_of_rows_give_the_same_gradient(
    objective: Any, size: int, batch: Any, token_policy: Any, gradient: Any
) -> None:
    traj = batch(LENGTHS)
    whole = gradient(objective, token_policy, traj)
    parts = gradient(objective, token_policy, traj, list(traj.minibatches(size)))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", ["step", "constant"])
def test_micro_batches_of_steps_give_the_same_gradient(
    reduction: Any, batch: Any, denoising_policy: Any, gradient: Any
) -> None:
    traj = batch(LENGTHS)
    objective = ClippedSurrogate(reduction=reduction)
    whole = gradient(objective, denoising_policy, traj)
    parts = gradient(objective, denoising_policy, traj, [traj.select_steps(t, t + 1) for t in range(4)])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.reduction != "constant"], ids=str)
def test_padding_changes_nothing(objective: Any, batch: Any, token_policy: Any, gradient: Any) -> None:
    traj = batch(LENGTHS)
    wide = pad_steps(traj, 9)
    for a, b in zip(
        gradient(objective, token_policy, traj), gradient(objective, token_policy, wide), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    short, long = objective(token_policy, traj)[1], objective(token_policy, wide)[1]
    assert short.keys() == long.keys()
    for key in short:
        torch.testing.assert_close(short[key], long[key], rtol=1e-5, atol=1e-7)


def test_entropy_and_exact_kl(batch: Any, token_policy: Any, denoising_policy: Any) -> None:
    traj = batch(LENGTHS)
    for policy in (token_policy, denoising_policy):
        with torch.no_grad():
            reference = policy.distribution(traj)
            name = "logits" if "logits" in reference else "mean"
            reference[name] = reference[name] + 0.1 * torch.arange(reference[name].shape[-1])
        traj.reference = reference
        objective = ClippedSurrogate(entropy=0.05, kl=0.2, reduction="trajectory")
        loss, metrics = objective(policy, traj)
        p, event = policy.distribution(traj), policy.event_reduction
        bare = clipped_surrogate(policy.log_prob(traj), traj.log_prob, traj.advantage, 0.2)
        kl, entropy = divergence.kl(p, reference, event), divergence.entropy(p, event)
        expected = reduce(bare + 0.2 * kl - 0.05 * entropy, traj.mask, "trajectory")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(metrics["kl"], reduce(kl, traj.mask).detach())
        torch.testing.assert_close(metrics["entropy"], reduce(entropy, traj.mask).detach())
        assert set(metrics) == {"loss", "ratio_deviation_max", "approx_kl", "clip_fraction", "kl", "entropy"}
        assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())


def test_a_reference_padded_with_zeros_spoils_nothing(
    batch: Any, denoising_policy: Any, gradient: Any
) -> None:
    traj = batch(LENGTHS)
    with torch.no_grad():
        traj.reference = denoising_policy.distribution(traj)
    objective = ClippedSurrogate(kl=1.0, entropy=0.1)
    narrow, wide = (gradient(objective, denoising_policy, b) for b in (traj, pad_steps(traj, 8)))
    for a, b in zip(narrow, wide, strict=True):
        torch.testing.assert_close(a, b)


def test_one_forward_pass_whatever_is_asked(batch: Any, token_policy: Any) -> None:
    traj = batch(LENGTHS)
    with torch.no_grad():
        traj.reference = token_policy.distribution(traj)
    for objective in (
        ClippedSurrogate(),
        ClippedSurrogate(entropy=0.1, kl=0.1),
        ClippedSurrogate(kl=0.1, kl_estimator="k2"),
        Reinforce(entropy=0.1),
    ):
        token_policy.forwards = 0
        objective(token_policy, traj)
        assert token_policy.forwards == 1


@pytest.mark.parametrize("clip", [1e-4, 0.2])
def test_before_the_first_update_nothing_has_moved(clip: float, batch: Any, denoising_policy: Any) -> None:
    traj = batch(LENGTHS)
    with torch.no_grad():
        traj = traj.with_(log_prob=denoising_policy.log_prob(traj))
    _, metrics = ClippedSurrogate(clip)(denoising_policy, traj)
    assert metrics["ratio_deviation_max"] <= 1e-5
    assert metrics["clip_fraction"] == 0
    assert abs(metrics["approx_kl"]) < 1e-6


def test_a_clip_range_of_1e_4_is_honoured_in_float32() -> None:
    old = torch.zeros(1, 4)
    new = torch.tensor([[0.5e-4, 1.5e-4, -0.5e-4, -1.5e-4]], requires_grad=True)
    clipped_surrogate(new, old, torch.ones(1, 4), 1e-4).sum().backward()
    assert new.grad is not None
    assert (new.grad != 0).tolist() == [[True, False, True, True]]
    metrics = drift(new, old, torch.ones(1, 4, dtype=torch.bool), (1e-4, 1e-4))
    assert metrics["clip_fraction"] == 0.5


def test_updates_raise_the_likelihood_of_good_steps(batch: Any, token_policy: Any) -> None:
    traj = batch([4] * 16, reward=None)
    with torch.no_grad():
        traj = traj.with_(log_prob=token_policy.log_prob(traj))
    good = traj.inputs["step", "action"] == 2
    traj.advantage = good.float() - good.float().mean()
    optimiser = torch.optim.SGD(token_policy.parameters(), lr=5.0)
    for _ in range(20):
        optimiser.zero_grad()
        ClippedSurrogate(0.2)(token_policy, traj)[0].backward()
        optimiser.step()
    after = token_policy.log_prob(traj).detach() - traj.log_prob
    assert after[good].mean() > 0.1 > 0 > after[~good].mean()


def test_what_is_missing_is_said(batch: Any, token_policy: Any) -> None:
    bare = batch(LENGTHS, advantage=None, reference_log_prob=None)
    for objective in (ClippedSurrogate(), Reinforce()):
        with pytest.raises(ShapeError, match=r"needs batch.advantage, which is missing"):
            objective(token_policy, bare)
    traj = batch(LENGTHS, reference_log_prob=None)
    with pytest.raises(ShapeError, match=r"needs batch.reference, which is missing"):
        ClippedSurrogate(kl=0.1)(token_policy, traj)
    with pytest.raises(ShapeError, match=r"needs batch.reference_log_prob, which is missing"):
        Reinforce(kl=0.1, kl_estimator="k3")(token_policy, traj)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ClippedSurrogate(reduction="steps"), "did you mean 'step'"),
        (lambda: ClippedSurrogate(kl_estimator="k4"), "did you mean 'k"),
        (lambda: ClippedSurrogate(-0.1), "must not be negative"),
        (lambda: ClippedSurrogate(dual_clip=1.0), "larger than 1"),
        (lambda: Reinforce(importance="steps"), "did you mean 'step'"),
    ],
)
def test_an_option_that_cannot_work_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make()


def test_objectives_are_picklable_and_comparable() -> None:
    for objective in OBJECTIVES:
        assert pickle.loads(pickle.dumps(objective)) == objective
    assert ClippedSurrogate(0.1).clip == 0.1
    assert math.isclose(ClippedSurrogate().clip, 0.2)


def test_the_first_positional_option_is_the_clip_range() -> None:
    assert ClippedSurrogate(0.3, 0.4, 5.0) == ClippedSurrogate(clip=0.3, clip_high=0.4, dual_clip=5.0)


def test_an_entropy_bonus_alone_flattens_the_policy(batch: Any, token_policy: Any) -> None:
    """An entropy bonus alone moves the policy towards uniform."""
    traj = batch([4] * 8).with_(advantage=torch.zeros(8, 4))
    with torch.no_grad():
        before = divergence.entropy(token_policy.distribution(traj)).mean()
    optimiser = torch.optim.SGD(token_policy.parameters(), lr=1.0)
    for _ in range(30):
        optimiser.zero_grad()
        ClippedSurrogate(entropy=1.0)(token_policy, traj)[0].backward()
        optimiser.step()
    after = divergence.entropy(TensorDict({"logits": token_policy.table[None]}, batch_size=[1, 5])).mean()
    assert after > before
