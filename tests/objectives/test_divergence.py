"""Exact divergences against torch.distributions, estimators against enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Categorical, Normal, kl_divergence

from guerdon.errors import ShapeError, UsageError
from guerdon.objectives import divergence

B, T = 3, 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def categorical(*event: int, seed: int = 0) -> TensorDict:
    return TensorDict({"logits": rand(B, T, *event, seed=seed)}, batch_size=[B, T])


def gaussian(*event: int, seed: int = 0, std_shape: tuple[int, ...] | None = None) -> TensorDict:
    std = rand(B, T, *(event if std_shape is None else std_shape), seed=seed + 100).exp()
    return TensorDict({"mean": rand(B, T, *event, seed=seed), "std": std}, batch_size=[B, T])


def normal(p: TensorDict) -> Normal:
    mean, std = p["mean"], p["std"]
    return Normal(mean, std.reshape(std.shape + (1,) * (mean.ndim - std.ndim)).expand(mean.shape))


def joined(terms: Tensor, event: str) -> Tensor:
    axes = tuple(range(2, terms.ndim))
    return (terms.sum(axes) if event == "sum" else terms.mean(axes)) if axes else terms


@pytest.mark.parametrize("event", ["sum", "mean"])
@pytest.mark.parametrize("shape", [(6,), (2, 6)])
def test_categorical(shape: tuple[int, ...], event: Any) -> None:
    p, q = categorical(*shape), categorical(*shape, seed=1)
    dp, dq = Categorical(logits=p["logits"]), Categorical(logits=q["logits"])
    action = torch.randint(6, (B, T, *shape[:-1]), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(divergence.kl(p, q, event), joined(kl_divergence(dp, dq), event))
    torch.testing.assert_close(divergence.entropy(p, event), joined(dp.entropy(), event))
    torch.testing.assert_close(divergence.log_prob(p, action, event), joined(dp.log_prob(action), event))


@pytest.mark.parametrize("event", ["sum", "mean"])
@pytest.mark.parametrize(
    ("shape", "std_shape"),
    [((5,), None), ((5,), (1,)), ((5,), ()), ((2, 3, 3), (1, 1, 1)), ((2, 3, 3), ()), ((), None)],
)
def test_gaussian(shape: tuple[int, ...], std_shape: tuple[int, ...] | None, event: Any) -> None:
    p, q = gaussian(*shape, std_shape=std_shape), gaussian(*shape, seed=1, std_shape=std_shape)
    action = rand(B, T, *shape, seed=7)
    torch.testing.assert_close(divergence.kl(p, q, event), joined(kl_divergence(normal(p), normal(q)), event))
    torch.testing.assert_close(divergence.entropy(p, event), joined(normal(p).entropy(), event))
    torch.testing.assert_close(
        divergence.log_prob(p, action, event), joined(normal(p).log_prob(action), event)
    )


def test_gradients_by_finite_differences() -> None:
    logits_p, logits_q = rand(2, 2, 4).requires_grad_(), rand(2, 2, 4, seed=1).requires_grad_()
    mean_p, mean_q = rand(2, 2, 2).requires_grad_(), rand(2, 2, 2, seed=1).requires_grad_()
    std_p, std_q = (
        rand(2, 2, 1, seed=2).exp().requires_grad_(),
        rand(2, 2, 2, seed=3).exp().requires_grad_(),
    )
    action = rand(2, 2, 2, seed=9)
    pack = lambda **parts: TensorDict(parts, batch_size=[2, 2])
    assert torch.autograd.gradcheck(
        lambda p, q: divergence.kl(pack(logits=p), pack(logits=q)), (logits_p, logits_q)
    )
    assert torch.autograd.gradcheck(lambda p: divergence.entropy(pack(logits=p)), logits_p)
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: divergence.kl(pack(mean=a, std=b), pack(mean=c, std=d), "mean"),
        (mean_p, std_p, mean_q, std_q),
    )
    assert torch.autograd.gradcheck(
        lambda a, b: divergence.log_prob(pack(mean=a, std=b), action), (mean_p, std_p)
    )
    assert torch.autograd.gradcheck(lambda a, b: divergence.entropy(pack(mean=a, std=b)), (mean_p, std_p))


def test_a_distribution_is_at_distance_exactly_zero_from_itself() -> None:
    for p in (categorical(6), gaussian(3), gaussian(3, std_shape=(1,))):
        p = p.float()
        assert not divergence.kl(p, p.clone()).any()


def test_equal_deviations_leave_half_the_squared_distance() -> None:
    p, q = gaussian(3), gaussian(3, seed=1)
    q["std"] = p["std"]
    expected = (0.5 * ((p["mean"] - q["mean"]) / p["std"]) ** 2).sum(-1)
    torch.testing.assert_close(divergence.kl(p, q), expected)


def test_forbidden_actions_count_nothing_and_spoil_no_gradient() -> None:
    logits = torch.tensor([[[0.0, 1.0, -math.inf]]], requires_grad=True)
    p = TensorDict({"logits": logits}, batch_size=[1, 1])
    q = TensorDict({"logits": torch.tensor([[[1.0, 0.0, -math.inf]]])}, batch_size=[1, 1])
    allowed_p, allowed_q = (
        Categorical(logits=logits[..., :2]),
        Categorical(logits=torch.tensor([[[1.0, 0.0]]])),
    )
    kl, entropy = divergence.kl(p, q), divergence.entropy(p)
    torch.testing.assert_close(kl, kl_divergence(allowed_p, allowed_q))
    torch.testing.assert_close(entropy, allowed_p.entropy())
    (kl + entropy).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad[0, 0, 2] == 0
    outside = TensorDict({"logits": torch.tensor([[[1.0, 0.0, 0.0]]])}, batch_size=[1, 1])
    assert divergence.kl(outside, q).item() > 1e30


def test_masked_steps_give_zero_and_pass_no_gradient_whatever_they_hold() -> None:
    mask = torch.tensor([[True, False]])
    std = torch.tensor([[[0.5], [0.5]]], requires_grad=True)
    mean = torch.tensor([[[1.0, 2.0], [3.0, math.nan]]], requires_grad=True)
    p = TensorDict({"mean": mean, "std": std}, batch_size=[1, 2])
    padded = TensorDict(
        {"mean": torch.zeros(1, 2, 2), "std": torch.tensor([[[1.0], [0.0]]])}, batch_size=[1, 2]
    )
    action = torch.full((1, 2, 2), math.inf)
    action[:, 0] = 0.0
    total = torch.zeros(1, 2)
    for terms in (
        divergence.kl(p, padded, mask=mask),
        divergence.kl(padded, p, mask=mask),
        divergence.entropy(p, mask=mask),
        divergence.log_prob(p, action, mask=mask),
    ):
        assert terms[0, 1] == 0
        assert terms[0, 0] != 0
        total = total + terms
    total.sum().backward()
    assert mean.grad is not None
    assert std.grad is not None
    assert torch.isfinite(mean.grad).all()
    assert mean.grad[0, 1].tolist() == [0, 0]
    assert std.grad[0, 1].item() == 0
    spoilt = TensorDict({"logits": torch.tensor([[[1.0, 2.0], [math.nan, 0.0]]])}, batch_size=[1, 2])
    fine = divergence.log_prob(spoilt, torch.tensor([[1, 77]]), mask=mask)
    assert fine[0, 1] == 0
    assert torch.isfinite(fine).all()


def test_estimators_on_every_outcome_of_a_small_distribution() -> None:
    """With all outcomes enumerated and weighted by p, an expectation is a sum."""
    theta = rand(1, 1, 6).requires_grad_()
    log_q = rand(1, 1, 6, seed=1).log_softmax(-1)[0]
    log_p = theta.log_softmax(-1)[0]
    p = log_p.detach().exp()
    exact = (log_p.exp() * (log_p - log_q)).sum()
    reverse = (log_q.exp() * (log_q - log_p)).sum()
    slope = {
        name: torch.autograd.grad(f, theta, retain_graph=True)[0]
        for name, f in (("pq", exact), ("qp", reverse))
    }

    def expectation(name: Any) -> Tensor:
        return (p * divergence.estimate_kl(log_p, log_q, name)).sum()

    def slope_of(name: Any) -> Tensor:
        return torch.autograd.grad(expectation(name), theta, retain_graph=True)[0]

    torch.testing.assert_close(expectation("k1"), exact)
    torch.testing.assert_close(expectation("k3"), exact)
    torch.testing.assert_close(slope_of("k1"), torch.zeros_like(theta))
    torch.testing.assert_close(slope_of("k2"), slope["pq"])
    torch.testing.assert_close(slope_of("k3"), slope["qp"])


def test_k3_is_never_negative_and_keeps_its_digits() -> None:
    log_p = torch.linspace(-3, 0, 100)[None]
    for gap in (1e-4, 1e-2, 1.0):
        estimate = divergence.k3(log_p, log_p - gap)
        assert (estimate >= 0).all()
    tiny = divergence.k3(torch.zeros(1, 1), torch.full((1, 1), 1e-3))
    assert tiny.item() == pytest.approx(0.5e-6, rel=2e-3)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ShapeError, match="p is Gaussian and q is categorical"):
        divergence.kl(gaussian(3), categorical(3))
    with pytest.raises(ShapeError, match="logits have shape"):
        divergence.kl(categorical(3), categorical(4))
    with pytest.raises(ShapeError, match="'logits', or 'mean' and 'std'"):
        divergence.entropy(TensorDict({"mean": rand(B, T)}, batch_size=[B, T]))
    with pytest.raises(ShapeError, match="expected integers"):
        divergence.log_prob(categorical(3), rand(B, T))
    with pytest.raises(ShapeError, match="action has shape"):
        divergence.log_prob(gaussian(3), rand(B, T, 2))
    with pytest.raises(UsageError, match="did you mean 'k"):
        divergence.estimate_kl(rand(1, 1), rand(1, 1), "k4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="sum"):
        divergence.entropy(gaussian(3), "total")  # type: ignore[arg-type]


# --- f-divergences and the KL of sequences ----------------------------------------------------------------

F = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha": lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * (0.3 - 1)),
}


@pytest.mark.parametrize("how", F)
def test_f_divergence_is_its_definition(how: Any) -> None:
    p, q = categorical(6), categorical(6, seed=1)
    dp, dq = p["logits"].softmax(-1), q["logits"].softmax(-1)
    expected = (dq * F[how](dp / dq)).sum(-1)
    torch.testing.assert_close(divergence.f_divergence(p, q, how, 0.3), expected)
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(0)) < 0.6
    found = divergence.f_divergence(p, q, how, 0.3, mask)
    torch.testing.assert_close(found, torch.where(mask, expected, 0.0))
    zero = divergence.f_divergence(p, p, how, 0.3)
    torch.testing.assert_close(zero, torch.zeros_like(zero), atol=1e-12, rtol=0)


@pytest.mark.parametrize("how", F)
def test_f_score_is_the_derivative_shifted_to_zero_at_one(how: Any) -> None:
    u = torch.tensor([0.05, 0.5, 1.0, 1.7, 20.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(F[how](u).sum(), u)
    at_one = torch.ones(1, dtype=torch.float64, requires_grad=True)
    (shift,) = torch.autograd.grad(F[how](at_one).sum(), at_one)
    torch.testing.assert_close(divergence.f_score(u.detach().log(), how, 0.3), slope - shift)


def test_alpha_divergence_lies_between_the_two_kls() -> None:
    ratio = torch.linspace(-3, 3, 9, dtype=torch.float64)
    for alpha, how in ((1e-6, "reverse_kl"), (1 - 1e-6, "forward_kl")):
        torch.testing.assert_close(
            divergence.f_score(ratio, "alpha", alpha),
            divergence.f_score(ratio, how),  # type: ignore[arg-type]
            atol=1e-4,
            rtol=1e-4,
        )


@pytest.mark.parametrize("how", F)
def test_f_score_of_huge_ratios_is_finite(how: Any) -> None:
    ratio = torch.tensor([-500.0, 0.0, 500.0], requires_grad=True)
    score = divergence.f_score(ratio, how)
    score.sum().backward()
    assert bool(score.isfinite().all())
    assert ratio.grad is not None
    assert bool(ratio.grad.isfinite().all())
    assert score[1].item() == pytest.approx(0.0, abs=1e-7)


def test_sequence_kl_is_the_kl_of_whole_trajectories() -> None:
    """Two tokens, the second depends on the first: the mean over all sequences is the exact KL between sequences."""
    first_p, first_q = rand(3, seed=1).log_softmax(0), rand(3, seed=2).log_softmax(0)
    next_p, next_q = rand(3, 3, seed=3).log_softmax(1), rand(3, 3, seed=4).log_softmax(1)
    log_p, log_q = first_p[:, None] + next_p, first_q[:, None] + next_q
    exact = (log_p.exp() * (log_p - log_q)).sum()
    token = torch.arange(3).repeat_interleave(3)  # every sequence once
    p, q = (
        TensorDict({"logits": torch.stack([first.expand(9, 3), follow[token]], 1)}, batch_size=[9, 2])
        for first, follow in ((first_p, next_p), (first_q, next_q))
    )
    mask = torch.ones(9, 2, dtype=torch.bool)
    per_sequence = divergence.sequence_kl(p, q, mask)
    assert per_sequence.shape == (9,)
    torch.testing.assert_close((log_p.exp().flatten() * per_sequence).sum(), exact)
    sampled = (
        log_p - log_q
    ).flatten()  # k1 summed along each sequence: as exact on average, but scattered more
    spread = lambda x: float((log_p.exp().flatten() * (x - exact) ** 2).sum())
    assert spread(per_sequence) < 0.5 * spread(sampled)
    mask[:, 1] = False
    torch.testing.assert_close(
        divergence.sequence_kl(p, q, mask)[0], (first_p.exp() * (first_p - first_q)).sum()
    )


def test_f_divergences_refuse_what_they_cannot_do(unchecked: None) -> None:
    p = categorical(6)
    with pytest.raises(UsageError, match="there is no divergence 'kl'"):
        divergence.f_score(torch.zeros(2), "kl")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="between 0 and 1"):
        divergence.f_divergence(p, p, "alpha", 1.0)
    with pytest.raises(ShapeError, match=r"needs logits \[B, T, A\]"):
        divergence.f_divergence(gaussian(2), gaussian(2), "js")
    with pytest.raises(ShapeError, match=r"needs logits \[B, T, A\]"):
        divergence.f_divergence(categorical(2, 3), categorical(2, 3), "alpha")
