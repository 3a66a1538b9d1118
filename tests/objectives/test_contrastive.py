"""The contrastive policy gradient: identities with IPO and leave-one-out, fixed points, groups, invariances."""

from __future__ import annotations

import math
import pickle
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guerdon.batch import Preferences, Trajectories, pad_steps
from guerdon.credit import leave_one_out
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.contrastive import ContrastivePolicyGradient
from guerdon.objectives.policy_gradient import Reinforce
from guerdon.optim import SGD
from guerdon.policies.tabular import CategoricalTable
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings

LENGTHS = [3, 1, 4, 2, 2, 4]
GROUPS = torch.tensor([7, 3, 7, 3, 7, 3])
BETA = 0.3


def pairs_of(batch: Any, **fields: Any) -> Preferences:
    """Three pairs from two sources: other answers, other lengths, other behaviour policies."""
    return Preferences(chosen=batch([3, 1, 4], seed=1, **fields), rejected=batch([2, 5, 1], seed=2, **fields))


def regularised(policy: Any, traj: Trajectories, beta: float = BETA) -> Tensor:
    """R_b of each row, written out."""
    rows = []
    for i in range(len(traj.mask)):
        total = traj.reward[i][traj.mask[i]].sum()
        log_prob, reference = policy.log_prob(traj)[i], traj.reference_log_prob[i]
        rows.append(total - beta * (log_prob[traj.mask[i]].sum() - reference[traj.mask[i]].sum()))
    return torch.stack(rows)


# --- the loss ---------------------------------------------------------------------------------------------


def test_the_loss_of_pairs_is_the_squared_gap(batch: Any, token_policy: Any) -> None:
    data = pairs_of(batch)
    loss, metrics = ContrastivePolicyGradient(beta=BETA)(token_policy, data)
    gap = regularised(token_policy, data.chosen) - regularised(token_policy, data.rejected)
    torch.testing.assert_close(loss, (gap.square() / (2 * BETA)).mean())
    torch.testing.assert_close(metrics["loss"], loss.detach())
    torch.testing.assert_close(metrics["spread"], (gap.abs() / math.sqrt(2)).mean().detach())


