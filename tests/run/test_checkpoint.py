"""Checkpoints: what may be saved, what is kept, and disks that are full."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_training
from torch import nn

from guerdon.errors import CheckpointError, StorageError, UsageError
from guerdon.run import Run, checkpoint


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimiser.step()
    payload = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "plain": [1, 2.5, "text é", None, True, b"bytes", (1, {2, 3}), OrderedDict(a=1), {(1, 2): 2**70}],
        "half": torch.ones(2, dtype=torch.bfloat16),
        "dtype": torch.float32,
    }
    path = checkpoint.save(tmp_path, 42, payload, keep=1)
    assert path == tmp_path / "checkpoints" / "step_00000042"
    found = checkpoint.load_newest(tmp_path)
    assert found is not None
    step, loaded = found
    assert step == 42
    assert loaded["plain"] == payload["plain"]
    assert loaded["dtype"] is torch.float32
    for name, value in payload["model"].items():
        assert torch.equal(loaded["model"][name], value)
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(loaded["optimiser"])


def test_the_newest_are_kept_and_later_ones_are_dropped(tmp_path: Path) -> None:
    for step in (0, 1, 5, 9):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert names(tmp_path) == ["step_00000005", "step_00000009"]
    # a resume from step 5 (9 was damaged) makes 9 the past of nobody
    checkpoint.save(tmp_path, 7, {"step": 7}, keep=1)
    assert names(tmp_path) == ["step_00000007"]
    checkpoint.save(tmp_path, 7, {"step": "again"}, keep=1)
    assert checkpoint.load_newest(tmp_path) == (7, {"step": "again"})
    assert names(tmp_path) == ["step_00000007"]


def test_what_a_kill_left_is_removed_at_the_start(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, {"x": 1})
    stale = tmp_path / "checkpoints" / ".tmp-step_00000004-123"
    stale.mkdir()
    (stale / "state.pt").write_bytes(b"half")
    assert checkpoint.load_newest(tmp_path) == (3, {"x": 1})
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["step_00000003"]


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_waiting_for_the_disk: Any
) -> None:
    order = []
    rename = os.rename

    def fsync(handle: int) -> None:
        order.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        no_waiting_for_the_disk(handle)

    def renamed(old: Any, new: Any) -> None:
        order.append("renamed")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    checkpoint.save(tmp_path, 1, {"x": 1})
    temporary = f".tmp-step_00000001-{os.getpid()}"
    assert order == ["state.pt", "manifest.json", temporary, "renamed", "checkpoints"]


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"replay": {"priorities": np.zeros(3)}}, "objects.replay.priorities, a numpy.ndarray"),
        ({"x": [1, np.float64(2)]}, r"objects.x\[1\], a numpy.float64"),
        ({"queue": deque([1])}, "objects.queue, a deque"),
        ({"cursor": toy_training.Cursor()}, "objects.cursor, a toy_training.Cursor"),
        ({np.int64(3): 1}, "key .* is a numpy.int64"),
    ],
)
def test_what_could_not_be_read_back_is_refused(tmp_path: Path, value: Any, where: str) -> None:
    with pytest.raises(UsageError, match=where):
        checkpoint.save(tmp_path, 1, {"objects": value})
    assert checkpoint.load_newest(tmp_path) is None


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    path = checkpoint.save(tmp_path, 1, {"x": 1})
    torch.save({"x": Evil()}, path / "state.pt")
    manifest = path / "manifest.json"
    import hashlib
    import json

    data = (path / "state.pt").read_bytes()
    changed = json.loads(manifest.read_text()) | {
        "sha256": hashlib.sha256(data).hexdigest(),
        "size": len(data),
    }
    manifest.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match="step_00000001"):
        checkpoint.load_newest(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_only_damaged_checkpoints_are_an_error(tmp_path: Path) -> None:
    for step in (1, 2):
        (checkpoint.save(tmp_path, step, {"x": 1}) / "state.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of .* step_00000002 .* step_00000001 .*; restore"
    ):
        checkpoint.load_newest(tmp_path)


def test_a_later_format_is_an_error_not_damage(tmp_path: Path) -> None:
    manifest = checkpoint.save(tmp_path, 1, {"x": 1}) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(CheckpointError, match="format 9"):
        checkpoint.load_newest(tmp_path)


def test_saving_is_quick(tmp_path: Path) -> None:
    payload = {"weights": [torch.randn(250_000) for _ in range(3)]}  # 3 MB
    times = []
    for step in range(9):
        start = time.perf_counter()
        checkpoint.save(tmp_path, step, payload)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


# --- full disks -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_stops_the_run_and_leaves_the_checkpoints(small_disk: Path) -> None:
    folder, done = small_disk / "run", 0

    def train() -> None:
        nonlocal done
        with Run(folder, engine=toy_training.ToyEngine(), checkpoint_steps=1, keep=9, progress=False) as run:
            run.state["x"] = torch.zeros(60_000)  # 240 kB
            for step in run.steps(9):
                run.log(number=step)
                done += 1

    with pytest.raises(
        StorageError, match=r"step_0000000\d could not be written: the disk is full .*free some"
    ):
        train()
    assert 2 <= done <= 4
    assert names(folder) == [f"step_{step:08d}" for step in range(done)], "no temporary is left"
    found = checkpoint.load_newest(folder)
    assert found is not None
    assert found[0] == done - 1


def test_a_full_disk_is_found_before_training(small_disk: Path) -> None:
    begun = False

    def train() -> None:
        nonlocal begun
        with Run(small_disk / "run", engine=toy_training.ToyEngine(), progress=False) as run:
            run.state["x"] = torch.zeros(500_000)
            for _ in run.steps(3):
                begun = True

    with pytest.raises(StorageError, match="the disk is full"):
        train()
    assert not begun


def test_metrics_that_do_not_fit_leave_no_torn_line(small_disk: Path) -> None:
    folder = small_disk / "run"

    def train() -> None:
        with Run(folder, engine=toy_training.ToyEngine(), progress=False, checkpoint_every=1e9) as run:
            for step in run.steps(3):
                run.log(text="x" * 700_000 if step else "small")
                if step == 1:
                    (small_disk / "filler").write_bytes(b"0" * 600_000)

    with pytest.raises(StorageError, match=r"metrics.jsonl could not be written: the disk is full"):
        train()
    assert (folder / "metrics.jsonl").read_text() == '{"step": 0, "text": "small"}\n'


def test_a_limit_of_file_sizes_is_a_storage_error(tmp_path: Path) -> None:
    result = tmp_path / "result"
    process = toy_training.processes().Process(
        target=toy_training.too_large, args=(tmp_path, 100_000, result)
    )
    process.start()
    process.join(60)
    assert (
        "step_00000002 could not be written: the file is larger than this system allows" in result.read_text()
    )
    assert names(tmp_path) == ["step_00000001"]
    assert checkpoint.load_newest(tmp_path) is not None


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(StorageError, match="file/run could not be written"),
        Run(tmp_path / "file" / "run", engine=toy_training.ToyEngine()),
    ):
        pass


def test_a_forbidden_folder_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint.os, "rename", refuse)
    with pytest.raises(StorageError, match=r"permission denied; change the folder's permissions"):
        checkpoint.save(tmp_path, 1, {"x": 1})
