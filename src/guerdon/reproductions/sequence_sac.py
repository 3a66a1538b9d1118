"""SequenceSAC on Pendulum: one observation, many actions. Return against the length of the action sequences, beside
SAC trained at two decision frequencies, SequenceSAC's ablations, and a planner with the same model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guerdon import compiled
from guerdon.dynamics.one_step import Shooting
from guerdon.engine.local import LocalEngine
from guerdon.evaluation.frequency import LENGTHS, return_by_length, score_of
from guerdon.experience.action_repeat import make_repeating
from guerdon.experience.rollouts import Rollouts
from guerdon.methods.online.sac import SAC
from guerdon.methods.online.sequence_sac import SequenceSAC
from guerdon.reproductions.runner import Check, Results
from guerdon.roles import Role
from guerdon.run import Run
from guerdon.run.checkpoint import load_newest
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import Control

TITLE = "SequenceSAC: sequences of actions from one observation (Patel and Siegelmann, 2025)"
CLAIM = (
    "An actor that decides once for several steps, trained with a critic and a model of single steps, keeps its return "
    "at decision frequencies where SAC, and SAC trained with repeated actions, lose theirs."
)
SEEDS = 3
# Fixed before the seeds that count were run.
THRESHOLDS = {
    "frequency-averaged score, J = 8": 0.55,
    "score, J = 8 over SAC-1": 0.08,
    "score, J = 8 over SAC-4": 0.08,
    "score, J = 8 over no recall": 0.05,
    "return when deciding every step, J = 8": -300.0,
    "actor updates of J = 8, times J, over critic updates": 1.0,
}
NOTES = "See docs/results.md for how settings and thresholds were found."
ENV = "Pendulum-v1"
STEPS, START = 16_000, 1_000
_SETTINGS: dict[str, Any] = {"batch_size": 128, "lr": 1e-3, "buffer_size": STEPS}


def _train(method: Any, seed: int, folder: Path, repeat: int = 1) -> tuple[Role, list[dict[str, Any]]]:
    """Train; the actor and the records."""
    shutil.rmtree(folder, ignore_errors=True)
    whole = "update" if compiled.available() is None else None
    engine = LocalEngine("cpu", threads=1, compile=whole)
    try:
        task = Control(Pieces(env=ENV), method)
        experience = Rollouts(make_repeating(ENV, repeat, 1, seed), seed=seed)
        settings = method.roles()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            models = {"actor": task.policy("gaussian")}
            if "critic" in settings:
                models["critic"] = task.critic(models["actor"])  # type: ignore[assignment]
        with Run(folder, engine=engine, seed=seed, checkpoint_every=1e9, progress=False) as run:
            roles = {name: run.role(name, model, settings=settings[name]) for name, model in models.items()}
            run.track("experience", experience)
            method.train(run, experience=experience, **roles)
    finally:
        engine.close()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return roles["actor"], [json.loads(line) for line in lines]


def _sweep(policy: Any, seed: int) -> dict[str, Any]:
    returns = return_by_length(policy, ENV, seed=10_000 + seed)
    means = {length: float(np.mean(values)) for length, values in returns.items()}
    return {"score": score_of(ENV, means), "returns": {str(k): round(v, 1) for k, v in means.items()}}


def _sequence(length: int, planner: bool = False, **options: Any) -> Callable[[int, Path], dict[str, Any]]:
    def arm(seed: int, folder: Path) -> dict[str, Any]:
        method = SequenceSAC(
            STEPS,
            START,
            length,
            hidden=(64,),
            critic_hidden=(64, 64),
            model_hidden=(64, 64),
            **_SETTINGS,
            **options,
        )
        actor, records = _train(method, seed, folder)
        last = records[-1]
        figures = {
            **_sweep(actor.model, seed),
            "actor_updates": last["actor_updates"],
            "critic_updates": last["critic_updates"],
            "decisions": last["decisions"],
            "model_loss": last.get("model_loss"),
            "course": [[r["steps"], r["reward"]] for r in records if "reward" in r],
        }
        if planner:
            newest = load_newest(folder)
            assert newest is not None
            saved = newest[1]["objects"]
            critic, model = method.make_critic(actor.model), method.make_model(actor.model)  # type: ignore[arg-type]
            critic.load_state_dict(saved["critic"]["weights"])
            model.load_state_dict(saved["model"]["weights"])
            shooting = Shooting(actor.model, critic, model, method.gamma, 32, 6, 3, seed)  # type: ignore[arg-type]
            figures["planner"] = _sweep(shooting, seed)
        return figures

    return arm


def _sac(repeat: int) -> Callable[[int, Path], dict[str, Any]]:
    def arm(seed: int, folder: Path) -> dict[str, Any]:
        method = SAC(STEPS // repeat, START // repeat, hidden=(64, 64), **_SETTINGS)
        actor, records = _train(method, seed, folder, repeat)
        course = [[r["steps"] * repeat, r["reward"]] for r in records if "reward" in r]
        return {**_sweep(actor.model, seed), "actor_updates": actor.updates, "course": course}

    return arm


ARMS = {
    "J = 8": _sequence(8, planner=True),
    "J = 4": _sequence(4),
    "SAC-1": _sac(1),
    "SAC-4": _sac(4),
    "no recall": _sequence(8, recall="none"),
    "no model": _sequence(8, recall="replay"),
}


def judge(results: Results) -> list[Check]:
    """Scores and returns by their mean over seeds, counts on each seed."""
    checks: list[Check] = []

    def mean(arm: str, value: Callable[[dict[str, Any]], float] = lambda f: f["score"]) -> float:
        return float(np.mean([value(f) for f in results[arm].values()]))

    def check(name: str, value: float) -> None:
        checks.append(Check(name, value, ">=", THRESHOLDS[name]))

    ours = "J = 8"
    if ours not in results:
        return checks
    check("frequency-averaged score, J = 8", mean(ours))
    for arm in ("SAC-1", "SAC-4", "no recall"):
        if arm in results:
            check(f"score, J = 8 over {arm}", mean(ours) - mean(arm))
    check("return when deciding every step, J = 8", mean(ours, lambda f: f["returns"]["1"]))
    name = "actor updates of J = 8, times J, over critic updates"
    for seed, f in results[ours].items():
        checks.append(Check(name, 8 * f["actor_updates"] / f["critic_updates"], "<=", THRESHOLDS[name], seed))
    return checks


def _curves(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Sweeps by arm, the planner's beside that of the actor it shares its model with."""
    curves = {arm: list(by_seed.values()) for arm, by_seed in results.items()}
    planned = [f["planner"] for by_seed in results.values() for f in by_seed.values() if "planner" in f]
    return {**curves, "planner, model of J = 8": planned} if planned else curves


