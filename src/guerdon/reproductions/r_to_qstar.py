"""From r to Q* (Rafailov et al., 2024, arXiv 2404.12358): DPO read token by token."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guerdon.evaluation import enumerable
from guerdon.evaluation.language import spearman
from guerdon.evaluation.token_credit import heat_map, localisation, token_rewards
from guerdon.experience.datasets import InMemory
from guerdon.objectives.sides import with_reference
from guerdon.reproductions.runner import Check, Results

TITLE = "From r to Q*: token rewards, search and credit of a model trained by DPO"
CLAIM = (
    "Trained on whole answers, DPO's token log-ratios are optimal advantages, beam search on its policy is guided "
    "decoding, implicit rewards of chosen answers fall after an SFT start, and a planted error has the lowest reward"
)
SEEDS = 3
BETA, PAIRS = 0.5, 20_000
SENTENCES, SENTENCE_BETA = 5_000, 1.0

THRESHOLDS: dict[str, float] = {
    "exact, largest error of the identities": 1e-8,
    "exact, mean implicit reward under the reference": 0.0,
    "EnumLM, rank correlation of token rewards with A*": 0.6,
    "EnumLM, the same minus that of fine-tuning on the chosen answers": 0.1,
    "EnumLM, 5 beams over sampling (standard deviations of the reward)": 0.5,
    "EnumLM, 5 beams over 1": 0.0,
    "EnumLM, 16 beams: share of the way from sampling to the best answer": 0.95,
    "EnumLM, chosen implicit reward after an SFT start": 0.0,
    "EnumLM, the same minus that without": 0.0,
    "EnumLM, margin (the smaller of both starts)": 0.0,
    "sentences, wrong word has the lowest reward": 0.7,
}
NOTES = (
    "Beams are judged by R + beta log pi_ref of what they find, which is what the optimum maximises; '16 beams' is "
    "measured as a share of the way from sampling to the best of all 4,096 answers, because the sum itself is near zero. "
    "In the sentences only results can be wrong: an operand is as good as any other, so a wrong operand shows only in the "
    "result that follows it. The model of sentences has 0.35 million weights and saw 30 % wrong results, so that there is "
    "something to learn. "
    "One threshold was replaced after a run with seed 100: that fine-tuning on the chosen answers correlates with A* by "
    "0.2 at most. It cannot hold: the chosen answers are the reference tilted by their probability of winning, which "
    "grows with the reward, so their log-ratio follows A* too (0.67 there, DPO's 0.89). Required now is that DPO's is "
    "larger by 0.1. All other thresholds stood before any run. In the sentences, likelihood alone finds the wrong word "
    "more often than the token reward does: the reference knows most sums. beta of the sentences was chosen on seeds 101 "
    "and 102: at 0.1 (lr 3e-4) chosen answers lose 5 to 14 nats, the joint behind a wrong result becomes as improbable as "
    "the result, and that is lowest in 0.13 and 0.45 of the answers; at 0.5 in 0.42 and 0.65, at 1 in 0.87 and 0.78. A "
    "first run of seeds 0 to 2 at beta 0.1, chosen on seed 100 alone, gave 0.00, 0.34 and 0.36."
)

_DPO: dict[str, Any] = {
    "beta": BETA,
    "optimiser": "adamw",
    "lr": 1e-3,
    "schedule": "linear",
    "warmup": 20,
    "max_grad_norm": 1.0,
    "batch_size": 128,
    "epochs": 4,
}


# --- exact ------------------------------------------------------------------------------------------------


def exact(seed: int, folder: Path) -> dict[str, Any]:
    """A random token problem: 4 tokens, 4 steps, Dirichlet reference, normal dense rewards."""
    generator = torch.Generator().manual_seed(seed)
    size, steps = 4, 4
    count = size**steps
    step_log_ref, step_reward = torch.empty(2, 1, count, steps, dtype=torch.float64)
    for t in range(steps):
        shape = (size**t, size)
        weight = -torch.rand(shape, generator=generator, dtype=torch.float64).log()  # a flat Dirichlet's
        tables = (
            (weight / weight.sum(1, keepdim=True)).log(),
            torch.randn(shape, generator=generator, dtype=torch.float64),
        )
        for target, table in zip((step_log_ref, step_reward), tables, strict=True):
            target[0, :, t] = table.reshape(-1).repeat_interleave(size ** (steps - 1 - t))
    log_ref, reward = step_log_ref.sum(-1), step_reward.sum(-1)
    value, advantage = enumerable.token_optimum(step_log_ref, step_reward, BETA, size)
    by_tokens = log_ref + advantage.sum(-1) / BETA
    whole = enumerable.optimum(log_ref, reward, BETA)
    implicit = BETA * (whole - log_ref)
    # a shaped reward r + Phi(s') - Phi(s), with Phi zero at the start and the end, has the same optimum
    phi = torch.zeros(1, count, steps + 1, dtype=torch.float64)
    for t in range(1, steps):
        phi[0, :, t] = torch.randn(size**t, generator=generator, dtype=torch.float64).repeat_interleave(
            size ** (steps - t)
        )
    _, shaped = enumerable.token_optimum(step_log_ref, step_reward + phi[..., 1:] - phi[..., :-1], BETA, size)
    best = int(whole.argmax()) == int((reward + BETA * log_ref).argmax())
    return {
        "policies": float((by_tokens - whole).abs().max()),
        "returns": float((reward - value[:, :, 0] - implicit).abs().max()),
        "shaping": float((shaped - advantage).abs().max()),
        "same_best": best,
        "implicit_under_reference": float((log_ref.exp() * implicit).sum()),
        "implicit_under_optimum": float((whole.exp() * implicit).sum()),
    }


# --- EnumLM -----------------------------------------------------------------------------------------------


def _start(world: Any, pairs: Any, seed: int, folder: Path) -> Any:
    """The reference fine-tuned on the chosen answers."""
    from guerdon.methods.imitation.sft import SFT
    from guerdon.reproductions.training import train

    method = SFT(epochs=2, batch_size=128, lr=1e-3)
    return train(method, folder, seed, {"actor": world.policy()}, demonstrations=InMemory(pairs.chosen))[
        "actor"
    ].model


def _tuned(start: Any, pairs: Any, seed: int, folder: Path) -> Any:
    from guerdon.methods.preference.dpo import DPO
    from guerdon.reproductions.training import train

    method = DPO(**_DPO)
    return train(method, folder, seed, {"actor": copy.deepcopy(start)}, preferences=InMemory(pairs))["actor"]


def _correlation(world: Any, policy: Any, pairs: Any) -> float:
    """Spearman's correlation of ``log pi / pi_ref`` with A*, over the tokens after every beginning in the pairs."""
    _, advantage = enumerable.token_optimum(world.reference_steps, world.token_reward, BETA, 8)
    found = world.step_log_probs(policy) - world.reference_steps
    from guerdon.tasks.enumlm import ANSWERS, HORIZON, place

    visited = torch.zeros(len(world.prompts), ANSWERS, dtype=torch.bool)
    for side in (pairs.chosen, pairs.rejected):
        visited[place(side)] = True
    a, b = [], []
    for t in range(HORIZON):
        block = 8 ** (HORIZON - 1 - t)  # answers that share the first t + 1 letters
        seen = visited.view(len(world.prompts), -1, block).any(-1)
        a.append(found[:, ::block, t][seen])
        b.append(advantage[:, ::block, t][seen])
    return spearman(torch.cat(a), torch.cat(b))


