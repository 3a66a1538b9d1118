"""Games of preference: the papers' examples, bounds and rates, exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guerdon.dynamics import games
from guerdon.errors import ShapeError, UsageError

REFERENCE = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
CYCLE = torch.tensor(
    [[0.5, 0.9, 0.2, 0.6], [0.1, 0.5, 0.85, 0.7], [0.8, 0.15, 0.5, 0.6], [0.4, 0.3, 0.4, 0.5]],
    dtype=torch.float64,
)
START = torch.tensor([0.1, 0.1, 0.1, 0.7], dtype=torch.float64)


def random_game(seed: int, answers: int = 5, shape: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """A preference matrix and two policies."""
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(*shape, answers, answers, generator=generator, dtype=torch.float64).triu(1)
    preference = upper + (1 - upper.mT).tril(-1) + 0.5 * torch.eye(answers, dtype=torch.float64)
    draws = torch.randn(2, *shape, answers, generator=generator, dtype=torch.float64)
    first, second = draws.softmax(-1)
    return games.checked(preference), first, second


# --- examples of Munos et al. -----------------------------------------------------------------------------


def test_each_die_beats_the_next_with_five_ninths_and_a_third_of_each_is_unbeaten() -> None:
    dice = games.dice()
    assert [float(dice[i, (i + 1) % 3]) for i in range(3)] == pytest.approx([5 / 9] * 3)
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert float(games.exploitability(dice, third)) == pytest.approx(0, abs=1e-12)
    # another reference leaves the equilibrium where it is, as tau falls
    assert games.equilibrium(dice, REFERENCE, 1e-3) == pytest.approx(third, abs=0.02)
    assert games.dice([(1, 2), (1, 2)])[0, 1] == 0.5  # equal throws count half


@pytest.mark.parametrize("epsilon", [-0.02, -0.001, 0.001, 0.02])
def test_raters_reward_jumps_and_nash_policy_moves_continuously(epsilon: float) -> None:
    preference = games.raters(epsilon)
    nash = torch.tensor([1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2, 1 / 3 - epsilon], dtype=torch.float64)
    assert float(games.exploitability(preference, nash)) == pytest.approx(0, abs=1e-12)
    uniform = torch.full((3,), 1 / 3, dtype=torch.float64)
    assert games.equilibrium(preference, uniform, 1e-3) == pytest.approx(nash, abs=1e-3)
    score = games.fit_bradley_terry(preference)
    greedy = games.tilted(uniform, score, 1e-5)  # always the answer of the largest reward
    assert greedy.argmax() == (0 if epsilon > 0 else 1)
    assert float(greedy.max()) > 0.999
    assert float(games.exploitability(preference, greedy)) > 0.15


def test_constrained_set_the_largest_reward_loses() -> None:
    score = torch.tensor([0.0, math.log(9), math.log(2)], dtype=torch.float64)
    preference = games.from_scores(score)
    assert preference[1, 0] == pytest.approx(0.9)
    assert preference[1, 2] == pytest.approx(9 / 11)
    p = torch.linspace(0, 1 / 3, 101, dtype=torch.float64)
    allowed = torch.stack([2 * p, p, 1 - 3 * p], -1)  # y1 is twice as likely as y2
    best = allowed[(allowed @ score).argmax()]
    third = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    assert best == pytest.approx(torch.tensor([2 / 3, 1 / 3, 0], dtype=torch.float64))
    assert float(games.win_rate(preference, best, third)) == pytest.approx(49 / 99)


# --- what a game is ---------------------------------------------------------------------------------------


def test_preferences_of_both_orders_sum_to_one() -> None:
    with pytest.raises(ShapeError, match="answer 0 beats 1 and that 1 beats 0"):
        games.checked(torch.tensor([[0.5, 0.7], [0.4, 0.5]]))
    with pytest.raises(ShapeError, match="answer 1 beats 1"):
        games.checked(torch.tensor([[0.5, 0.7], [0.3, 0.6]]))
    with pytest.raises(ShapeError, match=r"shape \[2, 3\]"):
        games.checked(torch.zeros(2, 3))
    for game in (games.dice(), games.raters(0.1), games.rock_paper_scissors(), CYCLE):
        assert torch.equal(games.checked(game), game)


@given(seed=st.integers(0, 300), tau=st.sampled_from([0.05, 0.3, 2.0]))
def test_the_value_is_a_half_and_play_is_symmetric(seed: int, tau: float) -> None:
    preference, first, second = random_game(seed)
    reference = torch.full_like(first, 0.2)
    for a, b in ((first, second), (first, first)):
        both = games.regularised_win_rate(preference, a, b, reference, tau) + games.regularised_win_rate(
            preference, b, a, reference, tau
        )
        assert float(both) == pytest.approx(1)
    assert float(games.exploitability(preference, first)) >= 0


@given(seed=st.integers(0, 300), tau=st.sampled_from([0.05, 0.3, 2.0]))
def test_regularised_exploitability_is_what_the_best_response_gains(seed: int, tau: float) -> None:
    preference, policy, reference = random_game(seed)
    gain = games.regularised_exploitability(preference, policy, reference, tau)
    response = games.best_response(preference, policy, reference, tau)
    best = games.regularised_win_rate(preference, response, policy, reference, tau) - 0.5
    assert float(gain) == pytest.approx(float(best), abs=1e-10)
    other = random_game(seed + 1)[1]
    assert float(games.regularised_win_rate(preference, other, policy, reference, tau) - 0.5) <= float(gain)


@given(seed=st.integers(0, 100), tau=st.sampled_from([0.005, 0.05, 1.0, 300.0]))
def test_the_equilibrium_is_its_own_best_response(seed: int, tau: float) -> None:
    preference, reference, _ = random_game(seed, answers=6)
    found = games.equilibrium(preference, reference, tau)
    assert games.best_response(preference, found, reference, tau) == pytest.approx(found, abs=1e-9)
    assert float(games.regularised_exploitability(preference, found, reference, tau)) < 1e-12


def test_equilibrium_needs_regularisation() -> None:
    with pytest.raises(UsageError, match="tau is 0"):
        games.equilibrium(CYCLE, START, 0.0)


def test_many_games_side_by_side_are_those_games() -> None:
    preference, start, reference = random_game(3, shape=(4,))
    policies = games.nash_md(preference, reference, 0.1, 20, start)
    nash = games.equilibrium(preference, reference, 0.1)
    gain = games.regularised_exploitability(preference, policies[-1], reference, 0.1)
    for i in range(4):
        alone = games.nash_md(preference[i], reference[i], 0.1, 20, start[i])
        assert policies[:, i] == pytest.approx(alone)
        assert nash[i] == pytest.approx(games.equilibrium(preference[i], reference[i], 0.1))
        assert float(gain[i]) == pytest.approx(
            float(games.regularised_exploitability(preference[i], alone[-1], reference[i], 0.1))
        )


def test_a_game_may_be_a_function() -> None:
    policies = games.nash_md(lambda policy: CYCLE @ policy, START, 0.1, 30)
    assert policies == pytest.approx(games.nash_md(CYCLE, START, 0.1, 30))


# --- Nash mirror descent ----------------------------------------------------------------------------------


def test_the_first_step_of_nash_md_forgets_the_start_and_no_rate_is_above_it() -> None:
    rates = games.nash_md_rates(0.01, 50)
    assert rates[0] * 0.01 == 1
    assert max(rates) == rates[0]
    assert games.nash_md(CYCLE, START, 0.3, 5) == pytest.approx(
        torch.cat([START[None], games.nash_md(CYCLE, START, 0.3, 5, START.flip(0))[1:]])
    )
    with pytest.raises(UsageError, match="more than all of the reference"):
        games.play(CYCLE, START, [3.0], START, tau=0.5)


@given(seed=st.integers(0, 200), rate=st.sampled_from([0.2, 1.0, 3.0]))
def test_a_step_of_nash_md_maximises_its_stated_objective(seed: int, rate: float) -> None:
    preference, policy, reference = random_game(seed)
    tau = 0.3
    after = games.play(preference, policy, [rate], reference, tau)[1]
    centre = games.mixture(policy, reference, rate * tau)

    def objective(candidate: Tensor) -> float:
        gain = rate * games.win_rate(preference, candidate, centre) - games.kl(candidate, centre)
        return float(gain)

    near = (after.log() + 0.1 * torch.randn(50, 5, dtype=torch.float64)).softmax(-1)
    assert all(objective(candidate) <= objective(after) + 1e-12 for candidate in near)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [(0.1, {100: 2.0e-5, 1000: 8.8e-7, 10_000: 1.0e-8}), (0.01, {100: 2.29, 1000: 0.268, 10_000: 3.96e-4})],
)
def test_nash_md_reaches_the_equilibrium_within_the_bound_in_its_last_policy(
    tau: float, expected: dict[int, float]
) -> None:
    game = games.rock_paper_scissors()
    nash = games.equilibrium(game, REFERENCE, tau)
    distance = games.kl(nash, games.nash_md(game, REFERENCE, tau, 10_000))
    bound = 8 / (tau**2 * (torch.arange(10_001) + 1.0))
    assert bool((distance <= bound).all())
    assert {T: float(distance[T]) for T in expected} == pytest.approx(expected, rel=0.02)
    slope = math.log10(float(distance[10_000] / distance[1000]))
    assert slope <= -0.9


def test_online_mirror_descent_meets_the_policy_itself_from_the_same_centre() -> None:
    policies = games.mirror_descent(CYCLE, START, 0.3, 3)
    rates = games.nash_md_rates(0.3, 3)
    for t, rate in enumerate(rates):
        weight = rate * 0.3
        logits = (1 - weight) * policies[t].log() + weight * START.log() + rate * (CYCLE @ policies[t])
        assert policies[t + 1] == pytest.approx(logits.softmax(-1))
    assert policies[2] != pytest.approx(games.nash_md(CYCLE, START, 0.3, 3)[2], abs=1e-3)
    # its promise is about the average of its policies
    long = games.averages(games.mirror_descent(CYCLE, START, 0.3, 2000))
    gaps = games.regularised_exploitability(CYCLE, long[[5, 2000]], START, 0.3)
    assert float(gaps[1]) < 1e-6 < float(gaps[0])


def test_fictitious_play_settles_in_its_average() -> None:
    game = games.rock_paper_scissors()
    soft = games.fictitious_play(game, REFERENCE, 0.1, 3000)[-1]
    assert float(games.regularised_exploitability(game, soft, REFERENCE, 0.1)) < 1e-3
    pure = games.fictitious_play(game, REFERENCE, 0.0, 3000)[-1]
    assert float(games.exploitability(game, pure)) < 0.05


def test_unregularised_self_play_cycles_in_its_last_policy_and_settles_in_its_average() -> None:
    game = games.rock_paper_scissors()
    policies = games.multiplicative_weights(game, REFERENCE, 0.5, 3000)
    assert float(games.exploitability(game, policies[-1])) > 0.3
    assert float(games.exploitability(game, games.averages(policies)[-2])) < 0.02


# --- direct Nash optimisation -----------------------------------------------------------------------------


def test_direct_nash_improves_in_every_step_by_at_least_its_own_divergence() -> None:
    policies = games.direct_nash(CYCLE, START, 0.5, 200)
    gain = games.win_rate(CYCLE, policies[1:], policies[:-1])
    assert bool((gain >= 0.5 + 0.5 * games.kl(policies[1:], policies[:-1]) - 1e-12).all())


def test_the_average_of_direct_nash_settles_and_its_last_policy_cycles() -> None:
    policies = games.direct_nash(CYCLE, START, 0.5, 200)
    gaps = games.exploitability(CYCLE, games.averages(policies))
    assert [float(gaps[T - 1]) for T in (5, 20, 100, 200)] == pytest.approx(
        [0.101, 0.050, 0.025, 0.017], abs=6e-4
    )
    assert float(games.exploitability(CYCLE, policies[200])) == pytest.approx(0.40, abs=0.01)


def test_regularised_direct_nash_settles_in_its_last_policy() -> None:
    eta, tau = 2.0, 0.1
    policies = games.direct_nash(CYCLE, START, eta, 400, START, tau)
    # the paper's powers of policy and reference
    centre = (1 - tau / eta) * policies[0].log() + tau / eta * START.log()
    first = (centre + games.wins(CYCLE, centre.softmax(-1)) / eta).softmax(-1)
    assert policies[1] == pytest.approx(first)
    nash = games.equilibrium(CYCLE, START, tau)
    assert float(games.kl(nash, policies[-1])) < 0.01
    assert float(games.kl(nash, games.direct_nash(CYCLE, START, eta, 400)[-1])) > 0.1


def test_direct_nash_is_self_play_with_one_over_eta() -> None:
    assert games.direct_nash(CYCLE, START, 0.5, 10) == pytest.approx(
        games.multiplicative_weights(CYCLE, START, 2.0, 10)
    )


def test_a_reward_gets_worse_the_more_it_is_trusted() -> None:
    score = games.fit_bradley_terry(CYCLE)
    gaps = {
        beta: float(games.exploitability(CYCLE, games.tilted(START, score, beta)))
        for beta in (0.5, 0.1, 0.02)
    }
    assert gaps == pytest.approx({0.5: 0.074, 0.1: 0.096, 0.02: 0.253}, abs=6e-4)


# --- Bradley-Terry ----------------------------------------------------------------------------------------


def test_bradley_terry_scores_are_recovered() -> None:
    score = torch.tensor([0.3, -1.0, 2.0, -1.3], dtype=torch.float64)
    game = games.from_scores(score)
    assert games.fit_bradley_terry(game) == pytest.approx(score)
    assert games.fit_bradley_terry(game, START) == pytest.approx(score)  # whoever draws the pairs


@pytest.mark.parametrize("weight", [None, START])
def test_bradley_terry_fit_is_where_the_likelihood_is_flat(weight: Tensor | None) -> None:
    score = games.fit_bradley_terry(CYCLE, weight).requires_grad_()
    drawn = torch.full((4,), 0.25, dtype=torch.float64) if weight is None else weight
    model = (score[:, None] - score).sigmoid()
    (drawn[:, None] * drawn * CYCLE * model.log()).sum().backward()
    assert score.grad is not None
    assert float(score.grad.abs().max()) < 1e-10


def test_no_scores_fit_an_answer_that_always_wins() -> None:
    with pytest.raises(UsageError, match="no finite scores"):
        games.fit_bradley_terry(torch.tensor([[0.5, 1.0], [0.0, 0.5]]))
