"""Exact figures of enumerable policies, against brute force and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from guerdon.errors import UsageError
from guerdon.evaluation import enumerable as exact
from guerdon.evaluation.enumerable import BradleyTerryOracle, CyclicOracle
from guerdon.randomness import row_seeds
from guerdon.tasks.tokens import tiny_llama, tokenizer

P, N = 3, 40


def tables(seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and rewards ``[P, N]``."""
    generator = torch.Generator().manual_seed(seed)
    logits, reward = torch.randn(2, P, N, generator=generator, dtype=torch.float64)
    return (spread * logits).log_softmax(-1), reward


def test_log_probs_equal_those_of_every_answer_one_by_one():
    from guerdon.policies.language import LanguagePolicy

    letters = [2, 3, 4]
    allowed = torch.zeros(10, dtype=torch.bool)
    allowed[letters] = True
    policy = LanguagePolicy(tiny_llama(width=16), tokenizer(), max_new_tokens=3, allowed=allowed).eval()
    prompts = [[5], [6, 7]]  # the second one longer: rows are padded
    table = exact.log_probs(policy, exact.prefixes(policy, prompts, letters, 3), letters)
    every = exact.answers(letters, 3).tolist()
    assert every[1] == [2, 2, 3]
    for p, prompt in enumerate(prompts):
        traj = policy.collate([prompt] * len(every), every)
        torch.testing.assert_close(
            table[p].float(), policy.log_prob(traj).sum(1).detach(), atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(table.logsumexp(-1), torch.zeros(2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_log_probs_take_a_temperature_and_name_token_by_token():
    from guerdon.policies.language import LanguagePolicy

    policy = LanguagePolicy(tiny_llama(width=16), tokenizer(), max_new_tokens=2).eval()
    letters = [2, 3, 4]
    rows = exact.prefixes(policy, [[5]], letters, 2)
    cold, hot = (exact.step_log_probs(policy, rows, letters, t) for t in (0.5, 2.0))
    assert cold.shape == (1, 9, 2)
    assert float(rows.inputs["temperature"][0]) == 1.0, "the rows were changed"
    assert cold.std() > 2 * hot.std()
    # without `allowed` some probability goes to other tokens
    assert exact.log_probs(policy, rows, letters).logsumexp(-1).item() < -1e-3


def test_expectation_kl_and_entropy_of_a_coin():
    coin = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    fair = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    assert exact.expected(coin, torch.tensor([[1.0, 3.0]])).item() == pytest.approx(2.5)
    assert exact.kl(coin, fair).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert exact.entropy(fair).item() == pytest.approx(math.log(2))
    assert exact.total_variation(coin, fair).item() == pytest.approx(0.25)
    certain = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    assert exact.kl(certain, fair).item() == pytest.approx(math.log(2))
    assert exact.kl(fair, certain).item() == math.inf


def test_optimum_maximises_the_objective_and_reaches_beta_log_z():
    log_ref, reward = tables()
    best = exact.optimum(log_ref, reward, 0.3)
    value = exact.objective(best, log_ref, reward, 0.3)
    torch.testing.assert_close(value, exact.best_objective(log_ref, reward, 0.3))
    for seed in range(5):
        other = (best + 0.1 * tables(seed + 1)[1]).log_softmax(-1)
        assert (exact.objective(other, log_ref, reward, 0.3) < value).all()
    assert exact.gap_closed(best, log_ref, reward, 0.3) == pytest.approx(1)
    assert exact.gap_closed(log_ref, log_ref, reward, 0.3) == pytest.approx(0)


def test_rewards_that_differ_by_the_prompt_have_the_same_optimum():
    log_ref, reward = tables()
    shifted = reward + torch.tensor([[1.0], [-3.0], [7.0]])
    torch.testing.assert_close(exact.optimum(log_ref, reward, 0.5), exact.optimum(log_ref, shifted, 0.5))


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
def test_bradley_terry_wins_equal_the_matrix_of_pairs(spread):
    log_p, reward = tables(3)
    oracle = BradleyTerryOracle(spread * reward)
    matrix = torch.sigmoid(spread * (reward[:, :, None] - reward[:, None, :]))
    expected = (matrix @ log_p.exp()[:, :, None]).squeeze(-1)
    torch.testing.assert_close(oracle.beats(log_p), expected, atol=1e-10, rtol=0)
    rows = torch.tensor([0, 2, 1]), torch.tensor([4, 5, 6]), torch.tensor([7, 8, 9])
    torch.testing.assert_close(oracle.compare(*rows), matrix[rows])


def test_rewards_that_are_all_equal_tie():
    log_p, _ = tables(3)
    torch.testing.assert_close(
        BradleyTerryOracle(torch.ones(P, N)).beats(log_p), torch.full((P, N), 0.5).double()
    )


def cyclic(seed: int = 4) -> tuple[CyclicOracle, torch.Tensor]:
    """An oracle and its preferences as a matrix ``[P, N, N]``, written as a loop."""
    _, quality = tables(seed)
    classes = torch.randint(3, (P, N), generator=torch.Generator().manual_seed(seed))
    matrix = torch.empty(P, N, N, dtype=torch.float64)
    for p in range(P):
        for i in range(N):
            for k in range(N):
                a, b = int(classes[p, i]), int(classes[p, k])
                if a == b:
                    matrix[p, i, k] = torch.sigmoid(quality[p, i] - quality[p, k])
                else:
                    matrix[p, i, k] = 0.8 if b == (a + 1) % 3 else 0.2
    return CyclicOracle(classes, quality), matrix


def test_cyclic_preferences_equal_the_matrix_and_are_antisymmetric():
    oracle, matrix = cyclic()
    log_p, _ = tables(5)
    log_q, _ = tables(6)
    torch.testing.assert_close(matrix + matrix.transpose(1, 2), torch.ones_like(matrix))
    torch.testing.assert_close(oracle.beats(log_p), (matrix @ log_p.exp()[:, :, None]).squeeze(-1))
    torch.testing.assert_close(exact.win_rate(log_p, log_q, oracle) + exact.win_rate(log_q, log_p, oracle),
                               torch.ones(P, dtype=torch.float64))  # fmt: skip
    torch.testing.assert_close(exact.win_rate(log_p, log_p, oracle), torch.full((P,), 0.5).double())
    at = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 3]), torch.tensor([5, 9, 12])
    torch.testing.assert_close(oracle.compare(*at), matrix[at])


def test_two_classes_make_no_circle():
    with pytest.raises(UsageError, match="three or more"):
        CyclicOracle(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4), count=2)


