"""Whole updates as one compiled function of flat tensors.

A small network's update is a hundred tensor operations of a few microseconds each, and most of its time goes
into starting them. Here the whole update, gradient, clipping and optimiser included, is one pure function

    (weights, optimiser state, learning rate, batch) -> (weights, optimiser state, metrics)

whose weights are ONE flat tensor. It is traced (`torch.fx`), compiled ahead of time (AOTInductor) and kept on
disk under a hash of the traced graph, so a changed objective can never meet a stale binary. The module's own
parameters are views of the flat tensor: whoever reads them sees the newest weights.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guerdon.errors import UsageError

if TYPE_CHECKING:
    from guerdon.optim import Optimiser

Function = Callable[[list[Tensor]], list[Tensor]]
_LOADED: dict[str, Function] = {}  # what this process has loaded, by hash


def cache_folder() -> Path:
    """Where compiled functions are kept: ``$GUERDON_CACHE``, or ``guerdon`` under the user's cache folder."""
    base = os.environ.get("GUERDON_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "guerdon"
    )
    return Path(base) / "compiled"


def compile_function(function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> Function:
    """``function`` compiled for inputs of the shapes of ``examples``, or loaded if that was done before.

    Args:
        function: pure: tensors in, tensors out; no random numbers, nothing that depends on tensor values.
        examples: its inputs; the compiled function takes such a list and returns a list.

    The first compilation of a graph takes some ten seconds and needs a C++ compiler; loading takes milliseconds.
    Raises whatever tracing or the compiler raise.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        key = _key(graph, examples)
        if key not in _LOADED:
            path = cache_folder() / f"{key}.pt2"
            if not path.exists():
                _build(graph, examples, path)
            # the loader itself: the public function around it first asks the compiler what this CPU can do (0.9 s)
            _LOADED[key] = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", True, 1, -1).run
        return _LOADED[key]


def _key(graph: torch.fx.GraphModule, examples: Sequence[Tensor]) -> str:
    """A hash of everything the binary depends on."""
    digest = hashlib.sha256(graph.code.encode())
    for name, value in sorted(graph.state_dict().items()):  # constants that tracing lifted out of the code
        digest.update(f"{name}{value.dtype}{value.tolist()}".encode())
    for example in examples:
        digest.update(f"{example.dtype}{tuple(example.shape)}{example.stride()}{example.device}".encode())
    digest.update(f"{torch.__version__}{torch.get_num_threads()}".encode())
    digest.update(torch.backends.cpu.get_cpu_capability().encode())
    return digest.hexdigest()[:32]


def _build(graph: torch.fx.GraphModule, examples: Sequence[Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    print(f"compiling an update, once (kept in {path.parent}) ...", file=sys.stderr, flush=True)
    program = torch.export.export(graph, tuple(examples))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = torch._inductor.aoti_compile_and_package(
            program, package_path=os.path.join(folder, "function.pt2")
        )
        os.replace(built, path)  # two processes may build the same: the later one wins, both are right


# --- flat weights -----------------------------------------------------------------------------------------


class FlatWeights:
    """A module's parameters as views of one tensor.

    Args:
        module: its parameters are moved into ``flat`` (they must share device and dtype).

    Attributes:
        flat: ``[P]``, all weights, in the order of ``module.named_parameters()``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        parameters = dict(module.named_parameters())
        self.shapes = [(p.numel(), p.shape) for p in parameters.values()]
        self.flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        for parameter, view in zip(parameters.values(), self._views(self.flat), strict=True):
            parameter.data = view
        # where each parameter and buffer hangs, so that a traced call can put others in their place
        self._slots = [self._slot(name) for name in parameters]
        self._buffer_slots = [self._slot(name) for name, _ in module.named_buffers()]

    def _slot(self, name: str) -> tuple[nn.Module, str]:
        owner, _, leaf = name.rpartition(".")
        return self.module.get_submodule(owner), leaf

    def _views(self, flat: Tensor) -> list[Tensor]:
        views, start = [], 0
        for size, shape in self.shapes:
            views.append(flat[start : start + size].view(shape))
            start += size
        return views

    def buffers(self) -> list[Tensor]:
        """The module's buffers, in a fixed order."""
        return [owner._buffers[leaf] for owner, leaf in self._buffer_slots]  # type: ignore[misc]

    @contextlib.contextmanager
    def replaced(self, flat: Tensor, buffers: Sequence[Tensor]) -> Iterator[nn.Module]:
        """The module with the weights of ``flat`` and these ``buffers`` in place of its own."""
        taken = [
            (owner._parameters, leaf, owner._parameters[leaf], new)
            for (owner, leaf), new in zip(self._slots, self._views(flat), strict=True)
        ] + [
            (owner._buffers, leaf, owner._buffers[leaf], new)
            for (owner, leaf), new in zip(self._buffer_slots, buffers, strict=True)
        ]
        try:
            for store, leaf, _, new in taken:
                store[leaf] = new  # type: ignore[index,assignment]
            yield self.module
        finally:
            for store, leaf, old, _ in taken:
                store[leaf] = old  # type: ignore[index,assignment]


# --- the update -------------------------------------------------------------------------------------------


class FlatUpdate:
    """The whole update of one role as one function; see the module.

    Args:
        weights: what learns.
        optimiser: its pure form is used (`Optimiser.pure`).
        max_grad_norm: gradients are scaled down to this norm; None leaves them.

    Attributes:
        state: the optimiser's flat tensors.
    """

    def __init__(self, weights: FlatWeights, optimiser: Optimiser, max_grad_norm: float | None) -> None:
        self.weights, self.optimiser, self.max_grad_norm = weights, optimiser, max_grad_norm
        self.state = optimiser.pure_state(weights.flat)
        self._functions: dict[Any, tuple[Function, list[str]]] = {}
        self._rate = torch.zeros(())

    def prepare(
        self,
        leaves: dict[tuple[str, ...], Tensor],
        rebuild: Callable[[dict[tuple[str, ...], Tensor]], Any],
        objective: Any,
        others: dict[str, FlatWeights],
        minibatch: int | None,
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """A function ``step(lr, rows) -> figures`` that makes one update from ``rows`` of the ``leaves`` (all,
        if None) and returns ``[2 + M]``: loss, gradient norm, and the metrics in the order of `names`.

        Args:
            leaves: the batch's tensors by name; rebuild: makes a batch of (parts of) them again.
            objective: its fields that are tensors become inputs, all else is compiled in.
            others: further models that the objective reads, by the name of its argument.
            minibatch: rows an update, or None.
        """
        plain, lifted = _fields(objective)
        fixed = [v for items in (leaves, lifted) for v in items.values()]
        fixed += [t for w in others.values() for t in (w.flat, *w.buffers())] + self.weights.buffers()
        key = (
            minibatch,
            tuple((n, tuple(v.shape), v.dtype) for n, v in leaves.items()),
            type(objective),
            plain,
            tuple(lifted),
            tuple(others.items()),  # by identity, and kept: the id of what is gone may be given again
            torch.get_num_threads(),
        )
        if key not in self._functions:
            self._functions[key] = self._compile(leaves, rebuild, objective, lifted, others, minibatch, fixed)
        function, self.names = self._functions[key]
        state_names = list(self.state)
        theta = self.weights.flat

        def step(lr: Tensor | float, rows: Tensor | None) -> Tensor:
            self._rate.fill_(lr)
            moving = [theta, *(self.state[n] for n in state_names), self._rate]
            if rows is not None:
                moving.append(rows)
            new, *states, figures = function(moving + fixed)
            theta.copy_(new)
            self.state = dict(zip(state_names, states, strict=True))
            return figures

        return step

    def _compile(
        self,
        leaves: dict[tuple[str, ...], Tensor],
        rebuild: Callable[..., Any],
        objective: Any,
        lifted: dict[str, Tensor],
        others: dict[str, FlatWeights],
        minibatch: int | None,
        fixed: list[Tensor],
    ) -> tuple[Function, list[str]]:
        names: list[str] = []
        state_names = list(self.state)

        def whole(theta: Tensor, *inputs: Tensor) -> list[Tensor]:
            queue = list(inputs)
            state = {n: queue.pop(0) for n in state_names}
            lr = queue.pop(0)
            rows = queue.pop(0) if minibatch is not None else None
            data = {n: queue.pop(0) for n in leaves}
            if rows is not None:
                data = {n: v.index_select(0, rows) for n, v in data.items()}
            varied = copy.copy(objective)  # not `replace`, which would check values that are not known yet
            for name in lifted:
                setattr(varied, name, queue.pop(0))
            with contextlib.ExitStack() as stack:
                models = {}
                for name, weights in others.items():
                    flat, buffers = queue.pop(0), [queue.pop(0) for _ in weights.buffers()]
                    models[name] = stack.enter_context(weights.replaced(flat, buffers))

                def loss(theta: Tensor) -> tuple[Tensor, Tensor]:
                    with self.weights.replaced(theta, queue) as model:
                        value, metrics = varied(model, rebuild(data), **models)
                    names[:] = list(metrics)
                    return value, torch.stack(
                        [value.detach(), *(v.detach().float() for v in metrics.values())]
                    )

                gradient, figures = torch.func.grad(loss, has_aux=True)(theta)
            norm = torch.linalg.vector_norm(gradient)
            if self.max_grad_norm is not None:
                gradient = gradient * (self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            new, new_state = self.optimiser.pure(theta, gradient, state, lr)
            # an update that is not finite changes nothing; the caller sees it in the figures
            good = torch.isfinite(norm) & torch.isfinite(figures[0])
            new = torch.where(good, new, theta)
            kept = [torch.where(good, new_state[n], state[n]) for n in state_names]
            return [new, *kept, torch.cat([figures[:1], norm[None], figures[1:]])]

        examples = [self.weights.flat, *self.state.values(), torch.zeros(())]
        if minibatch is not None:
            examples.append(torch.zeros(minibatch, dtype=torch.int64))
        return compile_function(whole, [t.detach().clone() for t in examples + fixed]), list(names)


def _fields(objective: Any) -> tuple[Any, dict[str, Tensor]]:
    """An objective's values that are compiled in, hashable, and its tensors, which are inputs."""
    if not dataclasses.is_dataclass(objective):
        raise UsageError(
            f"a compiled update takes an objective that is a dataclass, not {type(objective).__name__}"
        )
    fields = vars(objective)
    lifted = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    plain = tuple(item for item in fields.items() if item[0] not in lifted)
    try:
        hash(plain)
    except TypeError:  # a list among them
        return repr(plain), lifted
    return plain, lifted


def available() -> str | None:
    """Why whole updates cannot be compiled here, or None if they can."""
    import shutil

    if not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        return "no C++ compiler was found"
    if sys.platform == "win32":
        return "ahead-of-time compilation is not tried on Windows"
    return None
