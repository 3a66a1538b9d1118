"""The score-function gradient of the reverse KL: unbiased, lower variance with leave-one-out, splitting, errors."""

from __future__ import annotations

import pickle
from itertools import product
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories, pad_steps
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.reverse_kl import ReverseKL
from guerdon.policies.tabular import CategoricalTable
from guerdon.randomness import row_seeds

# every outcome of a policy that takes two steps of three actions each; the second depends on the first
OUTCOMES = torch.cartesian_prod(torch.arange(3), torch.arange(3))


class TwoSteps(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = torch.nn.Parameter(torch.randn(4, 3, generator=generator, dtype=torch.float64))

    def log_prob(self, traj: Any) -> Tensor:
        logits = self.table[traj.inputs["step", "state"]].log_softmax(-1)
        chosen = logits.gather(-1, traj.inputs["step", "action"][..., None])[..., 0]
        return torch.where(traj.mask, chosen, 0.0)


def two_steps(action: Tensor) -> Trajectories:
    rows = len(action)
    state = torch.stack([torch.zeros(rows, dtype=torch.int64), 1 + action[:, 0]], 1)
    step = TensorDict({"state": state, "action": action}, batch_size=[rows, 2])
    return Trajectories(
        inputs=TensorDict({"step": step}, batch_size=[rows]),
        log_prob=torch.zeros(rows, 2, dtype=torch.float64),
        mask=torch.ones(rows, 2, dtype=torch.bool),
        group=torch.zeros(rows, dtype=torch.int64),
    )


def exact_kl(policy: TwoSteps, reference: TwoSteps) -> Tensor:
    """By enumeration."""
    traj = two_steps(OUTCOMES)
    log_p = policy.log_prob(traj).sum(1)
    return (log_p.exp() * (log_p - reference.log_prob(traj).sum(1).detach())).sum()


def estimates(objective: ReverseKL, k: int, far: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The expected gradient and its variance over all ``k``-tuples of outcomes, and the gradient of the exact KL."""
    policy, reference = TwoSteps(0), TwoSteps(1)
    if far:  # the policy avoids the last action, on which the reference puts all but a thousandth
        with torch.no_grad():
            policy.table[:, 2] = -9.0
            reference.table[:, 2] = 7.0
    (expected,) = torch.autograd.grad(exact_kl(policy, reference), policy.table)
    log_p = policy.log_prob(two_steps(OUTCOMES)).sum(1).detach()
    mean, square = torch.zeros_like(expected), torch.zeros_like(expected)
    for rows in product(range(9), repeat=k):
        traj = two_steps(OUTCOMES[list(rows)])
        traj.reference_log_prob = reference.log_prob(traj).detach()
        loss, _ = objective(policy, traj)
        (slope,) = torch.autograd.grad(loss, policy.table)
        weight = log_p[list(rows)].sum().exp()
        mean += weight * slope
        square += weight * slope.square()
    return mean, (square - mean.square()).sum(), expected


@pytest.mark.parametrize("credit", ["trajectory", "step"])
@pytest.mark.parametrize(("leave_one_out", "k"), [(True, 2), (False, 1), (False, 2)])
def test_the_expected_gradient_is_that_of_the_kl(credit: Any, leave_one_out: bool, k: int) -> None:
    mean, _, expected = estimates(ReverseKL(leave_one_out, credit), k)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(mean, expected)


def test_credit_by_step_lowers_the_variance_and_leave_one_out_does_far_from_the_reference() -> None:
    for far in (False, True):
        variance = {
            (loo, credit): float(estimates(ReverseKL(loo, credit), 2, far)[1])  # type: ignore[arg-type]
            for loo in (False, True)
            for credit in ("trajectory", "step")
        }
        assert variance[False, "step"] < variance[False, "trajectory"]
        for credit in ("trajectory", "step"):
            # another answer's log-ratio is a noisy baseline: of use where the KL outgrows the spread of the ratios
            assert (variance[True, credit] < 0.8 * variance[False, credit]) == far


def test_the_mean_over_10000_samples_is_within_3_standard_errors_of_the_exact_gradient() -> None:
    torch.manual_seed(0)
    policy = CategoricalTable(["x"], 6)
    policy.logits.data.normal_()
    reference = torch.randn(6).log_softmax(0)
    log_pi = policy.logits[0].log_softmax(0)
    kl = (log_pi.exp() * (log_pi - reference)).sum()
    (expected,) = torch.autograd.grad(kl, policy.logits)
    n = 10_000
    with torch.no_grad():
        traj = policy.sample(["x"] * n, row_seeds(3, 0, n), group=torch.arange(n) // 2)
    traj.reference_log_prob = reference[traj.inputs["step", "action"]]
    loss, metrics = ReverseKL()(policy, traj)
    (mean,) = torch.autograd.grad(loss, policy.logits)
    # the standard error from the estimates of the pairs: (l_1 - l_2) (grad log pi(a_1) - grad log pi(a_2)) / 2
    action = traj.inputs["step", "action"].view(-1, 2)
    ratio = log_pi.detach()[action] - reference[action]
    hot = torch.nn.functional.one_hot(action, 6).float()
    each = (ratio[:, 0] - ratio[:, 1])[:, None] * (hot[:, 0] - hot[:, 1]) / 2
    torch.testing.assert_close(mean[0], each.mean(0), rtol=1e-3, atol=1e-5)
    error = each.std(0) / len(each) ** 0.5
    assert ((mean - expected)[0].abs() < 3 * error).all()
    assert metrics["kl"].item() == pytest.approx(kl.item(), abs=4 * float(ratio.std()) / n**0.5)
    assert metrics["ratio_deviation_max"] < 1e-5  # the samples are fresh


def test_backpropagating_the_log_ratio_itself_would_regularise_nothing() -> None:
    """The trap that the score function avoids: the expected gradient of log pi - log pi_ref is zero."""
    policy = TwoSteps(0)
    traj = two_steps(OUTCOMES)
    weight = policy.log_prob(traj).sum(1).exp().detach()
    (slope,) = torch.autograd.grad((weight * policy.log_prob(traj).sum(1)).sum(), policy.table)
    assert slope.abs().max() < 1e-12


def test_stale_samples_show() -> None:
    policy = TwoSteps(0)
    traj = two_steps(OUTCOMES)
    with torch.no_grad():
        traj = traj.with_(log_prob=policy.log_prob(traj), reference_log_prob=TwoSteps(1).log_prob(traj))
        policy.table += 0.1 * torch.randn(4, 3, dtype=torch.float64)
    assert ReverseKL()(policy, traj)[1]["ratio_deviation_max"] > 1e-3


@pytest.mark.parametrize("credit", ["trajectory", "step"])
def test_masked_steps_count_nowhere(credit: Any, batch: Any, token_policy: Any, gradient: Any) -> None:
    traj = batch([3, 1, 4, 2, 2, 4])
    objective = ReverseKL(credit=credit)
    plain = gradient(objective, token_policy, traj)[0]
    torch.testing.assert_close(gradient(objective, token_policy, pad_steps(traj, 9))[0], plain)
    with torch.no_grad():
        ratio = (token_policy.log_prob(traj) - traj.reference_log_prob).sum(1)
    torch.testing.assert_close(objective(token_policy, traj)[1]["kl"], ratio.mean())


@pytest.mark.parametrize("credit", ["trajectory", "step"])
def test_groups_may_be_split_between_groups_and_not_within(
    credit: Any, batch: Any, token_policy: Any, gradient: Any
) -> None:
    traj, objective = batch([3, 1, 4, 2, 2, 4]), ReverseKL(credit=credit)  # groups of two
    whole = gradient(objective, token_policy, traj)[0]
    parts = gradient(objective, token_policy, traj, list(traj.minibatches(2)))[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    with pytest.raises(ShapeError, match=r"ReverseKL: row 0 is the only one of group 0"):
        objective(token_policy, traj[:1])
    four = traj.with_(group=torch.tensor([0, 0, 0, 0, 1, 1]))
    parted = [objective.weight(part) for part in four.minibatches(2)]
    assert sum(parted) != objective.weight(four)  # which a role refuses


def test_without_groups(batch: Any, token_policy: Any, gradient: Any) -> None:
    traj, objective = batch([3, 1, 4], group=None), ReverseKL(leave_one_out=False)
    whole = gradient(objective, token_policy, traj)[0]
    parts = gradient(objective, token_policy, traj, list(traj.minibatches(1)))[0]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-6)
    with pytest.raises(ShapeError, match="carries no group"):
        ReverseKL()(token_policy, traj)
    with pytest.raises(ShapeError, match=r"needs batch.reference_log_prob"):
        objective(token_policy, traj.with_(reference_log_prob=None))


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_credit_is_refused() -> None:
    with pytest.raises(UsageError, match="did you mean 'step'"):
        ReverseKL(credit="steps")  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(ReverseKL())) == ReverseKL()
