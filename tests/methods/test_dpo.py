"""DPO: everything that a faithful implementation has, one test each, through the method's own loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from guerdon.batch import Preferences, concatenate
from guerdon.engine.local import LocalEngine
from guerdon.experience.datasets import InMemory, load_preferences
from guerdon.methods.preference.dpo import DPO
from guerdon.objectives.pair_losses import PairLoss
from guerdon.objectives.preference import PairwiseObjective, PlackettLuce
from guerdon.objectives.sides import with_reference
from guerdon.optim import SGD
from guerdon.policies.language import LanguagePolicy
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run, read_metrics
from guerdon.tasks.tokens import tiny_llama, tokenizer

PROMPTS = ["a", "b c d", "e f", "h h g a b", "c", "d d"]
CHOSEN = ["a b", "c", "d e f g", "b", "", "h g"]
REJECTED = ["c", "d d a", "e", "g h a b", "f", "a"]


class Watched(Role):
    """A role that keeps its batches, objectives, metrics, and the weights before and after each update."""

    def update(self, batch: Any, objective: Any, **others: Any) -> Any:
        self.calls: list[dict[str, Any]] = getattr(self, "calls", [])
        if getattr(self, "stop_at", None) == self.updates:
            raise KeyboardInterrupt
        before = weights(self)
        metrics = super().update(batch, objective, **others)
        self.calls.append(
            {
                "batch": batch,
                "objective": objective,
                "metrics": metrics,
                "before": before,
                "after": weights(self),
            }
        )
        return metrics


def weights(role: Role) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in role.model.named_parameters()}


def policy(**options: Any) -> LanguagePolicy:
    return LanguagePolicy(tiny_llama(), tokenizer(), max_new_tokens=6, **options)


def pairs() -> Preferences:
    blank = policy()
    return Preferences(chosen=blank.encode(PROMPTS, CHOSEN), rejected=blank.encode(PROMPTS, REJECTED))


def train(
    folder: Path,
    method: DPO,
    data: Any = None,
    actor: Role | None = None,
    settings: RoleSettings | None = None,
    resume: bool = False,
    **run_options: Any,
) -> Watched:
    """The actor after ``method.train``, with everything it saw."""
    if actor is None:
        actor = Watched("actor", policy(), settings or method.roles()["actor"])
    data = InMemory(pairs()) if data is None else data
    options = {"progress": False, "checkpoint_every": 1e9, "resume": resume} | run_options
    engine = LocalEngine("cpu", threads=1)
    try:
        with Run(folder, engine=engine, seed=3, **options) as run:
            run.adopt("actor", actor)
            method.train(run, actor, data)
    finally:
        engine.close()
    assert isinstance(actor, Watched)
    return actor


def small(**options: Any) -> DPO:
    return DPO(**({"batch_size": 3, "lr": 1e-2, "warmup": 0, "epochs": 2, "beta": 0.5} | options))


def one_by_one(model: Any, prompts: list[str], answers: list[str]) -> list[Tensor]:
    """Log-probabilities of each answer's tokens from transformers' own logits, nothing padded or masked."""
    blank, found = policy(), []
    for prompt, answer in zip(prompts, answers, strict=True):
        p, a = blank.tokens(prompt), blank.answer_tokens(answer)
        log_p = model(input_ids=torch.tensor([p + a])).logits[0].float().log_softmax(-1)
        found.append(torch.stack([log_p[len(p) - 1 + i, token] for i, token in enumerate(a)]))
    return found


# --- the checklist ----------------------------------------------------------------------------------------


def test_prompts_are_masked_logits_shifted_the_end_counted_and_padding_left_out(tmp_path: Path) -> None:
    actor = train(tmp_path / "run", small(batch_size=6, epochs=1))
    call = actor.calls[0]
    untrained = policy().model
    chosen = one_by_one(untrained, PROMPTS, CHOSEN)
    rejected = one_by_one(untrained, PROMPTS, REJECTED)
    end = policy().tokenizer.eos_token_id
    side = call["batch"].chosen
    assert all(
        end == row[mask][-1] for row, mask in zip(side.inputs["step", "token"], side.mask, strict=True)
    )
    for name, sums in (("chosen", chosen), ("rejected", rejected)):
        mean = float(torch.stack([row.sum() for row in sums]).detach().mean())
        assert float(call["metrics"][f"log_prob_{name}"]) == pytest.approx(mean, abs=1e-4)


def test_log_probabilities_are_float32_whatever_the_weights() -> None:
    half = policy()
    half.model.to(torch.bfloat16)
    batch = with_reference(pairs(), half)
    assert batch.chosen.reference_log_prob is not None
    assert batch.chosen.reference_log_prob.dtype == torch.float32
    loss, _ = PairwiseObjective()(half, batch)
    assert loss.dtype == torch.float32


def test_sums_over_tokens_by_default_and_means_on_request(tmp_path: Path) -> None:
    """The margin after a step, from transformers' own logits before and after it."""
    for normalise in (None, True):
        method = small(batch_size=6, epochs=2, length_normalise=normalise)
        actor = train(tmp_path / str(normalise), method)
        moved = policy().model
        moved.load_state_dict({name.removeprefix("model."): value for name, value in actor.calls[1]["before"].items()},
                              strict=False)  # fmt: skip
        ratios = []
        for answers in (CHOSEN, REJECTED):
            new, old = one_by_one(moved, PROMPTS, answers), one_by_one(policy().model, PROMPTS, answers)
            reduce: Callable[[Tensor], Tensor] = torch.mean if normalise else torch.sum
            ratios.append(torch.stack([reduce(n - o) for n, o in zip(new, old, strict=True)]))
        h = 0.5 * (ratios[0] - ratios[1])
        assert h.abs().max() > 0.05
        h = h.detach()
        assert float(actor.calls[1]["metrics"]["margin"]) == pytest.approx(float(h.mean()), abs=1e-4)
        assert float(actor.calls[1]["metrics"]["loss"]) == pytest.approx(
            float(torch.nn.functional.softplus(-h).mean()), abs=1e-4
        )


