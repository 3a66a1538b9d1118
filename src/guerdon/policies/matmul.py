"""Matrix products of language models on the CPU, by the faster of the two libraries that torch carries.

torch computes float32 products with MKL. On processors that are not Intel's, MKL keeps to narrower
instructions than they have: on an AMD processor with AVX-512 it reaches 170 GFLOP/s where oneDNN, which torch
carries for convolutions and half precision, reaches 400, in float32 all the same. `fast_linears` makes the
linear layers of a model use the faster one, forward and backward.

torch hands float32 products to oneDNN only with leave to round their operands to bfloat16, which oneDNN takes on
processors with matrix tiles (AMX) and has no use for on others. So it is asked only without AMX and where the
results of a test were as exact as MKL's. Which library is faster is measured at the same time, once on a machine, and
remembered beside the compiled functions, so that a resumed run computes as the run it goes on from.
``GUERDON_MATMUL=mkl`` or ``onednn`` overrides the measurement of speed (``auto`` measures).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd import forward_ad

from guerdon.compiled import cache_folder
from guerdon.errors import UsageError, nearest

Library = Literal["mkl", "onednn"]

# Below these sizes the extra 10 microseconds of a oneDNN call outweigh what it gains.
_ROWS = 4  # of the input
_FEATURES = 16  # of the input and of the output
_WORK = 1 << 20  # multiplications of a product

_GAIN = 1.2  # oneDNN is taken where it is this much faster: a tie stays with torch's own choice
_EXACT = (
    3.0  # and where its errors are at most this many times MKL's; with bfloat16 they are a thousand times
)


# --- which library ----------------------------------------------------------------------------------------


def library() -> Library:
    """The library for float32 products on this machine's CPU.

    "onednn" only where it computes in float32; then ``$GUERDON_MATMUL`` decides if it is "mkl" or "onednn", else
    a measurement of 50 ms, made once for this processor, version of torch and number of threads, and kept in the
    cache folder.

    Raises `UsageError` when ``$GUERDON_MATMUL`` is anything else.
    """
    asked = os.environ.get("GUERDON_MATMUL", "auto")
    if asked == "mkl" or not torch.backends.mkldnn.enabled:
        return "mkl"
    if asked not in ("onednn", "auto"):
        raise UsageError(f"GUERDON_MATMUL is '{asked}'; {nearest(asked, (*get_args(Library), 'auto'))}")
    found = _tried(torch.get_num_threads())
    return "onednn" if found["exact"] and (asked == "onednn" or found["faster"]) else "mkl"


@functools.cache
def _tried(threads: int) -> dict[str, Any]:
    """Whether oneDNN is ``"exact"`` and ``"faster"``, from the cache folder or by trying."""
    words = (torch.__version__, torch.backends.cpu.get_cpu_capability(), _processor(), str(threads))
    path = cache_folder() / f"matmul-{hashlib.sha256('|'.join(words).encode()).hexdigest()[:16]}.json"
    kept = _read(path)
    if kept is None:
        kept = {**_try(), "on": list(words)}
        try:
            _write_first(path, kept)
        except OSError:  # a cache that cannot be written: tried again in the next process
            return kept
        kept = _read(path) or kept  # another process may have been first: both go by its word
    return kept


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            lines = file.read().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    wanted = ("vendor_id", "cpu family", "model", "flags")
    return " ".join(value.strip() for name, value in fields.items() if name.strip() in wanted)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return kept if {type(kept["exact"]), type(kept["faster"])} == {bool} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write_first(path: Path, record: dict[str, Any]) -> None:
    """Put ``record`` at ``path`` unless a readable one is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file)
        if _read(path) is None:
            os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _try() -> dict[str, bool]:
    """A layer of a small transformer by both libraries: the errors of the product and of its gradients, and the times, in
    turns, each by its best: a busy machine slows some of the calls, never all of one side's."""
    if not torch.backends.mkldnn.is_available() or torch.cpu._is_amx_tile_supported():
        return {"exact": False, "faster": False}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator)
    weight = torch.randn(1024, 256, generator=generator)
    grad = torch.randn(256, 1024, generator=generator)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        exact = True
        for left, right in ((x, weight.t()), (grad, weight), (grad.t(), x), (x[:5], weight.t())):
            true = left.double() @ right.double()
            errors = [
                float((found - true).norm()) for found in (left @ right, _onednn(torch.mm, left, right))
            ]
            exact = exact and errors[1] <= _EXACT * errors[0]
        sides: tuple[Callable[..., Tensor], ...] = (F.linear, functools.partial(_onednn, F.linear))
        best = [math.inf, math.inf]
        for turn in range(22):
            for i, side in enumerate(sides):
                start = time.perf_counter()
                side(x, weight)
                if turn >= 2:  # the first calls build the kernels
                    best[i] = min(best[i], time.perf_counter() - start)
    return {"exact": exact, "faster": best[0] > _GAIN * best[1]}


_lock = threading.Lock()
_inside: list[str] = []  # the settings that products under way have found


