"""Watching a method run: which verb of which role was called, what it read, and which call had made that.

A `Recorder` follows tensors by the memory they lie in. What a call gives is marked with the call and the field's name; every
operation of the method between two calls passes the marks of its inputs on to its results (an advantage carries those of the
rewards and values it was made of). What a call reads is found by watching which marked tensors the operations inside it
touch: an objective that is handed a whole batch is charged with the fields that it looks at.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from tensordict import TensorDictBase, is_tensorclass
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from guerdon.batch import Batch, Preferences, Trajectories
from guerdon.engine.graph import Kind, ParamRealloc
from guerdon.engine.local import LocalEngine, merged
from guerdon.roles import Role

Mark = tuple["int | str", str]
"""Who made a tensor (the number of a call, or the name of recorded data) and which field of its result it is."""

Move = tuple[Role, Role, float]
"""Weights of the first went to the second, this share of them."""

PROMPTS: Mark = ("data", "prompts")

VERBS: dict[str, tuple[Kind, str]] = {
    "sample": ("generate", ""),
    "log_prob": ("inference", "log_prob"),
    "distribution": ("inference", "distribution"),
    "value": ("inference", "value"),
    "next_value": ("inference", "next_value"),
    "score": ("inference", "score"),
    "compare": ("inference", "preference"),
    "evaluate": ("inference", "figures"),
    "update": ("train", ""),
    "fit": ("train", ""),
    "natural_step": ("train", ""),
}
"""Verbs of a role that are calls on its model: what kind of call, and what to name a result that is one tensor."""

_MOVED = (
    frozenset(
        {"__getitem__", "__setitem__", "index_select", "gather", "take_along_dim", "narrow", "select", "flip"}
    )
    | frozenset(
        {"to", "cpu", "cuda", "float", "double", "half", "int", "long", "bool", "type_as", "contiguous"}
    )
    | frozenset(
        {"clone", "detach", "alias", "copy_", "index_put_", "requires_grad_", "pin_memory", "as_tensor"}
    )
    | frozenset(
        {"view", "view_as", "reshape", "expand", "expand_as", "flatten", "unflatten", "squeeze", "unsqueeze"}
    )
    | frozenset({"transpose", "permute", "t", "movedim", "roll", "repeat", "repeat_interleave", "pad"})
    | frozenset({"split", "chunk", "tensor_split", "unbind", "cat", "stack", "concat"})
)
"""Operations that carry tensors about and look at none of their numbers; by these alone nothing counts as read."""

_FORMS = frozenset(
    {"empty_like", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_empty", "new_full"}
)
"""Operations that take nothing but its form from a tensor: what they give bears no mark."""

_BOOKS = frozenset({"group", "version", "index"})
"""Fields that say where rows belong. No call waits for them: which prompts are asked is known before they are answered."""

_ENGINE = str(Path(__file__).parent)


class EnoughError(Exception):
    """Raised inside a method when its loop has gone round so often that nothing new is to be expected."""


@dataclass(eq=False)
class Call:
    """One place in a method from which a verb is called, with all its calls of the iteration.

    Attributes:
        role: a `Role`, or the name of who acts or judges.
        looped: whether it is called in the method's loop, not before or after.
        reads: in the order in which they were.
        gives: field -> shape, of what came first.
        rows, steps, times: sums over its calls: rows of their batches, updates of the optimiser, calls.
        pre, post: weights that moved before and after it.
    """

    number: int
    verb: str
    kind: Kind
    role: Any
    looped: bool
    uses: dict[int, Role] = field(default_factory=dict)
    reads: dict[Mark, None] = field(default_factory=dict)
    gives: dict[str, tuple[int, ...]] = field(default_factory=dict)
    rows: int = 0
    steps: int = 0
    times: int = 0
    pre: list[Move] = field(default_factory=list)
    post: list[Move] = field(default_factory=list)


class Recorder(TorchFunctionMode):
    """Enter it, let a method train on the roles of a `RecordingEngine`, read ``calls``.

    Args:
        most: calls without a new place among them, after which `EnoughError` is raised.

    Attributes:
        calls: in the order in which each came first.
        names: id of a role -> the name that the run knows it by.
        unit: what the rows of a batch are: "trajectory", or "step" where experience is counted in steps.
        looping: whether the method's loop is running.
        flattened: roles whose weights were handed out to be moved from outside, the last one at the end.
    """

    def __init__(self, most: int = 400) -> None:
        super().__init__()
        self.most = most
        self.calls: list[Call] = []
        self.names: dict[int, str] = {}
        self.unit = "trajectory"
        self.looping = False
        self.flattened: list[Role] = []
        self._places: dict[Any, Call] = {}
        self._current: Call | None = None
        self._quiet = 0
        self._marks: dict[int, frozenset[Mark]] = {}
        self._alive: list[Any] = []  # memory that is used again would bear the marks of what was there before
        self._held: frozenset[int] = frozenset()  # weights that `weighing` waits to see used
        self._changed: dict[
            int, Mark
        ] = {}  # id of a role -> the call of this iteration that changed its weights
        self._moves: list[Move] = []  # to be told of the next call that reads the target

    # -- tensors -------------------------------------------------------------------------------------------

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for kind in types:  # batches take operations apart: go on watching inside
            if issubclass(kind, TensorDictBase) or is_tensorclass(kind):
                with self:
                    return kind.__torch_function__(func, types, args, kwargs)
        found = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__" or name in _FORMS or not (self._marks or self._held):
            return found
        if name.startswith("_foreach_"):  # a batch copies its tensors by these, each for itself
            lists = [part for part in args if isinstance(part, (list, tuple))]
            for own in zip(found or args[0], *lists, strict=True):
                self._add(
                    own[0], frozenset().union(*(self._marks.get(_address(t), frozenset()) for t in own[1:]))
                )
            return found
        marks: frozenset[Mark] = frozenset()
        for tensor in _tensors((args, kwargs)):
            address = _address(tensor)
            marks |= self._marks.get(address, frozenset())
            if address in self._held:
                self._held = frozenset()
        if not marks:
            return found
        moved = name in _MOVED
        if self._current is not None and not moved:
            self._current.reads.update(dict.fromkeys(sorted(marks, key=str)))
        if self._current is None or moved:
            self._add(found, marks)
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                self._add(args[0], marks)
        return found

    def _add(self, value: Any, marks: frozenset[Mark]) -> None:
        for tensor in _tensors(value):
            if address := _address(tensor):
                self._marks[address] = self._marks.get(address, frozenset()) | marks
                self._alive.append(tensor)

    def stamp(self, value: Any, marks: Callable[[str], Iterable[Mark]], word: str = "") -> None:
        """Mark the tensors in ``value`` afresh, by what ``marks`` says of the name of each; ``word`` names a lone one."""
        for name, tensor in _fields(value, word):
            if address := _address(tensor):
                self._marks[address] = frozenset(marks(name))
                self._alive.append(tensor)

    def gave(self, call: Call, value: Any, word: str = "") -> None:
        """``value`` is what ``call`` gave. What it only handed on, it has read."""
        for name, tensor in _fields(value, word):
            call.gives.setdefault(name, tuple(tensor.shape))
            passed = self._marks.get(_address(tensor), frozenset())
            call.reads.update({mark: None for mark in sorted(passed, key=str) if mark[0] != call.number})
        self.stamp(value, lambda name: [(call.number, name)], word)

    # -- calls ---------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def call(
        self, verb: str, kind: Kind, role: Any, uses: Iterable[Role] = (), rows: int = 0, place: Any = None
    ) -> Iterator[Call | None]:
        """A call begins; None inside another, to which it belongs. ``place``: what tells places apart; the lines
        that are being carried out, if none is given."""
        if self._current is not None:
            if isinstance(role, Role):
                self._current.uses.setdefault(id(role), role)
            yield None
            return
        key = (verb, self.looping, self.name(role), _lines() if place is None else place)
        call = self._places.get(key)
        if call is None:
            call = self._places[key] = Call(len(self.calls), verb, kind, role, self.looping)
            self.calls.append(call)
            self._quiet = 0
        self._quiet += 1
        if self.looping and self._quiet > self.most:
            raise EnoughError
        call.uses.update({id(other): other for other in uses})
        call.rows, call.times = call.rows + rows, call.times + 1
        read = {id(role), *call.uses}
        changed = (mark for who, mark in self._changed.items() if who in read)
        call.reads.update({mark: None for mark in changed if mark[0] != call.number})
        for move in [move for move in self._moves if id(move[1]) in read]:
            self._moves.remove(move)
            _once(call.pre, move)
        self._current = call
        try:
            yield call
        finally:
            self._current = None
        if kind == "train":
            call.gives.setdefault("weights", ())
            self._changed[id(role)] = (call.number, "weights")

    @contextlib.contextmanager
    def weighing(self, model: nn.Module) -> Iterator[list[bool]]:
        """What it gives holds afterwards whether the weights of ``model`` were used."""
        used: list[bool] = []
        before, self._held = self._held, frozenset(_address(p) for p in model.parameters())
        try:
            yield used
        finally:
            used.append(not self._held)
            self._held = before

    def moved(self, source: Role, target: Role, share: float) -> None:
        """Weights of ``target`` moved towards those of ``source``, outside any call: after the last call that trained the
        source or, if none has yet, before the next that reads the target."""
        if not self.looping:
            return
        move, trained = (source, target, share), self._changed.get(id(source))
        if trained is None:
            self._moves.append(move)
            return
        call = self.calls[cast(int, trained[0])]
        if not any(move in other.pre for other in self.calls):  # seen the iteration before, so to say
            _once(call.post, move)
        word = f"{self.name(target)}_weights"
        call.gives.setdefault(word, ())
        self._changed[id(target)] = (call.number, word)

    def rows(self, values: Iterable[Any]) -> int:
        """The rows of the first batch, list of prompts or number among a call's arguments."""
        for value in values:
            if isinstance(value, Trajectories) and self.unit == "step":
                return value.mask.numel()
            if isinstance(value, Preferences):
                return 2 * len(value)
            if isinstance(value, (Batch, list, tuple)):
                return len(value)
            if isinstance(value, int):
                return value
        return 0

    def name(self, role: Any) -> str:
        """What the run calls a role: the name under which it was adopted, else its own."""
        if isinstance(role, str):
            return role
        name = self.names.get(id(role), role.name)
        return "reference" if name == "actor_reference" else name

    def hooks(self, moves: Iterable[Move]) -> tuple[ParamRealloc, ...]:
        """Moved weights as hooks of a graph, each once."""
        found = (ParamRealloc(self.name(a), self.name(b), float(share)) for a, b, share in moves)
        return tuple(dict.fromkeys(found))