@pytest.mark.parametrize("lora", [0, 2])
def test_the_loss_at_step_0_is_exactly_log_2_also_with_dropout_in_the_model(
    lora: int, tmp_path: Path
) -> None:
    model = tiny_llama()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    noisy = LanguagePolicy(model, tokenizer()).train()
    with torch.no_grad():  # it does drop out while it is left in training mode
        assert not torch.equal(noisy.log_prob(pairs().chosen), noisy.log_prob(pairs().chosen))
    method = small(lora_rank=lora)
    actor = train(tmp_path / "run", method, actor=Watched("actor", noisy, method.roles()["actor"]))
    first = actor.calls[0]["metrics"]
    assert float(first["loss"]) == torch.tensor(2.0).log().item()
    assert float(first["margin"]) == 0
    assert float(first["rewards_chosen"]) == 0
    assert float(actor.calls[1]["metrics"]["margin"]) != 0


def test_the_reference_is_frozen_at_the_start_and_never_moves(tmp_path: Path) -> None:
    actor = train(tmp_path / "run", small(epochs=3))
    start = policy()
    assert len(actor.calls) == 6
    for call in actor.calls:
        for side in (call["batch"].chosen, call["batch"].rejected):
            assert not side.reference_log_prob.requires_grad
            assert torch.allclose(side.reference_log_prob, start.log_prob(side).detach(), atol=1e-6)
    assert actor.log_prob(pairs().chosen).sub(start.log_prob(pairs().chosen)).abs().max() > 0.1


