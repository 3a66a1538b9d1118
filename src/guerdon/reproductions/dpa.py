"""Directional preference alignment (Wang et al., 2024, arXiv 2402.18571): one model, a trade-off in the prompt."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.evaluation.language import spearman
from guerdon.experience.completions import Completions
from guerdon.experience.directions import objective_weights
from guerdon.experience.prompts import Prompts
from guerdon.feedback.reward_model import RewardModel
from guerdon.methods.online.dpa import DPA
from guerdon.methods.online.rejection_sampling import RejectionSampling
from guerdon.objectives.judges import AttributeRegression
from guerdon.optim import AdamW
from guerdon.randomness import mix
from guerdon.reproductions.runner import Check, Results
from guerdon.reproductions.training import train
from guerdon.roles import Role, RoleSettings
from guerdon.tasks import topics

TITLE = "DPA: trade-offs written into the prompt, on topics"
CLAIM = (
    "A single model fine-tuned on the best of its answers for each direction makes answers longer or shorter, and more or "
    "less helpful, as the direction in the prompt says; it comes near best-of-16 at every angle, where a model tuned for "
    "one reward serves one point"
)
SEEDS = 3
RATING_EPOCHS = 3
THRESHOLDS: dict[str, float] = {
    "DPA, rank correlation of angle and mean length": 0.9,
    "DPA, mean length at 45 degrees over that at -45": 1.5,
    "shuffled directions, rank correlation of angle and mean length": 0.5,
    "DPA, share of the way from SFT to best-of-16 (mean over angles)": 0.5,
    "DPA's share minus that of scalar rejection sampling": 0.1,
    "hypervolume after iteration 2 minus that after iteration 1": 0.0,
}
NOTES = (
    "All thresholds stood before any run; the world was changed once, after a run with seed 100 in which every repeated "
    "word on the topic counted as helpful. There a model that keeps to its topic loses nothing by length, so lengths stood "
    "at their limit from 0 degrees on, and scalar rejection sampling closed 98 % of the gap to best-of-16. Since then a "
    "repeated word does not count. "
    "The language model has 0.1 million weights and is pre-trained once for all seeds; seeds differ in ratings, reward "
    "model, sampling and order. Half of its pre-training prompts carry a direction that means nothing, so that numbers are "
    "known to it, as to any language model. Everything is measured on held-out prompts with the true rewards, at "
    "temperature 1; training sees the ten outputs of a reward model fitted to noisy ratings of which half are missing. "
    "Best-of-16 chooses by the true reward, from the untuned model; trained models may pass it. Objectives are not "
    "normalised: both go from 0 to 100. The shuffled arm ranks as DPA does and writes the direction of another answer. "
    "The rank correlation misses its threshold by a hair (0.893): from 15 degrees on all lengths stand at 23 to 24 of 24 "
    "words, where their order is noise. "
    "Not compared: SteerLM, reward soup, DPO on scalarised pairs."
)
EPOCHS, LR = 4, 1e-3
_DPA: dict[str, Any] = {
    "prompts_per_iteration": 128,
    "directions": 8,
    "candidates": 16,
    "outputs": topics.OUTPUTS,
    "system": topics.SYSTEM,
    "epochs": EPOCHS,
    "lr": LR,
}
_SAMPLES = 4  # answers to each of the 64 held-out prompts at each angle


class Shuffled(DPA):
    """Writes the direction of another row than the one that chose the answer."""

    def written(self, places: list[int], direction: Tensor, experience: Any) -> list[str]:
        rows = direction.flatten(0, 1)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows)))
        return super().written(places, rows[order].view_as(direction), experience)


class Helpfulness:
    """One objective of the reward model, as a scalar judge."""

    name = "helpfulness"

    def __init__(self, model: RewardModel) -> None:
        self.model = model
        self.weights = objective_weights(topics.OUTPUTS, 2, 10)[:, 0]

    def score(self, traj: Trajectories) -> Tensor:
        """``[B]``."""
        with torch.no_grad():
            return torch.cat([self.model.scores(part) for part in traj.minibatches(1024)]) @ self.weights


@functools.lru_cache(maxsize=1)
def _reward_model(seed: int) -> RewardModel:
    """Ten outputs, fitted to noisy ratings of which half are missing."""
    model = topics.reward_model(topics.base_policy(), seed)
    data = topics.ratings(topics.RATINGS, seed)
    steps = RATING_EPOCHS * -(-len(data) // 64)
    role = Role("reward", model, RoleSettings(AdamW(2e-3, "cosine", total=steps)))
    generator = torch.Generator().manual_seed(seed)
    role.fit(data, AttributeRegression(), RATING_EPOCHS, 64, generator)
    return model.requires_grad_(False)


def _experience(seed: int) -> Completions:
    return Completions(Prompts(topics.prompts()[0], seed=seed), seed=mix(seed, 1))


def sft(seed: int, folder: Path) -> dict[str, Any]:
    """The untuned model, and the best of 16 of its answers by the true reward."""
    policy = topics.base_policy()
    return {
        "front": topics.front(policy, seed, _SAMPLES, directed=False),
        "best of 16": topics.front(policy, seed, 1, best_of=16, directed=False),
    }


def scalar(seed: int, folder: Path) -> dict[str, Any]:
    """Rejection sampling for helpfulness alone, with as many prompts, candidates and rounds."""
    method = RejectionSampling(
        rounds=2,
        prompts_per_round=_DPA["prompts_per_iteration"],
        group_size=_DPA["candidates"],
        epochs=2 * EPOCHS,
        lr=LR,
    )
    judge = Helpfulness(_reward_model(seed))
    models = {"actor": topics.base_policy()}
    roles = train(method, folder, seed, models, experience=_experience(seed), feedback=judge)
    return {"front": topics.front(roles["actor"], seed, _SAMPLES, directed=False)}


def _directed(method: DPA, seed: int, folder: Path) -> dict[str, Any]:
    fronts: list[dict[str, Any]] = []
    train(
        method,
        folder,
        seed,
        {"actor": topics.base_policy(), "reward": copy.deepcopy(_reward_model(seed))},
        after=lambda roles: fronts.append(topics.front(roles["actor"], seed, _SAMPLES)),
        experience=_experience(seed),
    )
    return {"front": fronts[-1], "fronts": fronts}


def dpa(seed: int, folder: Path) -> dict[str, Any]:
    """Two iterations; the front after each."""
    return _directed(DPA(**_DPA), seed, folder)


def shuffled(seed: int, folder: Path) -> dict[str, Any]:
    """The same with directions that say nothing about the answer."""
    return _directed(Shuffled(**_DPA), seed, folder)


ARMS = {"SFT": sft, "scalar RSF": scalar, "DPA": dpa, "DPA with shuffled directions": shuffled}


# --- judging ----------------------------------------------------------------------------------------------


def _control(front: dict[str, Any]) -> float:
    """Rank correlation of angle and mean length; 0 where all lengths are equal."""
    found = spearman(torch.tensor(topics.ANGLES), torch.tensor(front["length"]))
    return 0.0 if np.isnan(found) else found


def _share(results: Results, arm: str, seed: int) -> float:
    """How much of the gap between SFT and best-of-16 an arm closes, in the mean of v . r over angles."""
    value = lambda found: float(np.mean(found["value"]))
    low, high = (value(results["SFT"][seed][name]) for name in ("front", "best of 16"))
    return (value(results[arm][seed]["front"]) - low) / (high - low)


def judge(results: Results) -> list[Check]:
    """Means over seeds, against `THRESHOLDS`."""
    checks: list[Check] = []

    def check(name: str, values: list[float], sense: str = ">=") -> None:
        checks.append(Check(name, float(np.mean(values)), sense, THRESHOLDS[name]))

    by_seed = results.get("DPA", {})
    if by_seed:
        fronts = [f["front"] for f in by_seed.values()]
        check("DPA, rank correlation of angle and mean length", [_control(f) for f in fronts])
        check(
            "DPA, mean length at 45 degrees over that at -45",
            [f["length"][-1] / f["length"][0] for f in fronts],
        )
        growth = [f["fronts"][-1]["hypervolume"] - f["fronts"][0]["hypervolume"] for f in by_seed.values()]
        check("hypervolume after iteration 2 minus that after iteration 1", growth)
    if "DPA with shuffled directions" in results:
        name = "shuffled directions, rank correlation of angle and mean length"
        check(name, [_control(f["front"]) for f in results["DPA with shuffled directions"].values()], "<=")
    seeds = [seed for seed in by_seed if seed in results.get("SFT", {})]
    if seeds:
        name = "DPA, share of the way from SFT to best-of-16 (mean over angles)"
        check(name, [_share(results, "DPA", seed) for seed in seeds])
        seeds = [seed for seed in seeds if seed in results.get("scalar RSF", {})]
        if seeds:
            name = "DPA's share minus that of scalar rejection sampling"
            shares = [_share(results, "DPA", s) - _share(results, "scalar RSF", s) for s in seeds]
            check(name, shares)
    return checks


def _rows(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The fronts of all seeds by what they are of."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for arm, by_seed in results.items():
        for figures in by_seed.values():
            rows.setdefault(arm, []).append(figures["front"])
            if "best of 16" in figures:
                rows.setdefault("best of 16 (true reward)", []).append(figures["best of 16"])
            if arm == "DPA":
                rows.setdefault("DPA, iteration 1", []).append(figures["fronts"][0])
    return rows


def table(results: Results) -> list[list[str]]:
    """A row a policy: v . r and length in words at seven angles, means over seeds."""
    rows = [["policy", "mean v.r", "hypervolume", *(f"v.r, words at {a:g}" for a in topics.ANGLES)]]
    for name, fronts in _rows(results).items():
        value, length = (np.mean([f[key] for f in fronts], 0) for key in ("value", "length"))
        volume = np.mean([f["hypervolume"] for f in fronts])
        cells = [f"{v:.1f}, {w:.1f}" for v, w in zip(value, length, strict=True)]
        rows.append([name, f"{value.mean():.1f}", f"{volume:.3f}", *cells])
    return rows


def draw(results: Results, path: Path) -> None:
    """Helpfulness against verbosity; and length against the angle."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for name, fronts in _rows(results).items():
        x, y, length = (np.mean([f[k] for f in fronts], 0) for k in ("verbosity", "helpfulness", "length"))
        left.plot(x, y, "o-", markersize=4, label=name)
        right.plot(topics.ANGLES, length, "o-", markersize=4, label=name)
    left.set(xlabel="verbosity", ylabel="helpfulness", title="the front, one point an angle")
    right.set(xlabel="angle of the direction (degrees)", ylabel="mean length (words)", title="control")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
