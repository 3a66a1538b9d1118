"""Sequences of actions from one observation: a recurrent squashed Gaussian, and what carries sequences out.

A decision gives as many primitive actions as are asked for; the environment is looked at again only when they are
spent. `OpenLoop` does the carrying out for any policy: a recurrent one, one that repeats its single action, a planner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.policies.control import Controller, SquashedGaussian
from guerdon.policies.features import Features, numpy_perceptron, to_tensor

Cell = Literal["gru", "rnn"]
Plan = Callable[[Any, np.ndarray, "np.ndarray | None"], np.ndarray]
"""``(observation [k, ...], previous action [k, ...], noise [k, L, A] or None) -> actions [k, L, ...]``."""


class SequenceGaussian(SquashedGaussian):
    """A squashed Gaussian for each of as many actions as are asked for, from one observation and the action before it
    (Patel and Siegelmann, 2025).

    ``h_0`` is a linear function of the features; ``h_{j+1} = cell(a_{j-1}, h_j)`` gives the j-th action's mean and
    deviation. The action that is fed back is the one drawn, or the mean (squashed) where none is drawn. No model of
    the environment takes part.

    Everything a one-step controller can do is the first action of a sequence, after a previous action of zero where
    none is known; ``inputs["step", "previous_action"]`` tells it to ``log_prob`` and ``distribution``.

    Args:
        features: from observations to feature vectors; the recurrent state is as wide as they are.
        low, high: ``[A]``, the action's range.
        cell: the recurrence.
        latent: width of a state between the features and the recurrence; 0 for none. Then the features and the
            projection to it belong to a model of the environment: here they are a copy (buffers, no weights that
            learn), refreshed by `take_encoder`.
    """

    kind: ClassVar[str] = "gaussian"
    name: ClassVar[str] = "sequence"
    scale: Tensor
    centre: Tensor

    def __init__(
        self,
        features: Features,
        low: Sequence[float],
        high: Sequence[float],
        cell: Cell = "gru",
        latent: int = 0,
    ) -> None:
        super().__init__(features, low, high)
        if cell not in ("gru", "rnn"):
            raise UsageError(f"there is no cell '{cell}'; use 'gru' or 'rnn'")
        if not features.hidden:
            raise UsageError(
                "a sequence policy needs features of at least one hidden layer; set hidden=(256,)"
            )
        if features.images and not latent:
            raise UsageError(
                "a model cannot predict images; give the sequence policy a latent state (latent=50)"
            )
        self.cell_kind, self.latent = cell, latent
        width = features.width
        if latent:
            self.project = freeze(nn.Linear(width, latent))
            freeze(features)
            self.body = nn.Sequential(nn.Linear(latent, width), nn.ReLU())
        self.start = nn.Linear(width, width)
        self.cell = (nn.GRUCell if cell == "gru" else nn.RNNCell)(len(self.low), width)

    # -- states --------------------------------------------------------------------------------------------

    @property
    def state_size(self) -> int:
        """Width of `state`."""
        return self.latent or self.features.vectors

    def state(self, observation: Any) -> Tensor:
        """``[N, S]``, what models and critics of this policy see of observations ``[N, ...]``: the latent state, or
        the observation itself as a vector."""
        if self.latent:
            return self.project(self.features(observation))
        return self.features.vector(observation)

    def take_encoder(self, encoder: Encoder) -> None:
        """Copy the weights of the model's encoder into this policy's own."""
        mine = [*self.features.buffers(), *self.project.buffers()]
        for copy, weight in zip(mine, encoder.parameters(), strict=True):
            copy.copy_(weight.detach())

    def _begin(self, state: Tensor) -> Tensor:
        """``h_0 [N, H]`` at states ``[N, S]``."""
        if self.latent:
            return self.start(self.body(state))
        scaled = state if self.features.scaler is None else self.features.scaler(state)
        return self.start(self.features.layers(scaled))

    def _head(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(hidden), self.log_std(hidden).clamp(*self.LOG_STD)

    # -- sequences -----------------------------------------------------------------------------------------

    def draw_sequence(
        self, observation: Any, previous_action: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draw actions open loop, differentiable in the weights through both results and through the recurrence.

        Args:
            observation: ``[N, ...]``; previous_action: ``[N, A]``, what was done before it (zeros at first).
            noise: ``[N, J, A]`` standard normal numbers.

        Returns ``(actions [N, J, A], log_probs [N, J])``.
        """
        hidden, action = self._begin(self.state(observation)), previous_action
        actions, raws, log_stds = [], [], []
        for j in range(noise.shape[1]):
            hidden = self.cell(action, hidden)
            mean, log_std = self._head(hidden)
            raw = mean + log_std.exp() * noise[:, j]
            action = self.squash(raw)
            actions.append(action)
            raws.append(raw)
            log_stds.append(log_std)
        raw, log_std = torch.stack(raws, 1), torch.stack(log_stds, 1)
        log_density = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
        return torch.stack(actions, 1), log_density - self._stretch(raw)

    def mode_sequence(self, observation: Any, previous_action: Tensor, length: int) -> Tensor:
        """``[N, length, A]``: the means, squashed, each fed back to the next."""
        hidden, action = self._begin(self.state(observation)), previous_action
        actions = []
        for _ in range(length):
            hidden = self.cell(action, hidden)
            action = self.squash(self.mean(hidden))
            actions.append(action)
        return torch.stack(actions, 1)

    # -- one step ------------------------------------------------------------------------------------------

    def mode_at(self, state: Tensor, previous_action: Tensor) -> Tensor:
        """``[N, A]``, the first action's squashed mean at states ``[N, S]``."""
        return self.squash(self._head(self.cell(previous_action, self._begin(state)))[0])

    def parameters_at(self, observation: Any, previous_action: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self._begin(self.state(observation))
        lead = hidden.shape[:-1]  # cells take one axis of rows
        action = hidden.new_zeros(*lead, len(self.low)) if previous_action is None else previous_action
        hidden = self.cell(action.flatten(0, -2), hidden.flatten(0, -2))
        return self._head(hidden.unflatten(0, lead))

    def distribution(self, traj: Trajectories) -> TensorDict:
        step = traj.inputs["step"]
        mean, log_std = self.parameters_at(step["observation"], step.get("previous_action", None))
        return TensorDict({"mean": mean, "std": log_std.exp()}, batch_size=traj.mask.shape)

    # -- acting --------------------------------------------------------------------------------------------

    def actor(self, length: int = 1) -> OpenLoop:
        """An `OpenLoop` that looks every ``length`` steps."""
        return OpenLoop(self.planner(length), length, np.zeros(len(self.low), np.float32))

    def planner(self, length: int) -> Plan:
        """Sequences of ``length`` for NumPy observations, with the newest weights, without gradient."""
        here = all(p.device.type == "cpu" for p in self.parameters())
        if here and self.features.plain and not self.latent:
            return self._numpy_planner(length)
        device = next(self.parameters()).device

        @torch.no_grad()
        def plan(observation: Any, previous: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
            seen, before = to_tensor(observation).to(device), torch.from_numpy(previous).to(device)
            if noise is None:
                actions = self.mode_sequence(seen, before, length)
            else:
                actions = self.draw_sequence(seen, before, torch.from_numpy(noise).to(device))[0]
            return actions.cpu().numpy()

        return plan

    def _numpy_planner(self, length: int) -> Plan:
        begin = numpy_perceptron(self.features, [(self.start.weight.T, self.start.bias)])
        weights = [p.detach().numpy() for p in (self.cell.weight_ih, self.cell.weight_hh)]
        from_action, from_hidden = (w.T for w in weights)
        bias_action, bias_hidden = (p.detach().numpy() for p in (self.cell.bias_ih, self.cell.bias_hh))
        heads = [(h.weight.detach().numpy().T, h.bias.detach().numpy()) for h in (self.mean, self.log_std)]
        (to_mean, bias_mean), (to_log_std, bias_log_std) = heads
        scale, centre = self.scale.numpy(), self.centre.numpy()
        width, gated = from_hidden.shape[0], self.cell_kind == "gru"

        def step(action: np.ndarray, hidden: np.ndarray) -> np.ndarray:
            x, h = action @ from_action + bias_action, hidden @ from_hidden + bias_hidden
            if not gated:
                return np.tanh(x + h)
            gates = 0.5 * (
                1.0 + np.tanh(0.5 * (x[:, : 2 * width] + h[:, : 2 * width]))
            )  # the logistic function
            reset, update = gates[:, :width], gates[:, width:]
            new = np.tanh(x[:, 2 * width :] + reset * h[:, 2 * width :])
            return new + update * (hidden - new)

        def plan(observation: np.ndarray, previous: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
            hidden, action = begin(observation)[0], previous
            actions = np.empty((len(previous), length, previous.shape[1]), np.float32)
            for j in range(length):
                hidden = step(action, hidden)
                raw = hidden @ to_mean + bias_mean
                if noise is not None:
                    log_std = np.clip(hidden @ to_log_std + bias_log_std, *self.LOG_STD)
                    raw += np.exp(log_std) * noise[:, j]
                action = actions[:, j] = np.tanh(raw) * scale + centre
            return actions

        return plan

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "cell": self.cell_kind, "latent": self.latent}


class Encoder(nn.Module):
    """Observations ``[N, ...]`` to latent states ``[N, latent]``: features and a projection."""

    def __init__(self, features: Features, latent: int) -> None:
        super().__init__()
        self.features = features
        self.project = nn.Linear(features.width, latent)

    def forward(self, observation: Any) -> Tensor:
        return self.project(self.features(observation))


def freeze(module: nn.Module) -> nn.Module:
    """``module`` with every weight as a buffer: it is saved and moved with the rest, and no optimiser sees it."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                del part._parameters[name]
                part.register_buffer(name, weight.detach())
    return module


# --- carrying sequences out -------------------------------------------------------------------------------


class OpenLoop:
    """Actions one at a time from a plan that gives several: a function ``(observation, noise) -> {"action": ...}``
    on NumPy arrays ``[n, ...]``, with a memory for each of the n rows.

    Args:
        plan: see `Plan`; asked only about rows that have nothing left to do.
        length: actions that a plan has.
        nothing: ``[...]``, the action that stands for none: what was done before an episode's first.

    Call `begin` for the rows whose episodes ended: what they had left to do is dropped, and nothing was done before.

    Attributes:
        decisions: plans made so far, over all rows.
    """

    def __init__(self, plan: Plan, length: int, nothing: np.ndarray) -> None:
        if length < 1:
            raise UsageError(f"a sequence has at least one action, not {length}")
        self.plan, self.length, self.nothing = plan, length, np.asarray(nothing)
        self.decisions = 0
        self._allocate(0)

    def _allocate(self, n: int) -> None:
        self._left = np.zeros(n, np.int64)
        self._previous = np.tile(self.nothing, (n, *[1] * self.nothing.ndim))
        self._queue = np.zeros((n, self.length, *self.nothing.shape), self.nothing.dtype)

    def __call__(self, observation: Any, noise: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """``{"action": [n, ...]}``. ``noise`` is ``[n, length * A]`` (None: without); rows in the midst of a sequence
        leave theirs unused."""
        n = len(next(iter(observation.values())) if isinstance(observation, dict) else observation)
        if len(self._left) != n:
            self._allocate(n)
        rows = np.flatnonzero(self._left == 0)
        if len(rows):
            seen = _rows(observation, rows) if len(rows) < n else observation
            drawn = None if noise is None else noise[rows].reshape(len(rows), self.length, -1)
            self._queue[rows] = self.plan(seen, self._previous[rows], drawn)
            self._left[rows] = self.length
            self.decisions += len(rows)
        self._previous = self._queue[np.arange(n), self.length - self._left]
        self._left -= 1
        return {"action": self._previous.copy()}

    def begin(self, rows: np.ndarray | None = None) -> None:
        """New episodes in ``rows`` (bool ``[n]``; None: in all)."""
        if rows is None:
            rows = np.ones(len(self._left), bool)
        self._left[rows] = 0
        self._previous[rows] = self.nothing

    def took(self, action: np.ndarray) -> None:
        """Others acted: ``action [n, ...]`` was done last, and nothing is left to do."""
        if len(self._left) != len(action):
            self._allocate(len(action))
        self._left[:] = 0
        self._previous[:] = action

    def state_dict(self) -> dict[str, Any]:
        """What is left to do, and what was done last."""
        names = ("_left", "_previous", "_queue")
        state: dict[str, Any] = {name[1:]: torch.from_numpy(getattr(self, name).copy()) for name in names}
        return {**state, "decisions": self.decisions}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name in ("left", "previous", "queue"):
            setattr(self, f"_{name}", state[name].numpy().copy())
        self.decisions = state["decisions"]


def _rows(observation: Any, rows: np.ndarray) -> Any:
    if isinstance(observation, dict):
        return {name: value[rows] for name, value in observation.items()}
    return observation[rows]


def repeated(policy: Controller, length: int, action_space: Any) -> OpenLoop:
    """A one-step controller that looks every ``length`` steps and repeats its likeliest action in between."""
    act = policy.actor()

    def plan(observation: Any, previous: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        return np.repeat(act(observation, None)["action"][:, None], length, 1)

    return OpenLoop(plan, length, np.zeros(action_space.shape, action_space.dtype))
