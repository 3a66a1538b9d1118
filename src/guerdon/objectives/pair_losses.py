"""Losses of a pair of answers, as pure functions, and of ranked lists.

A pair says that ``chosen`` was preferred to ``rejected``. What a policy makes of it starts from two numbers a pair, the
log-ratios ``a = sum_t log pi(step t) - log pi_ref(step t)`` of both sides (or what a loss compares in their place). The
functions here turn such ``[pair]`` tensors into a loss a pair; `guerdon.objectives.preference` applies them to batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

PairLoss = Literal[
    "sigmoid",
    "sigmoid_norm",
    "robust",
    "hinge",
    "slic",
    "ipo",
    "exo_pair",
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "aot",
    "aot_unpaired",
    "discopop",
    "cpl",
    "unlikelihood",
]
Pairs = Float[Tensor, " pair"]


def sigmoid_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1, margin: float = 0.0) -> Pairs:
    """``-log sigma(beta (a_w - a_l) - margin)``: DPO (Rafailov et al., 2023, eq. 7); with a ``margin`` on
    length-averaged log-probabilities it is SimPO (Meng et al., 2024, eq. 6)."""
    return -logsigmoid(beta * (chosen - rejected) - margin)


def hinge_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1) -> Pairs:
    """``max(0, 1 - beta (a_w - a_l))``: RSO's normalised hinge (Liu et al., 2024). On log-probabilities in place of
    log-ratios it is the hinge of SLiC (Zhao et al., 2023) with margin ``1 / beta``."""
    return (1 - beta * (chosen - rejected)).relu()


def ipo_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1) -> Pairs:
    """``((a_w - a_l) - 1 / (2 beta))^2``: IPO (Azar et al., 2024, eq. 17, whose tau is this beta)."""
    return (chosen - rejected - 0.5 / beta).square()


def exo_loss(
    chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1, probability: float | Pairs = 0.999
) -> Pairs:
    """KL(q || p) of the model's distribution over the two, ``q = sigma(beta (a_w - a_l))``, from that of the label,
    ``p = probability`` strictly between 0 and 1 (EXO, Ji et al., 2024, eq. 16, where p is 1 - epsilon)."""
    p = torch.as_tensor(probability, dtype=chosen.dtype, device=chosen.device)
    logit = beta * (chosen - rejected)
    wins = logit.sigmoid() * (logsigmoid(logit) - p.log())
    return wins + (-logit).sigmoid() * (logsigmoid(-logit) - (-p).log1p())


def nca_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1) -> Pairs:
    """``-log sigma(r_w) - log sigma(-r_w) / 2 - log sigma(-r_l) / 2`` with ``r = beta a``: noise-contrastive alignment
    for pairs (Chen et al., 2024). It looks at each likelihood itself, not only at their difference."""
    win, lose = beta * chosen, beta * rejected
    return -logsigmoid(win) - 0.5 * logsigmoid(-win) - 0.5 * logsigmoid(-lose)


def bco_loss(
    chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1, delta: float | Tensor = 0.0
) -> Pairs:
    """``-log sigma(r_w - delta) - log sigma(-(r_l - delta))`` with ``r = beta a``: binary classifier optimisation (Jung
    et al., 2024); ``delta`` is a running mean of the rewards."""
    return -logsigmoid(beta * chosen - delta) - logsigmoid(delta - beta * rejected)


def sppo_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1) -> Pairs:
    """``(a_w - 1 / (2 beta))^2 + (a_l + 1 / (2 beta))^2``: self-play preference optimisation (Wu et al., 2024, eq. 4.7)
    with win probabilities 1 and 0."""
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_zero_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1) -> Pairs:
    """``1 - sigma(r_w) + sigma(r_l)``: anchored preference optimisation (D'Oosterlinck et al., 2024, eq. 7), for chosen
    answers that are better than the model's own."""
    return (-beta * chosen).sigmoid() + (beta * rejected).sigmoid()


def apo_down_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1) -> Pairs:
    """``sigma(r_w) + 1 - sigma(r_w - r_l)``: anchored preference optimisation (D'Oosterlinck et al., 2024, eq. 8), for
    chosen answers that are worse than the model's own."""
    return (beta * chosen).sigmoid() + (-beta * (chosen - rejected)).sigmoid()


