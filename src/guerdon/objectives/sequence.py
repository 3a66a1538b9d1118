"""Learning action sequences with a critic and a model of single steps (Patel and Siegelmann, 2025).

The objectives read `Transitions` with ``previous_action``. Critics and models see states ``[N, S]``, which the actor
makes of observations (``actor.state``). Where a batch holds runs of successive rows, ``length`` rows each
(`Replay.windows`), ``weight`` says which of them are real.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.batch import Transitions
from guerdon.objectives.action_value import MeanOverRows, continues, temperature, weighted_mean
from guerdon.objectives.base import Metrics

Recall = Literal["model", "backprop", "replay", "none"]


def at_time(state: Tensor, position: Tensor | float) -> Tensor:
    """States ``[..., S]`` with their position in the sequence behind them: ``[..., S + 1]``."""
    column = torch.as_tensor(position, dtype=state.dtype, device=state.device)
    return torch.cat([state, column.expand(state.shape[:-1]).unsqueeze(-1)], -1)


@dataclass
class SequenceBellman(MeanOverRows):
    """SAC's critic at the time scale of single actions: ``r + gamma (min_i Q'_i(s', a') - alpha log pi(a'|s', a))``.

    ``a'`` is the first action of the sequence that the actor begins at s' after a. All rows are steps that were taken.
    Called with ``target`` (the critic's slow copy) and ``actor``.

    Attributes:
        alpha: the temperature, where the actor has none of its own.
    """

    alpha: float = 1.0

    def __call__(self, critic: Any, batch: Transitions, target: Any, actor: Any) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            y = _soft_target(batch, target, actor, self.alpha)
            state = actor.state(batch.observation)
        raw = critic.raw(state, batch.action)
        loss = weighted_mean(critic.head.loss(raw, y), batch).sum()
        return loss, {"loss": loss.detach(), "q": critic.head.mean(raw).detach().mean()}


def _soft_target(
    batch: Transitions, target: Any, actor: Any, alpha: float, position: float | None = None
) -> Tensor:
    """``[N]``; with a ``position``, for critics that are told it."""
    noise = batch.noise[:, 1:2]  # type: ignore[index]
    actions, log_probs = actor.draw_sequence(batch.next_observation, batch.action, noise)
    state = actor.state(batch.next_observation)
    if position is not None:
        state = at_time(state, position)
    value = target.q(state, actions[:, 0]).amin(0) - temperature(actor, alpha) * log_probs[:, 0]
    return batch.reward + continues(batch) * value


@dataclass
class TimeAwareBellman(MeanOverRows):
    """A critic that is told how far into its sequence an action is, an ablation: ``Q(s_j, j, a_j)`` fits the reward and
    the soft value at position 0 of the state that followed, where ``s_j`` is what the model recalls after the actions
    taken from the run's first state.

    Called with ``target``, ``actor`` and ``recalled`` (the model's slow copy) on runs of ``length`` rows.
    """

    length: int
    alpha: float = 1.0

    def __call__(
        self, critic: Any, batch: Transitions, target: Any, actor: Any, recalled: Any
    ) -> tuple[Tensor, Metrics]:
        with torch.no_grad():
            y = _soft_target(batch, target, actor, self.alpha, position=0.0)
            actions = _runs(batch.action, self.length)
            state = _runs(actor.state(batch.observation), self.length)[:, 0]
            states = [state]
            for j in range(self.length - 1):
                state = recalled(state, actions[:, j])
                states.append(state)
            position = torch.arange(float(self.length), device=y.device).expand(len(state), -1)
            timed = at_time(torch.stack(states, 1), position)
        raw = critic.raw(timed.flatten(0, 1), batch.action)
        loss = (weighted_mean(critic.head.loss(raw, y), batch) / batch.weight.mean()).sum()  # type: ignore[union-attr]
        return loss, {"loss": loss.detach(), "q": critic.head.mean(raw).detach().mean()}


def _runs(rows: Tensor, length: int) -> Tensor:
    """``[N * length, ...]`` as ``[N, length, ...]``."""
    return rows.unflatten(0, (-1, length))


@dataclass
class OneStepPrediction(MeanOverRows):
    """The model's mean squared error in the next state. Called with ``actor``, which makes states of observations."""

    def __call__(self, model: Any, batch: Transitions, actor: Any) -> tuple[Tensor, Metrics]:
        error = model(actor.state(batch.observation), batch.action) - actor.state(batch.next_observation)
        loss = error.square().mean()
        return loss, {"loss": loss.detach()}


@dataclass
class LatentPrediction(MeanOverRows):
    """Encoder and model together: from the encoded first state of a run the model foresees ``length`` latent states,
    which are compared with what the slow encoder makes of the observations; the j-th error counts ``decay**j``.

    Called with ``target``, the model's slow copy.
    """

    length: int
    decay: float = 0.5

    def __call__(self, model: Any, batch: Transitions, target: Any) -> tuple[Tensor, Metrics]:
        first = batch.observation[:: self.length]
        state = model.encoder(first)
        with torch.no_grad():
            goals = _runs(target.encoder(batch.next_observation), self.length)
        actions, real = _runs(batch.action, self.length), _runs(batch.weight, self.length)  # type: ignore[arg-type]
        loss = torch.zeros((), device=state.device)
        for j in range(self.length):
            state = model(state, actions[:, j])
            error = (state - goals[:, j]).square().mean(-1)
            loss = loss + self.decay**j * (error * real[:, j]).mean()
        return loss, {"loss": loss.detach()}


@dataclass
class SequenceImprovement(MeanOverRows):
    """The actor: ``sum_j (alpha log pi_j - min_i Q_i(s_j, a_j))`` over a sequence drawn from one observation, and the
    actor's temperature, if it has one, such that the entropy of an action, averaged over the sequence, meets a target.

    ``s_0`` is the state; where the later ones come from is `recall`. By ``"model"`` the model's slow copy foresees
    them without gradient: a_j learns from its own Q alone, and from what later actions make of the recurrence.

    Called with ``critic`` and, where the model recalls, ``recalled`` (its slow copy).

    Attributes:
        length: J, actions in a sequence; the batch's ``noise`` is ``[N, J, A]``.
        target_entropy: of a single action, in nats.
        alpha: the temperature, where the actor has none of its own.
        recall: ``"model"``; or an ablation: ``"backprop"``, the gradient flows through the model and only the last
            action is judged (the published code asks the critic one foreseen state later, after that action);
            ``"replay"``, the states that followed in the memory, where other actions were taken (no model; the batch
            holds runs of ``length`` rows); ``"none"``, ``s_j = s_0``.
        time_aware: the critic is told j.

    Metrics: ``loss``, ``entropy``, ``alpha``.
    """

    length: int
    target_entropy: float = -1.0
    alpha: float = 1.0
    recall: Recall = "model"
    time_aware: bool = False

    def __call__(
        self, actor: Any, batch: Transitions, critic: Any, recalled: Any = None
    ) -> tuple[Tensor, Metrics]:
        alpha = temperature(actor, self.alpha)
        observation, previous, noise = batch.observation, batch.previous_action, batch.noise
        real = None
        if self.recall == "replay":
            observation = observation[:: self.length]
            previous = previous[:: self.length]  # type: ignore[index]
            noise = _runs(noise[:, 0], self.length)  # type: ignore[index]
            real = _runs(batch.weight, self.length)  # type: ignore[arg-type]
        actions, log_probs = actor.draw_sequence(observation, previous, noise)
        states = self._states(actor, batch, actions, recalled)
        if self.time_aware:
            position = torch.arange(float(self.length), device=actions.device).expand(len(actions), -1)
            states = at_time(states, position)
        q = critic.q(states.flatten(0, 1), actions.flatten(0, 1)).amin(0)
        losses = alpha * log_probs - _runs(q, self.length)
        if self.recall == "backprop":
            losses = losses[:, -1:]
        if real is not None:
            losses = losses * real
        loss = losses.mean(0).sum()
        entropy = -log_probs.detach().mean()
        metrics = {"loss": loss.detach(), "entropy": entropy}
        own = getattr(actor, "log_temperature", None)
        if own is not None:
            loss = loss + own * (entropy - self.target_entropy)
            metrics["alpha"] = own.detach().exp()
        return loss, metrics

    def _states(self, actor: Any, batch: Transitions, actions: Tensor, recalled: Any) -> Tensor:
        """``[N, J, S]``."""
        if self.recall == "replay":
            return _runs(actor.state(batch.observation), self.length)
        state = actor.state(batch.observation)
        if self.recall == "none":
            return state[:, None].expand(-1, self.length, -1)
        through = self.recall == "backprop"
        taken, states = actions if through else actions.detach(), [state]
        for j in range(self.length - 1):
            state = recalled(state, taken[:, j])
            if not through:  # whether or not the model's weights learn
                state = state.detach()
            states.append(state)
        return torch.stack(states, 1)
