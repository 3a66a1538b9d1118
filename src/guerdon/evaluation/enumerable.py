"""Exact figures of policies whose answers can all be enumerated.

A policy over ``N`` answers to each of ``P`` prompts is a table of log-probabilities ``[P, N]`` in float64; `log_probs`
reads it off a language model through the model's own forward pass. Everything else is arithmetic on tables: expected
reward, KL divergence, the optimum of the KL-regularised objective, win rates, exploitability, coverage. Functions of
tables give one number a prompt, ``[P]``; prompts that are equally likely are averaged with ``.mean()``.

Answers are numbered in lexicographic order: the last token counts fastest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import ShapeError, UsageError
from guerdon.sampling import best_of_n_distribution

Table = Float[Tensor, "prompt answer"]
PerPrompt = Float[Tensor, "prompt"]


# --- reading a policy -------------------------------------------------------------------------------------


def answers(alphabet: Sequence[int], horizon: int) -> Int[Tensor, "answer step"]:
    """``[V**T, T]`` token ids: every answer of ``horizon`` tokens over the alphabet, in lexicographic order."""
    return torch.tensor(list(itertools.product(alphabet, repeat=horizon)), dtype=torch.int64)


def prefixes(
    policy: Any, prompts: Sequence[Sequence[int]], alphabet: Sequence[int], horizon: int
) -> Trajectories:
    """The rows that `log_probs` evaluates: for each prompt (token ids) every beginning of ``horizon - 1`` tokens, with
    any token after it. ``policy.collate`` makes the batch."""
    rows = [[*row, alphabet[0]] for row in answers(alphabet, horizon - 1).tolist()]
    return policy.collate([p for p in prompts for _ in rows], rows * len(prompts))


@torch.no_grad()
def step_log_probs(
    acting: Any, rows: Trajectories, alphabet: Sequence[int], temperature: float | None = None
) -> Float[Tensor, "prompt answer step"]:
    """``[P, N, T]``: the log-probability of each token of each answer given what came before, in float64.

    An answer shares its beginnings with others, so ``P V**(T-1)`` rows (`prefixes`) serve ``P V**T`` answers. They go
    through ``acting.distribution``, the pass that training and sampling use.

    Args:
        acting: a policy or a role.
        rows: what `prefixes` gave.
        alphabet: the token ids that answers are made of.
        temperature: overrides that of the rows.
    """
    if temperature is not None:
        rows = rows.with_(inputs=rows.inputs.clone(False))
        rows.inputs["temperature"] = torch.full_like(rows.inputs["temperature"], temperature)
    if isinstance(acting, torch.nn.Module):  # a role moves what it is given by itself
        rows = rows.to(next(acting.parameters()).device)
    steps, letters = rows.steps, torch.tensor(list(alphabet))
    size = len(letters)
    prompts, rest = divmod(len(rows), size ** (steps - 1))
    if rest:
        raise ShapeError(f"{len(rows)} rows are not all beginnings of {steps - 1} tokens over {size} letters")
    logits = acting.distribution(rows)["logits"].double().cpu()
    log_p = logits.log_softmax(-1)
    token = rows.inputs["step", "token"].cpu()
    taken = log_p.gather(-1, token.unsqueeze(-1)).squeeze(-1)[:, :-1]  # the tokens of the beginning
    last = log_p[:, -1, letters]  # every possible last token
    whole = torch.cat([taken[:, None, :].expand(-1, size, -1), last[:, :, None]], dim=-1)
    return whole.reshape(prompts, size**steps, steps)


def log_probs(
    acting: Any, rows: Trajectories, alphabet: Sequence[int], temperature: float | None = None
) -> Table:
    """``[P, N]``: the log-probability of each answer; see `step_log_probs`."""
    return step_log_probs(acting, rows, alphabet, temperature).sum(-1)


# --- expectations and divergences -------------------------------------------------------------------------


def expected(log_p: Table, values: Table) -> PerPrompt:
    """The mean of ``values`` under the policy."""
    return (log_p.exp() * values).sum(-1)


def kl(log_p: Table, log_q: Table) -> PerPrompt:
    """KL(p || q) in nats; infinite where p has answers that q never gives."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def entropy(log_p: Table) -> PerPrompt:
    """In nats."""
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0.0).sum(-1)


