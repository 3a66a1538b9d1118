"""TensorBoard, wandb and trackio behind one small interface."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_training import ToyEngine

from guerdon.errors import UsageError
from guerdon.run import Run, read_config


def train(folder: Path, log: str, steps: int = 3, resume: bool = False) -> None:
    with Run(folder, engine=ToyEngine(), log=(log,), progress=False, resume=resume, config={"a": 1}) as run:
        for step in run.steps(steps):
            run.log(reward=0.5 * step, name="text", ratio=math.nan)
            if step == 1:
                run.save_image("picture", np.full((4, 5, 3), 7, dtype=np.uint8))


def test_tensorboard_files_are_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path / "run", "tensorboard")
    train(tmp_path / "run", "tensorboard", steps=5, resume=True)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [
        (0, 0.0),
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
    ]
    picture = events.Images("picture")[0]
    assert (picture.step, picture.height, picture.width) == (1, 4, 5)


class Recorder(types.ModuleType):
    """Stands for the modules ``wandb`` and ``trackio``, as far as they are used."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[Any, ...]] = []

    def init(self, **options: Any) -> Recorder:
        self.calls.append(("init", options))
        return self

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.calls.append(("log", step, metrics))

    def finish(self) -> None:
        self.calls.append(("finish",))

    def Image(self, array: np.ndarray) -> tuple[int, ...]:  # noqa: N802
        return array.shape


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_outside_loggers_get_metrics_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = Recorder(name)
    monkeypatch.setitem(sys.modules, name, module)
    train(tmp_path / "run", name)
    start, *logged, end = module.calls
    identity = read_config(tmp_path / "run")["id"]
    options = start[1]
    assert options["project"] == "guerdon"
    assert options["config"] == {"a": 1}
    assert options["resume"] == "allow"
    assert identity == options["id"] if name == "wandb" else identity[:6] in options["name"]
    assert logged == [
        ("log", 0, {"reward": 0.0, "name": "text"}),
        ("log", 1, {"picture": (4, 5, 3)}),
        ("log", 1, {"reward": 0.5, "name": "text"}),
        ("log", 2, {"reward": 1.0, "name": "text"}),
    ]
    assert end == ("finish",)
    module.calls.clear()
    train(tmp_path / "run", name, resume=True)
    assert module.calls[0][1] == options, "a resume continues the same run"


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [
        ("wandb", "wandb", "pip install wandb"),
        ("trackio", "trackio", "pip install trackio"),
        ("tensorboard", "torch.utils.tensorboard", r"pip install 'guerdon\[tensorboard\]'"),
    ],
)
def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, install: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=f"--log {name} needs the package {name}: {install}"):
        train(tmp_path / "run", name)


def test_an_unknown_logger_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no logger 'tensorbord'.*did you mean 'tensorboard'"):
        train(tmp_path / "run", "tensorbord")
