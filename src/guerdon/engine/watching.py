"""What a method calls beside its roles (judges, recorded data, environments, replays), told to a recorder.

Each wrapper passes everything on to what it wraps and records a few verbs; see `guerdon.engine.recording`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from guerdon.engine.graph import Kind
from guerdon.engine.recording import Recorder
from guerdon.roles import Role


class Watched:
    """``value``, with some of its verbs recorded.

    Args:
        recorder: who is told.
        value: what does the work.
        name: the role of its calls.
        kind: of its calls.
        verbs: verb -> what to name a result that is one tensor.
    """

    def __init__(
        self, recorder: Recorder, value: Any, name: str, kind: Kind, verbs: Mapping[str, str]
    ) -> None:
        self.__dict__.update(_recorder=recorder, _value=value, _name=name, _kind=kind, _verbs=dict(verbs))

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._value, name)
        return partial(self._said, name, found) if name in self._verbs else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._value, name, value)

    def __len__(self) -> int:
        return len(self._value)

    def _said(self, verb: str, plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        others = [v for v in (*args, *options.values()) if isinstance(v, Role)]
        with self._recorder.call(verb, self._kind, self._name, others, self._recorder.rows(args)) as call:
            found = plain(*args, **options)
        if call is not None:
            self._recorder.gave(call, found, self._verbs[verb])
        return found


class WatchedData(Watched):
    """Recorded data: what is taken from them is nobody's work."""

    def __init__(self, recorder: Recorder, data: Any, name: str) -> None:
        super().__init__(recorder, data, name, "experience", {"take": ""})

    def _said(self, verb: str, plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        self._recorder.stamp(found, lambda name: [(self._name, name)])
        return found


class WatchedExperience(Watched):
    """Environments: their steps are calls, and so are those into the replays that they make. ``actors`` act where nobody
    says who does."""

    def __init__(self, recorder: Recorder, experience: Any, actors: Iterable[Role]) -> None:
        super().__init__(recorder, experience, "environment", "experience", {"collect": "", "advance": ""})
        self.__dict__["_actors"] = tuple(actors)

    def replay(self, *args: Any, **options: Any) -> Any:
        """As `Rollouts.replay`."""
        return WatchedReplay(self._recorder, self._value.replay(*args, **options), self._actors)


class WatchedReplay(Watched):
    """A replay: what is drawn from it was made by the environment's steps."""

    def __init__(self, recorder: Recorder, replay: Any, actors: Iterable[Role]) -> None:
        super().__init__(recorder, replay, "replay", "experience", {"sample": "", "windows": ""})
        self.__dict__["_actors"] = tuple(actors)

    def add(self, *row: Any) -> None:
        """As `Replay.add`; steps that no call has announced are one of their own."""
        with self._recorder.call("act", "experience", "environment", self._actors, 1, "act"):
            self._value.add(*row)

    def _said(self, verb: str, plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        found = plain(*args, **options)
        acted = [call for call in self._recorder.calls if call.role == "environment"]
        if acted:
            self._recorder.gave(acted[-1], found)
        return found


class WatchedStream(Watched):
    """The environment of learners that learn from one step at a time (`guerdon.streaming`). Their numbers are no tensors and
    bear no marks: a step reads what the actor said."""

    def __init__(self, recorder: Recorder, stream: Any) -> None:
        super().__init__(recorder, stream, "environment", "experience", {"step": ""})

    def _said(self, verb: str, plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with self._recorder.call(verb, "experience", "environment", (), 1, verb) as call:
            found = plain(*args, **options)
        if call is not None:
            call.gives.update({"observation": (), "reward": ()})
            for other in self._recorder.calls:
                if other.verb == "forward" and self._recorder.name(other.role) == "actor":
                    call.reads.update(dict.fromkeys((other.number, word) for word in other.gives))
        return found


class WatchedLearner(Watched):
    """Such a learner: its predictions read the environment's last step, its updates that and all predictions."""

    def __init__(self, recorder: Recorder, learner: Any, role: Role) -> None:
        super().__init__(recorder, learner, role.name, "train", {"forward": "", "predict": "", "step": ""})
        self.__dict__["_role"] = role

    def _said(self, verb: str, plain: Callable[..., Any], *args: Any, **options: Any) -> Any:
        recorder, learns = self._recorder, verb == "step"
        kind: Kind = "train" if learns else "inference"
        with recorder.call(verb, kind, self._role, (), 1, verb) as call:
            found = plain(*args, **options)
        if call is None:
            return found
        call.steps += learns
        if not learns:
            call.gives.setdefault("value" if self._name == "critic" else "output", ())
        for other in recorder.calls:
            if other.role == "environment" or (learns and other.verb in ("forward", "predict")):
                call.reads.update(dict.fromkeys((other.number, word) for word in other.gives))
        return found
