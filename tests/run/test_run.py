"""The verbs of a run, its folder, its errors and its signals."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import nn
from toy_training import Cursor, ToyEngine, ToyRole

from guerdon.batch import Trajectories
from guerdon.errors import CheckpointError, NonFiniteError, ShapeError, UsageError
from guerdon.run import Interrupted, Run, checkpoint, read_config, read_metrics, read_timings
from guerdon.run.metrics import Meter


def make(folder: Path, **options: Any) -> Run:
    return Run(folder, engine=ToyEngine(), **{"progress": False, **options})


# --- metrics ----------------------------------------------------------------------------------------------


def test_metrics_of_a_step_become_one_record(tmp_path: Path) -> None:
    third = torch.tensor(1 / 3)
    with make(tmp_path / "run") as run:
        for step in run.steps(2):
            run.log(a=1, b=0.1, text="one", flag=True)
            run.log(third=third, big=2**60, c=torch.tensor(7), d=np.float64(0.25), text="two")
            run.step({"nested/name": torch.tensor(True), "e": step})
    first, second = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert first == (
        f'{{"step": 0, "a": 1, "b": 0.1, "text": "two", "flag": true, "third": {float(third)!r}, '
        '"big": 1152921504606846976, "c": 7, "d": 0.25, "nested/name": true, "e": 0}'
    )
    assert json.loads(second)["step"] == 1
    assert [list(record) for record in read_timings(tmp_path / "run")] == [
        ["step", "seconds", "step_seconds", "peak_memory"]
    ] * 2


def test_what_is_logged_several_times_in_a_step_is_averaged(tmp_path: Path) -> None:
    with make(tmp_path / "run") as run:
        for _ in run.steps(2):
            for minibatch in range(4):
                run.log(loss=torch.tensor(float(minibatch)), number=minibatch, mixed=float(minibatch))
                run.log(mixed=torch.tensor(10.0, dtype=torch.float64))
    assert read_metrics(tmp_path / "run") == [
        {"step": step, "loss": 1.5, "number": 1.5, "mixed": 5.75} for step in (0, 1)
    ]


def test_what_is_logged_after_the_last_loop_is_one_more_record(tmp_path: Path) -> None:
    def train(steps: int, resume: bool) -> list[dict[str, Any]]:
        with make(tmp_path / "run", resume=resume) as run:
            for step in run.steps(steps):
                run.log(x=step)
            run.log(final=10 * steps)
        return read_metrics(tmp_path / "run")

    two = [{"step": 0, "x": 0}, {"step": 1, "x": 1}, {"step": 2, "final": 20}]
    assert train(2, False) == two
    assert train(2, True) == two
    assert train(3, True) == [*two[:2], {"step": 2, "x": 2}, {"step": 3, "final": 30}]


def test_a_parameter_that_changes_after_it_was_logged_is_recorded_as_it_was(tmp_path: Path) -> None:
    alpha, buffer = nn.Parameter(torch.tensor(1.0)), torch.zeros(3)
    with make(tmp_path / "run") as run:
        for _ in run.steps(1):
            run.log(alpha=alpha, view=buffer[1])
            with torch.no_grad():
                alpha.add_(5)
            buffer += 1
    assert read_metrics(tmp_path / "run") == [{"step": 0, "alpha": 1.0, "view": 0.0}]


def test_logging_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("synchronised in log()")

    value = torch.tensor(2.0)
    with make(tmp_path / "run") as run:
        for _ in run.steps(1):
            with monkeypatch.context() as patch:
                for name in ("item", "tolist", "__float__", "__bool__", "cpu", "numpy"):
                    patch.setattr(torch.Tensor, name, refuse)
                run.log(loss=value)
                run.log(loss=value)
    assert read_metrics(tmp_path / "run") == [{"step": 0, "loss": 2.0}]


def test_values_on_a_device_are_fetched_together() -> None:
    class Remote(torch.Tensor):
        """Says that it lies on a GPU."""

        fetched = 0
        device = torch.device("cuda")

        def item(self) -> Any:
            raise AssertionError("fetched alone")

        def tolist(self) -> Any:
            Remote.fetched += 1
            return self.as_subclass(torch.Tensor).tolist()

    meter = Meter()
    for number in range(5):
        meter.add("loss", torch.tensor(float(number)).as_subclass(Remote))
        meter.add("entropy", torch.tensor(2.0 * number).as_subclass(Remote))
        meter.add("count", torch.tensor(number).as_subclass(Remote))
        meter.add("here", torch.tensor(1.0))
    assert meter.take() == {"loss": 2.0, "entropy": 4.0, "count": 2.0, "here": 1.0}
    assert Remote.fetched == 2, "once for the floats, once for the integers"
    assert meter.take() == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(3), r"loss has shape \[3\], expected one number"),
        ([1, 2], "loss is a list"),
        (None, "loss is a NoneType"),
    ],
)
def test_what_is_not_a_metric_is_refused_where_it_is_logged(value: Any, message: str) -> None:
    with pytest.raises((ShapeError, UsageError), match=message):
        Meter().add("loss", value)


def test_the_name_step_and_mixed_kinds_are_refused(tmp_path: Path) -> None:
    with make(tmp_path / "run") as run, pytest.raises(UsageError, match="'step' is the number"):
        run.log(step=3)

    def train() -> None:
        with make(tmp_path / "other") as run:
            for _ in run.steps(1):
                run.log(a="text")
                run.log(a=1)

    with pytest.raises(UsageError, match="a was logged as a text and as a number"):
        train()


def test_infinite_metrics_are_null_unless_they_are_a_reward_or_a_loss(tmp_path: Path) -> None:
    with make(tmp_path / "run") as run:
        for _ in run.steps(1):
            run.log(reward_std=math.nan, kl=torch.tensor(math.inf), reward=1.0)
    assert read_metrics(tmp_path / "run") == [{"step": 0, "reward_std": None, "kl": None, "reward": 1.0}]


@pytest.mark.parametrize("name", ["loss", "reward", "actor/loss", "value_loss"])
def test_a_reward_or_loss_that_is_not_finite_stops_the_run(tmp_path: Path, name: str) -> None:
    def train() -> None:
        with make(tmp_path / "run", checkpoint_steps=1) as run:
            for step in run.steps(5):
                run.step({name: torch.tensor(math.nan if step == 2 else 1.0)})

    with pytest.raises(
        NonFiniteError, match=rf"{name} became nan in step 2 .*checkpoint of step 2 is intact"
    ):
        train()
    assert len(read_metrics(tmp_path / "run")) == 2
    found = checkpoint.load_newest(tmp_path / "run")
    assert found is not None
    assert found[0] == 2


def test_the_batch_of_a_failed_update_is_kept(tmp_path: Path) -> None:
    batch = Trajectories(
        inputs=TensorDict({"x": torch.arange(3.0)}, batch_size=[3]),
        log_prob=torch.zeros(3, 2),
        mask=torch.ones(3, 2, dtype=torch.bool),
    )

    def train() -> None:
        with make(tmp_path / "run", checkpoint_steps=1) as run:
            for step in run.steps(5):
                if step == 3:
                    error = NonFiniteError("the loss of actor is nan")
                    error.batch = batch  # type: ignore[attr-defined]
                    raise error

    with pytest.raises(NonFiniteError) as caught:
        train()
    path = tmp_path / "run" / "failed_batch.safetensors"
    assert str(caught.value) == (
        f"the loss of actor is nan; the batch is saved in {path}; the checkpoint of step 3 is intact"
    )
    assert torch.equal(Trajectories.load_file(path).inputs["x"], torch.arange(3.0))


def test_a_batch_that_cannot_be_saved_does_not_hide_the_error(tmp_path: Path) -> None:
    def train() -> None:
        with make(tmp_path / "run"):
            error = NonFiniteError("the loss is nan")
            error.batch = object()  # type: ignore[attr-defined]
            raise error

    with pytest.raises(NonFiniteError, match=r"the loss is nan; the batch could not be saved \(.*save_file"):
        train()


def test_a_step_costs_less_than_a_millisecond(tmp_path: Path) -> None:
    values = {f"metric_{i}": torch.tensor(float(i)) for i in range(10)}
    times = []
    with make(tmp_path / "run", checkpoint_every=1e9) as run:
        before = time.perf_counter()
        for _ in run.steps(500):
            run.step(values)
            now = time.perf_counter()
            times.append(now - before)
            before = now
    assert statistics.median(times) < 1e-3


# --- the folder -------------------------------------------------------------------------------------------


def test_config_holds_what_is_needed_to_run_again(tmp_path: Path) -> None:
    config = {"method": "toy", "data": Path("a/b"), "steps": 3}
    with make(tmp_path / "run", seed=5, config=config):
        pass
    content = read_config(tmp_path / "run")
    assert content["config"] == {"method": "toy", "data": "a/b", "steps": 3}
    assert content["seed"] == 5
    assert content["engine"] == {"kind": "toy"}
    assert content["threads"] == torch.get_num_threads()
    assert content["versions"].keys() == {"guerdon", "torch", "numpy", "python"}
    assert content["platform"]
    assert content["cpus"] == os.cpu_count()


def test_a_config_that_json_cannot_hold_is_refused(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(UsageError, match=r"config cannot be written .* is a Cursor"):
        make(tmp_path / "run", config={"x": Cursor()}).__enter__()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    with make(tmp_path / "run"):
        pass
    with pytest.raises(UsageError, match=r"already holds a run; .*`guerdon resume .*run`.* --name"):
        make(tmp_path / "run")


def test_resuming_where_there_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no run \(no config.json\)"):
        make(tmp_path / "nothing", resume=True)
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "config.json").write_text('{"x"')
    with pytest.raises(CheckpointError, match=r"config.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"x": 1}')
    with pytest.raises(CheckpointError, match="not the config of a run"):
        read_config(tmp_path)


def test_a_resumed_run_keeps_its_seed_and_config(tmp_path: Path) -> None:
    with make(tmp_path / "run", seed=5, config={"rounds": 3}):
        pass
    before = (tmp_path / "run" / "config.json").read_text()
    with make(tmp_path / "run", resume=True) as run:
        assert run.seed == 5
        assert run.config == {"rounds": 3}
    assert (tmp_path / "run" / "config.json").read_text() == before
    with make(tmp_path / "run", resume=True, config={"rounds": 9}) as run:
        assert run.config == {"rounds": 9}
    changed = read_config(tmp_path / "run")
    assert changed == {**json.loads(before), "config": {"rounds": 9}}


def test_another_process_cannot_write_the_same_run(tmp_path: Path) -> None:
    with make(tmp_path / "run"):
        child = os.fork()
        if not child:  # only os._exit: the test's own machinery must not run twice
            try:
                make(tmp_path / "run", resume=True).__enter__()
            except UsageError as error:
                os._exit(7 if "written by another process" in str(error) else 8)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with make(tmp_path / "run", resume=True):
        pass


def test_arguments_out_of_range_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="keep is 0"):
        make(tmp_path, keep=0)
    with pytest.raises(UsageError, match="checkpoint_steps is 0"):
        make(tmp_path, checkpoint_steps=0)


def test_pictures_are_saved_as_png(tmp_path: Path) -> None:
    from PIL import Image

    pixels = torch.randint(0, 256, (8, 6, 3), dtype=torch.uint8)
    with make(tmp_path / "run") as run:
        path = run.save_image("rounds/0001", pixels)
        run.save_image("other", Image.new("RGB", (3, 4)))
        assert run.samples == run.folder / "samples"
        with pytest.raises(UsageError, match="leads out"):
            run.save_image("../x", pixels)
        with pytest.raises(UsageError, match=r"float32 \[3\], expected uint8"):
            run.save_image("x", torch.zeros(3))
    assert path == tmp_path / "run" / "samples" / "rounds" / "0001.png"
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels.numpy())
    assert sorted(p.name for p in (tmp_path / "run" / "samples").iterdir()) == ["other.png", "rounds"]


# --- what is saved and restored ---------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_numbers_and_the_streams_differ(tmp_path: Path) -> None:
    def draw(name: str, seed: int) -> list[float]:
        with make(tmp_path / name, seed=seed) as run:
            return [
                torch.rand(()).item(),
                torch.rand((), generator=run.generator).item(),
                random.random(),
                float(np.random.rand()),
            ]

    first = draw("a", 1)
    assert draw("b", 1) == first
    assert all(x != y for x, y in zip(draw("c", 2), first, strict=True))
    assert len({round(x, 6) for x in first}) == 4


def test_names_are_taken_once_and_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with make(tmp_path / "run") as run:
        role = run.role("actor", nn.Linear(2, 1), 0.1, trained=False)
        assert isinstance(role, ToyRole)
        assert role.optimiser is None, "optimiser and settings reach the engine"
        cursor = Cursor()
        assert run.track("cursor", cursor) is cursor
        with pytest.raises(UsageError, match="already has something called 'actor'"):
            run.adopt("actor", role.copy())
        with pytest.raises(UsageError, match=r"'x' cannot be saved: list has no state_dict\(\)"):
            run.track("x", [1])


def test_a_checkpoint_that_does_not_fit_is_an_error(tmp_path: Path) -> None:
    def train(
        steps: int = 2, size: int = 3, name: str = "actor", resume: bool = True, more: bool = False
    ) -> None:
        with make(tmp_path / "run", resume=resume) as run:
            if name:
                run.role(name, nn.Linear(size, 1))
            if more:
                run.track("cursor", Cursor())
            for _ in run.steps(steps):
                pass

    train(resume=False)
    with pytest.raises(CheckpointError, match=r"step 2 .* holds 'actor', which this run does not have"):
        train(name="")
    with pytest.raises(CheckpointError, match="lacks 'cursor'"):
        train(more=True)
    with pytest.raises(CheckpointError, match=r"does not fit 'actor': .*size mismatch"):
        train(size=4)
    train()


def test_records_without_a_checkpoint_are_not_thrown_away(tmp_path: Path) -> None:
    import shutil

    def train(resume: bool) -> None:
        with make(tmp_path / "run", resume=resume) as run:
            for step in run.steps(2):
                run.log(x=step)

    train(False)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="has records but no checkpoint"):
        train(True)
    assert len(read_metrics(tmp_path / "run")) == 2


def test_checkpoints_come_by_steps_or_by_seconds_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[Run.__module__]

    def saved(name: str, **options: Any) -> list[int]:
        with make(tmp_path / name, keep=100, **options) as run:
            for _ in run.steps(7):
                time.sleep(0.02)
        return sorted(int(p.name[5:]) for p in (tmp_path / name / "checkpoints").iterdir())

    assert saved("steps", checkpoint_steps=3) == [0, 3, 6, 7]
    assert saved("rare", checkpoint_every=1000.0) == [0, 7]
    monkeypatch.setattr(module, "_SHARE", 0)
    assert saved("always", checkpoint_every=0.0) == [0, 1, 2, 3, 4, 5, 6, 7]
    monkeypatch.setattr(module, "_SHARE", 1e9)  # writing one takes so long that few may be written
    assert saved("costly", checkpoint_every=0.0) == [0, 7]


def test_how_often_checkpoints_are_made_is_not_seen_in_the_random_numbers(tmp_path: Path) -> None:
    class Drawing(Cursor):
        def state_dict(self) -> dict[str, int]:
            torch.rand(3), random.random(), np.random.rand()
            return super().state_dict()

    def drawn(name: str, every: int) -> list[dict[str, Any]]:
        with make(tmp_path / name, checkpoint_steps=every) as run:
            run.track("drawing", Drawing())
            for _ in run.steps(6):
                run.log(a=torch.rand(()), b=random.random(), c=np.random.rand())
        return read_metrics(tmp_path / name)

    assert drawn("often", 1) == drawn("rarely", 5)


def test_a_loop_left_by_break_is_recorded_and_finished(tmp_path: Path) -> None:
    def train(resume: bool) -> list[int]:
        taken = []
        with make(tmp_path / "run", resume=resume) as run:
            for step in run.steps(10):
                taken.append(step)
                run.log(x=step)
                if step == 2:
                    break
            for step in run.steps(2):
                taken.append(100 + step)
                run.log(y=step)
                if step == 0:
                    break
        return taken

    assert train(False) == [0, 1, 2, 100]
    records = [{"step": 0, "x": 0}, {"step": 1, "x": 1}, {"step": 2, "x": 2}, {"step": 3, "y": 0}]
    assert read_metrics(tmp_path / "run") == records
    assert train(True) == []
    assert read_metrics(tmp_path / "run") == records


def test_steps_need_an_entered_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"with Run\(...\) as run"):
        next(iter(make(tmp_path / "run").steps(3)))


# --- leaving ----------------------------------------------------------------------------------------------


def test_an_error_gives_everything_back(tmp_path: Path) -> None:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    threads, alive = torch.get_num_threads(), threading.active_count()
    run = make(tmp_path / "run")

    def train() -> None:
        with run:
            torch.set_num_threads(threads + 1)
            assert signal.getsignal(signal.SIGTERM) != handlers[1]
            for _ in run.steps(3):
                raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        train()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert torch.get_num_threads() == threads
    assert threading.active_count() == alive
    assert run._metrics._file.closed
    assert run._timings._file.closed
    assert read_metrics(tmp_path / "run") == [], "the broken step is not recorded"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_waits_for_the_step(
    tmp_path: Path, number: signal.Signals, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    finished = []

    def train() -> None:
        with make(tmp_path / "run", progress=True) as run:
            for step in run.steps(10):
                if step == 1:
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)
                finished.append(step)
                run.log(x=step)

    with pytest.raises(Interrupted, match="stopped after step 2; continue with `guerdon resume") as caught:
        train()
    assert caught.value.exit_status == status
    assert isinstance(caught.value, KeyboardInterrupt)
    assert finished == [0, 1]
    assert len(read_metrics(tmp_path / "run")) == 2
    found = checkpoint.load_newest(tmp_path / "run")
    assert found is not None
    assert found[0] == 2
    assert "stopping after this step" in capfd.readouterr().err


def test_the_second_signal_stops_at_once(tmp_path: Path) -> None:
    def train() -> None:
        with make(tmp_path / "run") as run:
            for _ in run.steps(10):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)

    start = time.monotonic()
    with pytest.raises(Interrupted, match=r"stopped at once; .* continues after step 0") as caught:
        train()
    assert time.monotonic() - start < 4
    assert caught.value.exit_status == 143


def test_a_signal_outside_a_loop_stops_at_once(tmp_path: Path) -> None:
    def prepare() -> None:
        with make(tmp_path / "run"):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(Interrupted, match="before the training began"):
        prepare()


def test_a_run_in_another_thread_leaves_the_signals_alone(tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGINT), []

    def train() -> None:
        with make(tmp_path / "run") as run:
            for _ in run.steps(1):
                seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert seen == [before]
