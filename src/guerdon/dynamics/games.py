"""Games of preference: which mixture of answers does no other mixture beat, and which rules of play find it.

An answer has no score here, only a chance to be preferred to each other answer: ``preference[i, j]`` is the
probability that answer ``i`` beats ``j``, and ``preference[i, j] + preference[j, i] = 1``. Such preferences may be
cyclic, so that no reward expresses them. A policy is a distribution over the ``K`` answers; two policies play

    P(a > b) = sum_ij a_i b_j preference[i, j],

a symmetric game of value 1/2. With a reference ``mu`` and ``tau > 0`` it becomes (Munos et al., 2024)

    P_tau(a > b) = P(a > b) - tau KL(a, mu) + tau KL(b, mu),

whose equilibrium is unique. All rules of play of this module are exact: they know every win rate. Probabilities are
float64 ``[..., K]`` (any number of games side by side), with full support unless said otherwise; ``preference`` is
``[..., K, K]``, or a function that maps a policy ``[..., K]`` to the win rates ``[..., K]`` of all answers against it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from guerdon.errors import ShapeError, UsageError

Preference = Tensor | Callable[[Tensor], Tensor]
Opponent = Literal["mixture", "self"]


# --- games ------------------------------------------------------------------------------------------------


def checked(preference: Float[Tensor, "*game answer other"]) -> Float[Tensor, "*game answer other"]:
    """``preference`` in float64. Raises `ShapeError` if it is not square, or where the two orders of a pair do not
    sum to one (an answer ties with itself)."""
    preference = preference.double()
    if preference.ndim < 2 or preference.shape[-1] != preference.shape[-2]:
        raise ShapeError(f"the preferences have shape {list(preference.shape)}; they are [..., K, K]")
    wrong = ((preference + preference.mT - 1).abs() > 1e-6) | (preference < 0) | (preference > 1)
    if bool(wrong.any()):
        *_, i, j = wrong.nonzero()[0].tolist()
        raise ShapeError(
            f"the chances that answer {i} beats {j} and that {j} beats {i} do not sum to one; "
            "average the judge over both orders"
        )
    return preference


def rock_paper_scissors() -> Float[Tensor, "answer other"]:
    """Three answers, each of which always beats the one before it."""
    return torch.tensor([[0.5, 0.0, 1.0], [1.0, 0.5, 0.0], [0.0, 1.0, 0.5]], dtype=torch.float64)


def dice(
    faces: Sequence[Sequence[float]] = ((2, 4, 9), (1, 6, 8), (3, 5, 7)),
) -> Float[Tensor, "answer other"]:
    """The chance that a throw of one die is higher than that of another (ties count half).

    With the three dice of Munos et al. (2024) each beats the next with 5/9.
    """
    throws = [torch.as_tensor(die, dtype=torch.float64) for die in faces]
    rows = [[_higher(a, b) for b in throws] for a in throws]
    return torch.tensor(rows, dtype=torch.float64)


def _higher(first: Tensor, second: Tensor) -> float:
    difference = first[:, None] - second
    return float(((difference > 0).double() + 0.5 * (difference == 0).double()).mean())


def raters(epsilon: float = 0.0) -> Float[Tensor, "answer other"]:
    """Three kinds of people who each mind one pair of answers and do not tell the others apart (Munos et al., 2024):
    a share ``1/3 - epsilon`` holds y2 > y1, ``1/3 + epsilon/2`` each y1 > y3 and y3 > y2."""
    shares = (1 / 3 - epsilon, 1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2)
    preference = torch.full((3, 3), 0.5, dtype=torch.float64)
    for share, (better, worse) in zip(shares, ((1, 0), (0, 2), (2, 1)), strict=True):
        preference[better, worse] += 0.5 * share
        preference[worse, better] -= 0.5 * share
    return preference


def from_scores(score: Float[Tensor, "*game answer"]) -> Float[Tensor, "*game answer other"]:
    """A Bradley-Terry game: ``i`` beats ``j`` with the sigmoid of the difference of their scores (in nats)."""
    score = score.double()
    return (score[..., :, None] - score[..., None, :]).sigmoid()


# --- measures ---------------------------------------------------------------------------------------------


def wins(preference: Preference, opponent: Float[Tensor, "*game answer"]) -> Float[Tensor, "*game answer"]:
    """How often each answer beats an answer of ``opponent``."""
    if callable(preference):
        return preference(opponent)
    return (preference @ opponent[..., None])[..., 0]


def win_rate(
    preference: Preference, first: Float[Tensor, "*game answer"], second: Float[Tensor, "*game answer"]
) -> Float[Tensor, " *game"]:
    """``P(first > second)``."""
    return (first * wins(preference, second)).sum(-1)


def kl(
    first: Float[Tensor, "*game answer"], second: Float[Tensor, "*game answer"]
) -> Float[Tensor, " *game"]:
    """KL(first || second) in nats; answers that ``first`` never gives count nothing."""
    return torch.special.xlogy(first, first / second).sum(-1)


def regularised_win_rate(
    preference: Preference,
    first: Float[Tensor, "*game answer"],
    second: Float[Tensor, "*game answer"],
    reference: Float[Tensor, "*game answer"],
    tau: float,
) -> Float[Tensor, " *game"]:
    """``P_tau(first > second)`` of the module."""
    return win_rate(preference, first, second) - tau * kl(first, reference) + tau * kl(second, reference)


def exploitability(preference: Preference, policy: Float[Tensor, "*game answer"]) -> Float[Tensor, " *game"]:
    """``max_y P(y > policy) - 1/2``: zero at the equilibrium, at most 1/2."""
    return wins(preference, policy).amax(-1) - 0.5


def regularised_exploitability(
    preference: Preference,
    policy: Float[Tensor, "*game answer"],
    reference: Float[Tensor, "*game answer"],
    tau: float,
) -> Float[Tensor, " *game"]:
    """``max_a P_tau(a > policy) - 1/2``, which is
    ``tau log sum_y mu(y) exp(P(y > policy) / tau) + tau KL(policy, mu) - 1/2``."""
    gain = tau * (reference.log() + wins(preference, policy) / tau).logsumexp(-1)
    return gain + tau * kl(policy, reference) - 0.5


def best_response(
    preference: Preference,
    opponent: Float[Tensor, "*game answer"],
    reference: Float[Tensor, "*game answer"],
    tau: float,
) -> Float[Tensor, "*game answer"]:
    """The policy of the largest ``P_tau`` against ``opponent``: ``mu exp(P(y > opponent) / tau) / Z``."""
    return (reference.log() + wins(preference, opponent) / tau).softmax(-1)


def mixture(
    policy: Float[Tensor, "*game answer"], reference: Float[Tensor, "*game answer"], weight: float
) -> Float[Tensor, "*game answer"]:
    """The geometric mixture ``policy^(1 - weight) reference^weight / Z``."""
    return ((1 - weight) * policy.log() + weight * reference.log()).softmax(-1)


# --- the equilibrium --------------------------------------------------------------------------------------


def equilibrium(
    preference: Float[Tensor, "*game answer other"], reference: Float[Tensor, "*game answer"], tau: float
) -> Float[Tensor, "*game answer"]:
    """The equilibrium of ``P_tau``: the policy that is its own best response, to machine precision.

    Newton's method on ``log policy``, from the equilibrium of a large ``tau`` (close to the reference) down to the
    one asked for. The linear systems are never singular: ``preference - 1/2`` is antisymmetric, so their eigenvalues
    have real part 1. For few answers (a system of K equations a step); ``tau`` well above 1e-4.

    Raises `UsageError` if ``tau`` is not positive: without regularisation there may be many equilibria.
    """
    if tau <= 0:
        raise UsageError(f"tau is {tau}; the equilibrium is unique for a positive one only")
    preference = checked(preference)
    start = reference.double().log()
    log_policy, identity = start, torch.eye(preference.shape[-1], dtype=torch.float64)
    hot = max(tau, 100.0)
    for i in range(200):
        temperature = tau * (hot / tau) ** (1 - i / 199)
        for _ in range(30):
            policy = log_policy.softmax(-1)
            error = log_policy - start - wins(preference, policy) / temperature
            error = error - error.mean(-1, keepdim=True)
            slope = policy[..., :, None] * (identity - policy[..., None, :])
            step = torch.linalg.solve(identity - preference @ slope / temperature, error[..., None])[..., 0]
            log_policy = log_policy - step
            if float(step.abs().max()) < 1e-10:  # it converges quadratically
                break
    return log_policy.softmax(-1)


# --- rules of play ----------------------------------------------------------------------------------------


def play(
    preference: Preference,
    start: Float[Tensor, "*game answer"],
    rates: Sequence[float],
    reference: Float[Tensor, "*game answer"] | None = None,
    tau: float = 0.0,
    opponent: Opponent = "mixture",
) -> Float[Tensor, "time *game answer"]:
    """All policies from ``start`` on: ``[1 + len(rates), ..., K]``.

    A step with rate ``eta`` goes from the centre ``c``, the geometric mixture of the policy with a share ``eta tau`` of
    the reference, to the policy that maximises ``eta P(policy > opponent) - KL(policy, c)``, which is
    ``c exp(eta P(y > opponent)) / Z``. The opponent is the centre ("mixture") or the policy itself ("self").

    Raises `UsageError` where ``eta tau`` exceeds 1: the mixture would leave the simplex.
    """
    reference = start if reference is None else reference
    policies = [start]
    for rate in rates:
        if rate * tau > 1 + 1e-12:
            raise UsageError(f"a rate of {rate:g} with tau {tau:g} mixes in more than all of the reference")
        centre = mixture(policies[-1], reference, rate * tau)
        met = centre if opponent == "mixture" else policies[-1]
        policies.append((centre.log() + rate * wins(preference, met)).softmax(-1))
    return torch.stack(policies)


def nash_md_rates(tau: float, steps: int) -> list[float]:
    """``2 / (tau (t + 2))`` for t from 0: the first step forgets the start, the mixture with the reference fades."""
    return [2 / (tau * (t + 2)) for t in range(steps)]


def nash_md(
    preference: Preference,
    reference: Float[Tensor, "*game answer"],
    tau: float,
    steps: int,
    start: Float[Tensor, "*game answer"] | None = None,
) -> Float[Tensor, "time *game answer"]:
    """Nash mirror descent (Munos et al., 2024): the opponent is the mixture with the reference. With its rates the
    LAST policy after T steps is within ``8 / (tau^2 (T + 1))`` nats of the equilibrium."""
    begin = reference if start is None else start
    return play(preference, begin, nash_md_rates(tau, steps), reference, tau)


def mirror_descent(
    preference: Preference, reference: Float[Tensor, "*game answer"], tau: float, steps: int
) -> Float[Tensor, "time *game answer"]:
    """Online mirror descent beside `nash_md`: the same centre and rates, but the opponent is the policy itself."""
    return play(preference, reference, nash_md_rates(tau, steps), reference, tau, opponent="self")


def multiplicative_weights(
    preference: Preference, start: Float[Tensor, "*game answer"], rate: float, steps: int
) -> Float[Tensor, "time *game answer"]:
    """Self-play without regularisation; on a cyclic game only the average of its policies settles."""
    return play(preference, start, [rate] * steps)


def direct_nash(
    preference: Preference,
    start: Float[Tensor, "*game answer"],
    eta: float,
    steps: int,
    reference: Float[Tensor, "*game answer"] | None = None,
    tau: float = 0.0,
) -> Float[Tensor, "time *game answer"]:
    """Direct Nash optimisation (Rosset et al., 2024), its regression solved exactly: soft policy iteration
    ``policy exp(r / eta) / Z`` on the win rate ``r`` against the policy itself. That is `multiplicative_weights` with
    the rate ``1 / eta``. With ``tau`` its regularised form, which is mirror descent against the mixture at this
    constant rate: the paper's powers ``1 - tau / eta`` and ``tau / eta`` of policy and reference."""
    return play(preference, start, [1 / eta] * steps, reference, tau)


