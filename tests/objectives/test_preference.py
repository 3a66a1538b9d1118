"""Losses of pairs and lists: values by hand, gradients, identities, exact splits; judges fitted to pairs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Preferences, Trajectories, pad_steps
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives import pair_losses
from guerdon.objectives.divergence import f_divergence, f_score
from guerdon.objectives.judges import AttributeRegression, PairClassifier, RewardPairs, coins
from guerdon.objectives.pair_losses import PairLoss, implicit_reward, plackett_luce
from guerdon.objectives.preference import PairwiseObjective, PlackettLuce, ranked
from guerdon.objectives.reward_difference import RewardDifference
from guerdon.objectives.sides import both_sides, with_reference
from guerdon.optim import Adam
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.tabular import CategoricalTable
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer

BETA = 0.5
CHOSEN, REJECTED = [0.5, -1.0, 2.0], [-0.5, 0.25, 0.5]  # log-ratios of three fixed pairs
REFERENCE_GAP = [0.3, -0.4, 0.1]  # log p_ref(chosen) - log p_ref(rejected)
LENGTHS = [2, 5, 1], [4, 2, 1]

# worked out apart, number by number, from CHOSEN, REJECTED, BETA and the formulas of the papers
VALUES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "sigmoid": ({}, [0.474077, 1.053701, 0.386871]),
    "cdpo": ({"loss": "sigmoid", "label_smoothing": 0.1}, [0.524077, 0.991201, 0.461871]),
    "simpo": ({"loss": "sigmoid", "target_margin": 0.4}, [0.644397, 1.331599, 0.533382]),
    "sigmoid_norm": ({}, [0.603785, 0.777694, 0.386871]),
    "robust": ({"label_smoothing": 0.1}, [0.411577, 1.131826, 0.293121]),
    "hinge": ({}, [0.5, 1.625, 0.25]),
    "ipo": ({}, [0.0, 5.0625, 0.25]),
    "ipo, averaged": ({"loss": "ipo", "length_normalise": True}, [0.390625, 1.755625, 0.25]),
    "exo_pair": ({"label_smoothing": 0.01}, [1.082048, 2.3565, 0.856776]),
    "nca_pair": ({}, [1.276879, 1.589915, 1.382862]),
    "bco_pair": ({"delta": 0.2}, [1.161709, 1.759536, 1.08956]),
    "sppo_hard": ({}, [0.5, 5.5625, 3.25]),
    "apo_zero": ({}, [0.875647, 1.153669, 0.831118]),
    "apo_down": ({}, [0.939717, 1.028896, 1.05188]),
    "aot": ({}, [1.053701, 0.437488, 0.420055]),
    "aot_unpaired": ({}, [0.825939, 0.632599, 0.386871]),
    "discopop": ({}, [0.606525, 1.053704, 0.472367]),
    "cpl": ({"bias": 0.5, "reference_free": False}, [0.523123, 1.013437, 0.348445]),
    "unlikelihood": ({"unlikelihood": 0.3, "reference_free": False}, [-0.65, 1.075, -1.85]),
    "forward_kl": ({"loss": "sigmoid", "divergence": "forward_kl"}, [0.466165, 1.291231, 0.582271]),
    "js": ({"loss": "sigmoid", "divergence": "js"}, [0.575939, 0.894371, 0.610121]),
    "alpha": (
        {"loss": "sigmoid", "divergence": "alpha", "alpha": 0.4},
        [0.472817, 1.125852, 0.488689],
    ),
}
SORTING = ("aot", "aot_unpaired")

# one of everything that may be split into micro-batches
OBJECTIVES = [
    *(
        PairwiseObjective(loss, BETA, label_smoothing=0.05 if loss in ("exo_pair", "robust") else 0.0)
        for loss in get_args(PairLoss)
        if loss not in SORTING
    ),
    PairwiseObjective("ipo", length_normalise=True, nll=0.2),
    PairwiseObjective("hinge", reference_free=True, nll=0.5, nll_reduction="sum"),
    PairwiseObjective(divergence="js", discount=0.9, tail=0.3),
]


class Given(nn.Module):
    """A policy whose log-probabilities of two sides are parameters."""

    def __init__(self, chosen: Tensor, rejected: Tensor) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.cat([chosen, rejected]))

    def log_prob(self, traj: Trajectories) -> Tensor:
        return torch.where(traj.mask, self.values[traj.inputs["row"], : traj.steps], 0.0)


def given_pairs(
    chosen: list[float], rejected: list[float], gap: list[float], lengths: Any = LENGTHS
) -> tuple[Given, Preferences]:
    """Pairs of these log-ratios and lengths, in sums over steps; ``gap`` is the reference's chosen minus rejected."""
    generator = torch.Generator().manual_seed(0)
    rows, steps = len(chosen), max(*lengths[0], *lengths[1])

    def side(sums: list[float], base: list[float], length: list[int], first: int) -> Any:
        mask = torch.arange(steps)[None] < torch.tensor(length)[:, None]

        def spread(totals: Tensor) -> Tensor:
            noise = torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0)
            noise[:, 0] += totals - noise.sum(1)
            return noise

        reference = spread(torch.tensor(base))
        policy = reference + spread(torch.tensor(sums))
        inputs = {
            "row": torch.arange(first, first + rows),
            "step": TensorDict({"action": torch.zeros(mask.shape)}, batch_size=mask.shape),
        }
        traj = Trajectories(
            inputs=TensorDict(inputs, batch_size=[rows]),
            log_prob=torch.zeros(mask.shape),
            mask=mask,
            reference_log_prob=reference,
        )
        return policy, traj

    low = [-3.0 - 0.1 * i for i in range(rows)]
    policy_w, traj_w = side(chosen, [b + g for b, g in zip(low, gap, strict=True)], lengths[0], 0)
    policy_l, traj_l = side(rejected, low, lengths[1], rows)
    return Given(policy_w, policy_l), Preferences(chosen=traj_w, rejected=traj_l)


def three_pairs() -> tuple[Given, Preferences]:
    return given_pairs(CHOSEN, REJECTED, REFERENCE_GAP)


