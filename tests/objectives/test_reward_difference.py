"""REBEL and PRDP: pairs, closed forms, invariances, the optimum, memory-saving gradients."""

from __future__ import annotations

import pickle
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from guerdon.batch import pad_steps
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.policy_gradient import Reinforce
from guerdon.objectives.reward_difference import (
    RewardDifference,
    clip_log_ratio,
    pair_groups,
    pairs,
    reward_difference,
)

LENGTHS = [3, 1, 4, 2, 2, 4]
GROUPS = torch.tensor([7, 3, 7, 3, 7, 3])

OBJECTIVES = [
    RewardDifference(),
    RewardDifference(eta=0.3, target="advantage"),
    RewardDifference(clip=0.05),
    RewardDifference(eta=0.5, clip=0.1, reference="frozen"),
]


class Table(nn.Module):
    """Log-probabilities themselves as parameters."""

    def __init__(self, log_prob: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(log_prob.clone())

    def log_prob(self, traj: Any) -> Tensor:
        return torch.where(traj.mask, self.values, 0.0)


# --- pairs ------------------------------------------------------------------------------------------------


def test_pairs_by_hand() -> None:
    group = torch.tensor([5, 2, 5, 9, 2, 5])
    as_set = lambda indices: set(zip(*(i.tolist() for i in indices), strict=True))
    assert as_set(pair_groups(group)) == {(0, 2), (0, 5), (2, 5), (1, 4)}
    assert as_set(pair_groups(group, "adjacent")) == {(0, 2), (1, 4)}


@given(group=st.lists(st.integers(-3, 4), max_size=12), seed=st.integers(0, 9))
def test_pairs_of_any_grouping(group: list[int], seed: int) -> None:
    labels = torch.tensor(group, dtype=torch.int64)
    expected = [(i, j) for i, j in combinations(range(len(group)), 2) if group[i] == group[j]]
    assert list(zip(*(i.tolist() for i in pair_groups(labels)), strict=True)) == expected
    for how in ("adjacent", "random"):
        first, second = pair_groups(labels, how, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
        assert torch.equal(labels[first], labels[second])
        used = first.tolist() + second.tolist()
        assert len(set(used)) == len(used)
        assert len(first) == sum(group.count(g) // 2 for g in set(group))
        if how == "adjacent":
            assert (first < second).all()


def test_random_pairs_follow_the_generator() -> None:
    group = torch.zeros(20, dtype=torch.int64)
    draw = lambda seed: pair_groups(group, "random", torch.Generator().manual_seed(seed))[0].tolist()
    assert draw(0) == draw(0)
    assert draw(0) != draw(1)


def test_a_batch_of_pairs_can_be_shuffled_and_split(batch: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    both = pairs(traj)
    assert both.batch_size == torch.Size([6])
    assert torch.equal(both.chosen.group, both.rejected.group)
    parts = list(both.minibatches(4, torch.Generator().manual_seed(0)))
    assert [p.batch_size[0] for p in parts] == [4, 2]
    assert torch.equal(parts[0].chosen.group, parts[0].rejected.group)
    assert pairs(traj, "adjacent").batch_size[0] == 2


# --- the loss ---------------------------------------------------------------------------------------------


def loop(log_prob: Tensor, traj: Any, objective: RewardDifference) -> float:
    """The definition, pair by pair and step by step."""
    total, count = 0.0, 0
    group = traj.group.tolist()
    for i, j in combinations(range(len(group)), 2):
        if group[i] != group[j]:
            continue
        plain, near, score = [], [], []
        for row in (i, j):
            s = s_near = 0.0
            length = int(traj.mask[row].sum())
            for t in range(length):
                old = traj.log_prob[row, t].item()
                base = old if objective.reference == "old" else traj.reference_log_prob[row, t].item()
                now, then = log_prob[row, t].item() - base, old - base
                s += now
                s_near += (
                    now
                    if objective.clip is None
                    else min(max(now, then - objective.clip), then + objective.clip)
                )
            plain.append(s)
            near.append(s_near)
            values = traj.reward if objective.target == "score" else traj.advantage
            amount = sum(values[row, :length].tolist())
            score.append(amount if objective.target == "score" else amount / length)
        gap = score[0] - score[1]
        losses = [(objective.eta * (side[0] - side[1]) - gap) ** 2 for side in (plain, near)]
        total += max(losses)
        count += 1
    return total / count


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_equals_the_definition_in_both_forms(
    objective: RewardDifference, batch: Any, token_policy: Any, gradient: Any
) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    expected = loop(token_policy.log_prob(traj), traj, objective)
    both = pairs(traj)
    for form in (traj, both):
        loss, metrics = objective(token_policy, form)
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())
        assert objective.weight(form).item() == 6
    assert objective(token_policy, traj)[1].keys() == objective(token_policy, both)[1].keys()
    whole = gradient(objective, token_policy, traj)
    for parts in ([both], list(both.minibatches(1)), list(both.minibatches(4))):
        for a, b in zip(whole, gradient(objective, token_policy, both, parts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert pickle.loads(pickle.dumps(objective)) == objective


def test_trajectories_are_summed_over_time_only() -> None:
    a, b = torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([[3.0], [30.0]])
    losses = reward_difference(a, b, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0]), eta=2.0)
    assert losses.tolist() == [(2 * 0 - 1) ** 2, (2 * 0 + 5) ** 2]


def test_gradients_by_finite_differences() -> None:
    draw = lambda *shape, seed: torch.randn(
        *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    a, b = draw(4, 3, seed=0).requires_grad_(), draw(4, 2, seed=1).requires_grad_()
    scores = draw(4, seed=2), draw(4, seed=3)
    assert torch.autograd.gradcheck(lambda a, b: reward_difference(a, b, *scores, eta=0.7), (a, b))
    assert torch.autograd.gradcheck(lambda a: clip_log_ratio(a, torch.zeros(4, 3).double(), 0.5), a)


@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o.target == "score"], ids=str)
def test_a_constant_added_to_a_prompts_scores_changes_nothing(
    objective: Any, batch: Any, token_policy: Any, gradient: Any
) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    shift = torch.where(GROUPS == 7, 50.0, -20.0)
    shifted = traj.judged(traj.score() + shift)
    for a, b in zip(
        gradient(objective, token_policy, traj), gradient(objective, token_policy, shifted), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_padding_changes_nothing(objective: Any, batch: Any, token_policy: Any, gradient: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    wide = pad_steps(traj, 9)
    for a, b in zip(
        gradient(objective, token_policy, traj), gradient(objective, token_policy, wide), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_fresh_model_predicts_no_difference(batch: Any, token_policy: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    with torch.no_grad():
        now = token_policy.log_prob(traj)
    first, second = pair_groups(GROUPS)
    gap = traj.score()[first] - traj.score()[second]
    for reference in ("old", "frozen"):
        fresh = traj.with_(log_prob=now, reference_log_prob=now)
        loss, metrics = RewardDifference(clip=1e-4, reference=reference)(token_policy, fresh)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, gap.square().mean())
        assert metrics["log_ratio"] == 0
        assert metrics["clip_fraction"] == 0


def test_zero_loss_is_the_optimum_of_reward_minus_kl(batch: Any) -> None:
    """pi* proportional to pi_ref exp(r / beta): with eta = beta every pair has zero loss and no gradient."""
    beta, actions = 0.4, 6
    generator = torch.Generator().manual_seed(0)
    log_ref = torch.randn(actions, generator=generator).log_softmax(0)
    reward = torch.randn(actions, generator=generator)
    log_star = (log_ref + reward / beta).log_softmax(0)
    old = torch.randn(actions, generator=generator).log_softmax(0)  # any sampling policy will do
    traj = batch(
        [1] * actions,
        group=torch.zeros(actions, dtype=torch.int64),
        reward=reward[:, None],
        log_prob=old[:, None],
        reference_log_prob=log_ref[:, None],
    )
    policy = Table(log_star[:, None])
    loss, metrics = RewardDifference(eta=beta, reference="frozen")(policy, traj)
    loss.backward()
    assert loss.item() < 1e-10
    assert policy.values.grad is not None
    assert policy.values.grad.abs().max() < 1e-5
    assert metrics["agreement"] == 1


def test_regression_reaches_the_optimum(batch: Any) -> None:
    beta, actions = 0.5, 5
    generator = torch.Generator().manual_seed(1)
    log_ref = torch.randn(actions, generator=generator).log_softmax(0)
    reward = torch.randn(actions, generator=generator)
    traj = batch(
        [1] * actions,
        group=torch.zeros(actions, dtype=torch.int64),
        reward=reward[:, None],
        log_prob=log_ref[:, None],
        reference_log_prob=log_ref[:, None],
    )
    logits = nn.Parameter(log_ref.clone())

    class Bandit(nn.Module):
        def log_prob(self, traj: Any) -> Tensor:
            return logits.log_softmax(0)[:, None]

    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        RewardDifference(eta=beta, reference="frozen")(Bandit(), traj)[0].backward()
        optimiser.step()
    torch.testing.assert_close(logits.softmax(0), (log_ref + reward / beta).softmax(0), rtol=1e-3, atol=1e-4)


# --- the clip ---------------------------------------------------------------------------------------------


def test_the_window_lies_around_the_sampled_value_not_around_zero() -> None:
    sampled = torch.tensor([[2.0, -2.0, 0.0]])
    moved = sampled + torch.tensor([[0.3, -0.3, 0.05]])
    torch.testing.assert_close(clip_log_ratio(moved, sampled, 0.1), torch.tensor([[2.1, -2.1, 0.05]]))


@pytest.mark.parametrize("reference", ["old", "frozen"])
def test_the_gradient_stops_beyond_the_clip_only_when_the_loss_would_fall(reference: Any, batch: Any) -> None:
    """A step moved by more than the clip: towards the target it is left alone, away from it corrected."""
    for move, corrected in ((0.3, False), (-0.3, True)):
        traj = batch([1, 1], group=torch.tensor([0, 0]), reward=torch.tensor([[1.0], [0.0]]))
        policy = Table(traj.log_prob + torch.tensor([[move], [0.0]]))
        traj = traj.with_(reference_log_prob=traj.log_prob.clone())
        loss, metrics = RewardDifference(clip=0.1, reference=reference)(policy, traj)
        loss.backward()
        assert policy.values.grad is not None
        assert (policy.values.grad[0].item() != 0) == corrected
        assert policy.values.grad[1].item() != 0 or not corrected
        expected = (0.1 - 1) ** 2 if not corrected else (-0.3 - 1) ** 2
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert metrics["clip_fraction"] == float(not corrected)


def test_the_larger_of_whole_pair_losses_not_of_steps(batch: Any) -> None:
    """Two steps that moved by opposite amounts: clipped they cancel, and only then is the loss taken."""
    traj = batch([2, 2], group=torch.tensor([0, 0]), reward=torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
    policy = Table(traj.log_prob + torch.tensor([[0.5, -0.3], [0.0, 0.0]]))
    loss, _ = RewardDifference(clip=0.1)(policy, traj)
    plain, near = (0.5 - 0.3 - 1) ** 2, (0.1 - 0.1 - 1) ** 2
    assert loss.item() == pytest.approx(max(plain, near), rel=1e-5)


# --- one pass instead of many -----------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("reduction", ["step", "trajectory", "sum", "constant"])
def test_two_passes_have_the_gradient_of_one(
    objective: Any, reduction: Any, batch: Any, denoising_policy: Any, gradient: Any
) -> None:
    traj = batch([3, 1, 3, 2, 2, 3], group=GROUPS)
    with torch.no_grad():  # a ratio near 1, as in use
        now = denoising_policy.log_prob(traj)
        traj = traj.with_(log_prob=now + 0.05 * traj.log_prob, reference_log_prob=now)
    whole = gradient(objective, denoising_policy, traj)
    with torch.no_grad():
        now = denoising_policy.log_prob(traj)
        second = traj.with_(advantage=objective.as_advantage(now, traj, reduction))
    linear = Reinforce(reduction=reduction)
    splits = [list(second.minibatches(1)), list(second.minibatches(4))]
    if reduction in ("step", "constant"):
        splits.append([second.select_steps(t, t + 1) for t in range(3)])
    for parts in splits:
        for a, b in zip(whole, gradient(linear, denoising_policy, second, parts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, a.abs().max().item()))


# --- what can go wrong ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
def test_errors_are_one_sentence(batch: Any, token_policy: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    with pytest.raises(ShapeError, match=r"carr(y|ies) no group"):
        RewardDifference()(token_policy, traj.with_(group=None))
    with pytest.raises(ShapeError, match=r"row 0 is the only one of group 7"):
        RewardDifference()(token_policy, traj[:2])
    with pytest.raises(ShapeError, match=r"needs batch.reference_log_prob, which is missing"):
        RewardDifference(reference="frozen")(token_policy, traj.with_(reference_log_prob=None))
    with pytest.raises(ShapeError, match=r"needs batch.advantage, which is missing"):
        RewardDifference(target="advantage")(token_policy, traj.with_(advantage=None))
    with pytest.raises(ShapeError, match=r"not been judged"):
        RewardDifference()(token_policy, traj.with_(reward=None))
    with pytest.raises(UsageError, match="did you mean 'frozen'"):
        RewardDifference(reference="froze")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="must be positive"):
        RewardDifference(clip=-1.0)
    with pytest.raises(UsageError, match="did you mean 'random'"):
        pair_groups(GROUPS, "randomly")  # type: ignore[arg-type]


def test_no_pair_at_all_is_a_loss_of_zero(batch: Any, token_policy: Any) -> None:
    traj = batch(LENGTHS, group=torch.arange(6))
    nothing = pairs(traj)
    loss, _ = RewardDifference()(token_policy, nothing)
    loss.backward()
    assert loss.item() == 0
    assert RewardDifference().weight(nothing).item() == 0
    assert RewardDifference().weight(traj).item() == 0