def test_the_update_is_the_analytic_gradient(tmp_path: Path) -> None:
    """``-beta sigma(-beta h) (grad log p(y_w) - grad log p(y_l))``, averaged over pairs; at a policy that has moved, where
    the weights of the pairs differ."""
    rate, beta = 0.5, 0.5
    actor = train(tmp_path / "run", small(batch_size=6, beta=beta), settings=RoleSettings(SGD(rate), None))
    call, model = actor.calls[1], policy()
    model.load_state_dict(call["before"], strict=False)
    batch = call["batch"]
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    factors = []
    for i in range(6):
        sums = [model.log_prob(side[i : i + 1]).sum() for side in (batch.chosen, batch.rejected)]
        base = [side[i : i + 1].reference_log_prob.sum() for side in (batch.chosen, batch.rejected)]
        h = float((sums[0] - base[0] - (sums[1] - base[1])).detach())
        factors.append(beta / (1 + math.exp(beta * h)))
        slopes = torch.autograd.grad(sums[0] - sums[1], list(model.parameters()))
        for (name, _), slope in zip(model.named_parameters(), slopes, strict=True):
            expected[name] -= factors[-1] * slope / 6
    assert max(factors) - min(factors) > 0.02
    for name, slope in expected.items():
        assert torch.allclose(call["after"][name], call["before"][name] - rate * slope, atol=1e-5), name


def test_a_shift_of_both_rewards_of_a_prompt_changes_nothing(tmp_path: Path) -> None:
    start = policy()
    plain, shifted = with_reference(pairs(), start), with_reference(pairs(), start)
    for side in (shifted.chosen, shifted.rejected):  # c(x) / beta off the reference is c(x) on the reward
        assert side.reference_log_prob is not None
        side.reference_log_prob[:, 0] -= torch.tensor([3.0, -1.0, 0.5, 7.0, -2.0, 0.0])
    ends = [train(tmp_path / str(i), small(), InMemory(data)) for i, data in enumerate((plain, shifted))]
    assert ends[0].calls[0]["metrics"]["rewards_chosen"] != ends[1].calls[0]["metrics"]["rewards_chosen"]
    for name, value in weights(ends[0]).items():
        assert torch.allclose(value, weights(ends[1])[name], atol=1e-4), name


def test_ranked_lists_of_two_have_the_same_loss() -> None:
    start, moved = policy(), policy()
    with torch.no_grad():
        for value in moved.parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(0)))
    batch = with_reference(pairs(), start)
    lists = concatenate([batch.chosen, batch.rejected]).with_(group=torch.arange(6).repeat(2))
    lists = lists.judged(torch.tensor([1.0] * 6 + [0.0] * 6))
    ranked, _ = PlackettLuce(beta=0.5)(moved, lists)
    paired, _ = PairwiseObjective(beta=0.5)(moved, batch)
    assert float(ranked.detach()) == pytest.approx(float(paired.detach()), abs=1e-5)


def test_with_an_adapter_the_reference_is_the_base_with_the_adapter_off(tmp_path: Path) -> None:
    method = small(lora_rank=2, lr=5e-2, optimiser="adamw")
    actor = Watched("actor", policy(), method.roles()["actor"])
    reference = actor.copy(frozen=True)
    assert reference.model is actor.model  # nothing is copied
    train(tmp_path / "run", method, actor=actor)
    before = {n: v for n, v in actor.calls[0]["before"].items() if "lora" not in n}
    assert all(torch.equal(value, weights(actor)[name]) for name, value in before.items())
    start = policy().log_prob(pairs().chosen).detach()
    assert (actor.log_prob(pairs().chosen) - start).abs().max() > 0.05
    assert torch.allclose(reference.log_prob(pairs().chosen), start, atol=1e-6)
    assert torch.allclose(
        actor.calls[-1]["batch"].chosen.reference_log_prob,
        policy().log_prob(actor.calls[-1]["batch"].chosen).detach(),
        atol=1e-6,
    )