def total_variation(log_p: Table, log_q: Table) -> PerPrompt:
    """Half the sum of absolute differences, in [0, 1]."""
    return 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)


def mass(log_p: Table, members: Bool[Tensor, "prompt answer"]) -> PerPrompt:
    """The probability of the answers in a set."""
    return torch.where(members, log_p.exp(), 0.0).sum(-1)


def restricted(log_p: Table, members: Bool[Tensor, "prompt answer"]) -> Table:
    """The policy given that its answer lies in a set; minus infinity outside it."""
    inside = log_p.masked_fill(~members, -math.inf)
    return inside.log_softmax(-1)


# --- the KL-regularised objective -------------------------------------------------------------------------


def objective(log_p: Table, log_ref: Table, reward: Table, beta: float) -> PerPrompt:
    """J = E r - beta KL(p || ref)."""
    return expected(log_p, reward) - beta * kl(log_p, log_ref)


def optimum(log_ref: Table, reward: Table, beta: float) -> Table:
    """The maximiser of `objective`: proportional to ref exp(r / beta) (Rafailov et al., 2023, equation 4)."""
    return (log_ref + reward / beta).log_softmax(-1)


def best_objective(log_ref: Table, reward: Table, beta: float) -> PerPrompt:
    """The largest value of `objective`: beta log Z."""
    return beta * (log_ref + reward / beta).logsumexp(-1)


def gap_closed(log_p: Table, log_ref: Table, reward: Table, beta: float) -> float:
    """How far ``log_p`` came from the reference (0) to the optimum (1) in the objective, averaged over prompts. Negative
    for a policy that is worse than the reference."""
    start = expected(log_ref, reward).mean()
    best = best_objective(log_ref, reward, beta).mean()
    return ((objective(log_p, log_ref, reward, beta).mean() - start) / (best - start)).item()


def best_of_n(log_p: Table, scores: Table, n: int) -> Table:
    """The policy that draws ``n`` answers and keeps the one with the highest score; see
    `guerdon.sampling.best_of_n_distribution`."""
    return best_of_n_distribution(log_p.exp(), scores.double(), n).log()


# --- coverage ---------------------------------------------------------------------------------------------


def density_ratio(log_p: Table, log_ref: Table) -> PerPrompt:
    """The largest p(y) / ref(y) among answers that p gives."""
    return torch.where(log_p > -math.inf, log_p - log_ref, -math.inf).amax(-1).exp()


def coverage_coefficient(log_ref: Table, radius: float | None = None) -> PerPrompt:
    """The largest density ratio that any policy with KL(pi || ref) <= ``radius`` (nats) reaches against the reference
    (Song et al., 2024: the local coverage C_eps; ``radius`` None is the global one, 1 / min ref).

    The worst policy within the ball puts mass m on one answer and leaves the others in proportion, so its divergence is
    m log(m / r) + (1 - m) log((1 - m) / (1 - r)), which is solved for m by bisection. The radius counts for each prompt;
    a policy that saves its divergence on the other prompts of ``P`` has ``P`` times as much for one.
    """
    r = log_ref.exp()
    if radius is None:
        return (1 / r).amax(-1)
    if radius < 0:
        raise UsageError(f"the radius of a KL ball is at least 0, not {radius}")
    low, high = r.clone(), torch.ones_like(r)
    for _ in range(100):
        m = (low + high) / 2
        spent = torch.special.xlogy(m, m / r) + torch.special.xlogy(1 - m, (1 - m) / (1 - r))
        low, high = torch.where(spent <= radius, m, low), torch.where(spent <= radius, high, m)
    # high starts at 1, and stays there where the ball holds even the point mass
    return (torch.where(-log_ref <= radius, 1.0, low) / r).amax(-1)


# --- preferences ------------------------------------------------------------------------------------------