def make(name: str) -> tuple[PairwiseObjective, list[float]]:
    options, expected = VALUES[name]
    return PairwiseObjective(**({"loss": name, "beta": BETA} | options)), expected


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VALUES)
def test_values_of_three_fixed_pairs_by_hand(name: str) -> None:
    policy, batch = three_pairs()
    objective, expected = make(name)
    loss, _ = objective(policy, batch)
    assert loss.item() == pytest.approx(sum(expected) / 3, abs=2e-5)
    if objective.loss not in SORTING:
        found = [objective(policy, batch[i : i + 1])[0].item() for i in range(3)]
        assert found == pytest.approx(expected, abs=2e-5)


def test_every_loss_has_a_value_by_hand() -> None:
    covered = {options.get("loss", name) for name, (options, _) in VALUES.items()}
    assert covered | {"slic"} == set(get_args(PairLoss))


def test_slic_is_the_hinge_without_reference() -> None:
    policy, batch = three_pairs()
    log_prob = policy.values.detach().sum(1)  # masked slots hold zeros
    expected = (1 - BETA * (log_prob[:3] - log_prob[3:])).relu().mean()
    for objective in (PairwiseObjective("slic", BETA), PairwiseObjective("hinge", BETA, reference_free=True)):
        loss, _ = objective(policy, batch)
        torch.testing.assert_close(loss.detach(), expected)
    with_answer, _ = PairwiseObjective("slic", BETA, nll=0.1, nll_reduction="sum")(policy, batch)
    torch.testing.assert_close(with_answer.detach(), expected - 0.1 * log_prob[:3].mean())


def test_nll_term_is_averaged_or_summed_over_the_chosen_steps() -> None:
    policy, batch = three_pairs()
    plain, _ = PairwiseObjective(beta=BETA)(policy, batch)
    log_prob = policy.values.detach()[:3].sum(1)
    mean, metrics = PairwiseObjective(beta=BETA, nll=0.3)(policy, batch)
    expected = -(log_prob / torch.tensor(LENGTHS[0])).mean()
    torch.testing.assert_close(mean - plain, 0.3 * expected)
    torch.testing.assert_close(metrics["nll"], expected)
    total, _ = PairwiseObjective(beta=BETA, nll=0.3, nll_reduction="sum")(policy, batch)
    torch.testing.assert_close(total - plain, -0.3 * log_prob.mean())


def test_soft_labels_take_the_expected_loss() -> None:
    policy, batch = three_pairs()
    batch.strength = torch.tensor([0.8, 0.5, 1.0])
    loss, _ = PairwiseObjective(beta=BETA)(policy, batch)
    assert float(loss) == pytest.approx((0.574077 + 0.741201 + 0.386871) / 3, abs=2e-5)
    hard, _ = PairwiseObjective(beta=BETA, soft_labels=False)(policy, batch)
    assert float(hard) == pytest.approx((0.474077 + 1.053701 + 0.386871) / 3, abs=2e-5)
    # a label that is right with probability p is one of p = 1 for the pair and one of 1 - p for its mirror
    mirror = Preferences(chosen=batch.rejected, rejected=batch.chosen)
    for objective in OBJECTIVES:
        if objective.loss in ("exo_pair", "robust") or objective.nll:
            continue
        forward, backward = (objective(policy, b)[0] for b in (without_strength(batch), mirror))
        both, _ = objective(policy, batch_of_strength(batch, 0.7))
        torch.testing.assert_close(both, 0.7 * forward + 0.3 * backward)


def batch_of_strength(batch: Preferences, strength: float) -> Preferences:
    rows = batch.chosen.mask.shape[0]
    return Preferences(chosen=batch.chosen, rejected=batch.rejected, strength=torch.full((rows,), strength))


def without_strength(batch: Preferences) -> Preferences:
    return Preferences(chosen=batch.chosen, rejected=batch.rejected)


def test_robust_undoes_label_noise() -> None:
    """Averaged over labels that are wrong with probability epsilon, it is the clean loss."""
    policy, batch = three_pairs()
    mirror = Preferences(chosen=batch.rejected, rejected=batch.chosen)
    noisy = PairwiseObjective("robust", BETA, label_smoothing=0.2)
    right, wrong = noisy(policy, batch)[0], noisy(policy, mirror)[0]
    clean, _ = PairwiseObjective("sigmoid", BETA)(policy, batch)
    torch.testing.assert_close(0.8 * right + 0.2 * wrong, clean)


def test_discount_and_tail_weigh_the_steps() -> None:
    policy, batch = three_pairs()
    ratio = policy.values.detach() - torch.cat(
        [batch.chosen.reference_log_prob, batch.rejected.reference_log_prob]
    )
    shorter = torch.tensor(LENGTHS).amin(0).repeat(2)
    weight = torch.where(torch.arange(5) < shorter[:, None], 1.0, 0.25) * 0.9 ** torch.arange(5)
    total = (ratio * weight).sum(1)
    _, metrics = PairwiseObjective(beta=BETA, discount=0.9, tail=0.25)(policy, batch)
    torch.testing.assert_close(metrics["rewards_chosen"], BETA * total[:3].mean())
    torch.testing.assert_close(metrics["rewards_rejected"], BETA * total[3:].mean())


def test_metrics() -> None:
    policy, batch = three_pairs()
    loss, metrics = PairwiseObjective(beta=BETA)(policy, batch)
    log_prob = policy.values.detach().sum(1)
    expected = {
        "loss": float(loss),
        "rewards_chosen": BETA * 0.5,
        "rewards_rejected": BETA * 0.25 / 3,
        "margin": BETA * 1.25 / 3,
        "accuracy": 2 / 3,
        "log_prob_chosen": float(log_prob[:3].mean()),
        "log_prob_rejected": float(log_prob[3:].mean()),
    }
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, abs=1e-5)
    assert all(v.ndim == 0 and not v.requires_grad for v in metrics.values())


# --- gradients --------------------------------------------------------------------------------------------

