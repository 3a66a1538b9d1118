"""``guerdon reproduce``: arms side by side over seeds, thresholds fixed in the experiment's file, a table, a
picture, ``results/SLUG.json``, and an exit status.

An experiment is a module of this package with

    TITLE, CLAIM   what the paper says, in a sentence
    SEEDS          how many seeds it takes by default
    THRESHOLDS     name -> number, written before the runs that count
    NOTES          how the thresholds and settings were found
    ARMS           name -> function(seed, folder) -> dict of figures (JSON values)
    judge(results) -> list of `Check`; ``results[arm][seed]`` are the figures
    table(results) -> rows of texts, the first one the header
    draw(results, path)  the picture
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guerdon import catalog
from guerdon.errors import UsageError
from guerdon.run.records import format_table, machine

Results = dict[str, dict[int, dict[str, Any]]]


@dataclass(frozen=True)
class Check:
    """One statement that can fail: ``value`` against ``threshold``."""

    name: str
    value: float
    sense: str  # ">=" or "<="
    threshold: float
    seed: int | None = None

    @property
    def passed(self) -> bool:
        """Whether the statement holds; a NaN does not."""
        return self.value >= self.threshold if self.sense == ">=" else self.value <= self.threshold

    def __str__(self) -> str:
        where = f" (seed {self.seed})" if self.seed is not None else ""
        return f"{'holds' if self.passed else 'FAILS':<6} {self.name}{where}: {self.value:.3g} {self.sense} {self.threshold:g}"


def find(slug: str) -> Any:
    """The experiment's module. Raises `UsageError` when the system has none."""
    slug = catalog.find(slug).slug
    name = f"guerdon.reproductions.{slug}"
    if importlib.util.find_spec(name) is None:
        raise UsageError(f"'{slug}' has no reproduction yet")
    return importlib.import_module(name)


def main(slug: str, options: Any) -> int:
    """Run what is missing of an experiment, judge it, write the results. Returns 0 if the claim holds, else 1."""
    experiment = find(slug)
    slug = catalog.find(slug).slug
    count = options.seeds if options.seeds is not None else experiment.SEEDS
    if count < 1:
        raise UsageError(f"--seeds {count}: at least one")
    seeds = list(range(options.first_seed, options.first_seed + count))
    wanted = [arm.strip() for arm in options.arms.split(",") if arm.strip()] or list(experiment.ARMS)
    for arm in wanted:
        if arm not in experiment.ARMS:
            raise UsageError(f"no arm '{arm}'; arms: {', '.join(experiment.ARMS)}")
    scratch = Path("runs") / "reproduce" / slug
    scratch.mkdir(parents=True, exist_ok=True)
    partial = scratch / "partial.json"
    results: Results = {} if options.fresh else _read(partial)
    print(f"{experiment.TITLE}\n{experiment.CLAIM}\n")
    start = time.perf_counter()
    for seed in seeds:
        for arm in wanted:
            if seed in results.get(arm, {}):
                continue
            began = time.perf_counter()
            print(f"seed {seed}, {arm} ...", end=" ", flush=True)
            figures = experiment.ARMS[arm](seed, scratch / f"{arm}-{seed}")
            figures["wall_seconds"] = round(time.perf_counter() - began, 1)
            results.setdefault(arm, {})[seed] = figures
            partial.write_text(json.dumps(results), encoding="utf-8")
            print(f"{figures['wall_seconds']:.0f} s", flush=True)
    chosen = {arm: {s: f for s, f in by_seed.items() if s in seeds} for arm, by_seed in results.items()}
    chosen = {arm: by_seed for arm, by_seed in chosen.items() if by_seed}
    checks: list[Check] = experiment.judge(chosen)
    table = format_table(experiment.table(chosen))
    print(f"\n{table}\n")
    for check in checks:
        print(check)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / f"{slug}.png"
    experiment.draw(chosen, picture)
    holds = all(check.passed for check in checks) and bool(checks)
    record = {
        "system": slug,
        "claim": experiment.CLAIM,
        "holds": holds,
        "complete": set(chosen) == set(experiment.ARMS)
        and all(len(v) == len(seeds) for v in chosen.values()),
        "seeds": seeds,
        "thresholds": dict(experiment.THRESHOLDS),
        "notes": experiment.NOTES,
        "checks": [asdict(check) | {"passed": check.passed} for check in checks],
        "table": experiment.table(chosen),
        "results": chosen,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d"),
    }
    path = out / f"{slug}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{'the claim holds' if holds else 'the claim does NOT hold as stated'}; {path}, {picture}")
    return 0 if holds else 1


def _read(path: Path) -> Results:
    try:
        saved: Mapping[str, Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return {}
    print(f"continuing from {path} (--fresh starts over)", file=sys.stderr)
    return {arm: {int(seed): figures for seed, figures in by_seed.items()} for arm, by_seed in saved.items()}
