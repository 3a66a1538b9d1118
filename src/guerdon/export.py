"""A trained controller as a file that needs neither guerdon nor torch: ONNX, or one header of C.

Either holds the deterministic policy from end to end. It takes the observation as the environment gives it
(normalisation by the statistics of training is inside) and returns the action as the environment takes it (squashing and
clipping to the range are inside; a discrete action counts from 0).
"""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon import __version__
from guerdon.critics.greedy import Greedy
from guerdon.errors import UsageError, nearest
from guerdon.policies.control import Categorical, Controller, Deterministic, Gaussian, SquashedGaussian
from guerdon.policies.features import Entry, Features
from guerdon.policies.small import EPSILON, SLOPE, SmallController, SmallNetwork

Format = Literal["onnx", "c"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".h": "c"}


def export(controller: Controller, path: str | Path, format: Format | None = None) -> str:
    """Write ``controller`` to ``path`` and say in one line what goes in and what comes out.

    Args:
        format: ``"onnx"`` (`to_onnx`) or ``"c"`` (`to_c`); None takes the one that the path's ending names.

    Raises `UsageError` for an unknown format, a controller that the format cannot hold, and a path that cannot be
    written.
    """
    path = Path(path)
    chosen = format or SUFFIXES.get(path.suffix)
    if chosen not in get_args(Format):
        known = nearest(str(format), get_args(Format)) if format else "name it .onnx or .h, or say --format"
        raise UsageError(f"'{format or path}' names no format; {known}")
    try:
        if chosen == "onnx":
            return to_onnx(controller, path)
        text, said = to_c(controller)
        path.write_text(text, encoding="utf-8")
        return said
    except OSError as error:
        raise UsageError(f"cannot write the controller to '{path}': {error.strerror or error}") from error


def _entries(controller: Controller) -> dict[str, Entry]:
    """What the controller reads."""
    if isinstance(controller.features, Features):
        return controller.features.entries
    shape = tuple(controller.features.shape)
    if getattr(controller, "timed", False):
        shape = (shape[0] - 1,)
    return {"": Entry(shape, "vector" if len(shape) == 1 else "image")}


# --- ONNX -------------------------------------------------------------------------------------------------


class _Scale(nn.Module):
    """`Scaler` with its statistics as two float32 constants."""

    def __init__(self, mean: Tensor, scale: Tensor, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.mean: Tensor
        self.scale: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)

    def forward(self, vector: Tensor) -> Tensor:
        return ((vector - self.mean) * self.scale).clamp(-self.limit, self.limit)


class _Deployed(nn.Module):
    """From the parts of a raw observation to the action, clipped."""

    def __init__(self, controller: Controller) -> None:
        super().__init__()
        self.controller = copy.deepcopy(controller).cpu().eval().requires_grad_(False)
        features = self.controller.features
        if isinstance(features, Features) and features.scaler is not None:
            features.scaler = _Scale(*_statistics(features), features.scaler.limit)  # type: ignore[assignment]
        if isinstance(features, SmallNetwork):
            features._activate = partial(_activate, features)  # type: ignore[method-assign]
        self.names = list(_entries(controller))
        self.clips = _bounds(controller) is not None
        low, high = _bounds(controller) or ([], [])
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, *parts: Tensor) -> Tensor:
        observation: Any = parts[0] if self.names == [""] else dict(zip(self.names, parts, strict=True))
        action = self.controller.mode(observation)
        return torch.minimum(torch.maximum(action, self.low), self.high) if self.clips else action


def _activate(network: SmallNetwork, x: Tensor, dims: int) -> Tensor:
    """What `SmallNetwork` does between its layers, over a shape that is constant in the exported graph."""
    if network.layer_norm:
        x = F.layer_norm(x, [int(size) for size in x.shape[-dims:]], eps=EPSILON)
    return F.leaky_relu(x, SLOPE)


def _statistics(features: Features) -> tuple[Tensor, Tensor]:
    """Mean and one over the deviation, as `Scaler` computes with them."""
    scaler = features.scaler
    assert scaler is not None
    return scaler.mean.float().cpu(), (scaler.variance + 1e-8).rsqrt().float().cpu()


def _bounds(controller: Controller) -> tuple[list[float], list[float]] | None:
    """The action's range; None for discrete actions, and where the controller was not told."""
    if isinstance(controller, (Gaussian, SquashedGaussian, Deterministic)):
        return controller.low, controller.high
    return None


_TYPES = {"vector": torch.float32, "image": torch.uint8, "one_hot": torch.int64}