PURE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda w, r: pair_losses.sigmoid_loss(w, r, 0.4, 0.2),
    "hinge": lambda w, r: pair_losses.hinge_loss(w, r, 0.4),
    "ipo": lambda w, r: pair_losses.ipo_loss(w, r, 0.4),
    "exo": lambda w, r: pair_losses.exo_loss(w, r, 0.4, 0.95),
    "nca": lambda w, r: pair_losses.nca_loss(w, r, 0.4),
    "bco": lambda w, r: pair_losses.bco_loss(w, r, 0.4, 0.1),
    "sppo": lambda w, r: pair_losses.sppo_loss(w, r, 0.4),
    "apo_zero": lambda w, r: pair_losses.apo_zero_loss(w, r, 0.4),
    "apo_down": lambda w, r: pair_losses.apo_down_loss(w, r, 0.4),
    "aot": lambda w, r: pair_losses.aot_loss(w, r, 0.4, 0.1),
    "discopop": lambda w, r: pair_losses.discopop_loss(w, r, 0.4, 0.5),
    "cpl": lambda w, r: pair_losses.cpl_loss(w, r, 0.4, 0.5),
    "unlikelihood": lambda w, r: pair_losses.unlikelihood_loss(w, r, 0.4),
    "soft": lambda w, r: pair_losses.soften(pair_losses.sigmoid_loss, w, r, 0.7),
    "js": lambda w, r: pair_losses.sigmoid_loss(f_score(w, "js"), f_score(r, "js")),
}


@pytest.mark.parametrize("name", PURE)
def test_gradients_by_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    sides = [torch.randn(6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    assert torch.autograd.gradcheck(PURE[name], sides)


def test_analytic_gradient_of_dpo(batch: Any, token_policy: Any) -> None:
    """-beta sigma(-beta h) (grad log pi(w) - grad log pi(l)): pairs ranked wrongly weigh most (eq. 7's gradient)."""
    pairs = Preferences(chosen=batch([3, 4, 1], seed=1), rejected=batch([2, 5, 4], seed=2))
    policy = token_policy
    loss, _ = PairwiseObjective(beta=0.3)(policy, pairs)
    (found,) = torch.autograd.grad(loss, policy.table)
    expected = torch.zeros_like(found)
    for i in range(3):
        sums, ratios = [], []
        for side in (pairs.chosen, pairs.rejected):
            log_prob = policy.log_prob(side[i : i + 1]).sum()
            sums.append(torch.autograd.grad(log_prob, policy.table)[0])
            ratios.append(float(log_prob.detach() - side.reference_log_prob[i].sum()))
        wrong = 1 / (1 + math.exp(0.3 * (ratios[0] - ratios[1])))
        expected += -0.3 * wrong * (sums[0] - sums[1]) / 3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss", get_args(PairLoss))
def test_far_from_the_reference_losses_and_gradients_are_finite(loss: Any) -> None:
    policy, batch = given_pairs([900.0, -900.0], [-900.0, 900.0], [0.0, 0.0], ([2, 2], [2, 2]))
    smoothing = 0.1 if loss == "exo_pair" else 0.0
    value, _ = PairwiseObjective(loss, 1.0, label_smoothing=smoothing)(policy, batch)
    value.backward()
    assert bool(value.isfinite())
    assert policy.values.grad is not None
    assert bool(policy.values.grad.isfinite().all())


# --- identities -------------------------------------------------------------------------------------------


def language_pairs() -> tuple[LanguagePolicy, Preferences]:
    policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer(), max_new_tokens=4)
    prompts = [[2], [3, 4], [5], [6, 7, 2], [8]]
    chosen = [[2, 3, 0], [4, 0], [5, 5, 5, 0], [0], [6, 0]]
    rejected = [[7, 0], [4, 4, 4, 0], [0], [8, 2, 0], [2, 2, 2]]
    return policy, Preferences(
        chosen=policy.collate(prompts, chosen), rejected=policy.collate(prompts, rejected)
    )


def table_pairs(rows: int = 5) -> tuple[CategoricalTable, Preferences]:
    policy = CategoricalTable(["a", "b"], 4)
    with torch.no_grad():
        policy.logits.copy_(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    sides = [policy.sample(["a", "b", "a", "b", "a"][:rows], torch.arange(rows) + s) for s in (0, 50)]
    return policy, Preferences(chosen=sides[0], rejected=sides[1])


@pytest.mark.parametrize("pairs", [table_pairs, language_pairs])
def test_loss_at_the_start_is_log_two(pairs: Any) -> None:
    policy, batch = pairs()
    role = Role("actor", policy, RoleSettings(Adam(1e-3)))
    batch = with_reference(batch, role.copy(frozen=True))
    loss, metrics = PairwiseObjective(beta=0.7)(policy, batch)
    assert float(metrics["margin"]) == 0.0
    assert float(loss) == pytest.approx(math.log(2), abs=1e-7)
    assert float(metrics["accuracy"]) == 0.0


def test_reference_is_called_without_gradient_and_never_changes() -> None:
    policy, batch = language_pairs()
    role = Role("actor", policy, RoleSettings(Adam(1e-2)))
    reference = role.copy(frozen=True)
    before = [p.clone() for p in reference.model.parameters()]
    first = with_reference(batch, reference)
    assert batch.chosen.reference_log_prob is None  # the batch that was given is as it was
    for side in (first.chosen, first.rejected):
        assert side.reference_log_prob is not None
        assert not side.reference_log_prob.requires_grad
    role.update(first, PairwiseObjective())
    after = with_reference(batch, reference)
    assert torch.equal(first.chosen.reference_log_prob, after.chosen.reference_log_prob)
    assert all(torch.equal(a, b) for a, b in zip(before, reference.model.parameters(), strict=True))
    assert not with_reference(batch, policy).chosen.reference_log_prob.requires_grad


def test_precomputed_reference_gives_the_same_loss() -> None:
    policy, batch = language_pairs()
    frozen = Role("actor", policy, RoleSettings(Adam(1e-2), sample_batch=2)).copy(frozen=True)
    together = with_reference(batch, frozen)
    chosen, rejected = (with_reference(side, frozen) for side in (batch.chosen, batch.rejected))
    for side, alone in ((together.chosen, chosen), (together.rejected, rejected)):
        torch.testing.assert_close(side.reference_log_prob, alone.reference_log_prob)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    apart = Preferences(chosen=chosen, rejected=rejected)
    objective = PairwiseObjective()
    torch.testing.assert_close(objective(policy, together)[0], objective(policy, apart)[0])


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "discopop", "nca_pair", "apo_zero"])
def test_adding_to_both_rewards_changes_nothing_but_for_losses_of_each_side(loss: Any) -> None:
    policy, batch = three_pairs()
    shifted = batch.clone()
    for side in (shifted.chosen, shifted.rejected):
        side.reference_log_prob[:, 0] -= torch.tensor([1.0, -2.0, 0.5])
    before, after = (PairwiseObjective(loss, BETA)(policy, b)[0] for b in (batch, shifted))
    assert math.isclose(float(before), float(after), abs_tol=1e-5) is (loss not in ("nca_pair", "apo_zero"))


