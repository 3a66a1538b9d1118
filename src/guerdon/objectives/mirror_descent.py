"""Policy improvement as mirror descent (MDPO, Tomar et al., 2022): a linearised gain minus the divergence from the
last policy, ``pi_k``, over a step size ``t_k``.

On the policy's own steps `MirrorDescent` is the sibling of the clipped surrogate and, without its KL term, the
surrogate of TRPO. From replay, `SoftMirrorDescent` improves a squashed Gaussian by the critics that `ValueBellman` and
`SoftValue` fit. In those three, log-densities are of actions in units of half their range, as published: a density
per dimension has units, and Tsallis' logarithm feels them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from guerdon.batch import Trajectories, Transitions
from guerdon.objectives import divergence
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.policy_gradient import drift
from guerdon.objectives.reduction import Reduction, reduce, reduction_weight

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
_FLOOR = math.log(1e-6)  # of a log-density before Tsallis' power, as published
_CEILING = 80.0  # exp() of more is infinite in float32


def mirror_descent(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    advantage: Float[Tensor, "batch step"],
    kl: Float[Tensor, "batch step"],
    weight: float | Float[Tensor, ""],
) -> Float[Tensor, "batch step"]:
    """``-rho A + weight KL`` with ``rho = exp(log_prob - old_log_prob)``, not clipped, as a per-step loss ``[B, T]``
    (Tomar et al., 2022, eq. 9).

    Args:
        log_prob: under the policy that learns; old_log_prob: under ``pi_k``, which acted.
        kl: divergence from ``pi_k`` at each step.
        weight: ``1 / t_k``.
    """
    return weight * kl - advantage * (log_prob - old_log_prob).exp()


def log_q(log_density: Float[Tensor, "..."], q: float) -> Float[Tensor, "..."]:
    """Tsallis' logarithm of a density, in the published parametrisation: ``(x^(q-1) - 1) / (q - 1)``, which is
    ``log x`` at ``q = 1`` and ``x - 1`` at ``q = 2``.

    Args:
        log_density: ``log x``; below ``log 1e-6`` it counts as that, except at ``q = 1``.
    """
    if q == 1:
        return log_density
    # expm1 keeps the digits that x^(q-1) - 1 would lose near q = 1
    power = (log_density.clamp(min=_FLOOR) * (q - 1)).clamp(max=_CEILING)
    return power.expm1() / (q - 1)


# --- on policy --------------------------------------------------------------------------------------------


@dataclass
class MirrorDescent:
    """On-policy MDPO: `mirror_descent` with the exact KL, reduced.

    Reads ``log_prob``, ``advantage`` and ``reference`` of the batch: the distribution of ``pi_k``, stored before the
    first of the m steps. At ``pi = pi_k`` the KL has no gradient, so the first step is plain policy gradient.

    Attributes:
        kl: ``1 / t_k``, the weight of the KL; may be a 0-d tensor that changes between updates. Zero is TRPO's surrogate.
        reverse: ``KL(pi_k || pi)``, the direction of TRPO and PPO, instead of ``KL(pi || pi_k)``.
        reduction: see `reduction.reduce`.

    Metrics (means over real steps): ``loss``, ``kl`` (of the direction chosen), ``ratio_deviation_max``, ``approx_kl``.
    Raises `UsageError` on an unknown reduction, `ShapeError` on a batch that lacks a field.
    """

    kl: float | Tensor = 1.0
    reverse: bool = False
    reduction: Reduction = "step"

    def __post_init__(self) -> None:
        check_choices(self, reduction=get_args(Reduction))

    def weight(self, batch: Trajectories) -> Tensor:
        """How much the loss counted (see `reduction.reduction_weight`)."""
        return reduction_weight(batch.mask, self.reduction)

    def divergence(self, policy: Any, batch: Trajectories) -> Tensor:
        """0-d: the divergence from ``pi_k``, reduced, differentiable in the weights."""
        return reduce(self._kl(policy, policy.distribution(batch), batch), batch.mask, self.reduction)

    def _kl(self, policy: Any, distribution: Any, batch: Trajectories) -> Tensor:
        reference = required(self, batch, "reference")
        p, q = (reference, distribution) if self.reverse else (distribution, reference)
        return divergence.kl(p, q, getattr(policy, "event_reduction", "sum"), batch.mask)

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        advantage, mask = required(self, batch, "advantage"), batch.mask
        distribution = policy.distribution(batch)
        log_prob = policy.log_prob(batch, distribution)
        kl = self._kl(policy, distribution, batch)
        losses = mirror_descent(log_prob, batch.log_prob, advantage, kl, self.kl)
        loss = reduce(losses, mask, self.reduction)
        metrics = drift(log_prob, batch.log_prob, mask)
        return loss, {"loss": loss.detach(), "kl": reduce(kl.detach(), mask), **metrics}


# --- from replay ------------------------------------------------------------------------------------------


class MeanOverRows:
    """Objectives whose loss is a mean over rows."""

    def weight(self, batch: Transitions) -> Tensor:
        """The number of rows."""
        return torch.tensor(float(batch.batch_size[0]))


def _draw(actor: Any, batch: Transitions) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reparameterised ``action``, its value ``raw`` before tanh, and the Gaussian's ``mean`` and ``log_std``,
    all ``[N, A]``."""
    mean, log_std = actor.parameters_at(batch.observation)
    raw = mean + log_std.exp() * batch.noise[:, 0]  # type: ignore[index]
    return actor.squash(raw), raw, mean, log_std