class RecordingRole(Role):
    """A role whose verbs are recorded and then do what they always do."""

    recorder: Recorder

    def _said(self, verb: str, *args: Any, **options: Any) -> Any:
        recorder, (kind, word) = self.recorder, VERBS[verb]
        others = [v for v in (*args, *options.values()) if isinstance(v, Role)]
        rows, before = recorder.rows(args), self.updates
        with recorder.call(verb, kind, self, others, rows) as call, recorder.weighing(self.model) as used:
            found = getattr(Role, verb)(self, *args, **options)
        if call is None:
            return found
        if kind == "train":
            made = self.updates - before
            call.steps += made
            size = options.get("minibatch") or (args[3] if len(args) > 3 else None)
            if verb == "fit" and rows:  # goes over its rows more than once
                call.rows += rows * (made // -(-rows // (size or rows)) - 1)
        elif verb == "evaluate" and not used[0]:  # tokenised, or looked something up: no work of the model
            recorder.stamp(found, lambda name: call.reads)
        else:
            if kind == "generate" and all(word.endswith("weights") for _, word in call.reads):
                call.reads[PROMPTS] = None
            recorder.gave(call, found, word)
        return found

    def acting(self) -> Any:
        """As `Role.acting`; whoever acts now uses this role's weights."""
        with self.recorder.call("act", "experience", self):
            return super().acting()

    def copy(self, frozen: bool = True, name: str | None = None) -> Role:
        """As `Role.copy`; in the loop, weights move to the copy."""
        twin = super().copy(frozen, name)
        twin.__class__ = type(self)
        self.recorder.moved(self, twin, 1.0)
        return twin

    def follow(self, other: Role, tau: float) -> None:
        """As `Role.follow`."""
        super().follow(other, tau)
        self.recorder.moved(other, self, tau)

    def flat_weights(self) -> Any:
        """As `Role.flat_weights`."""
        self.recorder.flattened.append(self)
        return super().flat_weights()


def _verb(name: str) -> Callable[..., Any]:
    @wraps(getattr(Role, name))
    def say(self: RecordingRole, *args: Any, **options: Any) -> Any:
        return self._said(name, *args, **options)

    return say


for _name in VERBS:
    setattr(RecordingRole, _name, _verb(_name))


class RecordingEngine(LocalEngine):
    """Roles in this process that tell a recorder what is asked of them."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__("cpu", torch.get_num_threads(), compile=False, precision="float32")
        self.recorder = recorder

    def role(
        self, name: str, model: nn.Module, optimiser: Any = None, settings: Any = None, **changes: Any
    ) -> Role:
        """As `LocalEngine.role`."""
        role = RecordingRole(name, model, merged(settings, optimiser, changes, self.overrides), self.device)
        role.recorder = self.recorder
        return role


# --- small things -----------------------------------------------------------------------------------------


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _tensors(part)


def _fields(value: Any, word: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of what a call gave, by the last part of their names; of a pair both sides alike."""
    if isinstance(value, Tensor):
        yield word, value
    elif isinstance(value, (TensorDictBase, dict)) or is_tensorclass(value):
        for name, part in cast(Any, value).items():
            if name not in _BOOKS:
                yield from _fields(part, str(name))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _fields(part, word)


def _address(tensor: Tensor) -> int:
    """Where a tensor's memory begins; 0 for one that has none of its own."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def _lines() -> tuple[tuple[str, int], ...]:
    """The lines that are being carried out, engines left out, from the method's ``train`` down."""
    frame: FrameType | None = sys._getframe(2)
    lines = []
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith(_ENGINE):
            lines.append((path, frame.f_lineno))
            if frame.f_code.co_name == "train":
                break
        frame = frame.f_back
    return tuple(lines)


def _once(moves: list[Move], move: Move) -> None:
    if move not in moves:
        moves.append(move)