class Oracle(Protocol):
    """Pairwise preferences between all answers to a prompt, never written out as a matrix ``[N, N]``."""

    def beats(self, log_q: Table) -> Table:
        """``[P, N]``: the probability that each answer is preferred to an answer of the policy ``log_q``."""
        ...

    def compare(
        self, prompt: Int[Tensor, "row"], a: Int[Tensor, "row"], b: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        """``[B]``: the probability that answer ``a`` is preferred to answer ``b`` (numbers of prompts and answers)."""
        ...


class _LogisticSums:
    """``sum_j w_j sigmoid(x_i - x_j)`` for all i without the matrix of pairs.

    The sum is an analytic function of x_i (its poles lie at a distance of pi from the real line), so its values at a
    few Chebyshev points of [min x, max x] give it everywhere to rounding error (barycentric interpolation).
    """

    def __init__(self, x: Table) -> None:
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        half = ((high - low) / 2).clamp(min=1e-12)
        reach = math.pi / half.max().item()
        count = min(math.ceil(37 / math.log(reach + math.sqrt(1 + reach**2))) + 8, 4000)
        turns = torch.arange(count, dtype=x.dtype) * math.pi / (count - 1)
        nodes = (low + high) / 2 + half * turns.cos()
        weight = torch.ones(count, dtype=x.dtype)
        weight[1::2] = -1
        weight[[0, -1]] *= 0.5
        away = x[:, :, None] - nodes[:, None, :]
        hit = away.abs() < 1e-14 * half[:, :, None]
        basis = weight / torch.where(hit, 1.0, away)
        basis = torch.where(hit.any(-1, keepdim=True), hit.to(x.dtype), basis)
        self.basis = basis / basis.sum(-1, keepdim=True)  # [P, N, M]
        self.kernel = torch.sigmoid(nodes[:, :, None] - x[:, None, :])  # [P, M, N]

    def __call__(self, weights: Float[Tensor, "prompt sum answer"]) -> Float[Tensor, "prompt answer sum"]:
        return self.basis @ (self.kernel @ weights.transpose(1, 2))


class BradleyTerryOracle:
    """P(a over b) = sigmoid(scale (r(a) - r(b))).

    Args:
        reward: ``[P, N]``.
    """

    def __init__(self, reward: Table, scale: float = 1.0) -> None:
        self.reward = reward.double() * scale
        self._sums = _LogisticSums(self.reward)

    def beats(self, log_q: Table) -> Table:
        """See `Oracle`."""
        return self._sums(log_q.exp()[:, None, :]).squeeze(-1)

    def compare(
        self, prompt: Int[Tensor, "row"], a: Int[Tensor, "row"], b: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        """See `Oracle`."""
        return torch.sigmoid(self.reward[prompt, a] - self.reward[prompt, b])


class CyclicOracle:
    """Answers fall into ``K`` classes; class i is preferred to class i + 1 (the last to the first) with probability
    ``strength``, whatever the answers, and within a class Bradley-Terry on a quality decides. No scalar reward explains
    it. Classes that are not neighbours on the circle (K > 3) tie.

    Args:
        classes: ``[P, N]`` int64 in [0, K).
        quality: ``[P, N]``.
    """

    def __init__(
        self, classes: Int[Tensor, "prompt answer"], quality: Table, strength: float = 0.8, count: int = 3
    ) -> None:
        if not 0.5 <= strength <= 1:
            raise UsageError(
                f"strength is {strength}; a class beats the next with a probability from 0.5 to 1"
            )
        self.classes, self.quality, self.strength = classes, quality.double(), strength
        self.member = torch.nn.functional.one_hot(classes, count).double()  # [P, N, K]
        step = (torch.arange(count)[None, :] - torch.arange(count)[:, None]) % count
        across = torch.full((count, count), 0.5, dtype=torch.float64)
        across[step == 1], across[step == count - 1] = strength, 1 - strength
        if count == 2:
            raise UsageError("two classes cannot beat each other in a circle; use three or more")
        self.across = across  # [K, K], the row's class against the column's
        self._sums = _LogisticSums(self.quality)

    def beats(self, log_q: Table) -> Table:
        """See `Oracle`."""
        weight = log_q.exp()[:, :, None] * self.member  # [P, N, K]
        share = weight.sum(1)  # [P, K]
        other = self.across.clone()
        other.fill_diagonal_(0.0)
        between = (self.member * (share @ other.T)[:, None, :]).sum(-1)
        within = (self.member * self._sums(weight.transpose(1, 2))).sum(-1)
        return between + within

    def compare(
        self, prompt: Int[Tensor, "row"], a: Int[Tensor, "row"], b: Int[Tensor, "row"]
    ) -> Float[Tensor, "row"]:
        """See `Oracle`."""
        first, second = self.classes[prompt, a], self.classes[prompt, b]
        tie = torch.sigmoid(self.quality[prompt, a] - self.quality[prompt, b])
        return torch.where(first == second, tie, self.across[first, second])


def win_rate(log_p: Table, log_q: Table, oracle: Oracle) -> PerPrompt:
    """P(p over q): the probability that an answer of ``p`` is preferred to one of ``q``."""
    return expected(log_p, oracle.beats(log_q))


def exploitability(log_p: Table, oracle: Oracle) -> PerPrompt:
    """How often the best answer against ``p`` wins beyond one half; 0 for an equilibrium."""
    return oracle.beats(log_p).amax(-1) - 0.5


def regularised_exploitability(log_p: Table, log_ref: Table, oracle: Oracle, tau: float) -> PerPrompt:
    """The same in the game regularised towards a reference (Munos et al., 2024), where a policy pays tau KL(pi || ref):
    tau log sum_y ref(y) exp(P(y over p) / tau) + tau KL(p || ref) - 1/2. Zero for the equilibrium alone."""
    best = tau * (log_ref + oracle.beats(log_p) / tau).logsumexp(-1)
    return best + tau * kl(log_p, log_ref) - 0.5


def best_response(log_q: Table, log_ref: Table, oracle: Oracle, tau: float) -> Table:
    """The policy that does best against ``log_q`` in the regularised game."""
    return (log_ref + oracle.beats(log_q) / tau).log_softmax(-1)


def equilibrium(
    log_ref: Table, oracle: Oracle, tau: float, steps: int = 2000, tolerance: float = 1e-10
) -> Table:
    """The Nash equilibrium of the regularised game, by extragradient mirror descent: the gradient is taken where a first
    step would lead, which makes a constant step converge linearly. Ends when the regularised exploitability of every
    prompt is below ``tolerance``."""
    eta = min(1.0, 0.5 / tau)
    log_p = log_ref
    for t in range(steps):
        kept = (1 - eta * tau) * log_p + eta * tau * log_ref
        ahead = (kept + eta * oracle.beats(log_p)).log_softmax(-1)
        log_p = (kept + eta * oracle.beats(ahead)).log_softmax(-1)
        if t % 20 == 19 and regularised_exploitability(log_p, log_ref, oracle, tau).max() < tolerance:
            break
    return log_p


# --- the token's view -------------------------------------------------------------------------------------


def token_optimum(
    step_log_ref: Float[Tensor, "prompt answer step"],
    step_reward: Float[Tensor, "prompt answer step"],
    beta: float,
    size: int,
) -> tuple[Float[Tensor, "prompt answer step"], Float[Tensor, "prompt answer step"]]:
    """Exact soft values of the token problem: V* before each token and the advantage A* of the token taken, ``[P, N, T]``.

    V*(s) = beta log sum_a ref(a|s) exp((r(s,a) + V*(s')) / beta), A* = r + V*(s') - V*(s), and the optimal policy is
    ref exp(A* / beta) (Rafailov et al., 2024, "From r to Q*", equations 5 to 7).

    Args:
        step_log_ref, step_reward: of every answer's tokens, as `step_log_probs` gives them.
        beta: weight of the KL divergence.
        size: letters of the alphabet, so that ``answer = size ** step``.
    """
    prompts, count, steps = step_log_ref.shape
    value = torch.zeros(prompts, count, dtype=step_log_ref.dtype)  # V*(s') after the last token
    values: list[Tensor] = []
    advantages: list[Tensor] = []
    for t in reversed(range(steps)):
        gain = step_reward[:, :, t] + value
        # the siblings of a token lie size ** (T - 1 - t) apart
        shape = (prompts, size**t, size, size ** (steps - 1 - t))
        before = beta * (step_log_ref[:, :, t] + gain / beta).reshape(shape).logsumexp(2, keepdim=True)
        value = before.expand(shape).reshape(prompts, count)
        values.insert(0, value)
        advantages.insert(0, gain - value)
    return torch.stack(values, -1), torch.stack(advantages, -1)
