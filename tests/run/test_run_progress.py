"""What a user sees while a run is going on."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console
from toy_training import ToyEngine

from guerdon.run import Run
from guerdon.run.progress import Bar, Lines, _State, clock


def train(folder: Path, resume: bool = False, steps: int = 4, progress: bool = True) -> None:
    with Run(folder, engine=ToyEngine(), progress=progress, resume=resume) as run:
        for step in run.steps(steps, what="round"):
            run.log(reward=0.25 * (step + 1))
            if step == 1:
                run.note("a remark")


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run")
    first, remark, last = capsys.readouterr().out.splitlines()
    assert first.startswith("round 1/4 (25%)  ")
    assert "ETA 0:0" in first
    assert first.endswith("reward 0.25 -> 0.25")
    assert remark == "a remark"
    assert last.startswith("round 4/4 (100%)")
    assert last.endswith("ETA 0:00  reward 0.25 -> 1")
    train(tmp_path / "run", resume=True, steps=6)
    resumed = capsys.readouterr().out.splitlines()
    assert resumed[0] == f"continuing {tmp_path / 'run'} at round 4 of 6"
    assert resumed[-1].endswith("reward 0.25 -> 1.5"), "the first value is that before the resume"


def test_progress_can_be_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path / "run", progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_bar_shows_rate_eta_step_and_headline() -> None:
    text = io.StringIO()
    state = _State(10, "round", 0, "reward", None)
    bar = Bar(state, Console(file=text, force_terminal=True, width=140))
    state.samples[0] = (state.samples[0][0] - 1.0, 0)  # a second ago
    for done in (1, 2, 3, 4, 5):
        bar.advance(done, {"reward": done / 10})
    bar.note("[not markup]")
    bar.close()
    shown = text.getvalue()
    for part in ("rounds", "5/10", "rounds/s", "ETA 0:01", "reward 0.1 → 0.5", "[not markup]"):
        assert part in shown


def test_a_reader_that_goes_away_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    lines = Lines(_State(3, "step", 0, "reward", None), every=0.0)
    monkeypatch.setattr(sys, "stdout", Closed())
    lines.advance(1, {})
    lines.note("x")
    lines.close()


def test_slow_steps_are_shown_as_seconds_a_step() -> None:
    state = _State(4, "epoch", 0, "reward", None)
    state.samples[0] = (state.samples[0][0] - 20.0, 0)
    state.advance(2, {"reward": "text"})
    assert state.rate_text() == "10 s/epoch"
    assert state.eta_text() == "ETA 0:20"
    assert state.headline_text("->") == ""


def test_clock() -> None:
    assert [clock(x) for x in (0.2, 59.6, 750.0, 11100.0)] == ["0:00", "1:00", "12:30", "3:05:00"]