def _values(world: Any, traj: Any) -> tuple[float, float]:
    """``R + beta log pi_ref`` of answers, and R."""
    from guerdon.tasks.enumlm import place

    prompt, answer = place(traj)
    goal = world.reward + BETA * world.reference
    return float(goal[prompt, answer].mean()), float(world.reward[prompt, answer].mean())


def enumlm(seed: int, folder: Path) -> dict[str, Any]:
    """DPO from the base and from an SFT start; token rewards against A*; beams."""
    from guerdon.search import beam_search
    from guerdon.tasks.enumlm import world as make_world

    world = make_world(seed)
    pairs = world.pairs(PAIRS, seed)
    base = world.policy()
    figures: dict[str, Any] = {}
    sft = _start(world, pairs, seed, folder / "sft")
    figures["correlation_sft"] = _correlation(world, sft, pairs)
    held_out = world.pairs(2_000, seed + 10_000)
    for name, start in (("base", base), ("sft", sft)):
        reference = copy.deepcopy(start).eval()
        actor = _tuned(start, pairs, seed, folder / f"dpo_{name}")
        for side in ("chosen", "rejected"):
            reward = token_rewards(actor, reference, getattr(held_out, side), BETA).sum(1).mean()
            figures[f"{side}_{name}"] = float(reward)
        if name == "base":
            tuned = actor
    figures["correlation"] = _correlation(world, tuned, pairs)
    log_p = world.log_probs(tuned)
    goal = world.reward + BETA * world.reference
    figures["sampling"] = float((log_p.exp() * goal).sum(1).mean())
    figures["best"] = float(goal.max(1).values.mean())
    for beams in (1, 2, 5, 16):
        found = beam_search(tuned.model, world.prompts, beams)
        figures[f"beams {beams}"], figures[f"reward {beams}"] = _values(world, found)
    figures["reward_sampling"] = float((log_p.exp() * world.reward).sum(1).mean())
    return figures


