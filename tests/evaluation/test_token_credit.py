"""Token rewards, soft values and the localisation of planted errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guerdon.errors import ShapeError
from guerdon.evaluation import enumerable
from guerdon.evaluation.token_credit import heat_map, localisation, soft_values, token_rewards
from guerdon.feedback.implicit import ImplicitReward
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.sides import with_reference
from guerdon.policies.language import LanguagePolicy
from guerdon.reproductions import r_to_qstar
from guerdon.tasks import arithmetic
from guerdon.tasks.tokens import tiny_llama, tokenizer


def two() -> tuple[LanguagePolicy, LanguagePolicy]:
    return LanguagePolicy(tiny_llama(seed=1), tokenizer()), LanguagePolicy(tiny_llama(seed=0), tokenizer())


def test_token_rewards_sum_to_the_answers_implicit_reward() -> None:
    policy, reference = two()
    traj = policy.encode(["a", "b c"], ["a b c", "d"])
    tokens = token_rewards(policy, reference, traj, beta=0.3)
    whole = ImplicitReward(policy, reference, 0.3)
    assert torch.allclose(tokens.sum(1), whole.score(traj))
    assert (tokens[~traj.mask] == 0).all()
    assert torch.equal(ImplicitReward(policy, reference, 0.3, dense=True).score(traj), tokens)


def test_the_margin_of_dpo_is_the_difference_of_summed_token_rewards() -> None:
    """Bandit DPO and token DPO are the same number."""
    from guerdon.batch import Preferences

    policy, reference = two()
    pairs = Preferences(
        chosen=policy.encode(["a"], ["a b c"]), rejected=policy.encode(["a"], ["d"]), batch_size=[1]
    )
    _, metrics = PairwiseObjective(beta=0.3)(policy, with_reference(pairs, reference))
    sums = [token_rewards(policy, reference, side, 0.3).sum() for side in (pairs.chosen, pairs.rejected)]
    assert torch.allclose(metrics["margin"], sums[0] - sums[1], atol=1e-6)
    judge = ImplicitReward(policy, reference, 0.3)
    assert torch.allclose(judge.compare(pairs.chosen, pairs.rejected), torch.sigmoid(sums[0] - sums[1]))


def test_q_minus_v_is_beta_log_pi() -> None:
    policy, _ = two()
    traj = policy.encode(["a", "b"], ["a b", "c d"])
    logits, token = policy.distribution(traj)["logits"], traj.inputs["step", "token"]
    q, v, advantage = soft_values(logits, token, 0.3)
    assert torch.allclose(q - v, advantage)
    assert torch.allclose(torch.where(traj.mask, advantage, 0.0), 0.3 * policy.log_prob(traj), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_exact_identities_hold(seed: int, tmp_path: Path) -> None:
    found = r_to_qstar.exact(seed, tmp_path)
    assert max(found["policies"], found["returns"], found["shaping"]) < 1e-10
    assert found["same_best"]
    assert found["implicit_under_reference"] < 0 < found["implicit_under_optimum"]


def test_the_value_after_the_last_token_is_zero() -> None:
    """With no reward but on the last token, the advantage there is the reward minus the soft mean."""
    step_log_ref = torch.full((1, 4, 2), 0.5, dtype=torch.float64).log()
    reward = torch.zeros(1, 4, 2, dtype=torch.float64)
    reward[0, :, 1] = torch.tensor([1.0, 0.0, 2.0, 0.0])
    value, advantage = enumerable.token_optimum(step_log_ref, reward, 1.0, 2)
    expected = torch.log(0.5 * torch.tensor([1.0, 0.0]).double().exp().sum())
    assert torch.allclose(value[0, 0, 1], expected)
    assert torch.allclose(advantage[0, 0, 1], 1.0 - expected)


def test_localisation_counts_places_from_below() -> None:
    reward = torch.tensor([[0.0, -2.0, 1.0, 9.0], [0.0, -1.0, -3.0, 1.0]])
    mask = torch.tensor([[True, True, True, False], [True] * 4])
    found = localisation(reward, mask, torch.tensor([1, 1]))
    assert found["lowest"] == 0.5
    assert found["rank"] == 1.5
    assert found["auroc"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["chance"] == pytest.approx((1 / 3 + 1 / 4) / 2)
    with pytest.raises(ShapeError, match="planted token 3 of row 0"):
        localisation(reward, mask, torch.tensor([3, 0]))


def test_planted_errors_differ_in_one_result() -> None:
    policy = arithmetic.fresh_policy(0, width=16, layers=1)
    pairs, place = arithmetic.pairs(policy, 50, seed=0)
    right, wrong = (side.inputs["step", "token"] for side in (pairs.chosen, pairs.rejected))
    differ = right != wrong
    assert (differ.sum(1) == 1).all()
    assert torch.equal(differ.int().argmax(1), place)
    rows = torch.arange(50)
    operands = right[rows, place - 4] + right[rows, place - 2] - 2 * arithmetic.NUMBER
    assert torch.equal(right[rows, place] - arithmetic.NUMBER, operands)


def test_the_heat_map_is_a_picture(tmp_path: Path) -> None:
    heat_map([["a", "bb"], ["c"]], [[0.1, -1.0], [0.5]], tmp_path / "map.png", ["first", "second"])
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