def test_token_rewards_sum_to_the_reward_of_the_answer() -> None:
    policy, batch = three_pairs()
    _, metrics = PairwiseObjective(beta=BETA)(policy, batch)
    joined = both_sides(batch)
    reference = torch.cat([batch.chosen.reference_log_prob, batch.rejected.reference_log_prob])
    reward = implicit_reward(policy.log_prob(joined), reference, joined.mask, BETA)
    assert bool((reward[~joined.mask] == 0).all())
    torch.testing.assert_close(reward.sum(1), BETA * torch.tensor(CHOSEN + REJECTED))
    torch.testing.assert_close(reward[:3].sum(1).mean(), metrics["rewards_chosen"])


def all_pairs_of_one_step(actions: int, reference: Tensor) -> tuple[CategoricalTable, Preferences]:
    """Every ordered pair of actions in one context, with the reference's log-probabilities."""
    policy = CategoricalTable(["x"], actions)
    first, second = torch.tensor(list(itertools.permutations(range(actions), 2))).unbind(1)

    def side(action: Tensor) -> Trajectories:
        step = TensorDict(
            {"context": torch.zeros_like(action)[:, None], "action": action[:, None]},
            batch_size=[len(action), 1],
        )
        return Trajectories(
            inputs=TensorDict({"step": step}, batch_size=[len(action)]),
            log_prob=torch.zeros(len(action), 1),
            mask=torch.ones(len(action), 1, dtype=torch.bool),
            reference_log_prob=reference[action][:, None],
        )

    return policy, Preferences(chosen=side(first), rejected=side(second))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_the_minimiser_is_the_optimum_of_the_regularised_reward(divergence: Any) -> None:
    """With labels from Bradley-Terry on r, the gradient vanishes at the maximiser of E r - beta D(pi || pi_ref)."""
    reward, beta, alpha = torch.tensor([1.0, 0.2, -0.5, 0.4]), 0.6, 0.5
    reference = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    logits = reference.clone().requires_grad_()

    def value() -> Tensor:
        p, q = (TensorDict({"logits": x[None, None]}, batch_size=[1, 1]) for x in (logits, reference))
        return (logits.softmax(0) * reward).sum() - beta * f_divergence(p, q, divergence, alpha).sum()

    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9, line_search_fn="strong_wolfe")
    optimiser.step(lambda: _closure(optimiser, -value()))
    if divergence == "reverse_kl":
        optimum = (reference + reward / beta).softmax(0)
        torch.testing.assert_close(logits.detach().softmax(0), optimum, atol=1e-4, rtol=1e-4)
    policy, batch = all_pairs_of_one_step(4, reference)
    score = reward[batch.chosen.inputs["step", "action"][:, 0]]
    other = reward[batch.rejected.inputs["step", "action"][:, 0]]
    batch.strength = (score - other).sigmoid()
    objective = PairwiseObjective(beta=beta, divergence=divergence, alpha=alpha)
    slopes = []
    for start in (logits.detach(), reference):
        policy.logits.data.copy_(start[None])
        loss, _ = objective(policy, batch)
        slopes.append(float(torch.autograd.grad(loss, policy.logits)[0].abs().max()))
    assert slopes[0] < 1e-4 < 1e-2 < slopes[1]


def _closure(optimiser: Any, loss: Tensor) -> Tensor:
    optimiser.zero_grad()
    loss.backward()
    return loss


def test_soft_target_regression_has_soft_policy_iteration_as_its_minimiser() -> None:
    """DNO (Rosset et al., 2024, algorithm 1): pi_(t+1) proportional to pi_t exp(r_t / eta), r_t the win rates against pi_t."""
    matrix = torch.tensor(
        [[0.5, 0.9, 0.2, 0.6], [0.1, 0.5, 0.85, 0.7], [0.8, 0.15, 0.5, 0.6], [0.4, 0.3, 0.4, 0.5]]
    )
    start, eta = torch.tensor([0.1, 0.1, 0.1, 0.7]), 0.5
    wins = matrix @ start
    policy, batch = all_pairs_of_one_step(4, start.log())
    a, b = (side.inputs["step", "action"][:, 0] for side in (batch.chosen, batch.rejected))
    batch.strength = (wins[a] - wins[b]).sigmoid()
    policy.logits.data.copy_(start.log()[None])
    role = Role("actor", policy, RoleSettings(Adam(0.02), max_grad_norm=None))
    for _ in range(400):
        role.update(batch, PairwiseObjective(beta=eta))
    expected = (start * (wins / eta).exp()) / (start * (wins / eta).exp()).sum()
    torch.testing.assert_close(policy.logits.detach()[0].softmax(0), expected, atol=2e-4, rtol=0)


def test_ipo_is_the_regression_of_reward_differences_on_labels() -> None:
    """Rewards of +-1/4: (R_b(w) - R_b(l))^2 / (2 beta) = (beta / 2) (h - 1 / (2 beta))^2 (Flet-Berliac et al., 2024)."""
    policy, batch = three_pairs()
    ipo, _ = PairwiseObjective("ipo", BETA)(policy, batch)
    quarter = torch.full((3,), 0.25)
    scored = Preferences(chosen=batch.chosen.judged(quarter), rejected=batch.rejected.judged(-quarter))
    regression, _ = RewardDifference(eta=BETA, reference="frozen")(policy, scored)
    torch.testing.assert_close(regression / (2 * BETA), BETA / 2 * ipo)