def test_exploitability_is_what_the_best_answer_wins():
    oracle, matrix = cyclic()
    log_p, _ = tables(5)
    best = (matrix @ log_p.exp()[:, :, None]).squeeze(-1).max(-1).values
    torch.testing.assert_close(exact.exploitability(log_p, oracle), best - 0.5)


def test_regularised_exploitability_is_the_gain_of_the_best_response():
    oracle, _ = cyclic()
    log_p, _ = tables(5)
    log_ref, _ = tables(7)
    tau = 0.1
    best = exact.best_response(log_p, log_ref, oracle, tau)
    gain = (
        exact.win_rate(best, log_p, oracle) - tau * exact.kl(best, log_ref) + tau * exact.kl(log_p, log_ref)
    )
    torch.testing.assert_close(exact.regularised_exploitability(log_p, log_ref, oracle, tau), gain - 0.5)


@pytest.mark.parametrize("tau", [0.5, 0.05])
def test_equilibrium_cannot_be_exploited(tau):
    oracle, _ = cyclic()
    log_ref, _ = tables(8)
    found = exact.equilibrium(log_ref, oracle, tau)
    assert exact.regularised_exploitability(found, log_ref, oracle, tau).max() < 1e-9
    assert exact.regularised_exploitability(log_ref, log_ref, oracle, tau).min() > 1e-4


def test_equilibrium_of_rock_paper_scissors_without_a_lean_is_uniform():
    oracle = CyclicOracle(torch.arange(3)[None], torch.zeros(1, 3))
    found = exact.equilibrium(torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log(), oracle, 1e-3)
    torch.testing.assert_close(found.exp(), torch.full((1, 3), 1 / 3).double(), atol=0.01, rtol=0)


