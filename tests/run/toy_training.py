"""A toy training that uses every random state there is, run in processes of their own and killed there."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.run import Interrupted, Run, checkpoint


class ToyRole:
    """A linear model and its optimiser behind the verbs that a run needs."""

    def __init__(self, model: nn.Module, learning_rate: float | None = 0.02) -> None:
        self.model = model
        self.optimiser = torch.optim.Adam(model.parameters(), lr=learning_rate) if learning_rate else None

    def update(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        assert self.optimiser is not None
        loss = (self.model(x) - y).square().mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return {"loss": loss.detach()}

    def copy(self, frozen: bool = True) -> ToyRole:
        return ToyRole(copy.deepcopy(self.model).requires_grad_(not frozen), None if frozen else 0.02)

    def follow(self, other: ToyRole, tau: float) -> None:
        with torch.no_grad():
            for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
                mine.lerp_(theirs, tau)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimiser": None if self.optimiser is None else self.optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.optimiser is not None:
            self.optimiser.load_state_dict(state["optimiser"])


class ToyEngine:
    def role(self, name: str, model: nn.Module, optimiser: Any = None, **settings: Any) -> ToyRole:
        return ToyRole(model, (optimiser or 0.02) if settings.get("trained", True) else None)

    def describe(self) -> dict[str, Any]:
        return {"kind": "toy"}


class Cursor:
    """Where a data set is being read."""

    def __init__(self) -> None:
        self.position = 0

    def next(self, size: int) -> int:
        self.position = (self.position + 7) % size
        return self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def train(
    folder: str | Path, steps: int = 150, pause: float = 0.003, resume: bool = False, **options: Any
) -> dict[str, Tensor]:
    """Two loops: a "critic" of 20 steps, then an actor for ``steps``. Returns all weights."""
    torch.set_num_threads(1)
    with Run(folder, engine=ToyEngine(), seed=3, progress=False, resume=resume, **options) as run:
        actor = run.role("actor", nn.Linear(4, 1))
        critic = run.role("critic", nn.Linear(4, 1))
        target = run.adopt("target", critic.copy())
        reference = actor.copy(frozen=True)  # of the initial weights; not registered
        cursor = run.track("cursor", Cursor())
        data = torch.randn(64, 4)  # made anew, from the seed, before the checkpoint is restored
        run.log(before_training=float(data.sum()))
        for _step in run.steps(20, what="pass"):
            x = data[torch.randint(64, (8,), generator=run.generator)]
            run.step(critic.update(x, x.sum(1, keepdim=True)))
            target.follow(critic, 0.1)
            time.sleep(pause)
        judge = run.adopt("judge", critic.copy())  # registered between the loops
        run.log(between_loops=float(next(iter(critic.model.parameters())).detach().sum()))
        run.state["drawn"] = torch.zeros(3)
        for step in run.steps(steps, what="round"):
            order = torch.randperm(64, generator=run.generator)
            for rows in order.split(16)[: 1 + random.randrange(3)]:
                x = data[rows] + 0.01 * torch.randn(len(rows), 4)
                run.step(actor.update(x, judge.model(x).detach()))
            run.state["drawn"] = run.state["drawn"] + torch.tensor(np.random.rand(3), dtype=torch.float32)
            run.log(
                reward=-(actor.model.weight - judge.model.weight).square().sum(),
                moved=(actor.model.weight - reference.model.weight).norm(),
                cursor=cursor.next(64),
                drawn=run.state["drawn"].sum(),
                phase="late" if step > 50 else "early",
            )
            time.sleep(pause)
        return {
            **{f"actor.{k}": v.clone() for k, v in actor.model.state_dict().items()},
            **{f"target.{k}": v.clone() for k, v in target.model.state_dict().items()},
            **{f"judge.{k}": v.clone() for k, v in judge.model.state_dict().items()},
            "drawn": run.state["drawn"],
            "generator": run.generator.get_state(),
            "global": torch.get_rng_state(),
        }


def stall(where: str, marker: Path, saves: int) -> None:
    """Make the ``saves``-th checkpoint of this process stop half-way for ever, and say so in ``marker``."""
    count = 0

    def stop() -> None:
        marker.touch()
        time.sleep(3600)

    save, write = checkpoint.save, checkpoint._HashingWriter.write
    rename, synced = os.rename, checkpoint.write_synced

    def counting_save(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        return save(*arguments, **options)

    def half_written(self: Any, data: bytes) -> int:
        if count == saves and where == "state" and self.size:
            self.file.flush()
            stop()
        return write(self, data)

    def manifest(path: Path, text: str) -> None:
        if count == saves and where == "manifest":
            stop()
        synced(path, text)

    def renamed(old: Any, new: Any) -> None:
        rename(old, new)
        if count == saves and where == "renamed":
            stop()

    checkpoint.save = counting_save
    checkpoint._HashingWriter.write = half_written  # type: ignore[method-assign]
    checkpoint.write_synced = manifest
    checkpoint.os.rename = renamed  # type: ignore[attr-defined]


def processes() -> Any:
    """Processes that start with torch imported: in milliseconds rather than seconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "numpy", "guerdon.run"])
    return context


def life(
    folder: Path, resume: bool, options: dict[str, Any], stalling: tuple[str, Path, int] | None = None
) -> None:
    """One process of the training, until it ends or is killed; exits as the command line does."""
    os.fsync = lambda handle: None  # guards against power cuts, not kills, and is slow on a busy disk
    if stalling:
        stall(*stalling)
    try:
        train(folder, resume=resume, **options)
    except Interrupted as error:
        sys.exit(error.exit_status)


def long_steps(folder: Path, marker: Path) -> None:
    """A training whose second step takes for ever."""
    try:
        with Run(folder, engine=ToyEngine(), progress=False) as run:
            run.role("actor", nn.Linear(4, 1))
            for step in run.steps(3):
                run.log(number=step)
                if step == 1:
                    marker.touch()
                    while True:
                        time.sleep(0.01)
    except Interrupted as error:
        sys.exit(error.exit_status)


def too_large(folder: Path, limit: int, result: Path) -> None:
    """Save a large state under a limit of file sizes; the message of the error goes to ``result``."""
    import resource

    from guerdon.errors import StorageError

    checkpoint.save(folder, 1, {"x": torch.zeros(10)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        checkpoint.save(folder, 2, {"x": torch.zeros(limit)})
    except StorageError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        result.write_text(str(error))