def table(results: Results) -> list[list[str]]:
    """Scores and some of the returns, mean over seeds."""
    shown = ("1", "4", "8", "16", "30")
    rows = [["arm", "score", "spread over seeds", *(f"return at {s}" for s in shown), "actor updates"]]
    for arm, figures in _curves(results).items():
        scores = [f["score"] for f in figures]
        returns = [f"{np.mean([f['returns'][s] for f in figures]):.0f}" for s in shown]
        updates = str(figures[0].get("actor_updates", ""))
        rows.append([arm, f"{np.mean(scores):.3f}", f"{np.std(scores):.3f}", *returns, updates])
    return rows


def draw(results: Results, path: Path) -> None:
    """Return against the length of the sequences, and the returns of training."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from guerdon.run.plots import PALETTE, save

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.9), layout="constrained")
    for i, (arm, figures) in enumerate(_curves(results).items()):
        colour = PALETTE[i % len(PALETTE)]
        curves = np.array([[f["returns"][str(length)] for length in LENGTHS] for f in figures])
        left.plot(LENGTHS, curves.mean(0), color=colour, label=arm, linewidth=1.6)
        left.fill_between(LENGTHS, curves.min(0), curves.max(0), color=colour, alpha=0.12, linewidth=0)
        for f in figures:
            if "course" in f:
                right.plot(*np.array(f["course"]).T, color=colour, linewidth=1.1)
    left.set(xlabel="actions from one observation", ylabel="return")
    right.set(xlabel="environment steps", ylabel="return in training (last 100 episodes)")
    save(figure, path)