def test_best_of_n_has_the_share_of_the_highest_draw():
    log_p = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    found = exact.best_of_n(log_p, torch.tensor([[1.0, 0.0, 2.0]]), 3).exp()
    # the middle one only when all draws are; the last unless none is
    torch.testing.assert_close(found, torch.tensor([[0.7**3 - 0.5**3, 0.5**3, 1 - 0.7**3]]).double())


def test_restricted_policies_and_masses():
    log_p, _ = tables()
    members = torch.arange(N).expand(P, N) < 10
    inside = exact.restricted(log_p, members)
    torch.testing.assert_close(exact.mass(inside, members), torch.ones(P).double())
    torch.testing.assert_close(exact.kl(inside, log_p), -exact.mass(log_p, members).log())
    torch.testing.assert_close(exact.density_ratio(inside, log_p), 1 / exact.mass(log_p, members))


def test_coverage_grows_with_the_ball_up_to_the_global_one():
    log_ref, _ = tables(2, spread=2.0)
    whole = exact.coverage_coefficient(log_ref)
    torch.testing.assert_close(whole, (-log_ref.min(-1).values).exp())
    values = torch.stack([exact.coverage_coefficient(log_ref, r) for r in (0.0, 0.1, 1.0, 100.0)])
    assert (values[1:] >= values[:-1] - 1e-9).all()
    torch.testing.assert_close(values[0], torch.ones(P).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(values[-1], whole)
    # nobody inside the ball does worse: random policies of that divergence stay below
    for seed in range(20):
        other = (log_ref + tables(seed, 0.4)[1]).log_softmax(-1)
        radius = exact.kl(other, log_ref).max().item()
        assert (
            exact.density_ratio(other, log_ref) <= exact.coverage_coefficient(log_ref, radius) + 1e-6
        ).all()


def test_token_optimum_is_the_sequence_optimum():
    generator = torch.Generator().manual_seed(0)
    size, steps, beta = 3, 4, 0.5
    count = size**steps
    # a table of next-token log-probabilities and of rewards for every prefix
    steps_log, steps_reward = [], []
    for t in range(steps):
        shape = (2, size**t, size)
        log_p = torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(-1)
        gain = torch.randn(shape, generator=generator, dtype=torch.float64)
        for out, values in ((steps_log, log_p), (steps_reward, gain)):
            out.append(values.reshape(2, -1, 1).expand(-1, -1, count // size ** (t + 1)).reshape(2, count))
    log_ref, reward = torch.stack(steps_log, -1), torch.stack(steps_reward, -1)
    value, advantage = exact.token_optimum(log_ref, reward, beta, size)
    by_token = (log_ref + advantage / beta).sum(-1)
    torch.testing.assert_close(by_token, exact.optimum(log_ref.sum(-1), reward.sum(-1), beta))
    torch.testing.assert_close(
        value[:, 0, 0], exact.best_objective(log_ref.sum(-1), reward.sum(-1), beta), atol=1e-10, rtol=0
    )


def test_samples_follow_the_table():
    """What the sampler draws has the enumerated probabilities."""
    from guerdon.policies.language import LanguagePolicy

    allowed = torch.zeros(10, dtype=torch.bool)
    allowed[[2, 3]] = True
    policy = LanguagePolicy(tiny_llama(width=16, seed=5), tokenizer(), max_new_tokens=2, allowed=allowed)
    table = exact.log_probs(policy.eval(), exact.prefixes(policy, [[4]], [2, 3], 2), [2, 3])
    traj = policy.sample(["c"] * 2000, row_seeds(0, 0, 2000))
    token = traj.inputs["step", "token"] - 2
    share = torch.bincount(token[:, 0] * 2 + token[:, 1], minlength=4) / 2000
    error = (table.exp() * (1 - table.exp()) / 2000).sqrt()[0]
    assert ((share - table.exp()[0]).abs() < 4 * error).all()