def test_cpl_with_a_reference_and_without_bias_is_dpo() -> None:
    policy, batch = three_pairs()
    dpo, _ = PairwiseObjective("sigmoid", 0.2)(policy, batch)
    cpl, _ = PairwiseObjective("cpl", 0.2, reference_free=False)(policy, batch)
    torch.testing.assert_close(cpl, dpo)


def test_cpl_bias_is_on_the_losing_side_only() -> None:
    win, lose = torch.tensor([0.4]), torch.tensor([1.2])
    expected = -math.log(math.exp(0.4) / (math.exp(0.4) + math.exp(0.5 * 1.2)))
    assert float(pair_losses.cpl_loss(win, lose, 1.0, 0.5)) == pytest.approx(expected)
    same = torch.tensor([0.7])
    assert float(pair_losses.cpl_loss(same, same, 1.0, 1.0)) == pytest.approx(math.log(2))
    # a label of 0.5 counts both directions
    policy, batch = three_pairs()
    objective = PairwiseObjective("cpl", BETA, bias=0.5, reference_free=False)
    tie, _ = objective(policy, batch_of_strength(batch, 0.5))
    mirror = Preferences(chosen=batch.rejected, rejected=batch.chosen)
    torch.testing.assert_close(tie, 0.5 * (objective(policy, batch)[0] + objective(policy, mirror)[0]))


def test_track_moves_delta_to_the_mean_reward() -> None:
    policy, batch = three_pairs()
    objective = PairwiseObjective("bco_pair", BETA)
    _, metrics = objective(policy, batch)
    mean = 0.5 * float(metrics["rewards_chosen"] + metrics["rewards_rejected"])
    objective.track(metrics, 0.25)
    assert float(objective.delta) == pytest.approx(0.25 * mean)
    for _ in range(60):
        objective.track(metrics, 0.25)
    assert float(objective.delta) == pytest.approx(mean, abs=1e-6)
    assert float(objective(policy, batch)[0]) == pytest.approx(
        float(PairwiseObjective("bco_pair", BETA, delta=mean)(policy, batch)[0]), abs=1e-6
    )


# --- one forward pass, any padding, any split -------------------------------------------------------------


def test_both_sides_are_evaluated_in_one_pass(batch: Any, token_policy: Any) -> None:
    pairs = Preferences(chosen=batch([3, 4, 1], seed=1), rejected=batch([2, 5, 4], seed=2))
    token_policy.forwards = 0
    PairwiseObjective(nll=0.1)(token_policy, pairs)
    assert token_policy.forwards == 1
    with_reference(pairs, token_policy)
    assert token_policy.forwards == 2


def test_sides_may_carry_different_fields() -> None:
    policy, batch = language_pairs()
    chosen = batch.chosen.with_(
        reward=torch.zeros(batch.chosen.mask.shape), outputs=TensorDict({"text": torch.zeros(5, 3)}, [5])
    )
    chosen.inputs["margin"] = torch.ones(5)
    pairs = Preferences(chosen=chosen, rejected=batch.rejected)
    joined = both_sides(pairs, outputs=True)
    assert joined.outputs is None
    assert "margin" not in joined.inputs
    assert "margin" in pairs.chosen.inputs  # nothing is taken from the caller's batch
    torch.testing.assert_close(policy.log_prob(joined), policy.log_prob(both_sides(batch)))


def test_padding_changes_nothing(batch: Any, token_policy: Any) -> None:
    chosen, rejected = batch([3, 4, 1], seed=1), batch([2, 5, 4], seed=2)
    plain = Preferences(chosen=chosen, rejected=rejected)
    padded = Preferences(chosen=pad_steps(chosen, 9), rejected=pad_steps(rejected, 6))
    padded.chosen.reference_log_prob[:, 6:] = float("nan")
    for objective in (*OBJECTIVES, PairwiseObjective("aot")):
        a, b = (objective(token_policy, pairs)[0] for pairs in (plain, padded))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: o.loss)
def test_a_split_gives_the_gradient_of_the_whole(
    objective: Any, batch: Any, token_policy: Any, gradient: Any
) -> None:
    pairs = Preferences(
        chosen=batch([3, 1, 4, 0, 2], seed=1),
        rejected=batch([1, 5, 2, 3, 2], seed=2),
        strength=torch.tensor([1.0, 0.6, 0.9, 0.5, 0.7]),
    )
    whole = gradient(objective, token_policy, pairs)
    parts = gradient(objective, token_policy, pairs, [pairs[:2], pairs[2:3], pairs[3:]])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)
    assert any(bool(g.any()) for g in whole)


@pytest.mark.parametrize("pairs", [table_pairs, language_pairs])
def test_role_accumulates_to_the_same_update(pairs: Any) -> None:
    results = []
    for micro_batch in (None, 2):
        policy, batch = pairs()
        role = Role("actor", policy, RoleSettings(Adam(1e-2), micro_batch=micro_batch))
        batch = with_reference(batch, role.copy(frozen=True))
        metrics = [role.update(batch, PairwiseObjective(nll=0.1)) for _ in range(3)]
        results.append((metrics[-1], [p.detach().clone() for p in policy.parameters()]))
    (whole, weights), (parts, split) = results
    torch.testing.assert_close(split, weights, atol=1e-5, rtol=1e-4)
    assert set(parts) == set(whole)
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("loss", SORTING)
def test_losses_that_compare_rows_refuse_to_be_split(loss: Any) -> None:
    policy, batch = table_pairs()
    batch = with_reference(batch, policy)
    objective = PairwiseObjective(loss)
    whole = Role("actor", policy, RoleSettings(Adam(1e-2), micro_batch=5))
    whole.update(batch, objective)
    role = Role("actor", policy, RoleSettings(Adam(1e-2), micro_batch=2))
    with pytest.raises(UsageError, match="compares its rows with one another"):
        role.update(batch, objective)