def _log_density(raw: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """``[N, A]``: log-density of ``tanh(raw)`` in each dimension. From ``raw`` and not from the action, whose inverse
    tanh is infinite where it saturates."""
    slope = 2.0 * (math.log(2.0) - raw - F.softplus(-2.0 * raw))  # log(1 - tanh(raw)^2)
    return -0.5 * ((raw - mean) * (-log_std).exp()).square() - log_std - _HALF_LOG_TAU - slope


@dataclass
class SoftMirrorDescent(MeanOverRows):
    """Off-policy MDPO: ``c log_q pi(a|s) + q (entropy - c) log_q pi_k(a|s) - Q_1(s, a)`` with a reparameterised a
    (Tomar et al., 2022, eq. 12), the entropy term linearised at ``pi_k``; plus a small cost of ``mean^2`` and
    ``log_std^2``.

    Called with ``critic`` and ``old``, the policy ``pi_k``. Its weights stay, but the gradient flows through a into
    its log-density. Both densities are of the same a, by the value before tanh.

    Attributes:
        kl: ``c = 1 / t_k``. With ``kl == entropy`` (and ``q = 1``) ``pi_k`` drops out: SAC's loss, on the first critic.
        entropy: lambda, what a nat of entropy is worth; 0 is "hard" MDPO.
        q: of Tsallis' logarithm (`log_q`), summed over the action's dimensions; 1 is the KL divergence.
        regulariser: of mean and log deviation.

    Metrics: ``loss``, ``entropy`` (of Tsallis if q is not 1), ``kl`` (estimated on the same draws).
    """

    kl: float | Tensor = 0.5
    entropy: float | Tensor = 0.2
    q: float = 1.0
    regulariser: float = 1e-3

    def __call__(self, actor: Any, batch: Transitions, critic: Any, old: Any) -> tuple[Tensor, Metrics]:
        action, raw, mean, log_std = _draw(actor, batch)
        log_p = log_q(_log_density(raw, mean, log_std), self.q).sum(-1)
        log_old = log_q(_log_density(raw, *old.parameters_at(batch.observation)), self.q).sum(-1)
        value = critic.q(batch.observation, action)[0]
        losses = self.kl * log_p + self.q * (self.entropy - self.kl) * log_old - value
        cost = self.regulariser * (mean.square().mean() + log_std.square().mean())
        loss = losses.mean() + cost
        return loss, {
            "loss": loss.detach(),
            "entropy": -log_p.detach().mean(),
            "kl": (log_p - log_old).detach().mean(),
        }


@dataclass
class ValueBellman(MeanOverRows):
    """Action values from a state value: every member fits ``r + gamma V'(s')``, by half the square.

    Called with ``target``, the state critic's slow copy. Nothing follows where the episode terminated; where it was
    only cut, V' does.
    """

    def __call__(self, critic: Any, batch: Transitions, target: Any) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            follows = torch.where(batch.terminated, 0.0, batch.discount)  # type: ignore[arg-type]
            y = batch.reward + follows * target.values(batch.next_observation)
        raw = critic.raw(batch.observation, batch.action)
        loss = 0.5 * critic.head.loss(raw, y).mean(-1).sum()
        return loss, {"loss": loss.detach(), "q": critic.head.mean(raw).detach().mean()}


@dataclass
class SoftValue(MeanOverRows):
    """A state value fits ``min_i Q_i(s, a) - entropy log_q pi(a|s)`` with a drawn from the actor, by half the square.

    Called with ``actor`` and ``critic``. Attributes as in `SoftMirrorDescent`.
    """

    entropy: float | Tensor = 0.2
    q: float = 1.0

    def __call__(self, value: Any, batch: Transitions, actor: Any, critic: Any) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            action, raw, mean, log_std = _draw(actor, batch)
            log_p = log_q(_log_density(raw, mean, log_std), self.q).sum(-1)
            y = critic.q(batch.observation, action).amin(0) - self.entropy * log_p
        loss = 0.5 * value.head.loss(value.raw(batch.observation), y).mean()
        return loss, {"loss": loss.detach()}