# --- a planted error --------------------------------------------------------------------------------------


def sentences(seed: int, folder: Path) -> dict[str, Any]:
    """DPO on sentences with one wrong result; where is the lowest token reward?"""
    from guerdon.methods.imitation.sft import SFT
    from guerdon.methods.preference.dpo import DPO
    from guerdon.reproductions.training import train
    from guerdon.tasks import arithmetic

    base = arithmetic.fresh_policy(seed)
    arithmetic.pretrain(base, seed)
    reference = copy.deepcopy(base).eval()
    recorded, _ = arithmetic.pairs(base, SENTENCES, seed + 1)
    held_out, planted = arithmetic.pairs(base, 1_000, seed + 2)
    options = {**_DPO, "beta": SENTENCE_BETA, "batch_size": 64, "epochs": 1, "lr": 3e-4, "warmup": 10}
    actor = train(
        DPO(**options), folder / "dpo", seed, {"actor": copy.deepcopy(base)}, preferences=InMemory(recorded)
    )["actor"]
    tuned = train(
        SFT(epochs=1, batch_size=64, lr=3e-4),
        folder / "sft",
        seed,
        {"actor": copy.deepcopy(base)},
        demonstrations=InMemory(recorded.chosen),
    )["actor"]
    wrong = held_out.rejected
    with torch.no_grad():
        likelihood = reference.log_prob(wrong)
    reward = token_rewards(actor, reference, wrong, SENTENCE_BETA)
    both = with_reference(held_out, reference)
    right = token_rewards(actor, reference, both.chosen, SENTENCE_BETA).sum(1)
    figures: dict[str, Any] = {
        "DPO": localisation(reward, wrong.mask, planted),
        "fine-tuning on the chosen": localisation(
            token_rewards(tuned, reference, wrong, 1.0), wrong.mask, planted
        ),
        "likelihood of the reference": localisation(likelihood, wrong.mask, planted),
        "likelihood under DPO": localisation(actor.log_prob(wrong), wrong.mask, planted),
        "accuracy": float((right > reward.sum(1)).double().mean()),
    }
    words = [[arithmetic.WORDS[i] for i in row] for row in wrong.inputs["step", "token"][:4].tolist()]
    figures["shown"] = {
        "words": words,
        "rewards": [[round(v, 3) for v in row] for row in reward[:4].tolist()],
    }
    return figures


ARMS = {"exact": exact, "EnumLM": enumlm, "sentences": sentences}


# --- judging ----------------------------------------------------------------------------------------------


