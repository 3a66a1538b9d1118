"""What a recorder sees of a method, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories, concatenate
from guerdon.engine.local import LocalEngine
from guerdon.engine.recording import Call, EnoughError, Recorder, RecordingEngine
from guerdon.engine.watching import Watched, WatchedData
from guerdon.objectives.value import ValueRegression
from guerdon.optim import Adam
from guerdon.roles import Role


class _Values(nn.Module):
    """A critic of the first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(2, 1)

    def value(self, traj: Trajectories) -> Tensor:
        return self.core(traj.inputs["step", "state"]).squeeze(-1)


def _rows(n: int = 6) -> Trajectories:
    generator = torch.Generator().manual_seed(0)
    step = TensorDict({"state": torch.randn(n, 3, 2, generator=generator)}, batch_size=[n, 3])
    return Trajectories(
        inputs=TensorDict({"step": step}, batch_size=[n]),
        log_prob=torch.zeros(n, 3),
        mask=torch.ones(n, 3, dtype=torch.bool),
        reward=torch.randn(n, 3, generator=generator),
    )


class _Judge:
    name = "judge"

    def score(self, traj: Trajectories) -> Tensor:
        return traj.reward.sum(1)  # type: ignore[union-attr]


def _role(engine: LocalEngine, **settings: Any) -> Role:
    torch.manual_seed(0)
    return engine.role("critic", _Values(), Adam(1e-2), **settings)


def _iterate(critic: Role, data: Any, judge: Any) -> Tensor:
    """A method of a kind: targets from scores and values, an update in minibatches."""
    traj = data.take(torch.arange(6))
    score = judge.score(traj)
    value = critic.value(traj)
    target = torch.zeros_like(traj.log_prob)
    target[:, -1] = score
    target += 0.5 * value
    traj = traj.with_(value=value, target=target, advantage=target - value)
    for _ in range(2):
        for batch in traj.minibatches(3):
            critic.update(batch, ValueRegression())
    return target


class _Data:
    def take(self, rows: Tensor) -> Trajectories:
        return _rows()[rows]


def _recorded(**settings: Any) -> tuple[Recorder, Role, Tensor]:
    recorder = Recorder()
    critic = _role(RecordingEngine(recorder), **settings)
    recorder.looping = True
    judge = Watched(recorder, _Judge(), "reward", "feedback", {"score": "score"})
    with recorder:
        target = _iterate(critic, WatchedData(recorder, _Data(), "rated"), judge)
    return recorder, critic, target


def _read(recorder: Recorder, call: Call) -> set[tuple[str, str]]:
    def who(maker: int | str) -> str:
        return maker if isinstance(maker, str) else recorder.calls[maker].verb

    return {(who(maker), word) for maker, word in call.reads}


def test_it_sees_who_read_what() -> None:
    recorder, _, _ = _recorded()
    score, value, update = recorder.calls
    assert (score.verb, value.verb, update.verb) == ("score", "value", "update")
    assert _read(recorder, score) == {("rated", "reward")}
    assert _read(recorder, value) == {("rated", "state")}
    # the target is made of score and value, written into place; the batch's reward and advantage are not looked at
    assert _read(recorder, update) == {
        ("rated", "state"),
        ("rated", "mask"),
        ("score", "score"),
        ("value", "value"),
    }
    assert value.gives == {"value": (6, 3)}
    assert update.gives == {"weights": ()}
    assert (update.rows, update.steps, update.times) == (12, 4, 4)


@pytest.mark.parametrize("settings", [{}, {"micro_batch": 2}])
def test_it_changes_nothing(settings: dict[str, Any]) -> None:
    recorder, watched, target = _recorded(**settings)
    plain = _role(LocalEngine("cpu", 1), **settings)
    assert torch.equal(_iterate(plain, _Data(), _Judge()), target)
    for a, b in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert {"mask", "state"} <= {word for _, word in recorder.calls[-1].reads}  # found in micro-batches too


def test_marks_go_through_batches_that_are_joined_and_cut() -> None:
    recorder = Recorder()
    critic = _role(RecordingEngine(recorder))
    recorder.looping = True
    with recorder:
        data = WatchedData(recorder, _Data(), "rated")
        both = concatenate([data.take(torch.arange(2)), data.take(torch.arange(3))])
        some = both[torch.tensor([4, 0])].to("cpu").clone()
        critic.value(some)
    assert _read(recorder, recorder.calls[0]) == {("rated", "state")}
    assert recorder.calls[0].rows == 2


def test_calls_before_the_loop_are_told_apart() -> None:
    recorder = Recorder()
    critic = _role(RecordingEngine(recorder))
    with recorder:
        for recorder.looping in (False, True, True):
            critic.value(_rows())
    assert [(call.looped, call.times) for call in recorder.calls] == [(False, 1), (True, 2)]


def test_weights_that_moved_are_hooks_and_weights_that_trained_are_read() -> None:
    recorder = Recorder()
    critic = _role(RecordingEngine(recorder))
    target = critic.copy(frozen=True, name="target")
    recorder.looping = True
    batch = _rows().with_(target=torch.zeros(6, 3))
    with recorder:
        critic.update(batch, ValueRegression())
        target.follow(critic, 0.1)
        target.value(batch)
    update, value = recorder.calls
    (hook,) = recorder.hooks(update.post)
    assert (hook.source, hook.target, hook.eta) == ("critic", "target", 0.1)
    assert _read(recorder, value) == {("update", "target_weights")}
    assert set(update.gives) == {"weights", "target_weights"}


def test_a_copy_before_any_training_comes_before_the_next_reader() -> None:
    recorder = Recorder()
    critic = _role(RecordingEngine(recorder))
    recorder.looping = True
    with recorder:
        old = critic.copy(frozen=True, name="old")
        critic.value(_rows())
        old.value(_rows())
    own, others = recorder.calls
    assert (own.pre, own.post) == ([], [])
    (hook,) = recorder.hooks(others.pre)
    assert (hook.source, hook.target, hook.eta) == ("critic", "old", 1.0)


def test_a_look_that_needs_no_weights_is_no_work() -> None:
    recorder = Recorder()
    critic = _role(RecordingEngine(recorder))
    recorder.looping = True
    with recorder:
        traj = WatchedData(recorder, _Data(), "rated").take(torch.arange(6))
        double = critic.evaluate(lambda model, batch: 2 * batch.reward, traj)
        critic.evaluate(lambda model, batch: model.core.weight.sum() * batch, double)
    nothing, work = recorder.calls
    assert not nothing.gives
    assert work.gives
    assert _read(recorder, work) == {("rated", "reward")}


def test_a_loop_that_brings_nothing_new_is_left() -> None:
    recorder = Recorder(most=10)
    critic = _role(RecordingEngine(recorder))
    recorder.looping = True

    def loop() -> None:
        for _ in range(100):
            critic.value(_rows())

    with recorder, pytest.raises(EnoughError):
        loop()
    assert recorder.calls[0].times == 10