def test_training_that_goes_on_from_an_adapter_is_held_by_that_adapter(tmp_path: Path) -> None:
    method = small(lora_rank=2, lr=5e-2, optimiser="adamw")
    actor = train(tmp_path / "first", method)
    moved = actor.log_prob(pairs().chosen)
    assert (moved - policy().log_prob(pairs().chosen).detach()).abs().max() > 0.05
    actor.calls.clear()
    train(tmp_path / "second", method, actor=actor)
    assert float(actor.calls[0]["metrics"]["loss"]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(actor.calls[-1]["metrics"]["loss"]) < math.log(2)


def test_metrics(tmp_path: Path) -> None:
    """Every record has the implicit rewards, their margin and accuracy, log-probabilities, and on request the KL."""
    train(tmp_path / "run", small(epochs=4, kl_every=2, lr=1e-3))
    records = read_metrics(tmp_path / "run")
    names = {
        "loss",
        "rewards_chosen",
        "rewards_rejected",
        "margin",
        "accuracy",
        "log_prob_chosen",
        "log_prob_rejected",
    }
    assert all(names <= record.keys() for record in records)
    assert ["kl" in record for record in records] == [False, True] * 4
    assert all(record["kl"] >= 0 for record in records[1::2])
    assert records[-1]["kl"] > records[1]["kl"] > 0
    last = records[-1]
    assert last["margin"] == pytest.approx(last["rewards_chosen"] - last["rewards_rejected"], abs=1e-5)
    assert last["accuracy"] == 1.0


def test_a_cached_reference_trains_alike(tmp_path: Path) -> None:
    for lora in (0, 2):
        ends = [
            train(tmp_path / f"{lora}{cache}", small(cache_reference=cache, lora_rank=lora))
            for cache in (False, True)
        ]
        for a, b in zip(ends[0].calls, ends[1].calls, strict=True):
            assert float(a["metrics"]["loss"]) == pytest.approx(float(b["metrics"]["loss"]), abs=1e-5)
            assert torch.equal(a["batch"].chosen.mask, b["batch"].chosen.mask)


@pytest.mark.parametrize("loss", get_args(PairLoss))
def test_every_loss_trains(loss: str, tmp_path: Path) -> None:
    smoothing = 0.05 if loss in ("exo_pair", "robust") else 0.0
    options: dict[str, Any] = {"unlikelihood": 0.3} if loss == "unlikelihood" else {}
    method = small(loss=loss, label_smoothing=smoothing, epochs=4, lr=3e-3, **options)
    actor = train(tmp_path / "run", method)
    calls, start = actor.calls, policy()
    ratio = [
        (actor.log_prob(s) - start.log_prob(s).detach()).sum(1) for s in (pairs().chosen, pairs().rejected)
    ]
    assert float((ratio[0] - ratio[1]).mean()) > 0.1
    assert all(math.isfinite(float(call["metrics"]["loss"])) for call in calls)
    reads = calls[0]["batch"].chosen.reference_log_prob is not None
    assert reads == (loss not in ("slic", "cpl", "unlikelihood"))


def test_long_rows_are_cut_at_the_prompt_first_then_both_answers_alike(tmp_path: Path) -> None:
    """Through a file, as a user's data come."""
    rows = [
        {"prompt": "a b c d e f g h", "chosen": "a b", "rejected": "c"},
        {"prompt": "a b", "chosen": "c d e f g h a b", "rejected": "h g f e d c"},
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    blank = policy()
    found = {}
    for keep in ("start", "end"):
        data = load_preferences(path, blank, max_prompt=4, max_length=7, keep=keep)
        actor = train(tmp_path / keep, small(batch_size=1, epochs=1), data)
        for call in actor.calls:
            chosen, rejected = call["batch"].chosen, call["batch"].rejected
            found[keep, chosen.prompts[0]] = [
                blank.tokenizer.decode(chosen.inputs["prompt_token"][0][chosen.inputs["prompt_mask"][0]]),
                int(chosen.mask.sum()),
                int(rejected.mask.sum()),
            ]
    assert sorted(value[0] for (keep, _), value in found.items() if keep == "start") == ["a b", "a b c d"]
    assert sorted(value[0] for (keep, _), value in found.items() if keep == "end") == ["a b", "e f g h"]
    by_prompt = {value[0]: value[1:] for value in found.values()}
    assert by_prompt["a b c d"] == [3, 2]  # answers that fit keep their end
    assert by_prompt["a b"] == [5, 5]


# --- the loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2, "cache_reference": True}, {"loss": "bco_pair"}])
def test_a_run_that_was_interrupted_goes_on_bit_by_bit(options: dict[str, Any], tmp_path: Path) -> None:
    method = small(schedule="linear", warmup=2, epochs=5, kl_every=3, **options)
    whole = train(tmp_path / "whole", method)
    stopped = Watched("actor", policy(), method.roles()["actor"])
    stopped.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "torn", method, actor=stopped, checkpoint_steps=3)
    torn = train(tmp_path / "torn", method, resume=True)
    assert len(torn.calls) == 4  # from the checkpoint of step 6
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (
        tmp_path / "torn" / "metrics.jsonl"
    ).read_bytes()
    assert all(torch.equal(value, weights(torn)[name]) for name, value in weights(whole).items())


def test_a_falling_learning_rate_ends_at_zero_with_the_last_update(tmp_path: Path) -> None:
    method = small(schedule="linear", epochs=4, optimiser="adamw")
    actor = train(tmp_path / "run", method)
    optimiser = actor.settings.optimiser
    assert optimiser is not None
    assert optimiser.total == len(actor.calls) == 8
    assert optimiser.factor(7) == pytest.approx(1 / 8)
    flat = train(tmp_path / "flat", small(epochs=4, optimiser="adamw"))

    def moved(actor: Watched, i: int) -> float:
        call = actor.calls[i]
        return max(float((call["after"][n] - call["before"][n]).abs().max()) for n in call["before"])

    assert moved(actor, 0) == pytest.approx(moved(flat, 0))
    assert moved(actor, 7) < 0.5 * moved(flat, 7)


def test_micro_batches_give_the_same_update(tmp_path: Path) -> None:
    one, parts = (
        train(tmp_path / str(m), small(batch_size=6), settings=RoleSettings(SGD(0.5), micro_batch=m))
        for m in (None, 2)
    )
    for name, value in weights(one).items():
        assert torch.allclose(value, weights(parts)[name], atol=1e-5), name
    for name, value in one.calls[-1]["metrics"].items():
        assert torch.allclose(value, parts.calls[-1]["metrics"][name], atol=1e-5), name


# --- a world whose every answer is known ------------------------------------------------------------------


@pytest.fixture(scope="module")
def world() -> Any:
    from guerdon.tasks.enumlm import world

    return world(0)


def learned(world: Any, folder: Path, flip: float = 0.0) -> tuple[dict[str, float], list[dict[str, Any]]]:
    method = DPO(
        beta=0.5, lr=1e-3, optimiser="adamw", warmup=10, schedule="linear", max_grad_norm=1.0, kl_every=80
    )
    method.batch_size = 64  # 80 updates
    data = InMemory(world.pairs(5_120, seed=5, flip=flip))
    actor = Watched("actor", world.policy(), method.roles()["actor"])
    train(folder, method, data, actor)
    return world.measures(actor), read_metrics(folder)


def test_a_good_part_of_the_way_to_the_optimum_in_a_few_seconds(world: Any, tmp_path: Path) -> None:
    figures, records = learned(world, tmp_path / "run")
    assert figures["gap"] > 0.4
    assert figures["reward"] > 0.4
    assert figures["win_rate"] > 0.6
    estimates = [record["kl"] for record in records if "kl" in record]
    assert estimates[-1] == pytest.approx(figures["kl"], rel=0.5)  # 64 answers against all 32768


def test_turned_labels_lead_the_other_way(world: Any, tmp_path: Path) -> None:
    figures, _ = learned(world, tmp_path / "run", flip=1.0)
    assert figures["reward"] < -0.3
