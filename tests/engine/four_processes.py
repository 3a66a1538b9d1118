"""Checks that run in several processes of torch.distributed, started once for a test module."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 420  # seconds until processes that do not end are killed

# what is imported once, not in each process
PRELOAD = [
    "guerdon.engine.pipelines",
    "torch._dynamo",  # which the first optimiser imports
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "qwen2", "qwen3")),
]


class Answers:
    """What each rank found: ``answers["check"]`` is a list with one value a rank."""

    def __init__(self, ranks: list[dict[str, Any]]) -> None:
        self.ranks = ranks

    def __getitem__(self, check: str) -> list[Any]:
        found = [rank.get(check, f"rank {i} did not come to it") for i, rank in enumerate(self.ranks)]
        for answer in found:
            assert not isinstance(answer, str), answer
        return found


def run(checks: Callable[[], dict[str, Callable[[], Any]]], folder: Path, world: int = 4) -> Answers:
    """Run the checks one after the other in ``world`` processes that can talk to each other."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["guerdon.engine.pipelines"]
    )  # so that torch is imported once, not ``world`` times
    before = {name: os.environ.get(name) for name in ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    try:
        processes = [
            context.Process(target=_work, args=(checks, rank, world, str(folder)), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    files = [folder / f"{rank}.pt" for rank in range(world)]
    return Answers([torch.load(f, weights_only=False) if f.exists() else {} for f in files])


def _work(checks: Callable[[], dict[str, Callable[[], Any]]], rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=180),
    )
    answers: dict[str, Any] = {}
    for name, check in checks().items():
        try:
            answers[name] = check()
        except Exception:  # the other ranks are now out of step: nothing after this can be trusted
            answers[name] = f"rank {rank}, {name}:\n{traceback.format_exc()}"
            break
    torch.save(answers, f"{folder}/{rank}.pt")
    if not any(isinstance(answer, str) for answer in answers.values()):
        dist.barrier()
        dist.destroy_process_group()