def to_onnx(controller: Controller, path: str | Path) -> str:
    """Write an ONNX model with a free batch axis; returns a line about its inputs and output.

    It has one input for each part of the observation (``observation`` where there is only one): float32
    ``[batch, *shape]``, images uint8, whole numbers int64 ``[batch]``. Its output ``action`` is float32
    ``[batch, A]``, or int64 ``[batch]`` (``[batch, D]`` for several dials).

    Raises `UsageError` where onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise UsageError('ONNX needs the package onnx: pip install "guerdon[export]"') from error
    model, names, parts = _Deployed(controller), [], []
    for name, entry in _entries(controller).items():
        names.append(name or "observation")
        shape = () if entry.kind == "one_hot" else entry.shape
        parts.append(torch.zeros(2, *shape, dtype=_TYPES[entry.kind]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # it calls itself old; the newer one needs a further package
        torch.onnx.export(
            model,
            tuple(parts),
            str(path),
            input_names=names,
            output_names=["action"],
            dynamic_axes={name: {0: "batch"} for name in [*names, "action"]},
            opset_version=18,
            dynamo=False,
        )
        action = model(*parts)
    inputs = [f"{name} {_typed(part)}" for name, part in zip(names, parts, strict=True)]
    return f"{', '.join(inputs)} -> action {_typed(action)}"


def _typed(tensor: Tensor) -> str:
    shape = ", ".join(["batch", *map(str, tensor.shape[1:])])
    return f"{str(tensor.dtype).removeprefix('torch.')} [{shape}]"


# --- C ----------------------------------------------------------------------------------------------------


@dataclass
class _Source:
    """A header under construction: constant ``arrays``, the helper functions that are ``used``, statements."""

    arrays: list[str]
    code: list[str]
    used: set[str]
    width: int = 0  # of the widest layer
    here: str = "a"  # the buffer with the present layer, the other being free

    def array(self, name: str, values: Any, kind: str = "float") -> str:
        """Declare a constant array; returns its name."""
        flat = np.asarray(values).ravel()
        if kind == "float" and np.isnan(flat).any():
            raise UsageError("this controller's weights are not numbers (NaN); export an earlier checkpoint")
        words = [_float(v) if kind == "float" else str(int(v)) for v in flat]
        lines = [", ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
        name = f"guerdon_{name}"
        body = ",\n    ".join(lines)
        self.arrays.append(f"static const {kind} {name}[{len(words)}] = {{\n    {body}\n}};\n")
        return name

    def call(self, function: str, *arguments: Any) -> None:
        """Call a helper in place."""
        self.used.add(function)
        self.code.append(f"guerdon_{function}({', '.join(map(str, [self.here, *arguments]))});")

    def linear(self, name: str, weight: Tensor, bias: Tensor) -> int:
        """Through ``weight [inputs, outputs]`` and ``bias [outputs]`` into the other buffer; returns the outputs."""
        inputs, outputs = weight.shape
        there = "b" if self.here == "a" else "a"
        arrays = self.array(f"{name}_weight", _numbers(weight)), self.array(f"{name}_bias", _numbers(bias))
        self.call("linear", inputs, *arrays, there, outputs)
        self.here, self.width = there, max(self.width, inputs, outputs)
        return outputs


def to_c(controller: Controller) -> tuple[str, str]:
    """A header of C99 (and C++) without dependencies or allocation, and a line about what goes in and out.

    It declares ``void guerdon_act(const float *observation, float *action)``; for one discrete action
    ``int guerdon_act(const float *observation)``, for several dials ``void guerdon_act(const float *observation,
    int *action)``. The parts of an observation that is a dictionary follow one another in the space's order; a
    discrete observation is one float, its number.

    Raises `UsageError` for a controller that looks at images, or whose weights are not finite.
    """
    entries = _entries(controller)
    if any(entry.kind == "image" for entry in entries.values()):
        raise UsageError(
            "this controller looks at images, for which the C format has no layers; export it as onnx"
        )
    source = _Source([], [], set())
    taken, layout = _read(source, entries)
    width = _layers(source, controller)
    signature, constant, said = _answer(source, controller, width)
    body = "\n    ".join(source.code)
    text = _HEADER.format(
        version=__version__,
        kind=type(controller).__name__,
        layout=layout,
        taken=taken,
        constant=constant,
        arrays="\n".join(source.arrays),
        functions="\n".join(_FUNCTIONS[name] for name in _FUNCTIONS if name in source.used),
        signature=signature,
        width=source.width,
        body=body,
    )
    return text, f"float observation[{taken}] -> {said}"


def _read(source: _Source, entries: dict[str, Entry]) -> tuple[int, str]:
    """Statements that copy the observation into the first layer; the floats taken, and words about them."""
    taken = filled = 0
    words = []
    for name, entry in entries.items():
        size = math.prod(entry.shape)
        if entry.kind == "one_hot":
            source.code.append(
                f"for (i = 0; i < {size}; i++) a[{filled} + i] = i == (int)observation[{taken}] ? 1.0f : 0.0f;"
            )
            count, what = 1, f"a number from 0 to {size - 1}"
        else:
            source.code.append(f"for (i = 0; i < {size}; i++) a[{filled} + i] = observation[{taken} + i];")
            count, what = size, f"{size} numbers" if size > 1 else "a number"
        words.append(f"{f'{name}: ' if name else ''}{what}")
        taken, filled = taken + count, filled + size
    source.width = filled
    return taken, ", then ".join(words)


def _layers(source: _Source, controller: Controller) -> int:
    """Statements of all layers but the head; returns the width that they end in."""
    network: Any = controller.features
    if isinstance(controller, SmallController):
        mean, scale = controller.mean.float(), (controller.variance + 1e-8).rsqrt().float()
        size = source.width
        source.call(
            "scale",
            size,
            source.array("observation_mean", _numbers(mean)),
            source.array("observation_scale", _numbers(scale)),
        )
        if controller.timed:  # where nobody tells the time it is half past
            source.code.append(f"a[{size}] = 0.0f;")
        for i, linear in enumerate(network.hidden):
            size = source.linear(f"layer{i}", linear.weight.T, linear.bias)
            if network.layer_norm:
                source.call("normalise", size, _float(EPSILON))
            source.call("leaky_relu", size, _float(SLOPE))
        return size if len(network.hidden) else network.shape[0]
    size = source.width
    if network.scaler is not None:
        mean, scale = _statistics(network)
        source.call(
            "scale",
            size,
            source.array("observation_mean", _numbers(mean)),
            source.array("observation_scale", _numbers(scale)),
        )
        source.call("limit", size, _float(network.scaler.limit))
    for i, layer in enumerate(network.layers):
        if isinstance(layer, nn.Linear):
            size = source.linear(f"layer{i}", layer.weight.T, layer.bias)
        elif isinstance(layer, nn.LayerNorm):
            source.call("normalise", size, _float(layer.eps))
            affine = source.array(f"layer{i}_weight", _numbers(layer.weight)), _numbers(layer.bias)
            source.call("affine", size, affine[0], source.array(f"layer{i}_bias", affine[1]))
        elif network.activation == "leaky_relu":
            source.call("leaky_relu", size, _float(layer.negative_slope))
        else:
            source.call(network.activation, size)
    return size


def _answer(source: _Source, controller: Controller, width: int) -> tuple[str, str, str]:
    """Statements of the head; the function's signature, a constant about the action, and words about it."""
    if isinstance(controller, Greedy):
        head: Any = controller.head
        source.linear("head", head.weight[0], head.bias[0, 0])
        if head.categorical:
            source.call(
                "expected", controller.actions, head.bins, source.array("centres", _numbers(head.centres))
            )
        return _choice(source, controller.actions)
    if isinstance(controller, SmallController):
        small: Any = controller.features.head
        size = controller.size
        source.linear("head", small.weight[:size].T, small.bias[:size])
        return _numbers_out(source, size) if controller.head_name == "normal" else _choice(source, size)
    if isinstance(controller, Categorical):
        source.linear("head", controller.head.weight.T, controller.head.bias)
        if controller.dials is None:
            return _choice(source, controller.actions)
        source.used.add("best")
        positions = source.array("positions", controller.dials, "int")
        count = len(controller.dials)
        source.code.append(
            f"for (i = 0; i < {count}; i++) "
            f"action[i] = guerdon_best({source.here} + i * {controller.actions}, {positions}[i]);"
        )
        constant = f"#define GUERDON_ACTION {count} /* ints that come out, each from 0 */"
        return "void guerdon_act(const float *observation, int *action)", constant, f"int action[{count}]"
    squashes = isinstance(controller, (SquashedGaussian, Deterministic))
    last: Any = controller.mean if isinstance(controller, SquashedGaussian) else controller.head
    size = source.linear("head", last.weight.T, last.bias)
    if squashes:
        source.call("tanh", size)
        scale, centre = _numbers(controller.scale), _numbers(controller.centre)  # type: ignore[arg-type]
        source.call("affine", size, source.array("half_range", scale), source.array("centre", centre))
    low, high = _bounds(controller) or ([], [])
    source.call("clip", size, source.array("low", low), source.array("high", high))
    return _numbers_out(source, size)


