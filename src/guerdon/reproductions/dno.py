"""Direct Nash optimisation: exactly on a small cyclic game, and on a language model whose answers can all be enumerated,
judged by preferences that run in a circle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guerdon.reproductions.runner import Check, Results

TITLE = "DNO: direct Nash optimisation (Rosset et al., 2024)"
CLAIM = (
    "Learning in batches from pairs of its own newest answers, with a teacher's among them and only wide margins, a policy "
    "improves from iteration to iteration and beats offline DPO and SPIN on the same prompts; regression on win rates "
    "against itself comes closer, on average over its iterations, to what no other policy beats than any reward can."
)
SEEDS = 3
# Fixed before the seeds that count were run.
THRESHOLDS = {
    "four answers, exploitability of the average after 200 steps": 0.03,
    "four answers, least win rate of a step over the one before": 0.5,
    "four answers, exploitability of the best RLHF": 0.06,
    "four answers, total variation between regression and closed form": 0.02,
    "language model, least rise of DNO's win rate over the untrained model in an iteration": 0.0,
    "language model, DNO's final win rate over the untrained model": 0.65,
    "language model, least win rate of DNO's iterations over the one before": 0.5,
    "language model, DNO over offline DPO": 0.53,
    "language model, DNO over SPIN": 0.53,
    "language model, worst case of twelve iterations on average minus that of the best RLHF": 0.03,
}
NOTES = (
    "Thresholds as first written down, but for two things found on seed 100. The worst case (of any answer against the "
    "mean of the iterations) was meant for the three iterations of the practical form. Three are too few for it whatever "
    "the algorithm does: even exact iterations of any eta end no better than the best RLHF, so it is asked of twelve "
    "iterations of regression on win rates instead; the practical form's figure is in the table. That no iteration loses to "
    "the one before was added. Settings of the practical form (eta 0.2, learning rate 2e-3, margins of 0.6) are the best of "
    "eight tried on seed 100, by the win rate over the untrained model; the other arms have the same. The teacher is the "
    "optimal policy for the gold reward at a KL cost of 0.5. All measures are exact. What does not reproduce: the win rate "
    "over the untrained model neither rises in every iteration nor ends above 0.65 on every seed (the frozen settings gave "
    "0.70 on seed 100, but 0.63, 0.63, 0.72 on 101 to 103). In a cyclic game the algorithm does not promise it: exact "
    "iterations with eta 0.1 give 0.57, 0.62, 0.60. What it promises, winning against the iteration before, holds."
)
CYCLE = ((0.5, 0.9, 0.2, 0.6), (0.1, 0.5, 0.85, 0.7), (0.8, 0.15, 0.5, 0.6), (0.4, 0.3, 0.4, 0.5))
START = (0.1, 0.1, 0.1, 0.7)
ROWS, HELD_OUT, TEACHER = 400, 256, 0.5
TAUS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0, 4.0)
SHARED: dict[str, Any] = {
    "temperature": 1.0,  # figures are exact for this one
    "top_p": 1.0,
    "eta": 0.2,
    "lr": 2e-3,
    "batch_size": 128,
    "margin": 0.6,
    "student_margin": 0.6,
    "min_positive": 0.6,
    "parts": 4,
    "validation": HELD_OUT,
    "returns": "last",
    "save_iterations": True,
}


# --- exact ------------------------------------------------------------------------------------------------


def exact(seed: int, folder: Path) -> dict[str, Any]:
    """Four answers: exact iterations, what a Bradley-Terry reward leads to, and the regression by gradient steps."""
    from guerdon.dynamics import games

    game = torch.tensor(CYCLE, dtype=torch.float64)
    start = torch.tensor(START, dtype=torch.float64)
    policies = games.direct_nash(game, start, 0.5, 200)
    gaps = games.exploitability(game, games.averages(policies))
    score = games.fit_bradley_terry(game)
    rewarded = {
        beta: float(games.exploitability(game, games.tilted(start, score, beta))) for beta in (0.5, 0.1, 0.02)
    }
    return {
        "average": {str(T): float(gaps[T - 1]) for T in (5, 20, 100, 200)},
        "last": float(games.exploitability(game, policies[200])),
        "improvement": float(games.win_rate(game, policies[1:], policies[:-1]).min()),
        "rlhf": {str(beta): gap for beta, gap in rewarded.items()},
        "variation": max(_regressed(game, policies[t], seed + t) for t in range(3)),
    }


def _regressed(game: Tensor, policy: Tensor, seed: int) -> float:
    """Total variation between ``policy exp(r / eta) / Z`` and Adam on a table of logits with 4,000 sampled pairs."""
    from guerdon.batch import Preferences
    from guerdon.dynamics import games
    from guerdon.objectives.preference import PairwiseObjective
    from guerdon.objectives.sides import with_reference
    from guerdon.optim import Adam
    from guerdon.policies.tabular import CategoricalTable
    from guerdon.randomness import mix, row_seeds
    from guerdon.roles import Role, RoleSettings

    table = CategoricalTable(["?"], len(policy))
    table.logits.data.copy_(policy.log()[None])
    pairs, eta = 4000, 0.5
    actor = Role("actor", table, RoleSettings(Adam(0.02, "linear", total=300), max_grad_norm=None))
    reference = actor.copy(frozen=True)
    first, second = (actor.sample(["?"] * pairs, row_seeds(mix(seed, i), 0, pairs)) for i in (1, 2))
    reward = games.wins(game, policy)
    gain = reward[first.outputs["action"][:, 0]] - reward[second.outputs["action"][:, 0]]
    batch = with_reference(
        Preferences(chosen=first, rejected=second, strength=gain.sigmoid().float()), reference
    )
    for _ in range(300):
        actor.update(batch, PairwiseObjective(beta=eta))
    found = table.logits.detach().double().softmax(-1)[0]
    return 0.5 * float((found - games.direct_nash(game, policy, eta, 1)[1]).abs().sum())


# --- a language model -------------------------------------------------------------------------------------


def _trained(**options: Any) -> Callable[[int, Path], dict[str, Any]]:
    def arm(seed: int, folder: Path) -> dict[str, Any]:
        from guerdon.evaluation import enumerable
        from guerdon.experience.datasets import InMemory
        from guerdon.methods.preference.dno import DNO
        from guerdon.reproductions.training import train
        from guerdon.tasks import enumlm

        world = enumlm.world(seed)
        judge, method = world.cyclic(), DNO(**{**SHARED, **options})
        rows = HELD_OUT + ROWS * max(method.iterations, 3)
        drawn = world.draw(rows, seed, source=world.optimum(TEACHER))
        train(
            method,
            folder,
            seed,
            {"actor": world.policy()},
            demonstrations=InMemory(world.answers(*drawn)),
            feedback=judge,
        )
        count = method.iterations + method.lookahead
        saved = [folder / "iterations" / str(i + 1) for i in range(count)]
        learned = [world.log_probs(enumlm.load_policy(path).eval()) for path in saved]
        before = [world.reference, *learned[:-1]]
        mean = torch.stack([log_p.exp() for log_p in before]).mean(0).log()
        _keep(folder, learned[-1])
        over = lambda a, b: float(enumerable.win_rate(a, b, judge.oracle).mean())
        return {
            "over_untrained": [over(log_p, world.reference) for log_p in learned],
            "over_previous": [over(a, b) for a, b in zip(learned, before, strict=True)],
            "over_teacher": over(learned[-1], world.optimum(TEACHER)),
            "kl": float(enumerable.kl(learned[-1], world.reference).mean()),
            "exploitability": float(enumerable.exploitability(learned[-1], judge.oracle).mean()),
            "exploitability_of_mean": float(enumerable.exploitability(mean, judge.oracle).mean()),
        }

    return arm


def _keep(folder: Path, log_p: Tensor) -> None:
    from safetensors.torch import save_file

    save_file({"log_p": log_p.contiguous()}, str(folder / "last.safetensors"))


def rlhf(seed: int, folder: Path) -> dict[str, Any]:
    """The optimal policies for the reward that endless pairs would teach, at every strength of the KL."""
    from guerdon.evaluation import enumerable
    from guerdon.reproductions.nash_md import fitted_reward
    from guerdon.tasks import enumlm

    world = enumlm.world(seed)
    judge = world.cyclic()
    score = fitted_reward(world, judge)
    sweep = {}
    for tau in TAUS:
        log_p = enumerable.optimum(world.reference, score, tau)
        sweep[str(tau)] = {
            "over_untrained": float(enumerable.win_rate(log_p, world.reference, judge.oracle).mean()),
            "exploitability": float(enumerable.exploitability(log_p, judge.oracle).mean()),
            "kl": float(enumerable.kl(log_p, world.reference).mean()),
        }
    return {"sweep": sweep, "best": min(f["exploitability"] for f in sweep.values())}


def win_rates(seed: int, folder: Path) -> dict[str, Any]:
    """Of every arm's last policy against every other, exactly, from the tables that the arms left."""
    from safetensors.torch import load_file

    from guerdon.evaluation.language import exact_win_rates
    from guerdon.tasks import enumlm

    world = enumlm.world(seed)
    found = {arm: folder.parent / f"{arm}-{seed}" / "last.safetensors" for arm in ARMS}
    policies = {arm: load_file(str(path))["log_p"] for arm, path in found.items() if path.is_file()}
    rates = exact_win_rates({"untrained": world.reference, **policies}, world.cyclic().oracle)
    return {"names": list(rates.names), "matrix": rates.rate.tolist()}