def aot_loss(
    policy: Pairs, reference: Pairs, beta: float | Tensor = 0.1, label_smoothing: float = 0.0
) -> Pairs:
    """``-log sigma(beta (u_(i) - v_(i)))`` over the i-th smallest of each: distributional alignment by optimal transport
    (Melnyk et al., 2024).

    Paired data: ``policy`` and ``reference`` are ``log p(chosen) - log p(rejected)`` under either. Unpaired: the
    log-ratios of the chosen and of the rejected. The losses belong to ranks, no longer to pairs.
    """
    logit = beta * (policy.sort().values - reference.sort().values)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


def discopop_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1, tau: float = 0.05) -> Pairs:
    """``(1 - m) (-log sigma(z)) + m exp(-z)`` with ``z = beta (a_w - a_l)`` and ``m = sigma(z / tau)``: the loss that a
    search found (Lu et al., 2024, eq. 5, log-ratio modulated loss)."""
    logit = beta * (chosen - rejected)
    blend = (logit / tau).sigmoid()
    # the exponential counts only where z is not far below zero; cut off where the blend is nothing
    return (1 - blend) * -logsigmoid(logit) + blend * (-logit).clamp(max=80).exp()


def cpl_loss(chosen: Pairs, rejected: Pairs, beta: float | Tensor = 0.1, bias: float | Pairs = 1.0) -> Pairs:
    """``-log [e^S_w / (e^S_w + e^(bias S_l))]`` with ``S = beta`` times the (discounted) sum of log-probabilities:
    contrastive preference learning (Hejna et al., 2024, eq. 5 and its conservative form).

    With ``bias < 1`` a policy that makes both sides less likely by as much is worse off, so it stays with the data.
    ``bias`` may differ by pair (a sign of -1 raises both sides, as in SePPO, Zhang et al., 2024).
    """
    return softplus(-beta * (chosen - bias * rejected))


def unlikelihood_loss(chosen: Pairs, rejected: Pairs, alpha: float = 1.0) -> Pairs:
    """``-log p(chosen) + alpha log p(rejected)``: a baseline of Rafailov et al. (2023). It has no lower bound."""
    return alpha * rejected - chosen


def soften(loss: Callable[..., Pairs], chosen: Pairs, rejected: Pairs, probability: float | Pairs) -> Pairs:
    """The ``loss`` expected when the label is right with ``probability p``: ``p L(w, l) + (1 - p) L(l, w)``.

    For `sigmoid_loss` and p = 1 - epsilon this is conservative DPO (Mitchell, 2023); with p the soft target of DNO
    (Rosset et al., 2024, eq. 9) its regression; with p = (1 - epsilon) / (1 - 2 epsilon), above 1, the unbiased loss
    of robust DPO (Chowdhury et al., 2024).
    """
    return probability * loss(chosen, rejected) + (1 - probability) * loss(rejected, chosen)


def implicit_reward(
    log_prob: Float[Tensor, "batch step"],
    reference_log_prob: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    beta: float | Tensor = 0.1,
) -> Float[Tensor, "batch step"]:
    """``beta (log pi - log pi_ref)`` of each step, ``[B, T]``, zero where masked.

    At the optimum it is the advantage of the step in the reward that the policy implies (Rafailov et al., 2024, "From
    r to Q*"); its sum along a trajectory is DPO's implicit reward.
    """
    return torch.where(mask, beta * (log_prob - reference_log_prob), 0.0)


def plackett_luce(
    score: Float[Tensor, "list place"], mask: Bool[Tensor, "list place"] | None = None
) -> Float[Tensor, " list"]:
    """``-sum_k log [exp(s_k) / sum_(j >= k) exp(s_j)]`` of each list, its items in order, the best first (Plackett,
    1975; Rafailov et al., 2023, eq. 20). With two items this is ``-log sigma(s_1 - s_2)``.

    Args:
        score: ``[N, K]``; for DPO ``beta`` times the log-ratio.
        mask: ``[N, K]``, which places hold an item; None for all. Empty places come last and count nothing.
    """
    if mask is None:
        mask = torch.ones_like(score, dtype=torch.bool)
    low = torch.finfo(score.dtype).min / 4  # finite, so that the backward pass of an empty tail has no NaN
    remaining = torch.where(mask, score, low).flip(1).logcumsumexp(1).flip(1)
    return torch.where(mask, remaining - score, 0.0).sum(1)