def _choice(source: _Source, actions: int) -> tuple[str, str, str]:
    source.used.add("best")
    source.code.append(f"return guerdon_best({source.here}, {actions});")
    constant = f"#define GUERDON_ACTIONS {actions} /* the action is a number from 0, below this */"
    return "int guerdon_act(const float *observation)", constant, f"int below {actions}"


def _numbers_out(source: _Source, size: int) -> tuple[str, str, str]:
    source.code.append(f"for (i = 0; i < {size}; i++) action[i] = {source.here}[i];")
    constant = f"#define GUERDON_ACTION {size} /* floats that come out */"
    return "void guerdon_act(const float *observation, float *action)", constant, f"float action[{size}]"


def _numbers(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _float(value: float) -> str:
    """A constant of C that reads back as the same float32."""
    value = float(np.float32(value))
    if math.isinf(value):
        return "INFINITY" if value > 0 else "-INFINITY"
    text = f"{value:.9g}"
    return f"{text}f" if any(c in text for c in ".e") else f"{text}.0f"


# The weights lie [input][output], so that the inner loop runs over neighbours and compilers can widen it.
_FUNCTIONS = {
    "linear": """\
static inline void guerdon_linear(const float *x, int n, const float *weight, const float *bias, float *y, int m) {
    int i, j;
    for (j = 0; j < m; j++) y[j] = bias[j];
    for (i = 0; i < n; i++)
        for (j = 0; j < m; j++) y[j] += x[i] * weight[i * m + j];
}
""",
    "scale": """\
static inline void guerdon_scale(float *x, int n, const float *mean, const float *scale) {
    int i;
    for (i = 0; i < n; i++) x[i] = (x[i] - mean[i]) * scale[i];
}
""",
    "limit": """\
static inline void guerdon_limit(float *x, int n, float limit) {
    int i;
    for (i = 0; i < n; i++) x[i] = fminf(fmaxf(x[i], -limit), limit);
}
""",
    "affine": """\
static inline void guerdon_affine(float *x, int n, const float *weight, const float *bias) {
    int i;
    for (i = 0; i < n; i++) x[i] = x[i] * weight[i] + bias[i];
}
""",
    "clip": """\
static inline void guerdon_clip(float *x, int n, const float *low, const float *high) {
    int i;
    for (i = 0; i < n; i++) x[i] = fminf(fmaxf(x[i], low[i]), high[i]);
}
""",
    "normalise": """\
static inline void guerdon_normalise(float *x, int n, float epsilon) {
    int i;
    float mean = 0.0f, variance = 0.0f;
    for (i = 0; i < n; i++) mean += x[i];
    mean /= (float)n;
    for (i = 0; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    variance /= (float)n;
    for (i = 0; i < n; i++) x[i] = (x[i] - mean) / sqrtf(variance + epsilon);
}
""",
    "tanh": """\
static inline void guerdon_tanh(float *x, int n) {
    int i;
    for (i = 0; i < n; i++) x[i] = tanhf(x[i]);
}
""",
    "relu": """\
static inline void guerdon_relu(float *x, int n) {
    int i;
    for (i = 0; i < n; i++) x[i] = fmaxf(x[i], 0.0f);
}
""",
    "elu": """\
static inline void guerdon_elu(float *x, int n) {
    int i;
    for (i = 0; i < n; i++) x[i] = x[i] > 0.0f ? x[i] : expm1f(x[i]);
}
""",
    "silu": """\
static inline void guerdon_silu(float *x, int n) {
    int i;
    for (i = 0; i < n; i++) x[i] = x[i] / (1.0f + expf(-x[i]));
}
""",
    "leaky_relu": """\
static inline void guerdon_leaky_relu(float *x, int n, float slope) {
    int i;
    for (i = 0; i < n; i++) x[i] = x[i] > 0.0f ? x[i] : slope * x[i];
}
""",
    "expected": """\
/* The means of m histograms, given by logits of n bins each, in place. */
static inline void guerdon_expected(float *x, int m, int n, const float *centres) {
    int i, j;
    for (j = 0; j < m; j++) {
        float most = x[j * n], total = 0.0f, sum = 0.0f;
        for (i = 1; i < n; i++) most = fmaxf(most, x[j * n + i]);
        for (i = 0; i < n; i++) {
            float share = expf(x[j * n + i] - most);
            total += share;
            sum += share * centres[i];
        }
        x[j] = sum / total;
    }
}
""",
    "best": """\
static inline int guerdon_best(const float *x, int n) {
    int i, best = 0;
    for (i = 1; i < n; i++)
        if (x[i] > x[best]) best = i;
    return best;
}
""",
}

_HEADER = """\
/* A trained controller ({kind}), written by guerdon {version}.
 *
 * The observation is raw, as the environment gives it ({layout}); normalisation, squashing and
 * clipping are inside. C99 or C++; needs nothing but <math.h>, allocates nothing, keeps no state.
 */
#ifndef GUERDON_CONTROLLER_H
#define GUERDON_CONTROLLER_H

#include <math.h>

#define GUERDON_OBSERVATION {taken} /* floats that go in */
{constant}

{arrays}
{functions}
static inline {signature} {{
    float a[{width}], b[{width}];
    int i;
    {body}
}}

#endif
"""
