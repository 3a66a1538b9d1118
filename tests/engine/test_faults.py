"""Workers that die or hang, a full object store, a controller that is killed: a run goes on, or stops at once with the name
of the worker and resumes from its checkpoint."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon import launch
from guerdon.engine.ray import RayEngine
from guerdon.engine.workers import WorkerError
from guerdon.tasks.base import Measured

pytest.importorskip("ray")
pytestmark = pytest.mark.usefixtures("ray_cluster")

TINY: dict[str, Any] = {
    "method": "grpo",
    "task": "enumlm",
    "rounds": 5,
    "prompts_per_round": 2,
    "group_size": 4,
    "minibatch": 8,
    "lr": 1e-3,
    "engine": "ray",
    "threads": 1,
    "device": "cpu",
    "progress": False,
    "checkpoint_steps": 1,
}


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[RayEngine]:
    """The engines that runs make; they lose patience after four seconds, and nothing is measured before and after."""
    made: list[RayEngine] = []
    begin = RayEngine.__init__

    def watched(self: RayEngine, *args: Any, **settings: Any) -> None:
        begin(self, *args, **{**settings, "patience": 4.0})
        made.append(self)

    monkeypatch.setattr(RayEngine, "__init__", watched)
    monkeypatch.setattr(launch.Assembly, "measure", lambda self: Measured({}, None))
    return made


def letters(texts: list[str]) -> list[float]:
    """A reward of answers: their share of the first letter."""
    return [text.count(text[:1]) / max(1, len(text)) for text in texts]


def at_round(number: int, act: Callable[[], None]) -> Callable[..., list[float]]:
    """The reward, which does something else as well when it is asked for the ``number``-th time."""
    asked = 0

    def judge(texts: list[str]) -> list[float]:
        nonlocal asked
        asked += 1
        if asked == number:
            act()
        return letters(texts)

    return judge


def records(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in r.items() if isinstance(v, (int, float))} for r in launch.read_records(folder)]


def assert_same(a: list[dict[str, float]], b: list[dict[str, float]]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            assert math.isclose(x[name], y[name], rel_tol=1e-3, abs_tol=1e-4), (name, x[name], y[name])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    """What a run logs to which nothing happens (in one process: the numbers are the same)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch.Assembly, "measure", lambda self: Measured({}, None))
        result = launch.train(**{**TINY, "engine": "local"}, runs=folder, reward=letters)
    return records(result.folder)


@pytest.mark.parametrize(("number", "what"), [(signal.SIGKILL, "died"), (signal.SIGSTOP, "has not answered")])
def test_a_trainer_that_is_gone_or_hangs_stops_the_run_which_resumes(
    number: int,
    what: str,
    tmp_path: Path,
    engines: list[RayEngine],
    undisturbed: list[dict[str, float]],
) -> None:
    began: list[float] = []

    def strike() -> None:
        (group,) = engines[0]._groups.values()
        os.kill(group.places[1].pid, number)
        began.append(time.monotonic())

    with pytest.raises(WorkerError, match=rf"worker 1 of 'all' \(process \d+ on .*\) {what}"):
        launch.train(**TINY, name="run", runs=tmp_path, workers=2, reward=at_round(3, strike))
    assert time.monotonic() - began[0] < 20
    assert len(records(tmp_path / "run")) == 2
    launch.resume(tmp_path / "run", progress=False, reward=letters)
    assert_same(records(tmp_path / "run"), undisturbed)


def test_generators_that_are_gone_are_replaced_and_answer_again(
    tmp_path: Path,
    engines: list[RayEngine],
    undisturbed: list[dict[str, float]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(
        json.dumps(
            {
                "pools": {"train": 1, "make": 1},
                "mapping": {"actor": "train", "reference": "train", "generator": "make"},
            }
        )
    )
    seen: list[str] = []

    def strike() -> None:
        engines[0].note = seen.append
        os.kill(engines[0]._groups["make"].places[0].pid, signal.SIGKILL)

    result = launch.train(**TINY, name="run", runs=tmp_path, placement=str(plan), reward=at_round(2, strike))
    assert_same(records(result.folder), undisturbed)
    assert any("worker 0 of 'make'" in text and "replaced" in text for text in seen)


def test_a_full_object_store_spills_to_the_disk(ray_cluster: None) -> None:
    from probes import Probe

    from guerdon.engine.pools import ResourcePool
    from guerdon.engine.workers import WorkerGroup

    with WorkerGroup(ResourcePool([1]), Probe, backend="ray") as group:
        # four times what the store holds (see the fixture), all of it still wanted
        held = [group.call("zeros", 40_000_000, blocking=False) for _ in range(20)]
        assert all(float(future.get()[0].sum()) == 0 for future in held)


RUN = """
import sys
from guerdon import launch
sys.path.insert(0, {tests!r})
from test_faults import TINY, letters
import time
def slow(texts):
    time.sleep(0.5)
    return letters(texts)
launch.train(**TINY, name="run", runs={runs!r}, workers=2, reward=slow)
"""


def of_run(marker: str) -> Iterator[int]:
    """Processes whose environment holds the marker."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if marker.encode() in (folder / "environ").read_bytes():
                    yield int(folder.name)
            except OSError:
                continue


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for processes in /proc")
def test_nothing_is_left_of_a_run_whose_controller_is_killed(
    tmp_path: Path, undisturbed: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = f"GUERDON_TEST_MARKER={os.getpid()}-{time.monotonic_ns()}"
    name, value = marker.split("=")
    code = RUN.format(tests=str(Path(__file__).parent), runs=str(tmp_path))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, name: value},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180
    while len(records(tmp_path / "run")) < 2:
        assert process.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(list(of_run(marker))) > 2  # the controller and its workers
    process.kill()
    process.wait()
    deadline = time.monotonic() + 30
    while left := list(of_run(marker)):
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.2)
    monkeypatch.setattr(launch.Assembly, "measure", lambda self: Measured({}, None))
    launch.resume(tmp_path / "run", progress=False, reward=letters)
    assert_same(records(tmp_path / "run"), undisturbed)
    assert torch.get_num_threads() >= 1
