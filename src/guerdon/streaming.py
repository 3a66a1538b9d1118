"""Learning from each step once, as it arrives: eligibility traces, steps bounded against overshooting, sparse
initial weights (Elsayed et al., 2024, arXiv 2410.14606).

A learner predicts something (a value, the log-probability of an action). After each step of the environment
it adds the gradient of that *prediction* to the trace and moves the weights along the trace by the TD error:

    learner = Learner(network, ObGD(alpha=1.0, kappa=2.0), decay=gamma * lam)
    output, tape = learner.forward(observation)
    ...                                       # act, see the reward, form the TD error delta
    learner.accumulate(tape, cotangent)       # z <- gamma lambda z + d(cotangent . output)/dw
    learner.step(delta)                       # w <- w + step size * delta * z
    learner.reset()                           # z <- 0, where an episode ended

Weights and trace are flat vectors, NumPy arrays or tensors alike; a network that can be used here has their
``weights`` and knows how to pull a gradient back onto such a vector (`guerdon.policies.small`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.errors import NonFiniteError, UsageError, nearest


class Differentiable(Protocol):
    """A network at batch one.

    Attributes:
        weights: ``[P]``, all weights; changing it in place changes the network.
    """

    weights: Any

    def predict(self, observation: Any) -> Any:
        """``[outputs]``, NumPy."""

    def forward(self, observation: Any) -> tuple[Any, Any]:
        """``[outputs]``, NumPy, and what `pull_back` needs; valid until the weights change."""

    def pull_back(self, tape: Any, cotangent: Any, onto: Any) -> None:
        """Add the gradient of ``cotangent . outputs`` with respect to the weights to ``onto [P]``."""


# --- how far to step --------------------------------------------------------------------------------------


@dataclass
class ObGD:
    """Overshooting-bounded gradient descent: ``w <- w + step * delta * z`` with the step size cut so that the
    TD error does not change its sign (section 3.3 and algorithm 3 of the paper).

    Args:
        alpha: the largest step size; the bound does the work.
        kappa: caution; the larger, the shorter the steps.
    """

    alpha: float = 1.0
    kappa: float = 2.0

    def __post_init__(self) -> None:
        if self.alpha <= 0 or self.kappa <= 0:
            raise UsageError(f"alpha ({self.alpha}) and kappa ({self.kappa}) must both be above 0")

    def start(self, weights: Any) -> dict[str, Any]:
        """What is remembered between steps: nothing."""
        return {}

    def step(self, weights: Any, trace: Any, delta: float, state: dict[str, Any]) -> float:
        """Move ``weights [P]`` in place along ``trace [P]``; the step size that was used, at most ``alpha``."""
        size = self.size(float(abs(trace).sum()), delta)
        weights += (size * delta) * trace
        return size

    def size(self, norm: float, delta: float) -> float:
        """``alpha / max(1, M)`` with ``M = alpha kappa max(|delta|, 1) ||z||_1``; ``norm`` is the trace's L1
        norm over the whole network."""
        bound = self.alpha * self.kappa * max(abs(delta), 1.0) * norm
        return self.alpha / bound if bound > 1.0 else self.alpha


@dataclass
class AdaptiveObGD(ObGD):
    """ObGD on the trace divided by the running root mean square of ``delta z``, entry by entry (as in the
    paper's released code).

    Args:
        beta2: decay of the mean square.
        eps: added to it before its root.
    """

    beta2: float = 0.999
    eps: float = 1e-8

    def start(self, weights: Any) -> dict[str, Any]:
        """The mean square ``[P]`` and the steps that it has seen."""
        return {"square": 0.0 * weights, "steps": 0}

    def step(self, weights: Any, trace: Any, delta: float, state: dict[str, Any]) -> float:
        """As `ObGD.step`; the scaled trace is bounded and followed."""
        state["steps"] += 1
        square = state["square"]
        square *= self.beta2
        square += (1.0 - self.beta2) * (delta * trace) ** 2
        scaled = trace / (square / (1.0 - self.beta2 ** state["steps"]) + self.eps) ** 0.5
        return super().step(weights, scaled, delta, state)


@dataclass
class TraceSGD:
    """The classic step ``w <- w + lr * delta * z``, of a fixed size: what fails without the bound.

    Args:
        lr: step size.
    """

    lr: float = 1e-3

    def start(self, weights: Any) -> dict[str, Any]:
        """What is remembered between steps: nothing."""
        return {}

    def step(self, weights: Any, trace: Any, delta: float, state: dict[str, Any]) -> float:
        """Move ``weights [P]`` in place; the step size."""
        weights += (self.lr * delta) * trace
        return self.lr


Rule = ObGD | TraceSGD
RuleName = Literal["obgd", "adaptive", "sgd"]


def make_rule(name: RuleName, alpha: float, kappa: float) -> Rule:
    """The rule for steps of that name; ``alpha`` is the largest step size, or with ``sgd`` the step size, and
    ``kappa`` belongs to the bounded ones. Raises `UsageError` for another name."""
    if name == "obgd":
        return ObGD(alpha, kappa)
    if name == "adaptive":
        return AdaptiveObGD(alpha, kappa)
    if name == "sgd":
        return TraceSGD(alpha)
    raise UsageError(f"unknown optimiser '{name}'; {nearest(name, get_args(RuleName))}")


# --- the learner ------------------------------------------------------------------------------------------


class Learner:
    """A network, its eligibility trace and its rule for steps.

    Args:
        network: see `Differentiable`.
        rule: how far a step goes.
        decay: of the trace in a step, gamma times lambda. 0 forgets at once: no traces.

    Attributes:
        trace: ``[P]``, accumulating.
        step_size: that of the last step.
    """

    def __init__(self, network: Differentiable, rule: Rule, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise UsageError(f"the trace decays by gamma times lambda, which is {decay}; expected 0 to 1")
        self.network, self.rule, self.decay = network, rule, decay
        self.predict, self.forward = network.predict, network.forward
        self.trace = 0.0 * network.weights
        self.state = rule.start(network.weights)
        self.step_size = 0.0

    def accumulate(self, tape: Any, cotangent: Any) -> None:
        """``z <- decay z + gradient`` of ``cotangent [outputs] . outputs`` at the observation of ``tape``."""
        self.trace *= self.decay
        self.network.pull_back(tape, cotangent, self.trace)

    def step(self, delta: float) -> None:
        """One step along the trace. Raises `NonFiniteError` when the TD error ``delta`` is NaN or infinite; the
        weights are then as before."""
        if not math.isfinite(delta):
            raise NonFiniteError(
                f"the TD error is {delta}; the predictions have diverged or the reward is not finite: try a "
                "smaller step size, or ObGD, which bounds it"
            )
        self.step_size = self.rule.step(self.network.weights, self.trace, delta, self.state)

    def reset(self) -> None:
        """``z <- 0``."""
        self.trace[:] = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Trace and what the rule remembers; the weights belong to the role."""
        return {"trace": _saved(self.trace), "state": {n: _saved(v) for n, v in self.state.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        _restore(self.trace, state["trace"])
        for name, value in state["state"].items():
            if isinstance(value, Tensor):
                _restore(self.state[name], value)
            else:
                self.state[name] = value


def _saved(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    return value.clone() if isinstance(value, Tensor) else value


def _restore(into: Any, value: Tensor) -> None:
    into[:] = value.numpy() if isinstance(into, np.ndarray) else value


# --- initial weights --------------------------------------------------------------------------------------


@torch.no_grad()
def sparse_init(module: nn.Module, sparsity: float = 0.9, generator: torch.Generator | None = None) -> None:
    """Fresh weights for every linear and convolutional layer of ``module``: uniform in ``+-1/sqrt(fan_in)``
    (LeCun), then for each output unit ``ceil(sparsity * fan_in)`` of its inputs, chosen at random, set to 0.
    Biases are 0. Raises `UsageError` when ``sparsity`` is not in [0, 1)."""
    if not 0 <= sparsity < 1:
        raise UsageError(f"sparsity is {sparsity}; expected at least 0 (dense) and below 1 (no weights left)")
    for layer in module.modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            continue
        rows = layer.weight.view(len(layer.weight), -1)
        fan_in = rows.shape[1]
        bound = fan_in**-0.5
        rows.uniform_(-bound, bound, generator=generator)
        zeros = math.ceil(sparsity * fan_in)
        for row in rows:
            row[torch.randperm(fan_in, generator=generator)[:zeros]] = 0.0
        if layer.bias is not None:
            layer.bias.zero_()