def _onednn(product: Callable[..., Tensor], *operands: Any) -> Tensor:
    """``product(*operands)``, with float32 products inside it given to oneDNN."""
    setting = cast(Any, torch.backends.mkldnn).matmul
    with _lock:
        _inside.append(_inside[0] if _inside else setting.fp32_precision)
        setting.fp32_precision = "bf16"
    try:
        return product(*operands)
    finally:
        with _lock:
            before = _inside.pop()
            if not _inside:
                setting.fp32_precision = before


# --- the product ------------------------------------------------------------------------------------------


def linear(
    x: Float[Tensor, "... inputs"],
    weight: Float[Tensor, "outputs inputs"],
    bias: Float[Tensor, "outputs"] | None = None,
) -> Float[Tensor, "... outputs"]:
    """``x weight^T + bias``, as ``torch.nn.functional.linear``, with its gradients of every order.

    oneDNN computes it, and its gradients of first order, where `library` says so and the operands are plain
    float32 tensors on the CPU, large enough to gain and outside autocast and any tracing; torch elsewhere.
    """
    if _gains(x, weight, bias, weight.shape[1], weight.shape[0]):
        return _product(x, weight, bias, False)
    return F.linear(x, weight, bias)


def turned_linear(
    x: Float[Tensor, "... inputs"],
    weight: Float[Tensor, "inputs outputs"],
    bias: Float[Tensor, "outputs"] | None = None,
) -> Float[Tensor, "... outputs"]:
    """`linear` for a layer that keeps its weight as ``[inputs, outputs]`` (GPT-2's)."""
    if _gains(x, weight, bias, weight.shape[0], weight.shape[1]):
        return _product(x, weight, bias, True)
    return F.linear(x, weight.t(), bias)


_PLAIN = (Tensor, nn.Parameter)


def _gains(x: Tensor, weight: Tensor, bias: Tensor | None, inputs: int, outputs: int) -> bool:
    rows = x.numel() // max(inputs, 1)
    return (
        rows >= _ROWS
        and inputs >= _FEATURES
        and outputs >= _FEATURES
        and rows * inputs * outputs >= _WORK
        and not torch.compiler.is_compiling()
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.device.type == "cpu"
        and weight.device.type == "cpu"
        and type(x) in _PLAIN
        and type(weight) in _PLAIN
        and x.shape[-1] == inputs
        and (bias is None or (bias.dtype is torch.float32 and bias.shape == (outputs,)))
        and not torch.is_autocast_enabled("cpu")
        and not _traced()
        and library() == "onednn"
    )


def _traced() -> bool:
    """Whether something reads the operations rather than their numbers, or wants derivatives in another way."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or torch.jit.is_tracing()
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool) -> Tensor:
    learns = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if learns and torch.is_grad_enabled():
        return cast(Tensor, _Product.apply(x, weight, bias, turned))
    return _onednn(F.linear, x, weight.t() if turned else weight, bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, turned: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.turned = turned
        return _onednn(F.linear, x, weight.t() if turned else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias, _ = ctx.needs_input_grad
        towards = weight if ctx.turned else weight.t()  # [inputs, outputs]
        grad_rows = grad.reshape(-1, grad.shape[-1])
        rows = x.reshape(-1, x.shape[-1])
        grad_x = grad_weight = grad_bias = None
        # a gradient that is itself differentiated, or taken for many directions at once, is left to torch
        by = _directly if torch.is_grad_enabled() or type(grad) is not Tensor or _traced() else _onednn
        if to_x:
            grad_x = by(F.linear, grad, towards)
        if to_weight:
            left, right = (rows, grad_rows) if ctx.turned else (grad_rows, rows)
            grad_weight = by(torch.mm, left.t(), right)
        if to_bias:
            grad_bias = grad_rows.sum(0)
        return grad_x, grad_weight, grad_bias, None


def _directly(product: Callable[..., Tensor], *operands: Any) -> Tensor:
    return product(*operands)


# --- layers of a model ------------------------------------------------------------------------------------


class FastLinear(nn.Linear):
    """``nn.Linear`` by `linear`. Weights, names and files are those of ``nn.Linear``."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


@functools.cache
def _fast_conv1d() -> type[nn.Module]:
    from transformers.pytorch_utils import Conv1D

    def forward(self: Any, x: Tensor) -> Tensor:
        return turned_linear(x, self.weight, self.bias)

    # named like a class of this module, so that a copy or a pickle finds it (see __getattr__)
    body = {"forward": forward, "__module__": __name__, "__doc__": "GPT-2's layer by `turned_linear`."}
    return type("FastConv1D", (Conv1D,), body)


