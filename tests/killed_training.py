"""Run by test_kill_resume.py: trains RLCM in forked children, kills them, resumes them, compares.

Usage: killed_training.py FOLDER SEED KILLS. Prints one JSON object.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

torch.set_num_threads(1)

from guerdon import launch  # noqa: E402
from guerdon.run import checkpoint  # noqa: E402
from guerdon.tasks.shapes.task import Shapes  # noqa: E402

ROUNDS = 24
# a model given by path is measured on few samples, which keeps the children short
SETTINGS = {
    "rounds": ROUNDS,
    "samples": 8,
    "steps": 3,
    "update_batch": 4,
    "kl": 0.2,
    "model": str(Shapes.fixtures / "consistency"),
    "threads": 1,
    "checkpoint_steps": 2,
    "progress": False,
}


def fork(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
    return pid


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(runs: Path, name: str) -> None:
    launch.train("rlcm", "shapes", name=name, runs=runs, seed=3, **SETTINGS)


def stuck_in_write(marker: Path, number: int, work: Callable[[], None]) -> Callable[[], None]:
    """``work`` whose ``number``-th checkpoint stops half-way, with the state written and no manifest."""
    genuine = checkpoint.write_synced
    calls = 0

    def slow(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == number:
            marker.touch()
            time.sleep(60)
        return genuine(*args, **kwargs)

    def run() -> None:
        checkpoint.write_synced = slow
        work()

    return run


def begin_or_resume(runs: Path, name: str) -> Callable[[], None]:
    folder = runs / name
    if (folder / "config.json").exists():
        return lambda: launch.resume(folder, progress=False) and None
    return lambda: train(runs, name)


def main() -> None:
    runs, seed, kills = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    chance = random.Random(seed)
    start = time.monotonic()
    assert wait(fork(lambda: train(runs, "whole"))) == 0
    duration = time.monotonic() - start
    moments = []
    for kill in range(kills):
        work = begin_or_resume(runs, "killed")
        if kill in (1, 3):
            marker = runs / f"marker-{kill}"
            pid = fork(stuck_in_write(marker, 2, work))
            while not marker.exists():
                if os.waitpid(pid, os.WNOHANG)[0]:
                    raise SystemExit("the child ended before its checkpoint")
                time.sleep(0.01)
            moments.append("in a checkpoint")
        else:
            pid = fork(work)
            # short of a whole run, so that each resume finds something left to do
            delay = chance.uniform(0.05, 0.35) * duration
            time.sleep(delay)
            moments.append(f"{delay:.2f} s")
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    assert wait(fork(begin_or_resume(runs, "killed"))) == 0
    same = {}
    for name in ("metrics.jsonl", "model/model.safetensors"):
        same[name] = (runs / "whole" / name).read_bytes() == (runs / "killed" / name).read_bytes()
    whole, killed = (checkpoint.load_newest(runs / n)[1] for n in ("whole", "killed"))
    weights = [w["objects"]["actor"]["weights"] for w in (whole, killed)]
    same["weights"] = all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    same["statistics"] = repr(whole["objects"]["statistics"]) == repr(killed["objects"]["statistics"])
    lines = (runs / "killed" / "metrics.jsonl").read_text().count("\n")
    print(json.dumps({"same": same, "moments": moments, "records": lines, "seconds": duration}))


if __name__ == "__main__":
    main()
