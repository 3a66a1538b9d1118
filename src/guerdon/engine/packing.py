"""What a role's arguments and answers are on their way between the process of the method and the workers.

A batch of which some numbers are in workers already (`Pending` tensors) travels without them, beside the futures that
bring them from worker to worker (`pack`, `unpack`). Prompts travel as rows, with their seeds and whatever options go by
the row (`pack_prompts`, `unpack_prompts`). A role is `Named`. What an answer is like is asked of the workers
(`describe`, `structured`), or known from an earlier call with an objective of the same form (`form_of`); its numbers
stay where they are until they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import torch
from tensordict import TensorDict, TensorDictBase, is_tensorclass
from torch import Tensor, nn

from guerdon.batch import decode_text, encode_text, nested
from guerdon.engine.pending import Pending, resolve
from guerdon.engine.workers import Future, WorkerGroup
from guerdon.objectives.base import Metrics

_BULK = 4_000_000  # bytes: smaller answers are fetched whole, of larger ones only the tensor that is read

Path = tuple[str, ...]


# --- batches whose numbers are elsewhere --------------------------------------------------------------------


@dataclass(frozen=True)
class Hole:
    """A tensor of a batch that does not travel with it but comes by reference.

    Attributes:
        path: where it belongs in the batch.
        future: which of the futures that travel with the batch brings it.
        inside: where it is in what that future gives; empty where that is the tensor itself.
        width: its shape without the rows.
    """

    path: Path
    future: int
    inside: Path
    width: tuple[int, ...]


@dataclass(frozen=True)
class Source:
    """Where the numbers of a `Pending` tensor are."""

    future: Future
    inside: Path


def _inner(node: Any) -> TensorDictBase:
    return cast(TensorDictBase, node._tensordict if is_tensorclass(node) else node)


def _pending_leaves(node: Any, prefix: Path = ()) -> list[tuple[Path, Pending]]:
    found: list[tuple[Path, Pending]] = []
    for key, value in _inner(node).items():
        if isinstance(value, Pending):
            if not value.known and isinstance(value.source, Source):
                found.append(((*prefix, key), value))
        elif isinstance(value, TensorDictBase) or is_tensorclass(value):
            found += _pending_leaves(value, (*prefix, key))
    return found


def _at(value: Any, path: Path) -> Any:
    """What stands at ``path`` in a batch; with the path () the value itself."""
    for key in path:
        value = _inner(value).get(key)
    return value


def _parent(batch: Any, path: Path) -> TensorDictBase:
    return _inner(_at(batch, path[:-1]))


def pack(batch: Any) -> tuple[Any, tuple[Hole, ...], list[Future]]:
    """``batch`` without the tensors that are elsewhere, what is missing, and the futures that bring it."""
    if not (isinstance(batch, TensorDictBase) or is_tensorclass(batch)):
        return resolve(batch), (), []
    leaves = _pending_leaves(batch)
    if not leaves:
        return batch, (), []
    own = cast(Any, batch).clone(False)
    futures: list[Future] = []
    holes = []
    for path, leaf in leaves:
        source = leaf.source
        index = next((i for i, f in enumerate(futures) if f is source.future), len(futures))
        if index == len(futures):
            futures.append(source.future)
        holes.append(Hole(path, index, source.inside, tuple(leaf.shape[1:])))
        _parent(own, path).del_(path[-1])
    return own, tuple(holes), futures


def unpack(own: Any, holes: Sequence[Hole], values: Sequence[Any]) -> Any:
    """The batch again, in a worker, where the futures have become their values."""
    if not holes:
        return own
    own = cast(Any, own).clone(False)
    for hole in holes:
        leaf = _at(values[hole.future], hole.inside)
        _parent(own, hole.path).set(hole.path[-1], widen(leaf, hole.width, hole.path[-1]))
    return own


def widen(leaf: Tensor, width: Sequence[int], name: str = "") -> Tensor:
    """Pad ``leaf [B, ...]`` with zeros to ``[B, *width]``: at the end, tokens of a prompt at the beginning. Parts of a
    batch that were made by several workers may be of different widths."""
    missing = [want - has for want, has in zip(width, leaf.shape[1:], strict=True)]
    if not any(missing):
        return leaf
    pads: list[int] = []
    for gap in reversed(missing):
        pads += [gap, 0] if name.startswith("prompt_") else [0, gap]
    return nn.functional.pad(leaf, pads)


def leaf_of(value: Any, path: Path, width: Sequence[int]) -> Tensor:
    """The tensor at ``path`` in a batch (or, with the path (), the tensor itself), as wide as `widen` makes it."""
    return widen(_at(value, path), width, path[-1] if path else "")


# --- prompts and roles --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    """Stands for the role of this name that lives in the worker."""

    key: str


def pack_prompts(
    prompts: Sequence[str], seeds: Tensor, group: Tensor | None, options: Mapping[str, Any]
) -> tuple[TensorDict, dict[str, Any]]:
    """The arguments of ``Role.sample`` as rows, with the options that go by the row, and the other options."""
    rows = {"prompt": encode_text(list(prompts)), "seed": seeds}
    if group is not None:
        rows["group"] = group
    plain = {name: resolve(value) for name, value in options.items()}
    for name, value in options.items():
        if isinstance(value, Tensor) and value.ndim:
            rows[f"row_{name}"] = plain.pop(name)
    return TensorDict(rows, batch_size=[len(prompts)]), plain


def unpack_prompts(
    rows: TensorDict, options: Mapping[str, Any]
) -> tuple[list[str], Tensor, Tensor | None, dict[str, Any]]:
    """The inverse of `pack_prompts`, in a worker: prompts, seeds, groups, options."""
    names = [str(name) for name in rows.keys()]  # noqa: SIM118 (TensorDict)
    by_row = {name[4:]: rows[name] for name in names if name.startswith("row_")}
    return decode_text(rows["prompt"]), rows["seed"], rows.get("group", None), {**options, **by_row}


# --- answers ------------------------------------------------------------------------------------------------


def describe(value: Any) -> dict[Path, tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and types of the tensors in ``value``, by path; a tensor alone has the path ()."""
    if isinstance(value, Tensor):
        return {(): (tuple(value.shape), value.dtype)}
    found: dict[Path, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, part in _inner(value).items():
        if isinstance(part, Tensor):
            found[key,] = tuple(part.shape), part.dtype
        elif isinstance(part, TensorDictBase) or is_tensorclass(part):
            found |= {(key, *path): form for path, form in describe(part).items()}
    return found


def _joined_form(forms: Sequence[dict[Path, Any]], rows: int) -> dict[Path, Any]:
    """The shapes of the parts of several workers put together, ``rows`` rows in all."""
    result = {}
    for path, (first, dtype) in forms[0].items():
        width = tuple(max(form[path][0][i] for form in forms) for i in range(1, len(first)))
        result[path] = (rows, *width), dtype
    return result


def structured(future: Future, rows: int, kind: type, group: WorkerGroup) -> Any:
    """A batch (or tensor) of `Pending` tensors for what ``future`` will give; waits until it is made by ``group``."""
    forms = _joined_form(group.call("describe", future), rows)
    size = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in forms.values())

    def leaf(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Pending:
        def fetch() -> Tensor:
            if size <= _BULK:
                return leaf_of(future.get(), path, shape[1:])
            return cast(Tensor, group.call("leaf", path, shape[1:], future))

        return Pending(fetch, shape, dtype, Source(future, path))

    if () in forms:
        return leaf((), *forms[()])
    root = nested({path: leaf(path, shape, dtype) for path, (shape, dtype) in forms.items()})
    return root if kind is TensorDict else kind.from_tensordict(root)  # type: ignore[attr-defined]


def pending_metrics(future: Future, forms: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Metrics:
    """Metrics of these names, shapes and types that come when they are read: those of the first worker."""

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: future.get()[0][name]

    return {name: Pending(reader(name), shape, dtype) for name, (shape, dtype) in forms.items()}


def on_cpu(value: Any) -> Any:
    """``value`` with every tensor in it in memory of the CPU."""
    if isinstance(value, dict):
        return {k: on_cpu(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_cpu(v) for v in value)
    return value.to("cpu") if hasattr(value, "to") and not isinstance(value, nn.Module) else value


def form_of(objective: Any) -> Any:
    """What of an objective can change the names of its metrics: its class, its switches, and which weights are zero."""
    if not is_dataclass(objective):
        return type(objective)
    form: list[Any] = [type(objective)]
    for field in fields(objective):
        value = getattr(objective, field.name)
        if isinstance(value, (str, bool)) or value is None:
            form.append(value)
        elif isinstance(value, (int, float)):
            form.append(bool(value))
        else:
            form.append(type(value))
    return tuple(form)
