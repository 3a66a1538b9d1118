"""A run that is killed anywhere and resumed ends as if it had not been."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training

from guerdon.run import Run, checkpoint, read_metrics, read_timings


@pytest.fixture(scope="module")
def processes() -> Any:
    return toy_training.processes()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    weights = toy_training.train(folder, pause=0)
    return (folder / "metrics.jsonl").read_bytes(), weights


def wait_for(condition: Any, process: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), f"the process ended early, with {process.exitcode}"
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)


def records(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_same(folder: Path, uninterrupted: tuple[bytes, dict[str, torch.Tensor]], weights: Any) -> None:
    metrics, expected = uninterrupted
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.mark.timeout(120)
def test_killed_twelve_times_ends_bit_identical(
    tmp_path: Path, processes: Any, uninterrupted: tuple[bytes, dict[str, torch.Tensor]]
) -> None:
    folder, chance = tmp_path / "run", random.Random(7)
    # kills inside a checkpoint: the very first one, a half-written state, a missing manifest, just renamed
    stalls = {0: ("state", 1), 3: ("state", 2), 6: ("manifest", 1), 9: ("renamed", 2)}
    for number in range(12):
        options: dict[str, Any] = {"checkpoint_every": 0.03} if number % 2 else {"checkpoint_steps": 4}
        resume = (folder / "config.json").exists()
        before, marker, stalling = records(folder), tmp_path / f"stalled{number}", None
        if number in stalls:
            where, saves = stalls[number]
            stalling = (where, marker, saves)
        process = processes.Process(target=toy_training.life, args=(folder, resume, options, stalling))
        process.start()
        if stalling:
            wait_for(marker.exists, process)
        else:
            # it first falls back to its checkpoint, so count steps from there
            further = before + chance.randrange(3, 14)
            wait_for(lambda further=further: records(folder) >= further, process)
            time.sleep(chance.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 20 < records(folder) < 170, "killed in both loops, and before the end"

    weights = toy_training.train(folder, pause=0, resume=True)
    assert_same(folder, uninterrupted, weights)
    timings = read_timings(folder)
    assert [record["step"] for record in timings] == list(range(170))
    seconds = [record["seconds"] for record in timings]
    assert seconds == sorted(seconds)
    assert not list((folder / "checkpoints").glob(".tmp*"))
    assert len(list((folder / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_exits(
    tmp_path: Path,
    processes: Any,
    uninterrupted: tuple[bytes, dict[str, torch.Tensor]],
    number: int,
    status: int,
) -> None:
    folder = tmp_path / "run"
    options = {"checkpoint_every": 1000.0}
    process = processes.Process(target=toy_training.life, args=(folder, False, options))
    process.start()
    wait_for(lambda: records(folder) >= 30, process)
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == status
    found = checkpoint.load_newest(folder)
    assert found is not None
    assert found[0] == records(folder) >= 30
    assert_same(folder, uninterrupted, toy_training.train(folder, pause=0, resume=True))


def test_a_second_signal_stops_at_once(tmp_path: Path, processes: Any) -> None:
    folder, marker = tmp_path / "run", tmp_path / "marker"
    process = processes.Process(target=toy_training.long_steps, args=(folder, marker))
    process.start()
    wait_for(marker.exists, process)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.2)
    assert process.is_alive(), "the first signal waits for the step"
    os.kill(process.pid, signal.SIGINT)
    process.join(10)
    assert process.exitcode == 130
    assert records(folder) == 1
    found = checkpoint.load_newest(folder)
    assert found is not None
    assert found[0] == 0, "the step was not finished, so nothing was saved after it"


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest", "no state", "torn manifest"])
def test_a_damaged_newest_checkpoint_is_skipped(
    tmp_path: Path, uninterrupted: tuple[bytes, dict[str, torch.Tensor]], damage: str
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="enough"):
        interrupted_after(folder, 57)
    newest = max((folder / "checkpoints").iterdir())
    assert newest.name == "step_00000056"
    state, manifest = newest / "state.pt", newest / "manifest.json"
    data = bytearray(state.read_bytes())
    if damage == "truncated":
        state.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        state.write_bytes(data)
    elif damage == "no manifest":
        manifest.unlink()
    elif damage == "no state":
        state.unlink()
    else:
        manifest.write_text(manifest.read_text()[:40])
    with pytest.warns(RuntimeWarning, match=r"step_00000056 .*continuing from step_00000048") as caught:
        weights = toy_training.train(folder, pause=0, resume=True)
    assert len(caught) == 1
    assert_same(folder, uninterrupted, weights)


def interrupted_after(folder: Path, count: int, every: int = 8) -> None:
    """Train, and fail in the middle of the step after ``count``."""
    original = Run.step

    def step(self: Run, metrics: Any) -> None:
        if self._open and self._position.step == count:
            raise RuntimeError("enough")
        original(self, metrics)

    Run.step = step  # type: ignore[method-assign]
    try:
        toy_training.train(folder, pause=0, checkpoint_steps=every)
    finally:
        Run.step = original  # type: ignore[method-assign]


@pytest.mark.parametrize("count", [0, 1, 19, 20, 21])
def test_what_is_logged_before_a_loop_is_recorded_once(
    tmp_path: Path, uninterrupted: tuple[bytes, dict[str, torch.Tensor]], count: int
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="enough"):
        interrupted_after(folder, count, every=1)
    assert_same(folder, uninterrupted, toy_training.train(folder, pause=0, resume=True))


def test_torn_and_foreign_lines_after_the_checkpoint_are_cut_off(
    tmp_path: Path, uninterrupted: tuple[bytes, dict[str, torch.Tensor]]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="enough"):
        interrupted_after(folder, 61)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 61, "rew')
    with open(folder / "timings.jsonl", "a") as file:
        file.write('{"step": 61')
    assert len(read_metrics(folder)) == 61, "readers leave a torn line out"
    assert_same(folder, uninterrupted, toy_training.train(folder, pause=0, resume=True))


def test_metrics_that_were_changed_are_kept_as_far_as_they_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with pytest.raises(RuntimeError, match="enough"):
        interrupted_after(folder, 61)
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:30]) + "rubbish\n" + "".join(lines[31:]))
    with Run(folder, engine=toy_training.ToyEngine(), resume=True) as run:
        run._load_newest()
    assert path.read_text() == "".join(lines[:30])
    assert "metrics.jsonl is not what the checkpoint of step 56 covers" in capsys.readouterr().out


def test_a_finished_run_resumed_does_nothing_and_a_longer_one_goes_on(tmp_path: Path) -> None:
    toy_training.train(tmp_path / "long", steps=40, pause=0)
    folder = tmp_path / "short"
    first = toy_training.train(folder, steps=25, pause=0)
    before = (folder / "metrics.jsonl").read_bytes()
    again = toy_training.train(folder, steps=25, pause=0, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert all(torch.equal(first[name], again[name]) for name in first)
    toy_training.train(folder, steps=40, pause=0, resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "long" / "metrics.jsonl").read_bytes()


def test_records_hold_no_clock_and_start_with_the_step(
    uninterrupted: tuple[bytes, dict[str, torch.Tensor]],
) -> None:
    lines = uninterrupted[0].splitlines()
    assert len(lines) == 170
    first, last = json.loads(lines[0]), json.loads(lines[-1])
    assert list(first) == ["step", "before_training", "loss"]
    assert list(last) == ["step", "loss", "reward", "moved", "cursor", "drawn", "phase"]
    assert last["step"] == 169
    assert last["phase"] == "late"