def __getattr__(name: str) -> Any:
    if name == "FastConv1D":
        return _fast_conv1d()
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def fast_linears(module: nn.Module) -> nn.Module:
    """Make the linear layers inside ``module`` compute by `linear`, in place; returns ``module``.

    The layers become instances of a subclass; nothing else about them changes, so copies, saved files, adapters
    (added before or after) and compilation work as before, and a model that moves to another device computes
    there as it would have. Layers of another class than ``nn.Linear`` or GPT-2's ``Conv1D`` (quantised ones,
    other subclasses) are left alone. `plain_linears` is the way back.
    """
    conv1d = _conv1d()
    child: Any
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = FastLinear
        elif conv1d is not None and type(child) is conv1d:
            child.__class__ = _fast_conv1d()
    return module


def plain_linears(module: nn.Module) -> nn.Module:
    """Undo `fast_linears`, in place; returns ``module``."""
    conv1d = _conv1d()
    child: Any
    for child in module.modules():
        if type(child) is FastLinear:
            child.__class__ = cast(Any, nn.Linear)
        elif conv1d is not None and type(child) is _fast_conv1d():
            child.__class__ = conv1d
    return module


def _conv1d() -> type[nn.Module] | None:
    """GPT-2's layer, if anyone has loaded transformers (which takes a second)."""
    found = sys.modules.get("transformers.pytorch_utils")
    return None if found is None else cast("type[nn.Module]", found.Conv1D)


# --- log-probabilities without all logits -----------------------------------------------------------------

_LOGITS = {"cpu": 1 << 24}  # held at a time; 1 << 27 elsewhere


def token_log_probs(
    hidden: Float[Tensor, "*batch width"],
    weight: Float[Tensor, "vocabulary width"],
    tokens: Int[Tensor, "*batch"],
    temperature: Float[Tensor, "*batch"] | float = 1.0,
    chunk: int | None = None,
) -> Float[Tensor, "*batch"]:
    """Log-probability of each token, in float32, under logits ``hidden weight^T / temperature``, differentiable.

    Args:
        hidden: the last states, before the output layer.
        weight: of the output layer (without a bias), ``[vocabulary, width]``.
        tokens: whose log-probability is asked.
        temperature: one for all, or one for each token.
        chunk: states whose logits are held at a time; None takes as many as fill 64 MiB (on a GPU 512). Where that
            is fewer than all, the backward pass computes the logits again, a chunk at a time, so that memory does not
            grow with their number: 1024 tokens over a vocabulary of 150,000 would take 600 MB, and as much
            again for the gradient.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    index = tokens.reshape(-1)
    heat = None
    if not isinstance(temperature, float) or temperature != 1.0:
        heat = torch.as_tensor(temperature, dtype=torch.float32, device=hidden.device)
        heat = heat.expand(tokens.shape).reshape(-1)
    size = chunk or max(1, _LOGITS.get(hidden.device.type, 1 << 27) // weight.shape[0])
    if rows.shape[0] <= size:
        found = _chosen(rows, weight, index, heat)
    else:
        if heat is None:
            heat = torch.ones(rows.shape[0], device=hidden.device)
        found = cast(Tensor, _ChunkedLogProbs.apply(rows, weight, index, heat, size))
    return found.view(tokens.shape)


def _chosen(rows: Tensor, weight: Tensor, index: Tensor, heat: Tensor | None) -> Tensor:
    logits = linear(rows, weight).float()
    if heat is not None:
        logits = logits / heat[:, None]
    return logits.gather(1, index[:, None]).squeeze(1) - logits.logsumexp(1)


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, weight: Tensor, index: Tensor, heat: Tensor, size: int
    ) -> Tensor:
        kind = rows.device.type
        ctx.low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        ctx.size = size
        ctx.save_for_backward(rows, weight, index, heat)
        parts = zip(rows.split(size), index.split(size), heat.split(size), strict=True)
        return torch.cat([_chosen(r, weight, i, h) for r, i, h in parts])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, weight, index, heat = ctx.saved_tensors
        to_rows, to_weight, _, to_heat, _ = ctx.needs_input_grad
        if torch.is_grad_enabled() or to_heat:
            raise UsageError(
                "token_log_probs in chunks gives first derivatives for states and weights only; pass a larger chunk"
            )
        with torch.autocast(rows.device.type, enabled=False):
            low = ctx.low or rows.dtype
            matrix = weight.to(low)
            grad_rows = torch.empty_like(rows) if to_rows else None
            grad_weight = torch.zeros_like(weight) if to_weight else None
            for start in range(0, rows.shape[0], ctx.size):
                part = slice(start, start + ctx.size)
                states = rows[part].to(low)
                scale = heat[part, None]
                # d log p(token) / d logits = one-hot - p
                slope = (linear(states, matrix).float() / scale).softmax(1).neg_()
                slope.scatter_add_(1, index[part, None], slope.new_ones(slope.shape[0], 1))
                slope = (slope * (grad[part, None] / scale)).to(low)
                if grad_rows is not None:
                    grad_rows[part] = linear(slope, matrix.t()).to(rows.dtype)
                if grad_weight is not None:
                    fast = _gains(states, matrix, None, matrix.shape[1], matrix.shape[0])
                    grad_weight += (_onednn if fast else _directly)(torch.mm, slope.t(), states)
        return grad_rows, grad_weight, None, None, None