def fictitious_play(
    preference: Preference, reference: Float[Tensor, "*game answer"], tau: float, steps: int
) -> Float[Tensor, "time *game answer"]:
    """Each step plays the best response to the average of all before (for ``tau = 0`` the answer that wins most,
    probability one). Returns the averages, which begin with the reference."""
    average, averages = reference, [reference]
    for t in range(steps):
        if tau > 0:
            response = best_response(preference, average, reference, tau)
        else:
            rates = wins(preference, average)
            response = torch.nn.functional.one_hot(rates.argmax(-1), rates.shape[-1]).to(rates.dtype)
        average = average + (response - average) / (t + 2)
        averages.append(average)
    return torch.stack(averages)


def averages(policies: Float[Tensor, "time *game answer"]) -> Float[Tensor, "time *game answer"]:
    """Row ``t``: the uniform mixture of the policies 0 to t."""
    count = torch.arange(1, len(policies) + 1, dtype=policies.dtype)
    return policies.cumsum(0) / count.view(-1, *[1] * (policies.ndim - 1))


# --- the way through a reward -----------------------------------------------------------------------------


def fit_bradley_terry(
    preference: Float[Tensor, "answer other"],
    weight: Float[Tensor, " answer"] | None = None,
    tolerance: float = 1e-12,
) -> Float[Tensor, " answer"]:
    """The scores (mean zero) whose Bradley-Terry model is likeliest when both answers of a pair are drawn from
    ``weight`` (uniform without it) and labelled by ``preference``: what endless pairs would teach a reward model.

    Raises `UsageError` where no finite scores are best (an answer that always wins).
    """
    preference = checked(preference)
    count = preference.shape[-1]
    weight = torch.full((count,), 1 / count, dtype=torch.float64) if weight is None else weight.double()
    pairs = weight[:, None] * weight
    score = torch.zeros(count, dtype=torch.float64)
    for _ in range(200):
        model = from_scores(score)
        gradient = (pairs * (preference - model)).sum(1)
        curved = pairs * model * (1 - model)
        # the mean of the scores is free: the added rank one fixes it at zero
        slope = torch.diag(curved.sum(1)) - curved + torch.ones_like(curved) / count**2
        step, failed = torch.linalg.solve_ex(slope, gradient)
        if failed or not bool(step.isfinite().all()):
            break
        score = score + step * min(1.0, 2.0 / float(step.abs().max().clamp(min=1e-12)))
        if float(step.abs().max()) < tolerance:
            return score - score.mean()
    raise UsageError(
        "no finite scores fit these preferences best: an answer, or a group of them, always wins"
    )


def tilted(
    reference: Float[Tensor, "*game answer"], score: Float[Tensor, "*game answer"], tau: float
) -> Float[Tensor, "*game answer"]:
    """What reinforcement learning from a reward converges to: ``mu exp(score / tau) / Z``."""
    return (reference.log() + score / tau).softmax(-1)
