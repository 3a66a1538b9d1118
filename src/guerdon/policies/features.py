"""From observations to feature vectors: what actors and critics of control stand on.

Observations are tensors ``[..., *shape]`` or dictionaries (TensorDicts) of them; images are ``uint8`` with the
channels last, as environments give them, or stacks of grey frames with the channels first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from guerdon.errors import UsageError

Kind = Literal["vector", "image", "one_hot"]
Activation = Literal["tanh", "relu", "elu", "silu", "leaky_relu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


@dataclass(frozen=True)
class Entry:
    """One part of an observation.

    Args:
        shape: of one observation's array.
        kind: ``"vector"`` (flattened), ``"image"`` (convolved), ``"one_hot"`` (an integer below ``shape[0]``).
    """

    shape: tuple[int, ...]
    kind: Kind = "vector"

    @property
    def rank(self) -> int:
        """Axes of one observation's tensor."""
        return 0 if self.kind == "one_hot" else len(self.shape)


def describe(space: Any) -> dict[str, Entry]:
    """The entries of a gymnasium observation space; a plain space has one, called ``""``.

    Raises `UsageError` for spaces that are neither Box, Discrete, MultiBinary nor a Dict of those.
    """
    from gymnasium import spaces

    if isinstance(space, spaces.Dict):
        entries = {}
        for name, part in space.spaces.items():
            for inner, entry in describe(part).items():
                if inner:
                    raise UsageError(
                        f"the observation '{name}' is a dictionary inside a dictionary; flatten it first"
                    )
                entries[name] = entry
        return entries
    if isinstance(space, spaces.Discrete):
        return {"": Entry((int(space.n),), "one_hot")}
    if isinstance(space, (spaces.Box, spaces.MultiBinary)):
        shape = tuple(int(s) for s in space.shape)
        image = (
            space.dtype == np.uint8
            and len(shape) in (2, 3)
            and min(shape[-2:] if len(shape) == 2 else shape) > 0
        )
        image = image and max(shape) >= 8
        return {"": Entry(shape, "image" if image else "vector")}
    raise UsageError(
        f"a controller cannot read observations of {type(space).__name__}; use Box, Discrete or a Dict of them"
    )