def judge(results: Results) -> list[Check]:
    """Every threshold: the exact ones on each seed, the others on means over seeds."""
    checks: list[Check] = []

    def check(name: str, value: float, sense: str = ">=", seed: int | None = None) -> None:
        checks.append(Check(name, value, sense, THRESHOLDS[name], seed))

    for seed, f in results.get("exact", {}).items():
        error = max(f["policies"], f["returns"], f["shaping"]) if f["same_best"] else float("inf")
        check("exact, largest error of the identities", error, "<=", seed)
        check("exact, mean implicit reward under the reference", f["implicit_under_reference"], "<=", seed)

    if "EnumLM" in results:
        by_seed = list(results["EnumLM"].values())
        mean = lambda value: float(np.mean([value(f) for f in by_seed]))
        check("EnumLM, rank correlation of token rewards with A*", mean(lambda f: f["correlation"]))
        name = "EnumLM, the same minus that of fine-tuning on the chosen answers"
        check(name, mean(lambda f: f["correlation"] - f["correlation_sft"]))
        name = "EnumLM, 5 beams over sampling (standard deviations of the reward)"
        check(name, mean(lambda f: f["beams 5"] - f["sampling"]))
        check("EnumLM, 5 beams over 1", mean(lambda f: f["beams 5"] - f["beams 1"]))
        name = "EnumLM, 16 beams: share of the way from sampling to the best answer"
        check(name, mean(lambda f: (f["beams 16"] - f["sampling"]) / (f["best"] - f["sampling"])))
        check("EnumLM, chosen implicit reward after an SFT start", mean(lambda f: f["chosen_sft"]), "<=")
        name = "EnumLM, the same minus that without"
        check(name, mean(lambda f: f["chosen_sft"] - f["chosen_base"]), "<=")
        margins = lambda f: min(f[f"chosen_{s}"] - f[f"rejected_{s}"] for s in ("base", "sft"))
        check("EnumLM, margin (the smaller of both starts)", mean(margins))
    if "sentences" in results:
        lowest = [f["DPO"]["lowest"] for f in results["sentences"].values()]
        check("sentences, wrong word has the lowest reward", float(np.mean(lowest)))
    return checks


def table(results: Results) -> list[list[str]]:
    """One row a figure: its mean and each seed."""
    rows = [["part", "figure", "mean", "seeds"]]

    def row(part: str, name: str, values: list[float], form: str = "{:.2f}") -> None:
        rows.append([part, name, form.format(np.mean(values)), " ".join(form.format(v) for v in values)])

    for part, names in (
        ("exact", {"policies": "token and answer optimum differ by", "returns": "return identity is off by"}),
        (
            "EnumLM",
            {
                "correlation": "correlation with A*, DPO",
                "correlation_sft": "correlation with A*, fine-tuned on the chosen",
                "sampling": "R + beta log ref, sampled",
                "beams 1": "1 beam",
                "beams 2": "2 beams",
                "beams 5": "5 beams",
                "beams 16": "16 beams",
                "best": "best of all answers",
                "chosen_base": "implicit reward of chosen, from the base",
                "rejected_base": "implicit reward of rejected, from the base",
                "chosen_sft": "implicit reward of chosen, from SFT",
                "rejected_sft": "implicit reward of rejected, from SFT",
            },
        ),
    ):
        for name, label in names.items():
            values = [f[name] for f in results.get(part, {}).values()]
            if values:
                row(part, label, values, "{:.1e}" if part == "exact" else "{:.2f}")
    scores = ("DPO", "fine-tuning on the chosen", "likelihood of the reference", "likelihood under DPO")
    for score in scores:
        values = [f[score]["lowest"] for f in results.get("sentences", {}).values()]
        if values:
            row("sentences", f"wrong word is lowest by {score}", values)
            row("sentences", f"AUROC by {score}", [f[score]["auroc"] for f in results["sentences"].values()])
    return rows


def draw(results: Results, path: Path) -> None:
    """Token rewards of four held-out sentences with a wrong result."""
    by_seed = results.get("sentences")
    if not by_seed:
        heat_map([["nothing", "measured"]], [[0.0, 0.0]], path)
        return
    shown = next(iter(by_seed.values()))["shown"]
    heat_map(shown["words"], shown["rewards"], path)