ARMS = {
    "exact": exact,
    "DNO": _trained(),
    "offline DPO": _trained(iterations=1),
    "SPIN": _trained(pairs="spin"),
    "DNO-Restrictive": _trained(pairs="restrictive"),
    "DNO-Lookahead": _trained(lookahead=True),
    "DNO, first reference": _trained(reference="initial"),
    "DNO on win rates": _trained(mode="soft", iterations=12, replay=0.0, eta=0.1),
    "RLHF": rlhf,
    "win rates": win_rates,
}
_LEARNED = [arm for arm in ARMS if arm not in ("exact", "RLHF", "win rates")]


# --- judging ----------------------------------------------------------------------------------------------


def judge(results: Results) -> list[Check]:
    """Every threshold, on each seed."""
    checks: list[Check] = []

    def check(name: str, value: float, sense: str, seed: int) -> None:
        checks.append(Check(name, value, sense, THRESHOLDS[name], seed))

    for seed, f in results.get("exact", {}).items():
        check("four answers, exploitability of the average after 200 steps", f["average"]["200"], "<=", seed)
        check("four answers, least win rate of a step over the one before", f["improvement"], ">=", seed)
        check("four answers, exploitability of the best RLHF", min(f["rlhf"].values()), ">=", seed)
        check("four answers, total variation between regression and closed form", f["variation"], "<=", seed)

    for seed, f in results.get("DNO", {}).items():
        rise = float(np.diff([0.5, *f["over_untrained"]]).min())
        name = "language model, least rise of DNO's win rate over the untrained model in an iteration"
        check(name, rise, ">=", seed)
        name = "language model, DNO's final win rate over the untrained model"
        check(name, f["over_untrained"][-1], ">=", seed)
        name = "language model, least win rate of DNO's iterations over the one before"
        check(name, min(f["over_previous"]), ">=", seed)
    for seed, f in results.get("win rates", {}).items():
        for other in ("offline DPO", "SPIN"):
            if {"DNO", other} <= set(f["names"]):
                rate = f["matrix"][f["names"].index("DNO")][f["names"].index(other)]
                check(f"language model, DNO over {other}", rate, ">=", seed)
    for seed, f in results.get("RLHF", {}).items():
        many = results.get("DNO on win rates", {}).get(seed)
        if many:
            name = "language model, worst case of twelve iterations on average minus that of the best RLHF"
            check(name, f["best"] - many["exploitability_of_mean"], ">=", seed)
    return checks


