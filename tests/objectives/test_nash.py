"""The gradient of a regularised game of preference: exact expectations, splits, what is held fixed."""

from __future__ import annotations

import pickle
from typing import Any, Literal

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.dynamics import games
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.nash import PreferenceGradient
from guerdon.optim import SGD
from guerdon.roles import Role, RoleSettings


class TwoTokens(nn.Module):
    """Answers of two tokens out of three, or of one where the first is token 0 (the end): 7 answers, float64."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(
            3, 3, generator=generator, dtype=torch.float64
        )  # row 0: first token; 1, 2: after 1, 2
        self.logits = nn.Parameter(draw)

    def log_prob(self, traj: Trajectories) -> Tensor:
        token = traj.inputs["step", "token"]
        table = self.logits.log_softmax(-1)
        steps = torch.stack([table[0][token[:, 0]], table[token[:, 0], token[:, 1]]], 1)
        return torch.where(traj.mask, steps, 0.0)


def answers(rows: Tensor | None = None) -> Trajectories:
    """All seven answers (or some of them, by number)."""
    token = torch.tensor([[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]])
    mask = torch.tensor([[True, False]] + [[True, True]] * 6)
    if rows is not None:
        token, mask = token[rows], mask[rows]
    count = len(token)
    step = TensorDict({"token": token}, batch_size=[count, 2])
    return Trajectories(
        inputs=TensorDict({"step": step}, batch_size=[count]),
        log_prob=torch.zeros(count, 2, dtype=torch.float64),
        mask=mask,
    )


def game(seed: int = 0) -> Tensor:
    """A random game of the seven answers."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(7, 7, generator=generator, dtype=torch.float64).triu(1)
    return upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(7, dtype=torch.float64)


def expected_gradient(
    policy: TwoTokens, mu: TwoTokens, opponent: Tensor, tau: float, credit: Literal["step", "trajectory"]
) -> Tensor:
    """Every answer weighted by its probability: the expectation of the sampled gradient, to rounding."""
    preference = game()
    batch = answers()
    probability = policy.log_prob(batch).sum(1).exp().detach()
    batch.reference_log_prob = mu.log_prob(batch).detach()
    batch.advantage = batch.per_step(preference @ opponent - 0.5)
    total = torch.zeros_like(policy.logits)
    for i in range(7):
        loss, _ = PreferenceGradient(tau, credit)(policy, batch[i : i + 1])
        total += probability[i] * torch.autograd.grad(loss, policy.logits)[0]
    return total


@pytest.mark.parametrize("credit", ["step", "trajectory"])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_its_expectation_is_the_gradient_of_the_regularised_win_rate(
    credit: Literal["step", "trajectory"], tau: float
) -> None:
    policy, mu = TwoTokens(0), TwoTokens(1)
    opponent = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).softmax(0)
    found = expected_gradient(policy, mu, opponent, tau, credit)
    mine = policy.log_prob(answers()).sum(1).exp()
    reference = mu.log_prob(answers()).sum(1).exp().detach()
    value = games.regularised_win_rate(game(), mine, opponent, reference, tau)
    assert found == pytest.approx(-torch.autograd.grad(value, policy.logits)[0], abs=1e-12)


def test_a_step_charged_with_its_own_log_ratio_alone_is_biased() -> None:
    """What some implementations do; the expectation of their gradient is another one."""
    policy, mu = TwoTokens(0), TwoTokens(1)
    batch = answers()
    reference = mu.log_prob(batch).detach()
    log_prob = policy.log_prob(batch)
    own = ((log_prob.detach() - reference) * log_prob).sum(1)
    probability = log_prob.sum(1).exp()
    found = torch.autograd.grad((probability.detach() * own).sum(), policy.logits, retain_graph=True)[0]
    exact = games.kl(probability, reference.sum(1).exp())
    assert float((found - torch.autograd.grad(exact, policy.logits)[0]).abs().max()) > 0.01


def test_masked_steps_neither_count_nor_carry_anything() -> None:
    policy, mu = TwoTokens(0), TwoTokens(1)
    batch = answers(torch.tensor([0, 3]))
    batch.reference_log_prob = mu.log_prob(batch).detach()
    batch.advantage = batch.per_step(torch.tensor([0.2, -0.1]))
    before = torch.autograd.grad(PreferenceGradient(0.3)(policy, batch)[0], policy.logits)[0]
    batch.advantage[0, 1] = batch.reference_log_prob[0, 1] = 1e3
    after = torch.autograd.grad(PreferenceGradient(0.3)(policy, batch)[0], policy.logits)[0]
    assert torch.equal(before, after)


def test_metrics_say_how_far_the_policy_is_and_what_it_gains() -> None:
    policy, mu = TwoTokens(0), TwoTokens(1)
    batch = answers()
    batch.log_prob = policy.log_prob(batch).detach()
    batch.reference_log_prob = mu.log_prob(batch).detach()
    win = torch.linspace(0.1, 0.9, 7)
    batch.advantage = batch.per_step(win - 0.5)
    _, metrics = PreferenceGradient(0.3)(policy, batch)
    kl = (batch.log_prob - batch.reference_log_prob).sum(1).mean()
    assert float(metrics["kl"]) == pytest.approx(float(kl))
    assert float(metrics["loss"]) == pytest.approx(float(0.3 * kl - (win - 0.5).mean()))
    assert float(metrics["ratio_deviation_max"]) < 1e-12
    assert not any(value.requires_grad for value in metrics.values())


def test_a_split_batch_gives_the_same_update() -> None:
    moved = []
    for micro in (None, 2):
        settings = RoleSettings(SGD(0.5), max_grad_norm=None, micro_batch=micro)
        role = Role("actor", TwoTokens(0), settings)
        batch = answers()
        batch.reference_log_prob = TwoTokens(1).log_prob(batch).detach()
        batch.advantage = batch.per_step(torch.linspace(-0.4, 0.4, 7))
        metrics = role.update(batch, PreferenceGradient(0.2))
        moved.append((role.model.logits.detach().clone(), metrics["loss"]))
    assert moved[0][0] == pytest.approx(moved[1][0], abs=1e-7)
    assert float(moved[0][1]) == pytest.approx(float(moved[1][1]))


@pytest.mark.parametrize(
    ("options", "words"), [({"tau": -0.1}, "tau is -0.1"), ({"credit": "steps"}, "did you mean 'step'")]
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: str, unchecked: None) -> None:
    with pytest.raises(UsageError, match=words):
        PreferenceGradient(**options)


@pytest.mark.parametrize("missing", ["advantage", "reference_log_prob"])
def test_a_batch_that_lacks_a_field_is_refused(missing: str) -> None:
    batch = answers()
    batch.advantage = batch.reference_log_prob = torch.zeros(7, 2)
    setattr(batch, missing, None)
    with pytest.raises(ShapeError, match=missing):
        PreferenceGradient()(TwoTokens(0), batch)


def test_it_can_be_sent_elsewhere() -> None:
    assert pickle.loads(pickle.dumps(PreferenceGradient(0.3))) == PreferenceGradient(0.3)