class Scaler(nn.Module):
    """Normalises a vector by running statistics: ``clip((x - mean) / std, -limit, limit)``.

    The statistics are buffers, so they are saved with the model, and a loaded controller takes raw observations.

    Args:
        size: of the vector; limit: where normalised values are clipped (10, as the common wrappers do).
    """

    def __init__(self, size: int, limit: float = 10.0) -> None:
        super().__init__()
        self.limit = limit
        self.mean: Tensor
        self.variance: Tensor
        self.count: Tensor
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(size, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    def forward(self, vector: Tensor) -> Tensor:
        """``[..., size]``, normalised."""
        scale = (self.variance + 1e-8).rsqrt().float()
        return ((vector - self.mean.float()) * scale).clamp(-self.limit, self.limit)

    @torch.no_grad()
    def update(self, vectors: Tensor) -> None:
        """Take ``[N, size]`` vectors into the statistics (Chan et al., 1979)."""
        vectors = vectors.to(self.mean).reshape(-1, self.mean.shape[0])
        n = len(vectors)
        if not n:
            return
        mean, variance = vectors.mean(0), vectors.var(0, correction=0)
        total = self.count + n
        delta = mean - self.mean
        m2 = self.variance * self.count + variance * n + delta.square() * self.count * n / total
        self.mean.copy_(self.mean + delta * n / total)
        self.variance.copy_(m2 / total)
        self.count.copy_(total)


class Features(nn.Module):
    """Vectors concatenated (and normalised), images convolved, then a multilayer perceptron.

    Args:
        entries: what an observation holds (`describe`).
        hidden: widths of the perceptron.
        activation: after each layer.
        normalise: keep running statistics of the vector part; `scaler` may be shared with another model.
        layer_norm: after each linear layer, before the activation.
        scaler: use this one.

    Attributes:
        width: of the features.
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        hidden: Sequence[int] = (64, 64),
        activation: Activation = "tanh",
        normalise: bool = False,
        layer_norm: bool = False,
        scaler: Scaler | None = None,
    ) -> None:
        super().__init__()
        self.entries = dict(entries)
        self.hidden, self.activation, self.layer_norm = tuple(hidden), activation, layer_norm
        self.vectors = sum(math.prod(e.shape) for e in entries.values() if e.kind != "image")
        self.scaler = scaler or (Scaler(self.vectors) if normalise and self.vectors else None)
        self.images = nn.ModuleDict()
        width = self.vectors
        for name, entry in entries.items():
            if entry.kind == "image":
                network = _convolutions(entry.shape)
                self.images[name or "image"] = network
                width += int(network(torch.zeros(1, *entry.shape, dtype=torch.uint8)).shape[1])
        layers: list[nn.Module] = []
        for size in hidden:
            layers.append(nn.Linear(width, size))
            if layer_norm:
                layers.append(nn.LayerNorm(size))
            layers.append(ACTIVATIONS[activation]())
            width = size
        self.layers = nn.Sequential(*layers)
        self.width = width

    @property
    def plain(self) -> bool:
        """Whether the observation is one flat vector: then a controller can act in NumPy."""
        entry = self.entries.get("")
        return entry is not None and (entry.kind, entry.rank) == ("vector", 1) and not self.layer_norm

    def vector(self, observation: Any) -> Tensor:
        """The vector part ``[..., size]`` of an observation, as it comes."""
        parts = []
        for name, entry in self.entries.items():
            value = observation[name] if name else observation
            if entry.kind == "one_hot":
                # torch's own one_hot looks at the values, which a traced update cannot
                places = torch.arange(entry.shape[0], device=value.device)
                parts.append((value.unsqueeze(-1) == places).float())
            elif entry.kind == "vector":
                parts.append(
                    value.flatten(value.ndim - entry.rank).float() if entry.rank != 1 else value.float()
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def forward(self, observation: Any) -> Tensor:
        """``[..., width]`` features of observations ``[..., *shape]``."""
        parts = []
        if self.vectors:
            vector = self.vector(observation)
            parts.append(vector if self.scaler is None else self.scaler(vector))
        for name, entry in self.entries.items():
            if entry.kind == "image":
                image = observation[name] if name else observation
                lead = image.shape[: image.ndim - entry.rank]
                flat = self.images[name or "image"](image.reshape(-1, *entry.shape))
                parts.append(flat.reshape(*lead, -1))
        return self.layers(parts[0] if len(parts) == 1 else torch.cat(parts, -1))

    def settings(self) -> dict[str, Any]:
        """What `from_settings` needs, as plain data."""
        return {
            "entries": {name: asdict(entry) for name, entry in self.entries.items()},
            "hidden": list(self.hidden),
            "activation": self.activation,
            "normalise": self.scaler is not None,
            "layer_norm": self.layer_norm,
        }

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Features:
        """Features of the same shape, with fresh weights."""
        entries = {n: Entry(tuple(e["shape"]), e["kind"]) for n, e in settings["entries"].items()}
        return cls(entries, **{k: v for k, v in settings.items() if k != "entries"})


class _Pixels(nn.Module):
    """``uint8`` images in whatever layout to ``float [N, C, H, W]`` in [0, 1]."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        # frames stacked by a wrapper come first; colours come last
        self.first = len(shape) == 3 and shape[0] < shape[2]
        self.channels = 1 if len(shape) == 2 else shape[0] if self.first else shape[2]

    def forward(self, image: Tensor) -> Tensor:
        image = image.float() / 255.0
        if len(self.shape) == 2:
            return image.unsqueeze(1)
        return image if self.first else image.permute(0, 3, 1, 2)


def _convolutions(shape: Sequence[int]) -> nn.Sequential:
    """The convolutions of Mnih et al. (2015) for frames of 36 pixels and more, one 3x3 layer for less."""
    pixels = _Pixels(shape)
    side = min(shape[:2] if len(shape) == 2 or not pixels.first else shape[1:])
    if side >= 36:
        layers = [
            nn.Conv2d(pixels.channels, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
        ]
    else:
        layers = [nn.Conv2d(pixels.channels, 16, 3), nn.ReLU()]
    return nn.Sequential(pixels, *layers, nn.Flatten())


def orthogonal(module: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Orthogonal weights and zero biases in every linear and convolutional layer, as PPO's implementations have."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            nn.init.orthogonal_(layer.weight, gain)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


# --- the same perceptron in NumPy -------------------------------------------------------------------------


def numpy_perceptron(features: Features, heads: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A function from observations ``float32 [n, size]`` to the outputs of ``heads``, each a weight
    ``[width, outputs]`` and a bias ``[outputs]``, in NumPy.

    It reads the very memory of the torch parameters (which must stay where they are), so it always has the
    newest weights. For a handful of rows it takes a fifth of the time of the same calls in torch.
    """
    linears = [layer for layer in features.layers if isinstance(layer, nn.Linear)]
    pairs = [(p.weight.detach().numpy().T, p.bias.detach().numpy()) for p in linears]
    outputs = [(weight.detach().numpy(), bias.detach().numpy()) for weight, bias in heads]
    act = _NUMPY_ACTIVATIONS[features.activation]
    scaler = features.scaler
    if scaler is not None:
        mean, variance, limit = scaler.mean.numpy(), scaler.variance.numpy(), scaler.limit

    def forward(observation: np.ndarray) -> list[np.ndarray]:
        hidden = np.asarray(observation, np.float32)
        if scaler is not None:
            hidden = ((hidden - mean) / np.sqrt(variance + 1e-8)).clip(-limit, limit).astype(np.float32)
        for weight, bias in pairs:
            hidden = hidden @ weight
            hidden += bias
            hidden = act(hidden)
        return [hidden @ weight + bias for weight, bias in outputs]

    return forward


def _leaky(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.01 * x)


_NUMPY_ACTIVATIONS: dict[str, Any] = {
    "tanh": lambda x: np.tanh(x, out=x),
    "relu": lambda x: np.maximum(x, 0.0, out=x),
    "elu": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0.0))),
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "leaky_relu": _leaky,
}


def to_tensor(observation: Any) -> Any:
    """NumPy observations (an array, or a dictionary of arrays) as tensors that share their memory."""
    if isinstance(observation, Mapping):
        from tensordict import TensorDict

        parts = {name: torch.from_numpy(np.asarray(value)) for name, value in observation.items()}
        return TensorDict(parts, batch_size=next(iter(parts.values())).shape[:1])
    if isinstance(observation, (Tensor, TensorDictBase)):
        return observation
    return torch.from_numpy(np.ascontiguousarray(observation))