def test_the_loss_of_groups_sums_over_pairs_and_divides_by_k_minus_1(batch: Any, token_policy: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    value = regularised(token_policy, traj)
    losses = []
    for name in (3, 7):
        rows = (name == GROUPS).nonzero().flatten().tolist()
        squares = [(value[i] - value[j]).square() for i, j in combinations(rows, 2)]
        losses.append(sum(squares) / (2 * BETA * (len(rows) - 1)))
    loss, metrics = ContrastivePolicyGradient(beta=BETA)(token_policy, traj)
    torch.testing.assert_close(loss, (losses[0] + losses[1]) / 2)
    torch.testing.assert_close(metrics["regularised_reward"], value.mean().detach())
    ratio = (token_policy.log_prob(traj) - traj.reference_log_prob).sum(1).mean().detach()
    torch.testing.assert_close(metrics["log_ratio"], ratio)


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_squared_and_detached_form_have_equal_gradients(
    grouped: bool, average: bool, batch: Any, token_policy: Any, gradient: Any
) -> None:
    data = batch(LENGTHS, group=GROUPS) if grouped else pairs_of(batch)
    squared = ContrastivePolicyGradient(beta=BETA, length_average=average)
    detached = ContrastivePolicyGradient(beta=BETA, form="detached", length_average=average)
    a, b = gradient(squared, token_policy, data)[0], gradient(detached, token_policy, data)[0]
    assert a.abs().max() > 0.1
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    shown = [objective(token_policy, data)[1] for objective in (squared, detached)]
    assert shown[0].keys() == shown[1].keys()
    for name in shown[0]:  # the same figures are shown, the square among them
        torch.testing.assert_close(shown[0][name], shown[1][name])


def test_in_the_detached_form_the_gap_and_the_ratios_inside_it_carry_no_gradient(
    batch: Any, token_policy: Any, gradient: Any
) -> None:
    data = pairs_of(batch)
    gap = (regularised(token_policy, data.chosen) - regularised(token_policy, data.rejected)).detach()
    token_policy.zero_grad()
    sums = [token_policy.log_prob(side).sum(1) for side in (data.chosen, data.rejected)]
    (-(gap * (sums[0] - sums[1])).mean()).backward()
    expected = token_policy.table.grad.clone()
    found = gradient(ContrastivePolicyGradient(beta=BETA, form="detached"), token_policy, data)[0]
    torch.testing.assert_close(found, expected)


# --- special cases ----------------------------------------------------------------------------------------


def test_ipo_is_the_case_of_rewards_plus_and_minus_a_quarter(batch: Any, token_policy: Any) -> None:
    data = pairs_of(batch, reward=None)
    quarter = torch.full((3,), 0.25)
    data = Preferences(chosen=data.chosen.judged(quarter), rejected=data.rejected.judged(-quarter))
    ratio = [
        (token_policy.log_prob(side) - side.reference_log_prob).sum(1)
        for side in (data.chosen, data.rejected)
    ]
    ipo = (ratio[0] - ratio[1] - 1 / (2 * BETA)).square().mean()  # Azar et al., 2024, eq. 17
    loss, _ = ContrastivePolicyGradient(beta=BETA)(token_policy, data)
    torch.testing.assert_close(loss, BETA / 2 * ipo)


@pytest.mark.parametrize("k", [2, 3, 6])
def test_a_group_has_the_gradient_of_reinforce_with_leave_one_out(
    k: int, batch: Any, token_policy: Any, gradient: Any
) -> None:
    traj = batch(LENGTHS, group=torch.arange(6) // k)
    mine = gradient(ContrastivePolicyGradient(beta=BETA), token_policy, traj)[0]
    advantage = leave_one_out(regularised(token_policy, traj).detach(), traj.group)
    traj.advantage = traj.per_step(advantage)
    rloo = gradient(Reinforce(reduction="sum"), token_policy, traj)[0]  # a mean over answers
    torch.testing.assert_close(mine, k * rloo, rtol=1e-4, atol=1e-6)


def test_on_fresh_pairs_the_expected_gradient_is_twice_that_of_j() -> None:
    """Exactly: over all pairs of arms, each weighted by its probability."""
    reward, beta = torch.tensor([1.0, -0.5, 2.0, 0.3]), 0.7
    policy = CategoricalTable(["x"], 4)
    policy.logits.data.copy_(torch.tensor([[0.3, -0.2, 0.5, 0.0]]))
    reference = torch.tensor([0.1, 0.4, -0.3, 0.2]).log_softmax(0)
    pi = policy.logits[0].softmax(0)
    objective = (pi * (reward - beta * (pi.log() - reference))).sum()
    (slope,) = torch.autograd.grad(objective, policy.logits)
    total = torch.zeros_like(slope)
    for a in range(4):
        for b in range(4):
            data = pair_of_arms(policy, a, b, reward, reference)
            loss, _ = ContrastivePolicyGradient(beta=beta)(policy, data)
            total -= (pi[a] * pi[b]).detach() * torch.autograd.grad(loss, policy.logits)[0]
    torch.testing.assert_close(total, 2 * slope, rtol=1e-5, atol=1e-6)


def pair_of_arms(policy: Any, a: int, b: int, reward: Tensor, reference: Tensor) -> Preferences:
    sides = []
    for arm in (a, b):
        traj = policy.sample(["x"], row_seeds(0, 0, 1)).judged(reward[arm : arm + 1])
        traj.inputs["step", "action"][:] = arm
        sides.append(traj.with_(log_prob=torch.zeros(1, 1), reference_log_prob=reference[arm].view(1, 1)))
    return Preferences(chosen=sides[0], rejected=sides[1])


# --- the optimum ------------------------------------------------------------------------------------------


def test_the_loss_vanishes_at_the_optimum_whoever_drew_the_data(gradient: Any) -> None:
    reward, beta = torch.tensor([2.5, 2.0, 1.0]), 0.5
    reference = torch.tensor([0.2, 0.5, 0.3]).log()
    policy = CategoricalTable(["x"], 3)
    policy.logits.data.copy_((reference + reward / beta)[None])
    for a, b in combinations(range(3), 2):
        data = pair_of_arms(policy, a, b, reward, reference)
        loss, metrics = ContrastivePolicyGradient(beta=beta)(policy, data)
        assert loss.item() < 1e-12
        assert metrics["spread"] < 1e-6
        slope = gradient(ContrastivePolicyGradient(beta=beta), policy, data)[0]
        assert slope.abs().max() < 1e-6


def test_rewards_of_any_sign_and_scale(batch: Any, token_policy: Any, gradient: Any) -> None:
    data = batch(LENGTHS, group=GROUPS)
    plain = gradient(ContrastivePolicyGradient(beta=BETA), token_policy, data)[0]
    score = data.score()
    shifted = data.judged(score - 100 * (GROUPS == 3))  # a constant of a prompt cancels
    found = gradient(ContrastivePolicyGradient(beta=BETA), token_policy, shifted)[0]
    torch.testing.assert_close(found, plain, rtol=1e-3, atol=1e-4)
    scaled = gradient(ContrastivePolicyGradient(beta=5 * BETA), token_policy, data.judged(5 * score))[0]
    torch.testing.assert_close(scaled, 5 * plain, rtol=1e-4, atol=1e-5)  # a scale is beta's


def test_who_drew_the_answers_does_not_matter(batch: Any, token_policy: Any, gradient: Any) -> None:
    """No importance ratio and no clipping: the behaviour's log-probabilities are not read."""
    data = pairs_of(batch)
    found = gradient(ContrastivePolicyGradient(beta=BETA), token_policy, data)[0]
    other = Preferences(chosen=data.chosen.with_(log_prob=data.chosen.log_prob * 7), rejected=data.rejected)
    assert torch.equal(gradient(ContrastivePolicyGradient(beta=BETA), token_policy, other)[0], found)


def test_equal_answers_give_no_gradient(batch: Any, token_policy: Any, gradient: Any) -> None:
    traj = batch([3, 3])
    data = Preferences(chosen=traj, rejected=traj)
    assert gradient(ContrastivePolicyGradient(), token_policy, data)[0].abs().max() < 1e-6


# --- other baselines --------------------------------------------------------------------------------------


def test_the_other_baselines_by_hand(batch: Any, token_policy: Any, gradient: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    value, score = regularised(token_policy, traj).detach(), traj.score()
    others = torch.stack(
        [score[[j for j in range(6) if GROUPS[j] == GROUPS[i] and j != i]].mean() for i in range(6)]
    )
    own = torch.stack([value[GROUPS[i] == GROUPS].mean() for i in range(6)])
    for baseline, advantage in (
        ("none", value),
        ("reward", value - others),
        ("regularised", value - own),
    ):
        traj.advantage = traj.per_step(advantage)
        expected = 3 * gradient(Reinforce(reduction="sum"), token_policy, traj)[0]
        objective = ContrastivePolicyGradient(beta=BETA, form="detached", baseline=baseline)  # type: ignore[arg-type]
        found = gradient(objective, token_policy, traj)[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    contrast = gradient(ContrastivePolicyGradient(beta=BETA), token_policy, traj)[0]
    torch.testing.assert_close(found, contrast * 2 / 3, rtol=1e-4, atol=1e-6)  # the same fixed point


# --- steps, rows, kinds of policy -------------------------------------------------------------------------


def test_every_real_step_counts_and_no_other(batch: Any, token_policy: Any, gradient: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    objective = ContrastivePolicyGradient(beta=BETA)
    plain = gradient(objective, token_policy, traj)[0]
    torch.testing.assert_close(gradient(objective, token_policy, pad_steps(traj, 9))[0], plain)
    shorter = traj.mask.clone()
    shorter[2, 3] = False  # without its last step (the end of the text, say) the answer is another one
    changed = gradient(objective, token_policy, traj.with_(mask=shorter))[0]
    assert (changed - plain).abs().max() > 1e-3


def test_length_averages_only_where_asked(batch: Any, token_policy: Any) -> None:
    traj = batch(LENGTHS, group=GROUPS)
    lengths = torch.tensor(LENGTHS)
    ratio = (token_policy.log_prob(traj) - traj.reference_log_prob).sum(1)
    for average, expected in ((False, ratio), (True, ratio / lengths)):
        _, metrics = ContrastivePolicyGradient(length_average=average)(token_policy, traj)
        torch.testing.assert_close(metrics["log_ratio"], expected.mean().detach())
    assert not ContrastivePolicyGradient().length_average


@pytest.mark.parametrize("form", ["squared", "detached"])
@pytest.mark.parametrize("size", [1, 2])
def test_pairs_may_be_split_anywhere(
    form: Any, size: int, batch: Any, token_policy: Any, gradient: Any
) -> None:
    data, objective = pairs_of(batch), ContrastivePolicyGradient(beta=BETA, form=form)
    whole = gradient(objective, token_policy, data)[0]
    parts = gradient(objective, token_policy, data, list(data.minibatches(size)))[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)


def test_groups_may_be_split_between_groups_and_not_within(batch: Any) -> None:
    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Parameter(torch.randn(5, 5))

        def log_prob(self, traj: Any) -> Tensor:
            logits = self.table[traj.inputs["step", "state"]].log_softmax(-1)
            chosen = logits.gather(-1, traj.inputs["step", "action"][..., None])[..., 0]
            return torch.where(traj.mask, chosen, 0.0)

    def after(micro_batch: int | None) -> Tensor:
        role = Role("actor", Table(), RoleSettings(SGD(0.1), None, micro_batch=micro_batch))
        role.update(
            batch([3, 1, 4, 2, 2, 4, 1, 2], group=torch.arange(8) // 4), ContrastivePolicyGradient(BETA)
        )
        return role.model.table.detach()

    torch.testing.assert_close(after(4), after(None))
    with pytest.raises(UsageError, match="cannot be split into micro-batches"):
        after(2)
    with pytest.raises(ShapeError, match=r"row 0 is the only one of group 0 in this batch"):
        after(1)


def test_two_kinds_of_policy_with_the_same_log_probabilities_have_the_same_loss(
    batch: Any, token_policy: Any, denoising_policy: Any, same_log_probs: Any
) -> None:
    traj = same_log_probs(token_policy, denoising_policy, batch(LENGTHS, group=GROUPS))
    losses = [
        ContrastivePolicyGradient(beta=BETA)(policy, traj)[0].item()
        for policy in (token_policy, denoising_policy)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_one_forward_pass(batch: Any, token_policy: Any) -> None:
    for data in (pairs_of(batch), batch(LENGTHS, group=GROUPS)):
        token_policy.forwards = 0
        ContrastivePolicyGradient()(token_policy, data)
        assert token_policy.forwards == 1


def test_sides_with_other_fields_can_be_paired(batch: Any, token_policy: Any) -> None:
    """A recorded answer with values and advantages beside a fresh one without."""
    bare = batch([2, 5, 1], seed=2, value=None, target=None, advantage=None, group=None)
    data = Preferences(chosen=batch([3, 1, 4], seed=1), rejected=bare)
    expected = ContrastivePolicyGradient()(token_policy, pairs_of(batch))[0]
    torch.testing.assert_close(ContrastivePolicyGradient()(token_policy, data)[0], expected)


# --- errors -----------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(batch: Any, token_policy: Any) -> None:
    with pytest.raises(ShapeError, match=r"needs batch.reference_log_prob, which is missing"):
        ContrastivePolicyGradient()(token_policy, pairs_of(batch, reference_log_prob=None))
    with pytest.raises(ShapeError, match="have not been judged"):
        ContrastivePolicyGradient()(token_policy, pairs_of(batch, reward=None))
    with pytest.raises(ShapeError, match="this batch carries no group"):
        ContrastivePolicyGradient()(token_policy, batch(LENGTHS, group=None))


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": 0.0}, "must be positive"),
        ({"form": "square"}, "did you mean 'squared'"),
        ({"form": "detached", "baseline": "rewards"}, "did you mean 'reward'"),
        ({"baseline": "none"}, "no squared form with the baseline 'none'"),
    ],
)
def test_an_option_that_cannot_work_is_refused(options: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        ContrastivePolicyGradient(**options)


def test_objectives_are_picklable() -> None:
    objective = ContrastivePolicyGradient(beta=0.2, form="detached", baseline="reward")
    assert pickle.loads(pickle.dumps(objective)) == objective