@pytest.mark.parametrize("pairs", [table_pairs, language_pairs])
def test_training_raises_the_margin(pairs: Any) -> None:
    policy, batch = pairs()
    role = Role("actor", policy, RoleSettings(Adam(3e-2)))
    batch = with_reference(batch, role.copy(frozen=True))
    different = [
        i for i in range(5) if not torch.equal(*(policy.log_prob(s[i : i + 1]).sum() for s in sides(batch)))
    ]
    batch = batch[torch.tensor(different)]
    for _ in range(40):
        metrics = role.update(batch, PairwiseObjective(beta=0.5))
    assert float(metrics["loss"]) < 0.5 * math.log(2)
    assert float(metrics["margin"]) > 0.5


def sides(batch: Preferences) -> tuple[Trajectories, Trajectories]:
    return batch.chosen, batch.rejected


def test_no_pair_at_all_is_a_loss_of_zero() -> None:
    policy, batch = three_pairs()
    for objective in (PairwiseObjective(), RewardPairs()):
        model = policy if isinstance(objective, PairwiseObjective) else Scorer()
        loss, metrics = objective(model, batch[:0])
        assert float(loss) == 0.0
        assert all(bool(v.isfinite()) for v in metrics.values())


def test_objectives_can_be_sent() -> None:
    for objective in (*OBJECTIVES, PlackettLuce(), RewardPairs(), PairClassifier(), AttributeRegression()):
        assert pickle.loads(pickle.dumps(objective)) == objective


# --- ranked lists -----------------------------------------------------------------------------------------


def test_plackett_luce_by_a_naive_loop() -> None:
    score = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3, 1])[:, None]
    found = plackett_luce(score, mask)
    for i, count in enumerate(mask.sum(1).tolist()):
        values = score[i, :count].tolist()
        expected = -sum(
            math.log(math.exp(values[k]) / sum(math.exp(v) for v in values[k:])) for k in range(count)
        )
        assert float(found[i]) == pytest.approx(expected)
    score.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: plackett_luce(s, mask), score)


def test_plackett_luce_is_a_distribution_over_orders() -> None:
    score = torch.tensor([0.3, -1.0, 2.0, 0.1])
    orders = torch.stack([score[list(order)] for order in itertools.permutations(range(4))])
    assert float((-plackett_luce(orders)).exp().sum()) == pytest.approx(1.0, abs=1e-5)


def test_plackett_luce_of_two_is_the_pair_loss() -> None:
    win, lose = torch.tensor([0.3, -2.0, 40.0]), torch.tensor([1.0, 0.5, -60.0])
    found = plackett_luce(0.1 * torch.stack([win, lose], 1))
    torch.testing.assert_close(found, pair_losses.sigmoid_loss(win, lose, 0.1))


def test_lists_of_two_give_the_update_of_pairs() -> None:
    policy, batch = three_pairs()
    pair_loss, pair_metrics = PairwiseObjective(beta=BETA)(policy, batch)
    (expected,) = torch.autograd.grad(pair_loss, policy.values)
    lists = torch.cat([batch.rejected, batch.chosen])  # the worse first: ranks come from the scores
    lists = lists.judged(torch.tensor([0.0, 3.0, -1.0, 0.5, 4.0, 7.0]))
    lists.group = torch.tensor([4, 9, 2, 4, 9, 2])
    objective = PlackettLuce(beta=BETA)
    loss, metrics = objective(policy, lists)
    (found,) = torch.autograd.grad(loss, policy.values)
    torch.testing.assert_close(loss, pair_loss)
    torch.testing.assert_close(found, expected)
    for mine, theirs in (("rewards_best", "rewards_chosen"), ("margin", "margin"), ("accuracy", "accuracy")):
        torch.testing.assert_close(metrics[mine], pair_metrics[theirs])
    # lists may be kept whole in parts, a list may not be split
    parts = [lists[torch.tensor([0, 3])], lists[torch.tensor([1, 2, 4, 5])]]
    total = sum(objective(policy, part)[0] * objective.weight(part) for part in parts)
    torch.testing.assert_close(total / objective.weight(lists), loss)
    assert int(objective.weight(lists[:3])) + int(objective.weight(lists[3:])) != int(objective.weight(lists))


def test_ranked_lists_of_different_lengths() -> None:
    rows, mask = ranked(torch.tensor([7, 3, 7, 7, 3]), torch.tensor([0.1, 5.0, 0.9, 0.1, 6.0]))
    assert rows.tolist() == [[4, 1, 0], [2, 0, 3]]
    assert mask.tolist() == [[True, True, False], [True, True, True]]