def table(results: Results) -> list[list[str]]:
    """One row a policy, means over seeds. The worst case is of any single answer against it."""
    rows = [
        [
            "policy",
            "over the untrained, by iteration",
            "seeds",
            "DNO over it",
            "KL",
            "worst case",
            "of the mean",
        ]
    ]
    matrix = results.get("win rates", {})

    def against(arm: str) -> str:
        found = [
            f["matrix"][f["names"].index("DNO")][f["names"].index(arm)]
            for f in matrix.values()
            if {"DNO", arm} <= set(f["names"])
        ]
        return f"{np.mean(found):.3f}" if found and arm != "DNO" else ""

    for arm in _LEARNED:
        figures = list(results.get(arm, {}).values())
        if not figures:
            continue
        course = np.mean([f["over_untrained"] for f in figures], 0)
        rows.append(
            [
                arm,
                " ".join(f"{rate:.3f}" for rate in course),
                " ".join(f"{f['over_untrained'][-1]:.3f}" for f in figures),
                against(arm),
                f"{np.mean([f['kl'] for f in figures]):.2f}",
                f"{0.5 - np.mean([f['exploitability'] for f in figures]):.3f}",
                f"{0.5 - np.mean([f['exploitability_of_mean'] for f in figures]):.3f}",
            ]
        )
    figures = list(results.get("RLHF", {}).values())
    for tau in TAUS if figures else ():
        cells = {
            key: np.mean([f["sweep"][str(tau)][key] for f in figures]) for key in ("over_untrained", "kl")
        }
        worst = 0.5 - np.mean([f["sweep"][str(tau)]["exploitability"] for f in figures])
        rows.append(
            [
                f"RLHF, exact, tau {tau}",
                f"{cells['over_untrained']:.3f}",
                "",
                "",
                f"{cells['kl']:.2f}",
                f"{worst:.3f}",
                "",
            ]
        )
    return rows


def draw(results: Results, path: Path) -> None:
    """Left: win rates over the untrained model by iteration. Right: worst cases on the way."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from guerdon.run.plots import PALETTE, save

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    for colour, arm in zip(PALETTE, _LEARNED, strict=False):
        figures = list(results.get(arm, {}).values())
        if not figures:
            continue
        course = [0.5, *np.mean([f["over_untrained"] for f in figures], 0)]
        axes[0].plot(range(len(course)), course, "o-", color=colour, label=arm, linewidth=1.5, markersize=3)
        axes[1].plot(
            np.mean([f["kl"] for f in figures]),
            0.5 - np.mean([f["exploitability_of_mean"] for f in figures]),
            "o",
            color=colour,
        )
    figures = list(results.get("RLHF", {}).values())
    if figures:
        points = [
            [np.mean([f["sweep"][str(tau)][key] for f in figures]) for key in ("kl", "exploitability")]
            for tau in TAUS
        ]
        axes[1].plot(
            [p[0] for p in points], [0.5 - p[1] for p in points], color="#999999", label="RLHF, exact"
        )
    axes[0].set(xlabel="iteration", ylabel="win rate over the untrained model")
    axes[1].set(
        xlabel="KL of the last policy from the untrained", ylabel="worst case of the mean of iterations"
    )
    save(figure, path)
