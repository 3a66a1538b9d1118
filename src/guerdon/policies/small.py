"""Small networks for learning at batch one, and their gradients by hand.

At batch one a network of a few thousand weights spends its time in starting operations, not in arithmetic:
a forward and backward pass through autograd takes half a millisecond, the same numbers by NumPy, which starts
an operation in half a microsecond, a twentieth of that. `differentiable` picks the faster of the two;
weights stay those of the torch module, in the same memory.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon import normalise
from guerdon.batch import Trajectories
from guerdon.compiled import FlatWeights
from guerdon.errors import UsageError, nearest
from guerdon.objectives import divergence
from guerdon.policies.control import Controller
from guerdon.streaming import sparse_init

SLOPE = 0.01  # of LeakyReLU below 0
EPSILON = 1e-5  # of LayerNorm

# observations up to this height and width get MinAtar's convolution, larger ones Atari's: (channels, kernel, stride)
_GRID = 20
_MINATAR = ((16, 3, 1),)
_ATARI = ((32, 8, 5), (64, 4, 3), (64, 3, 2))


class SmallNetwork(nn.Module):
    """Layers of: linear map, LayerNorm without weights, LeakyReLU; then a linear head without either.

    Pixels ``[C, H, W]`` or ``[H, W, C]`` (the channels are the shorter end) go through convolutions first, with
    LayerNorm over channels, height and width together.

    Args:
        shape: of one observation, ``[D]`` or pixels.
        outputs: of the head.
        hidden: units of the fully connected layers.
        layer_norm: normalise each layer's units before the non-linearity.
        sparsity: share of each unit's inputs that begin at 0; see `sparse_init`.
        generator: draws the initial weights.

    Raises `UsageError` for any other shape.
    """

    def __init__(
        self,
        shape: Sequence[int],
        outputs: int,
        hidden: Sequence[int] = (128, 128),
        layer_norm: bool = True,
        sparsity: float = 0.9,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.units, self.layer_norm = tuple(shape), tuple(hidden), layer_norm
        self.convolutions = nn.ModuleList()
        if len(self.shape) == 3:
            self.channels_last = self.shape[2] < self.shape[0]
            channels, height, width = self._channels_first()
            for filters, kernel, stride in _MINATAR if max(height, width) <= _GRID else _ATARI:
                self.convolutions.append(nn.Conv2d(channels, filters, kernel, stride))
                channels = filters
                height, width = ((side - kernel) // stride + 1 for side in (height, width))
            features = channels * height * width
        elif len(self.shape) == 1:
            features = self.shape[0]
        else:
            raise UsageError(
                f"observations of shape {list(self.shape)}: expected a vector or pixels with channels"
            )
        widths = [features, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Linear(widths[-1], outputs)
        sparse_init(self, sparsity, generator)

    def _channels_first(self) -> tuple[int, int, int]:
        first, second, third = self.shape
        return (third, first, second) if self.channels_last else (first, second, third)

    def forward(self, observation: Tensor) -> Tensor:
        """``[..., *shape]`` to ``[..., outputs]``."""
        x = observation
        if self.convolutions:
            x = x.reshape(-1, *self.shape).float()
            if self.channels_last:
                x = x.movedim(-1, 1)
            for convolution in self.convolutions:
                x = self._activate(convolution(x), 3)
            x = x.flatten(1).reshape(*observation.shape[: observation.ndim - 3], -1)
        for linear in self.hidden:
            x = self._activate(linear(x), 1)
        return self.head(x)

    scaler = None  # normalising is the stream's work
    plain = False  # not a bare perceptron, which other controllers compute in NumPy

    def settings(self) -> dict[str, Any]:
        """Arguments that make a network of the same shape, as plain data."""
        return {
            "shape": list(self.shape),
            "outputs": self.head.out_features,
            "hidden": list(self.units),
            "layer_norm": self.layer_norm,
        }

    def _activate(self, x: Tensor, dims: int) -> Tensor:
        if self.layer_norm:
            x = F.layer_norm(x, x.shape[-dims:], eps=EPSILON)
        return F.leaky_relu(x, SLOPE)


def differentiable(network: nn.Module, flat: FlatWeights) -> NumpyNetwork | TorchNetwork:
    """The network at batch one with its gradient, by hand where that is possible (fully connected, on the CPU).

    Args:
        network: ``[*shape]`` to ``[outputs]``.
        flat: its weights as one tensor (`guerdon.roles.Role.flat_weights`).
    """
    if isinstance(network, SmallNetwork) and not network.convolutions and flat.flat.device.type == "cpu":
        return NumpyNetwork(network, flat)
    return TorchNetwork(network, flat)


class TorchNetwork:
    """Any module at batch one, its gradient by autograd; see `guerdon.streaming.Differentiable`."""

    def __init__(self, network: nn.Module, flat: FlatWeights) -> None:
        self.network, self.flat = network, flat
        self.weights = flat.flat
        self._parameters = list(network.parameters())

    def predict(self, observation: NDArray[Any]) -> NDArray[np.float32]:
        """``[*shape]`` to ``[outputs]``."""
        with torch.no_grad():
            return self._run(observation).cpu().numpy()

    def forward(self, observation: NDArray[Any]) -> tuple[NDArray[np.float32], Tensor]:
        """``[outputs]`` and the tape of `pull_back`."""
        with torch.enable_grad():
            output = self._run(observation)
        return output.detach().cpu().numpy(), output

    def pull_back(self, tape: Tensor, cotangent: NDArray[np.float32], onto: Tensor) -> None:
        """Add the gradient of ``cotangent . outputs`` to ``onto [P]``."""
        weights = torch.as_tensor(cotangent, dtype=torch.float32, device=tape.device)
        onto += torch.cat([g.reshape(-1) for g in torch.autograd.grad(tape, self._parameters, weights)])

    def _run(self, observation: NDArray[Any]) -> Tensor:
        return self.network(torch.as_tensor(observation, dtype=torch.float32, device=self.weights.device))


class NumpyNetwork:
    """A fully connected `SmallNetwork` at batch one, forward and backward by hand; see
    `guerdon.streaming.Differentiable`. Weights and torch parameters share their memory."""

    def __init__(self, network: SmallNetwork, flat: FlatWeights) -> None:
        self.layer_norm = network.layer_norm
        self.weights: NDArray[np.float32] = flat.flat.numpy()
        self._sizes = [tuple(linear.weight.shape) for linear in (*network.hidden, network.head)]
        *self._hidden, self._head = self._layers(self.weights)
        self._means = [np.full(rows, 1.0 / rows, dtype=np.float32) for rows, _ in self._sizes[:-1]]
        self._onto: tuple[Any, list[Any]] = (None, [])  # a trace that was seen, and its layers

    def _layers(self, flat: NDArray[np.float32]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        layers, start = [], 0
        for rows, columns in self._sizes:
            end = start + rows * columns
            layers.append((flat[start:end].reshape(rows, columns), flat[end : end + rows]))
            start = end + rows
        return layers

    def predict(self, observation: NDArray[np.float32]) -> NDArray[np.float32]:
        """``[D]`` to ``[outputs]``."""
        return self.forward(observation)[0]

    def forward(self, observation: NDArray[np.float32]) -> tuple[NDArray[np.float32], list[Any]]:
        """``[outputs]`` and the tape of `pull_back`: each layer's input, its units before the non-linearity, and
        one over their standard deviation."""
        tape: list[Any] = []
        x, inverse = observation, 1.0
        for (weight, bias), mean in zip(self._hidden, self._means, strict=True):
            units = weight.dot(x)
            units += bias
            if self.layer_norm:
                units -= units.dot(mean)
                inverse = 1.0 / math.sqrt(units.dot(units) / len(units) + EPSILON)
                units *= inverse
            tape.append((x, units, inverse))
            x = np.maximum(units, SLOPE * units)
        weight, bias = self._head
        tape.append(x)
        return weight.dot(x) + bias, tape

    def pull_back(self, tape: list[Any], cotangent: NDArray[np.float32], onto: NDArray[np.float32]) -> None:
        """Add the gradient of ``cotangent . outputs`` to ``onto [P]``."""
        if self._onto[0] is not onto:
            self._onto = (onto, self._layers(onto))
        *hidden, (into_weight, into_bias) = self._onto[1]
        into_weight += np.multiply.outer(cotangent, tape[-1])
        into_bias += cotangent
        back = cotangent.dot(self._head[0])
        for i in reversed(range(len(hidden))):
            x, units, inverse = tape[i]
            back = np.where(units > 0, back, SLOPE * back)
            if self.layer_norm:
                mean = self._means[i]
                back -= back.dot(mean)
                back -= units * (back.dot(units) / len(units))
                back *= inverse
            into_weight, into_bias = hidden[i]
            into_weight += np.multiply.outer(back, x)
            into_bias += back
            if i:
                back = back.dot(self._hidden[i][0])


# --- distributions of an action, from a network's outputs ----------------------------------------------------


class Choice:
    """One of the actions, by the softmax of the outputs ``[A]``."""

    def __init__(self, actions: int) -> None:
        self.outputs = actions
        self.noise: tuple[Literal["normal", "uniform"], int] = ("uniform", 1)

    def draw(self, output: NDArray[np.float32], noise: NDArray[np.float32]) -> tuple[int, Any]:
        """An action from uniform ``noise [1]``, and what `gradient` needs."""
        logits = output - output.max()
        share = np.exp(logits)
        total = share.sum()
        log_share = logits - math.log(total)
        share /= total
        action = min(int(share.cumsum().searchsorted(noise[0], side="right")), len(output) - 1)
        return action, (action, share, log_share)

    def gradient(self, drawn: Any, entropy: float) -> NDArray[np.float32]:
        """That of ``log pi(action) + entropy * H(pi)`` with respect to the outputs."""
        action, share, log_share = drawn
        spread = -share.dot(log_share)
        gradient = -share * (1.0 + entropy * (log_share + spread))
        gradient[action] += 1.0
        return gradient


class Normal:
    """A diagonal Gaussian from the outputs ``[2 A]``: means, and deviations before softplus. Not squashed: the
    environment clips, and the log-probability is of the action before that."""

    def __init__(self, size: int) -> None:
        self.size, self.outputs = size, 2 * size
        self.noise: tuple[Literal["normal", "uniform"], int] = ("normal", size)

    def draw(self, output: NDArray[np.float32], noise: NDArray[np.float32]) -> tuple[NDArray[Any], Any]:
        """An action from standard normal ``noise [A]``, and what `gradient` needs."""
        before = output[self.size :]
        std = np.logaddexp(np.float32(0.0), before)
        return output[: self.size] + std * noise, (noise, std, before)

    def gradient(self, drawn: Any, entropy: float) -> NDArray[np.float32]:
        """That of ``log pi(action) + entropy * H(pi)`` with respect to the outputs."""
        noise, std, before = drawn
        slope = 1.0 / (1.0 + np.exp(-before))  # of softplus
        return np.concatenate([noise / std, (noise * noise - 1.0 + entropy) * slope / std])


class SmallController(Controller):
    """A controller on a `SmallNetwork` that normalises its observations by statistics taken from a stream.

    Where it acts outside of the stream, the time in the episode is not known and its feature is 0 (half time).

    Args:
        network: its inputs are the observation and, if ``timed``, the time feature.
        head: ``"choice"`` (a softmax over actions), ``"normal"`` or ``"greedy"`` (the highest action value, now
            and then a random action).
        timed: whether the last input is the time.
    """

    name: ClassVar[str] = "small"
    mean: Tensor
    variance: Tensor

    def __init__(self, network: SmallNetwork, head: str, timed: bool = False) -> None:
        super().__init__(network)  # type: ignore[arg-type]
        outputs = network.head.out_features
        if head == "choice":
            self.kind, self.size, self.noise = "categorical", outputs, ("gumbel", outputs)  # type: ignore[misc]
        elif head == "normal":
            self.kind, self.size, self.noise = "gaussian", outputs // 2, ("normal", outputs // 2)  # type: ignore[misc]
        elif head == "greedy":
            self.kind, self.size, self.noise = "categorical", outputs, ("uniform", 2)  # type: ignore[misc]
        else:
            raise UsageError(f"unknown head '{head}'; {nearest(head, ('choice', 'normal', 'greedy'))}")
        self.head_name, self.timed = head, timed
        self.epsilon = 0.0
        shape = (network.shape[0] - 1,) if timed else network.shape
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(shape, dtype=torch.float64))

    @classmethod
    def build(cls, features: Mapping[str, Any], **settings: Any) -> SmallController:
        """See `Controller.build`."""
        return cls(SmallNetwork(**features), **settings)

    @torch.no_grad()
    def take_statistics(self, statistics: normalise.RunningMeanStd) -> None:
        """Normalise by these from now on (``variance`` is that of the sample)."""
        self.mean.copy_(torch.as_tensor(statistics.mean))
        self.variance.copy_(torch.as_tensor(statistics.var))

    def outputs(self, observation: Any) -> Tensor:
        """``[..., outputs]`` at raw observations ``[..., *shape]``."""
        seen = ((observation - self.mean) / (self.variance + normalise.EPSILON).sqrt()).float()
        if self.timed:
            seen = F.pad(seen, (0, 1))
        return self.features(seen)

    def distribution(self, traj: Trajectories) -> TensorDict:
        output = self.outputs(traj.inputs["step", "observation"])
        if self.head_name == "normal":
            mean, before = output.chunk(2, -1)
            return TensorDict({"mean": mean, "std": F.softplus(before)}, batch_size=traj.mask.shape)
        if self.head_name == "greedy":
            best = F.one_hot(output.argmax(-1), self.size).to(output.dtype)
            output = (best * (1.0 - self.epsilon) + self.epsilon / self.size).log()
        return TensorDict({"logits": output}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        p = self.distribution(traj) if distribution is None else distribution
        return divergence.log_prob(p, traj.inputs["step", "action"], mask=traj.mask)

    def mode(self, observation: Any) -> Tensor:
        output = self.outputs(observation)
        return output[..., : self.size] if self.head_name == "normal" else output.argmax(-1)

    def act(self, observation: Any, noise: Tensor | None) -> dict[str, Tensor]:
        if noise is None:
            return {"action": self.mode(observation)}
        output = self.outputs(observation)
        if self.head_name == "normal":
            mean, before = output.chunk(2, -1)
            return {"action": mean + F.softplus(before) * noise}
        if self.head_name == "choice":
            return {"action": (output + noise).argmax(-1)}
        any_action = (noise[:, 1] * self.size).long()
        return {"action": torch.where(noise[:, 0] < self.epsilon, any_action, output.argmax(-1))}

    def settings(self) -> dict[str, Any]:
        return {"head": self.head_name, "timed": self.timed}
