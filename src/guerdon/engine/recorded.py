"""A dataflow graph from what a `guerdon.engine.recording.Recorder` has seen."""

from __future__ import annotations

from guerdon.engine.graph import DataflowGraph, ModelFunctionCall
from guerdon.engine.recording import Call, Mark, Recorder
from guerdon.errors import UsageError


def graph_of(recorder: Recorder, slug: str, factor: int = 1, judge: str = "any") -> DataflowGraph:
    """What was recorded in a method's loop as a graph. What was made before the loop comes from the dataset, and what a later
    call of the loop has made belongs to the iteration before.

    Args:
        slug: the method, for the graph's name.
        factor: by what the rows of the method were divided.
        judge: "model" makes judges that are functions calls on a reward model.

    Raises `UsageError` where the loop made no call.
    """
    calls = [
        call
        for call in recorder.calls
        if call.looped and (call.gives or call.kind in ("train", "experience"))
    ]
    if not calls:
        raise UsageError(
            f"'{slug}' made no call in the first iteration of its loop; there is nothing to draw"
        )
    names = _names(recorder)
    position = {call.number: place for place, call in enumerate(calls)}
    cycles = max(1, min((call.times for call in calls if call.kind == "experience"), default=1))

    def key(mark: Mark) -> str:
        maker, word = mark
        if maker == "data":
            return word
        return f"{names[maker] if isinstance(maker, int) else maker}.{word}"

    def known(call: Call, mark: Mark) -> bool:
        maker = mark[0]
        return not isinstance(maker, int) or position.get(maker, -1) < position[call.number]

    found = []
    for call in calls:
        kind = call.kind
        if judge == "model" and kind == "feedback":
            kind = "inference"
        name = names[call.number]
        found.append(
            ModelFunctionCall(
                name,
                recorder.name(call.role),
                kind,
                inputs=tuple(dict.fromkeys(key(mark) for mark in call.reads if known(call, mark))),
                outputs=tuple(call.gives),
                rename={word: f"{name}.{word}" for word in call.gives},
                sequences=_rows(call, factor, cycles),
                minibatches=max(1, round(call.steps / cycles)),
                pre=recorder.hooks(call.pre),
                post=recorder.hooks(call.post),
                uses=tuple(
                    sorted({recorder.name(role) for role in call.uses.values() if role is not call.role})
                ),
            )
        )
    return DataflowGraph(found, slug)


def _rows(call: Call, factor: int, cycles: int) -> int | None:
    """Rows of all its calls in an iteration, at the method's own sizes. Environments that only fill a replay step as often as
    they do; an inner loop that was left early counts by its cycles."""
    if not call.rows:
        return None
    each = call.rows / call.times * (1 if call.verb in ("advance", "act", "step") else factor)
    return max(1, round(each * max(1, round(call.times / cycles))))


def _names(recorder: Recorder) -> dict[int, str]:
    """``role.verb`` for each call, numbered where there are several."""
    names: dict[int, str] = {}
    taken: dict[str, int] = {}
    for call in sorted(recorder.calls, key=lambda call: not call.looped):
        name = f"{recorder.name(call.role)}.{call.verb}"
        taken[name] = taken.get(name, 0) + 1
        names[call.number] = name if taken[name] == 1 else f"{name}#{taken[name]}"
    return names
