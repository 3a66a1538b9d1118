"""A killed and resumed RLCM run ends as the uninterrupted one, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from guerdon import launch
from guerdon.run import checkpoint
from guerdon.tasks.shapes.task import Shapes

SCRIPT = Path(__file__).parent / "killed_training.py"


@pytest.mark.timeout(400)
def test_ten_kills_two_of_them_inside_a_checkpoint_write(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "11", "10"],
        capture_output=True,
        text=True,
        timeout=380,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(found["moments"]) == 10
    assert found["moments"].count("in a checkpoint") == 2
    assert found["records"] == 24
    assert all(found["same"].values()), found


def _small_run(runs: Path, rounds: int = 4) -> Path:
    launch.train(
        "rlcm",
        "shapes",
        name="small",
        runs=runs,
        rounds=rounds,
        samples=8,
        steps=2,
        model=str(Shapes.fixtures / "consistency"),
        threads=1,
        checkpoint_steps=1,
        progress=False,
    )
    return runs / "small"


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(tmp_path: Path, damage: str) -> None:
    folder = _small_run(tmp_path)
    metrics = (folder / "metrics.jsonl").read_bytes()
    model = (folder / "model" / "model.safetensors").read_bytes()
    newest = sorted((folder / "checkpoints").iterdir())[-1] / "state.pt"
    data = bytearray(newest.read_bytes())
    if damage == "truncated":
        del data[len(data) // 2 :]
    else:
        data[len(data) // 2] ^= 0xFF
    newest.write_bytes(bytes(data))
    with pytest.warns(RuntimeWarning, match="skipped damaged checkpoint step_00000004"):
        launch.resume(folder, progress=False)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert (folder / "model" / "model.safetensors").read_bytes() == model
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load_newest(folder)[0] == 4
