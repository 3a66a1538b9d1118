"""Every method of the catalog, its file as it is, logs the same figures on two workers as in one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from guerdon import catalog, launch
from guerdon.engine.ray import RayEngine
from guerdon.run.run import Run
from guerdon.tasks.base import Measured

# Their first records take half a minute, or hundreds of updates over which rounding grows. SAC is compared over forty
# updates in test_same_on_ray.py; DPA and A-LoL were by hand (1e-5, 1e-3); the others were only run.
LONG = {"sac", "td3", "mdpo_off", "sequence_sac", "a_lol", "dpa"}
METHODS = [s.slug for s in catalog.systems(status="ready") if s.cls is not None and s.slug not in LONG]
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo": {"lora_rank": 4},
    "grpo": {"lora_rank": 4, "kl": 0.1},
    "rlcm": {"samples": 8},
    "ddpo": {"samples": 8},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_logs_the_same_on_two_workers(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = RayEngine.__init__

    def with_processes(self: RayEngine, *args: Any, **settings: Any) -> None:
        begin(self, *args, **{**settings, "backend": "process"})  # they start faster than Ray's

    monkeypatch.setattr(RayEngine, "__init__", with_processes)
    monkeypatch.setattr(launch.Assembly, "measure", lambda self: Measured({}, None))
    monkeypatch.setattr(launch, "_finish", lambda *args: [])
    monkeypatch.setattr(Run, "_reached", lambda self, metrics: self._position.done >= 1)  # two records
    logged = []
    for engine in ("local", "ray"):
        result = launch.train(
            method,
            name=engine,
            runs=tmp_path,
            engine=engine,
            workers=2,
            threads=1,
            device="cpu",
            compile=False,
            progress=False,
            **OPTIONS.get(method, {}),
        )
        logged.append(launch.read_records(result.folder))
    local, remote = logged
    assert len(local) == len(remote) > 0
    for a, b in zip(local, remote, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            if isinstance(value, (int, float)):
                assert math.isclose(value, b[name], rel_tol=1e-3, abs_tol=3e-4), (name, value, b[name])
            else:
                assert value == b[name]
