"""One loop that trains any row in any column, and the grid of all of them: in parallel, and resumable."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Batch, Preferences
from guerdon.errors import GuerdonError
from guerdon.matrix.columns import COLUMNS, Column
from guerdon.matrix.rows import ROWS, Row, standardised
from guerdon.optim import Adam
from guerdon.randomness import mix
from guerdon.roles import Role, RoleSettings

MEASURE_SEED = 1_000_003  # of the answers on which success is measured, apart from training's
PARTS = 2  # updates a pass over a round's answers


def run_cell(row: Row, column: Column, seed: int = 0, shuffled: bool = False) -> dict[str, Any]:
    """Train ``row``'s objective on ``column``'s policy and measure what that brought.

    Args:
        seed: of the policy's weights and of all sampling.
        shuffled: the control: scores are dealt out to the answers of a round at random.

    Returns ``before`` and ``after``, the mean reward of fresh answers; ``spread``, its deviation before; ``curve``, the mean
    reward of each round; ``updates``, ``seconds``; ``error``, what stopped the training, if anything did.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        actor = Role("actor", column.policy(), RoleSettings(Adam(column.lr)))
    experience, feedback = column.experience(seed), column.feedback()
    generator = torch.Generator().manual_seed(seed)
    before, spread = measure(actor, column, feedback)
    curve: list[float] = []
    error = ""
    start = time.perf_counter()
    try:
        for _ in range(column.rounds):
            traj = experience.collect(actor, column.samples, group_size=column.group_size, **column.sampling)
            traj = traj.judged(feedback.score(traj))
            curve.append(traj.score().mean().item())
            if shuffled:
                traj = traj.judged(traj.score()[torch.randperm(len(traj), generator=generator)])
            batch = row.prepare(actor, standardised(traj))
            for _ in range(row.epochs):
                for part in whole_groups(batch, PARTS, generator):
                    actor.update(part, row.objective)
    except GuerdonError as problem:  # weights that are no numbers any more, for example: the cell has failed
        error = str(problem)
    seconds = time.perf_counter() - start
    after = before if error else measure(actor, column, feedback)[0]
    return {
        "before": before,
        "spread": spread,
        "after": after,
        "curve": [round(value, 4) for value in curve],
        "updates": actor.updates,
        "seconds": round(seconds, 2),
        "error": error,
    }


def measure(actor: Role, column: Column, feedback: Any) -> tuple[float, float]:
    """Mean and deviation of the reward of ``column.measured`` fresh answers, always from the same seeds."""
    traj = column.experience(MEASURE_SEED).collect(actor, column.measured, **column.sampling)
    score = traj.judged(feedback.score(traj)).score()
    return score.mean().item(), score.std().item()


def whole_groups(batch: Batch, parts: int, generator: torch.Generator) -> Iterator[Batch]:
    """The batch in ``parts`` that keep groups together, groups in random order; parts without a row are left out."""
    traj: Any = batch.chosen if isinstance(batch, Preferences) else batch
    group: Tensor = traj.group
    if not len(group):
        return
    places, index = group.unique(return_inverse=True)
    order = torch.randperm(len(places), generator=generator)
    part = torch.empty_like(order)
    part[order] = torch.arange(len(places)) * parts // len(places)
    for number in range(parts):
        rows = (part[index] == number).nonzero().squeeze(1)
        if len(rows):
            yield batch[rows]


# --- the grid ---------------------------------------------------------------------------------------------


def fingerprint(row: Row, column: Column) -> str:
    """What a cell's result depends on, in short: a result with another one is measured again."""
    settings = {
        "row": [repr(row.objective), row.prepare.__qualname__, row.epochs],
        "column": [
            column.problem, column.goal, column.rounds, column.samples, column.group_size, column.lr,
            column.measured, dict(column.sampling),
        ],
        "parts": PARTS,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def run_grid(
    rows: Sequence[str],
    columns: Sequence[str],
    seeds: Sequence[int],
    store: Path,
    jobs: int = 1,
    plugins: Sequence[str] = (),
    report: Callable[[dict[str, Any], int, int], None] = lambda record, done, total: None,
) -> list[dict[str, Any]]:
    """Every cell that makes sense, with its control, over ``seeds``: what ``store`` does not hold yet is measured and added.

    Args:
        store: a file of JSON lines, one for each measured cell, arm and seed.
        jobs: processes side by side, each on one thread; 1 stays in this process.
        plugins: files that register rows and columns, imported by each process.
        report: called with each new record, how many are done and how many there are.

    Returns the records: row, column, seed, arm ("trained" or "control") and what `run_cell` gives.
    """
    wanted = {
        (row, column, seed, arm): fingerprint(ROWS[row], COLUMNS[column])
        for seed in seeds
        for column in columns
        for row in rows
        if not ROWS[row].senseless(COLUMNS[column])
        for arm in ("trained", "control")
    }
    held = {key: record for key, record in read_store(store).items() if wanted.get(key) == record["settings"]}
    missing = [key for key in wanted if key not in held]
    store.parent.mkdir(parents=True, exist_ok=True)
    done = len(held)
    with store.open("a+b") as kept:  # a line that was cut off must not swallow the next one
        if kept.tell() and (kept.seek(-1, 2), kept.read(1))[1] != b"\n":
            kept.write(b"\n")
    with store.open("a", encoding="utf-8") as file:
        for record in _measured(missing, jobs, plugins):
            record["settings"] = wanted[_key(record)]
            file.write(json.dumps(record) + "\n")
            file.flush()
            held[_key(record)] = record
            done += 1
            report(record, done, len(wanted))
    return [held[key] for key in wanted]


def read_store(store: Path) -> dict[tuple[str, str, int, str], dict[str, Any]]:
    """What was measured so far; of several records of a cell the last one. A line that was cut off is passed over."""
    found = {}
    for line in store.read_text(encoding="utf-8").splitlines() if store.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found[_key(record)] = record
    return found


def _key(record: dict[str, Any]) -> tuple[str, str, int, str]:
    return record["row"], record["column"], record["seed"], record["arm"]


def _measured(
    missing: Sequence[tuple[str, str, int, str]], jobs: int, plugins: Sequence[str]
) -> Iterator[dict[str, Any]]:
    if jobs == 1 or len(missing) < 2:
        threads = torch.get_num_threads()
        try:
            _prepare(plugins)
            yield from map(_one, missing)
        finally:
            torch.set_num_threads(threads)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _prepare, (plugins, os.getpid())) as pool:
        for future in as_completed([pool.submit(_one, key) for key in missing]):
            yield future.result()


def _prepare(plugins: Sequence[str], parent: int | None = None) -> None:
    torch.set_num_threads(1)  # in this process too: the same figures however many run side by side
    if parent is not None:
        threading.Thread(target=_leave_with, args=(parent,), daemon=True).start()
    for path in plugins:
        load_plugin(path)


def _leave_with(parent: int) -> None:
    """End this process when the one that started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def load_plugin(path: str) -> None:
    """Import a file that registers rows or columns."""
    import importlib.util
    import sys

    name = f"guerdon_matrix_plugin_{mix(*path.encode()):x}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _one(key: tuple[str, str, int, str]) -> dict[str, Any]:
    row, column, seed, arm = key
    found = run_cell(ROWS[row], COLUMNS[column], seed, shuffled=arm == "control")
    return {"row": row, "column": column, "seed": seed, "arm": arm, **found}