def test_lists_refuse_what_they_cannot_rank(batch: Any, token_policy: Any) -> None:
    alone = batch([2, 3, 1], group=torch.tensor([0, 0, 1]))
    with pytest.raises(ShapeError, match="lists of one"):
        PlackettLuce()(token_policy, alone)
    with pytest.raises(ShapeError, match="group"):
        PlackettLuce()(token_policy, batch([2, 3], group=None))
    with pytest.raises(ShapeError, match="with_reference"):
        PlackettLuce()(token_policy, batch([2, 3], reference_log_prob=None))


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "sigmoyd"}, "did you mean 'sigmoid'"),
        ({"beta": 0.0}, "beta is 0"),
        ({"label_smoothing": 0.5}, "below one half"),
        ({"loss": "exo_pair"}, "label_smoothing above 0"),
        ({"bias": 0.5}, "bias belongs to cpl"),
        ({"loss": "ipo", "discopop_tau": 0.1}, "discopop_tau belongs to discopop"),
        ({"loss": "nca_pair", "divergence": "js"}, "difference of two log-ratios"),
        ({"divergence": "js", "reference_free": True}, "with a reference"),
        ({"divergence": "alpha", "alpha": 1.0}, "alpha between 0 and 1"),
        ({"nll_reduction": "mean"}, "nll_reduction is 'mean'"),
    ],
)
def test_options_that_make_no_sense(unchecked: None, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PairwiseObjective(**options)


def test_missing_reference_is_named() -> None:
    policy, batch = table_pairs()
    with pytest.raises(ShapeError, match="with_reference"):
        PairwiseObjective()(policy, batch)
    PairwiseObjective("cpl")(policy, batch)  # needs none
    assert not any(PairwiseObjective(loss).reads_reference for loss in ("cpl", "slic", "unlikelihood"))
    assert not PairwiseObjective(reference_free=True).reads_reference
    assert PairwiseObjective("cpl", reference_free=False).reads_reference
    with pytest.raises(UsageError, match="soft_labels=False"):
        PairwiseObjective("aot", reference_free=True)(policy, batch_of_strength(batch, 0.7))


# --- judges -----------------------------------------------------------------------------------------------


class Scorer(nn.Module):
    """A score from the row's first observation; optionally one a step, or several outputs."""

    def __init__(self, per_step: bool = False, outputs: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(1, outputs)
        self.per_step = per_step
        self.calls = 0

    def scores(self, traj: Trajectories) -> Tensor:
        action = torch.where(traj.mask, traj.inputs["step", "action"].float(), 0.0)
        return self.linear(action.sum(1, keepdim=True))

    def score(self, traj: Trajectories) -> Tensor:
        self.calls += 1
        if self.per_step:
            return self.linear(traj.inputs["step", "action"][..., None].float())[..., 0]
        return self.scores(traj)[:, 0]

    def logit(self, a: Trajectories, b: Trajectories) -> Tensor:
        self.calls += 1
        return self.scores(a)[:, 0] - self.scores(b)[:, 1]  # not antisymmetric


def labelled(batch: Any, rows: int = 6) -> Preferences:
    lengths = [3, 1, 4, 2, 2, 5] * (rows // 6 or 1)
    return Preferences(chosen=batch(lengths[:rows], seed=3), rejected=batch(lengths[:rows][::-1], seed=4))


def test_reward_pairs_are_bradley_terry(batch: Any) -> None:
    model, pairs = Scorer(), labelled(batch)
    win, lose = model.score(pairs.chosen).detach(), model.score(pairs.rejected).detach()
    model.calls = 0
    loss, metrics = RewardPairs()(model, pairs)
    assert model.calls == 1  # both sides in one pass
    torch.testing.assert_close(loss.detach(), (1 + (lose - win).exp()).log().mean())
    expected = {
        "loss": loss.detach(),
        "accuracy": (win > lose).float().mean(),
        "margin": (win - lose).mean(),
        "score_chosen": win.mean(),
        "score_rejected": lose.mean(),
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value)


def test_reward_pairs_options(batch: Any) -> None:
    model, pairs = Scorer(), labelled(batch)
    win, lose = model.score(pairs.chosen).detach(), model.score(pairs.rejected).detach()
    bce = lambda z, p=1.0: -(p * z.sigmoid().log() + (1 - p) * (-z).sigmoid().log())
    run = lambda objective, data=pairs: objective(model, data)[0].detach()
    gap = win - lose
    torch.testing.assert_close(run(RewardPairs(margin=0.3)), bce(gap - 0.3).mean())
    torch.testing.assert_close(run(RewardPairs("hinge", margin=0.3)), (1.3 - gap).relu().mean())
    torch.testing.assert_close(run(RewardPairs(label_smoothing=0.1)), bce(gap, 0.9).mean())
    torch.testing.assert_close(run(RewardPairs(centering=0.2)), (bce(gap) + 0.2 * (win + lose) ** 2).mean())
    torch.testing.assert_close(run(RewardPairs(l2=0.2)), (bce(gap) + 0.2 * (win**2 + lose**2)).mean())
    strength = torch.tensor([0.9, 0.5, 1.0, 0.7, 0.6, 0.2])
    soft = Preferences(chosen=pairs.chosen, rejected=pairs.rejected, strength=strength)
    torch.testing.assert_close(run(RewardPairs(), soft), bce(gap, strength).mean())
    torch.testing.assert_close(run(RewardPairs(soft_labels=False), soft), bce(gap).mean())
    own = torch.tensor([0.5, -0.2, 0.0, 1.0, 0.1, -1.0])  # an adaptive margin may be negative
    chosen = pairs.chosen.clone()
    chosen.inputs["margin"] = own
    adaptive = Preferences(chosen=chosen, rejected=pairs.rejected, strength=strength)
    torch.testing.assert_close(run(RewardPairs(margin=0.1), adaptive), bce(gap - own - 0.1, strength).mean())


def test_step_rewards_are_summed_over_real_steps(batch: Any) -> None:
    model, pairs = Scorer(per_step=True), labelled(batch)
    totals = [
        torch.where(side.mask, model.score(side), 0.0).sum(1).detach()
        for side in (pairs.chosen, pairs.rejected)
    ]
    _, metrics = RewardPairs()(model, pairs)
    torch.testing.assert_close(metrics["score_chosen"], totals[0].mean())
    torch.testing.assert_close(metrics["score_rejected"], totals[1].mean())


JUDGES = [
    RewardPairs(centering=0.01),
    RewardPairs("hinge", label_smoothing=0.1),
    *(PairClassifier(order) for order in ("random", "both", "antisymmetric", "given")),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("objective", JUDGES, ids=repr)
def test_judges_take_the_same_update_in_any_split(objective: Any, batch: Any, gradient: Any) -> None:
    pairs = labelled(batch, 5)
    whole = gradient(objective, Scorer(), pairs)
    parts = gradient(objective, Scorer(), pairs, [pairs[:2], pairs[2:4], pairs[4:]])
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    metrics = [
        Role("reward", Scorer(), RoleSettings(Adam(1e-2), micro_batch=rows)).update(pairs, objective)
        for rows in (None, 2)
    ]
    torch.testing.assert_close(metrics[1], metrics[0], atol=1e-5, rtol=1e-4)


def test_coins_are_fair_and_belong_to_the_pair(batch: Any) -> None:
    pairs = Preferences(chosen=batch([1, 2, 3, 4] * 500, seed=5), rejected=batch([4, 3, 2, 1] * 500, seed=6))
    flips = coins(pairs)
    assert abs(float(flips.float().mean()) - 0.5) < 0.04
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(coins(pairs[order]), flips[order])
    padded = Preferences(chosen=pad_steps(pairs.chosen, 7), rejected=pad_steps(pairs.rejected, 5))
    assert torch.equal(coins(padded), flips)
    for other in (coins(pairs, salt=1), coins(Preferences(chosen=pairs.rejected, rejected=pairs.chosen))):
        assert abs(float((other == flips).float().mean()) - 0.5) < 0.04


def test_classifier_shows_both_orders(batch: Any) -> None:
    model, pairs = Scorer(), labelled(batch)
    forward = model.logit(pairs.chosen, pairs.rejected).detach()
    backward = model.logit(pairs.rejected, pairs.chosen).detach()
    softplus = nn.functional.softplus
    run = lambda order: PairClassifier(order)(model, pairs)
    torch.testing.assert_close(run("given")[0].detach(), softplus(-forward).mean())
    both, metrics = run("both")
    torch.testing.assert_close(both.detach(), 0.5 * (softplus(-forward) + softplus(backward)).mean())
    torch.testing.assert_close(metrics["first_bias"], 0.5 * (forward + backward).mean())
    logit = 0.5 * (forward - backward)
    loss, metrics = run("antisymmetric")
    torch.testing.assert_close(loss.detach(), softplus(-logit).mean())
    torch.testing.assert_close(metrics["margin"], logit.mean())
    torch.testing.assert_close(metrics["accuracy"], (logit > 0).float().mean())
    random, _ = run("random")
    flips = coins(pairs)
    assert 0 < int(flips.sum()) < 6
    torch.testing.assert_close(
        random.detach(), torch.where(flips, softplus(backward), softplus(-forward)).mean()
    )
    strength = torch.tensor([0.9, 0.5, 1.0, 0.7, 0.6, 0.2])
    soft = Preferences(chosen=pairs.chosen, rejected=pairs.rejected, strength=strength)
    loss, _ = PairClassifier("given")(model, soft)
    expected = (strength * softplus(-forward) + (1 - strength) * softplus(forward)).mean()
    torch.testing.assert_close(loss.detach(), expected)


def test_shown_in_one_order_a_classifier_learns_the_place(batch: Any) -> None:
    """What random order is for: with the chosen always first, a constant is a perfect answer."""

    class Place(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.zeros(()))

        def logit(self, a: Trajectories, b: Trajectories) -> Tensor:
            return self.constant.expand(a.mask.shape[0])

    pairs = Preferences(chosen=batch([1, 2, 3, 4] * 50, seed=5), rejected=batch([4, 3, 2, 1] * 50, seed=6))
    found = {}
    for order in ("given", "random", "both", "antisymmetric"):
        role = Role("reward", Place(), RoleSettings(Adam(0.1)))
        if order != "antisymmetric":
            for _ in range(60):
                role.update(pairs, PairClassifier(order))  # type: ignore[arg-type]
        found[order] = float(role.model.constant)
    assert found["given"] > 2
    assert abs(found["random"]) < 0.3
    assert found["both"] == pytest.approx(0.0, abs=1e-4)
    loss, _ = PairClassifier("antisymmetric")(Place(), pairs)
    assert float(loss) == pytest.approx(math.log(2))


def test_attribute_regression_leaves_out_missing_ratings(batch: Any) -> None:
    model, traj = Scorer(), batch([3, 1, 4, 2])
    nan = float("nan")
    rating = torch.tensor([[1.0, nan, 2.0], [nan, nan, nan], [0.5, 0.2, nan], [nan, 3.0, 1.0]])
    traj.inputs["rating"] = rating
    scores = model.scores(traj).detach()
    terms = [(i, j) for i in range(4) for j in range(3) if not math.isnan(float(rating[i, j]))]
    errors = [float(scores[i, j] - rating[i, j]) for i, j in terms]
    objective = AttributeRegression()
    loss, metrics = objective(model, traj)
    assert int(objective.weight(traj)) == len(errors) == 6
    assert float(loss) == pytest.approx(sum(e * e for e in errors) / 6, rel=1e-5)
    assert float(metrics["error"]) == pytest.approx(sum(map(abs, errors)) / 6, rel=1e-5)
    loss.backward()
    assert model.linear.weight.grad is not None
    assert bool(model.linear.weight.grad.isfinite().all())
    results = []
    for micro_batch in (None, 1):
        role = Role("reward", Scorer(), RoleSettings(Adam(1e-2), micro_batch=micro_batch))
        role.update(traj, objective)
        results.append([p.detach().clone() for p in role.model.parameters()])
    torch.testing.assert_close(results[1], results[0], atol=1e-6, rtol=1e-5)
    with pytest.raises(ShapeError, match="rating"):
        objective(model, batch([2]))
    with pytest.raises(ShapeError, match="the ratings are"):
        objective(Scorer(outputs=2), traj)


def test_judges_refuse_what_makes_no_sense(unchecked: None, batch: Any) -> None:
    with pytest.raises(UsageError, match="loss is 'bt'"):
        RewardPairs("bt")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="order is 'swap'"):
        PairClassifier("swap")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="label_smoothing"):
        RewardPairs(label_smoothing=0.7)

    class Vector(Scorer):
        def score(self, traj: Trajectories) -> Tensor:
            return self.scores(traj)[:-1, 0]

    with pytest.raises(ShapeError, match="score gave"):
        RewardPairs()(Vector(), labelled(batch))


@given(seed=st.integers(0, 200), beta=st.sampled_from([0.05, 0.5, 2.0]))
def test_soft_labels_between_the_hard_ones(seed: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    win, lose, p = torch.randn(3, 8, generator=generator).unbind()
    p = p.sigmoid()
    loss = lambda w, r: pair_losses.sigmoid_loss(w, r, beta)
    soft = pair_losses.soften(loss, win, lose, p)
    ends = torch.stack([loss(win, lose), loss(lose, win)])
    assert bool((soft <= ends.max(0).values + 1e-6).all())
    assert bool((soft >= ends.min(0).values - 1e-6).all())
    # at p = sigma(beta d) the gradient vanishes: the label is what the model says
    difference = (win - lose).requires_grad_()
    zero = torch.zeros_like(difference)
    fixed = (beta * difference.detach()).sigmoid()
    pair_losses.soften(loss, difference, zero, fixed).sum().backward()
    assert difference.grad is not None
    assert float(difference.grad.abs().max()) < 1e-6


def test_options_are_fields_with_defaults() -> None:
    assert all(
        f.default is not dataclasses.MISSING
        for cls in (PairwiseObjective, PlackettLuce, RewardPairs, PairClassifier)
        for f in dataclasses.fields(cls)
    )
