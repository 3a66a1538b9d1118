"""Learning action values, and policies that climb them: DQN, SAC, TD3.

The objectives read `Transitions`. ``batch.discount`` is the factor of what follows (``gamma``, or ``gamma**n``), which
is zero where the episode terminated and stays where it was merely cut. An objective that needs further models
takes them as arguments of these names; `Role.update` passes them. Random numbers come with the batch (``noise``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Transitions
from guerdon.objectives.base import Metrics


class MeanOverRows:
    """Objectives whose loss is a mean over rows."""

    def weight(self, batch: Transitions) -> Tensor:
        """The number of rows."""
        return torch.tensor(float(batch.batch_size[0]))


def continues(batch: Transitions) -> Tensor:
    """``[N]``, the factor of what follows."""
    discount = batch.discount
    assert discount is not None
    return torch.where(batch.terminated, 0.0, discount)


def weighted_mean(losses: Tensor, batch: Transitions) -> Tensor:
    """The mean over the last axis, with importance weights where the replay gave some."""
    return (losses if batch.weight is None else losses * batch.weight).mean(-1)


# --- discrete actions: DQN --------------------------------------------------------------------------------


@dataclass
class QLearning(MeanOverRows):
    """``Q(s, a) <- r + gamma max_a' Q'(s', a')`` (Mnih et al., 2015) by the loss of the model's value head.

    Called with ``target``, the model whose values are the target.

    Attributes:
        double: choose a' by the model that learns and value it by the target (van Hasselt et al., 2016).
        huber: for scalar heads, Huber's loss of width 1, as published, instead of the squared error. Half of the
            square near zero, so its gradient is half as large there.

    A C51 head gets the projected distribution of the greedy action (Bellemare et al., 2017), every other categorical
    head the histogram of the scalar target (Farebrother et al., 2024). Metrics: ``loss``, ``q`` (mean value of the
    actions taken), ``border_share`` of categorical heads.
    """

    double: bool = True
    huber: bool = True

    def targets(self, model: Any, batch: Transitions, target: Any) -> tuple[Tensor, Tensor | None]:
        """``[N]`` scalar targets, and for C51 ``[N, bins]`` target distributions."""
        with torch.no_grad():
            raw = target.q_raw(batch.next_observation)
            values = target.head.mean(raw)
            chooser = model.q(batch.next_observation) if self.double else values
            best = chooser.argmax(-1)
            follows = continues(batch)
            y = batch.reward + follows * values.gather(-1, best[:, None]).squeeze(-1)
            if target.head.kind != "c51":
                return y, None
            probabilities = target.head.probabilities(target.head.select(raw, best))
            return y, target.head.project(batch.reward, follows, probabilities)

    def errors(self, model: Any, batch: Transitions, target: Any) -> Tensor:
        """``[N]`` temporal-difference errors, for prioritised replay."""
        y, _ = self.targets(model, batch, target)
        return y - model.head.mean(model.head.select(model.q_raw(batch.observation), batch.action.long()))

    def __call__(self, model: Any, batch: Transitions, target: Any) -> tuple[Tensor, Metrics]:
        head = model.head
        y, distribution = self.targets(model, batch, target)
        raw = head.select(model.q_raw(batch.observation), batch.action.long())
        metrics: Metrics = {}
        if distribution is not None:
            losses = head.distribution_loss(raw, distribution)
        elif head.categorical or not self.huber:
            losses = head.loss(raw, y)
        else:
            losses = torch.nn.functional.smooth_l1_loss(raw, y, reduction="none")
        if head.categorical:
            metrics["border_share"] = head.border_share(y)
        loss = weighted_mean(losses, batch)
        return loss, {"loss": loss.detach(), "q": head.mean(raw).detach().mean(), **metrics}


# --- critics of continuous (and discrete) actors ----------------------------------------------------------


@dataclass
class SoftBellman(MeanOverRows):
    """SAC's critic (Haarnoja et al., 2018): every member of an ensemble fits
    ``r + gamma (min_i Q'_i(s', a') - alpha log pi(a'|s'))`` with a' drawn from the actor.

    Called with ``target`` (the ensemble's slow copy) and ``actor``. With a categorical actor the expectation over a'
    is exact (Christodoulou, 2019).

    Attributes:
        alpha: the temperature, where the actor has none of its own.
    """

    alpha: float | Tensor = 0.2

    def _next_value(self, batch: Transitions, target: Any, actor: Any, alpha: Tensor | float) -> Tensor:
        if actor.kind == "categorical":
            log_p = actor.logits(batch.next_observation).log_softmax(-1)
            q = target.q(batch.next_observation).amin(0)
            return (log_p.exp() * (q - alpha * log_p)).sum(-1)
        action, log_prob = actor.draw(batch.next_observation, batch.noise[:, 1])  # type: ignore[index]
        return target.q(batch.next_observation, action).amin(0) - alpha * log_prob

    def __call__(self, critic: Any, batch: Transitions, target: Any, actor: Any) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            alpha = temperature(actor, self.alpha)
            y = batch.reward + continues(batch) * self._next_value(batch, target, actor, alpha)
        return _fit(critic, batch, y, discrete=actor.kind == "categorical")


@dataclass
class TwinBellman(MeanOverRows):
    """TD3's critic (Fujimoto et al., 2018): ``r + gamma min_i Q'_i(s', a')``, with a' the target actor's action
    plus clipped noise.

    Called with ``target`` and ``target_actor``.

    Attributes:
        smoothing: deviation of the noise; clip: where it is cut; both as shares of half the action's range.
    """

    smoothing: float = 0.2
    clip: float = 0.5

    def __call__(
        self, critic: Any, batch: Transitions, target: Any, target_actor: Any
    ) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            scale, centre = target_actor.scale, target_actor.centre
            noise = (self.smoothing * batch.noise[:, 1]).clamp(-self.clip, self.clip) * scale  # type: ignore[index]
            action = target_actor.mode(batch.next_observation) + noise
            action = torch.maximum(torch.minimum(action, centre + scale), centre - scale)
            y = batch.reward + continues(batch) * target.q(batch.next_observation, action).amin(0)
        return _fit(critic, batch, y, discrete=False)


def _fit(critic: Any, batch: Transitions, y: Tensor, discrete: bool) -> tuple[Tensor, Metrics]:
    """Every member's loss against ``y [N]``, summed over members, averaged over rows."""
    head = critic.head
    if discrete:
        raw = head.select(critic.raw(batch.observation), batch.action.long())
    else:
        raw = critic.raw(batch.observation, batch.action)
    loss = weighted_mean(head.loss(raw, y), batch).sum()
    metrics = {"loss": loss.detach(), "q": head.mean(raw).detach().mean()}
    if head.categorical:
        metrics["border_share"] = head.border_share(y)
    return loss, metrics


# --- actors -----------------------------------------------------------------------------------------------


def temperature(actor: Any, fallback: float | Tensor) -> Tensor | float:
    """The actor's own temperature, without gradient, or ``fallback``."""
    own = getattr(actor, "log_temperature", None)
    return fallback if own is None else own.detach().exp()


@dataclass
class SoftImprovement(MeanOverRows):
    """SAC's actor: ``alpha log pi(a|s) - min_i Q_i(s, a)`` with a reparameterised a (exact for categorical actors),
    and the actor's temperature, if it has one, such that its entropy meets a target.

    Called with ``critic``.

    Attributes:
        target_entropy: in nats (``-dim(A)`` is published).
        alpha: the temperature, where the actor has none of its own.

    Metrics: ``loss``, ``entropy``, ``alpha``.
    """

    target_entropy: float = -1.0
    alpha: float | Tensor = 0.2

    def __call__(self, actor: Any, batch: Transitions, critic: Any) -> tuple[Tensor, Metrics]:
        alpha = temperature(actor, self.alpha)
        if actor.kind == "categorical":
            log_p = actor.logits(batch.observation).log_softmax(-1)
            q = critic.q(batch.observation).amin(0).detach()
            losses = (log_p.exp() * (alpha * log_p - q)).sum(-1)
            entropy = -(log_p.exp() * log_p).sum(-1).detach()
        else:
            action, log_prob = actor.draw(batch.observation, batch.noise[:, 0])  # type: ignore[index]
            losses = alpha * log_prob - critic.q(batch.observation, action).amin(0)
            entropy = -log_prob.detach()
        loss = losses.mean()
        metrics = {"loss": loss.detach(), "entropy": entropy.mean()}
        own = getattr(actor, "log_temperature", None)
        if own is not None:
            loss = loss + own * (entropy - self.target_entropy).mean()
            metrics["alpha"] = own.detach().exp()
        return loss, metrics


@dataclass
class DeterministicImprovement(MeanOverRows):
    """TD3's (and DDPG's) actor: ``-Q_1(s, mu(s))``. Called with ``critic``."""

    def __call__(self, actor: Any, batch: Transitions, critic: Any) -> tuple[Tensor, Metrics]:
        loss = -critic.first_q(batch.observation, actor.mode(batch.observation)).mean()
        return loss, {"loss": loss.detach()}
