"""DNO: what it learns from, against which policy, and what it leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.dynamics import games
from guerdon.engine.local import LocalEngine
from guerdon.errors import FeedbackError, UsageError
from guerdon.experience.datasets import InMemory
from guerdon.experience.views import split_rows
from guerdon.feedback.teachers import MatrixOracle
from guerdon.methods.preference.dno import DNO
from guerdon.policies.base import Policy
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.tabular import CategoricalTable
from guerdon.randomness import mix
from guerdon.run import Run
from guerdon.sampling import repeated_ngrams
from guerdon.tasks.tokens import LETTERS, echo, tiny_llama, tokenizer
from tiny import Watched

CYCLE = torch.tensor(
    [[0.5, 0.9, 0.2, 0.6], [0.1, 0.5, 0.85, 0.7], [0.8, 0.15, 0.5, 0.6], [0.4, 0.3, 0.4, 0.5]],
    dtype=torch.float64,
)
START = torch.tensor([0.45, 0.35, 0.2, 1e-9])
TEACHER = 3  # the answer that only the teacher gives; it is the weakest
SMALL = DNO(
    iterations=2,
    samples=4,
    parts=2,
    batch_size=64,
    lr=0.05,
    eta=0.5,
    margin=0.4,
    student_margin=0.2,
    validation=40,
)


def table(start: Tensor = START) -> CategoricalTable:
    policy = CategoricalTable(["?"], 4)
    policy.logits.data.copy_(start.log()[None])
    return policy


class Noted(InMemory):
    """Demonstrations that remember which rows were asked for."""

    def take(self, rows: Tensor) -> Any:
        self.taken = [*getattr(self, "taken", []), rows]
        return super().take(rows)


def demonstrations(count: int = 140, action: int = TEACHER) -> Noted:
    certain = torch.full((4,), 1e-12)
    certain[action] = 1.0
    return Noted(table(certain).sample(["?"] * count, torch.arange(count)))


class Judge(MatrixOracle):
    """Counts the pairs that it is shown."""

    shown = 0

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        self.shown += len(a)
        return super().compare(a, b)


def learn(
    method: DNO,
    folder: Path,
    data: Any = None,
    judge: Any = None,
    policy: Policy | None = None,
    **run_options: Any,
) -> Watched:
    actor = Watched("actor", policy or table(), method.roles()["actor"])
    engine = LocalEngine("cpu", threads=1)
    options = {"checkpoint_every": 1e9, "progress": False, "seed": 5} | run_options
    with Run(folder / "run", engine=engine, **options) as run:
        run.adopt("actor", actor)
        method.train(
            run, actor=actor, demonstrations=data or demonstrations(), feedback=judge or Judge(CYCLE)
        )
    engine.close()
    return actor


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, iteration: int) -> Tensor:
    saved = CategoricalTable.from_pretrained(folder / "run" / "iterations" / str(iteration))
    return saved.logits.detach()[0]


def actions(actor: Watched) -> tuple[Tensor, Tensor]:
    """Of all pairs that were learned from: the better and the worse answer."""
    sides = [
        (b.chosen.inputs["step", "action"], b.rejected.inputs["step", "action"]) for b, _, _ in actor.calls
    ]
    better, worse = (torch.cat([side[i].flatten() for side in sides]) for i in (0, 1))
    return better, worse


# --- what is learned --------------------------------------------------------------------------------------


def test_regression_on_win_rates_is_soft_policy_iteration(tmp_path: Path) -> None:
    start = torch.tensor([0.1, 0.1, 0.1, 0.7])
    method = replace(SMALL, mode="soft", iterations=1, samples=8, batch_size=256, lr=0.05, parts=5)
    actor = learn(method, tmp_path, demonstrations(440, action=0), policy=table(start))
    found = actor.model.logits.detach().double().softmax(-1)[0]  # type: ignore[union-attr,operator]
    exact = games.direct_nash(CYCLE, start.double(), 0.5, 1)[1]
    assert 0.5 * float((found - exact).abs().sum()) < 0.03
    assert 0.5 * float((found - start).abs().sum()) > 0.05


def test_each_iteration_is_preferred_to_the_one_before(tmp_path: Path) -> None:
    method = replace(SMALL, iterations=3, save_iterations=True)
    learn(method, tmp_path, demonstrations(400))
    policies = torch.stack([START.log(), *(weights(tmp_path, i) for i in (1, 2, 3))]).double().softmax(-1)
    gain = games.win_rate(CYCLE, policies[1:], policies[:-1])
    assert float(gain.min()) > 0.51
    last = [r for r in records(tmp_path) if "win_rate_previous" in r]
    assert [r["win_rate_previous"] for r in last] == pytest.approx(gain.tolist(), abs=0.12)  # 40 prompts
    assert all({"win_rate", "length_held_out", "loss"} <= r.keys() for r in last)


def test_a_language_model_learns_from_its_own_answers(tmp_path: Path) -> None:
    policy = LanguagePolicy(tiny_llama(width=32, layers=1), tokenizer(), max_new_tokens=6)
    prompts = list(LETTERS) * 20
    texts = [" ".join([p] * 3 + ["a"] * 3) for p in prompts]
    data = InMemory(policy.encode(prompts, texts, end=False))
    method = replace(SMALL, iterations=1, lr=1e-2, validation=48, top_p=1.0, temperature=1.0, ngram=0)
    learn(method, tmp_path, data, Echo(), policy)
    rates = [r["win_rate_previous"] for r in records(tmp_path) if "win_rate_previous" in r]
    assert rates[-1] > 0.6


class Echo:
    """Prefers the answer that echoes more of the prompt, without a doubt."""

    name = "echo"

    def score(self, traj: Trajectories) -> Tensor:
        return torch.tensor(echo(traj.prompts, traj.texts))

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        return ((self.score(a) - self.score(b)).sign() + 1) / 2


# --- references -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["previous", "initial"])
def test_the_reference_is_the_iteration_before(reference: Any, tmp_path: Path) -> None:
    actor = learn(replace(SMALL, reference=reference, replay=0.0, save_iterations=True), tmp_path)
    first = weights(tmp_path, 1).log_softmax(-1)
    found = []
    for batch, _, _ in actor.calls:
        for side in (batch.chosen, batch.rejected):
            action = side.inputs["step", "action"][:, 0]
            for known, log_p in (("initial", START.log().log_softmax(-1)), ("previous", first)):
                if torch.allclose(side.reference_log_prob[:, 0], log_p[action], atol=1e-5):
                    found.append(known)
    half = found.index("previous") if "previous" in found else len(found)
    assert found[:half] == ["initial"] * half
    assert len(found) == 2 * len(actor.calls)
    assert (half == len(found)) == (reference == "initial")


# --- pairs ------------------------------------------------------------------------------------------------


def test_the_teachers_answers_win_and_lose_and_the_policys_beat_each_other(tmp_path: Path) -> None:
    better, worse = actions(learn(SMALL, tmp_path))
    teacher_won, teacher_lost = better == TEACHER, worse == TEACHER
    assert bool(teacher_won.any())
    assert bool(teacher_lost.any())
    assert bool((~teacher_won & ~teacher_lost).any())
    assert not bool((teacher_won & teacher_lost).any())
    assert int(teacher_lost.sum()) > 2 * int(teacher_won.sum())  # it is the weaker one
    assert SMALL.min_positive == 0.5


def test_restrictive_pairs_are_those_that_the_teacher_won(tmp_path: Path) -> None:
    better, worse = actions(learn(replace(SMALL, pairs="restrictive"), tmp_path))
    assert bool((better == TEACHER).all())
    assert not bool((worse == TEACHER).any())


def test_spin_takes_the_teacher_to_be_right_and_asks_nobody(tmp_path: Path) -> None:
    judge = Judge(CYCLE)
    better, worse = actions(learn(replace(SMALL, pairs="spin", replay=0.0), tmp_path, judge=judge))
    assert bool((better == TEACHER).all())
    assert not bool((worse == TEACHER).any())
    assert len(better) == 100 * SMALL.samples  # every answer to every prompt that is not held out
    assert judge.shown == 2 * 2 * SMALL.validation  # for figures alone


def test_win_rates_are_against_the_pool_of_the_same_policy(tmp_path: Path) -> None:
    judge = Judge(CYCLE)
    learn(SMALL, tmp_path, judge=judge)
    pool = SMALL.samples + 1
    assert judge.shown == 100 * pool * (pool - 1) // 2 + 4 * SMALL.validation


def test_soft_labels_say_by_how_much_and_hard_ones_do_not(tmp_path: Path) -> None:
    soft = learn(replace(SMALL, mode="soft"), tmp_path / "soft")
    for batch, objective, _ in soft.calls:
        assert 0.25 < float(batch.strength.min()) <= float(batch.strength.max()) < 0.75  # sigma of -1 to 1
        assert objective.beta == SMALL.eta
    hard = learn(SMALL, tmp_path / "hard")
    assert all(batch.strength is None for batch, _, _ in hard.calls)
    assert type(hard.calls[0][1]) is type(soft.calls[0][1])


def test_scores_may_rank_in_place_of_win_rates(tmp_path: Path) -> None:
    class Points(Judge):
        def score(self, traj: Trajectories) -> Tensor:
            return torch.tensor([6.0, 3.0, 0.0, 5.0])[traj.outputs["action"][:, 0]]  # type: ignore[index]

    judge = Points(CYCLE)
    method = replace(SMALL, rank="score", min_positive=5.0, margin=2.0, student_margin=1.0)
    better, worse = actions(learn(method, tmp_path, judge=judge))
    assert set(zip(better.tolist(), worse.tolist(), strict=True)) == {(0, 1), (0, 2), (0, 3), (3, 1), (3, 2)}
    assert judge.shown == 4 * SMALL.validation


def test_margins_that_no_pair_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeedbackError, match="no two answers of iteration 1 differ by the margins"):
        learn(replace(SMALL, margin=2.0, student_margin=2.0), tmp_path)


def test_answers_that_repeat_themselves_lose(tmp_path: Path) -> None:
    policy = LanguagePolicy(tiny_llama(width=32, layers=1), tokenizer(), max_new_tokens=6)
    policy.model.lm_head.weight.data.mul_(4)
    prompts = list(LETTERS) * 3
    data = InMemory(policy.encode(prompts, ["a b c d e f"] * 24, end=False))
    method = replace(SMALL, iterations=1, validation=4, ngram=1, ngram_limit=0.4, temperature=0.7, lr=1e-4)
    actor = learn(method, tmp_path, data, Echo(), policy)
    shares: list[Tensor] = []
    for batch, _, _ in actor.calls:
        for side in (batch.chosen, batch.rejected):
            shares.append(repeated_ngrams(side.inputs["step", "token"], side.mask, 1))
            assert bool(
                (side.inputs["temperature"] == 1).all()
            )  # learned as the policy is, whatever it was drawn at
    assert float(torch.cat(shares[::2]).max()) <= 0.4
    assert float(torch.cat(shares[1::2]).max()) > 0.4


# --- iterations -------------------------------------------------------------------------------------------


def test_each_iteration_has_prompts_of_its_own_and_none_is_held_out(tmp_path: Path) -> None:
    data = demonstrations()
    learn(replace(SMALL, iterations=3), tmp_path, data)
    *training, held_out = split_rows(140, 3, SMALL.validation, mix(5, 12))
    rows = torch.cat([*training, held_out])
    assert sorted(rows.tolist()) == list(range(140))
    assert len(held_out) == 40
    asked = [taken for taken in data.taken if not torch.equal(taken, held_out)]
    assert sorted(torch.cat(asked).tolist()) == sorted(torch.cat(training).tolist())  # each once


def test_a_pair_is_learned_once_an_iteration_and_old_ones_are_a_share(tmp_path: Path) -> None:
    spin = replace(SMALL, pairs="spin", iterations=3, parts=3)

    def learned(replay: float) -> list[int]:
        actor = learn(replace(spin, replay=replay), tmp_path / str(replay), demonstrations(40 + 90))
        assert len(actor.calls) == actor.updates
        return [len(batch) for batch, _, _ in actor.calls]

    assert sum(learned(0.0)) == 3 * 30 * 4
    fresh = 120
    total = fresh + (fresh + fresh * 0.3 / 0.7) + (fresh / 0.55)
    assert sum(learned(0.3)) == pytest.approx(total, abs=4)


@pytest.mark.parametrize(("returns", "kept"), [("best", 1), ("last", 2)])
def test_the_best_iteration_on_held_out_prompts_is_kept(
    returns: Any, kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([0.6, 0.4])
    monkeypatch.setattr(DNO, "measure", lambda *_: {"win_rate": next(rates)})
    actor = learn(replace(SMALL, returns=returns, save_iterations=True), tmp_path)
    final = actor.model.logits.detach()[0]  # type: ignore[union-attr,operator]
    assert torch.equal(final, weights(tmp_path, kept))
    assert not torch.equal(final, weights(tmp_path, 3 - kept))


def test_lookahead_trains_the_untrained_policy_on_all_pairs(tmp_path: Path) -> None:
    method = replace(SMALL, lookahead=True, save_iterations=True, returns="best")
    actor = learn(method, tmp_path)
    assert torch.equal(actor.model.logits.detach()[0], weights(tmp_path, 3))  # type: ignore[union-attr,operator]
    start, second, ahead = START.log(), weights(tmp_path, 2), weights(tmp_path, 3)
    moved = [float((w.softmax(-1) - start.softmax(-1)).abs().sum()) for w in (second, ahead)]
    assert moved[1] > 0.01
    assert not torch.equal(second, ahead)


def test_offline_dpo_is_one_iteration(tmp_path: Path) -> None:
    data = demonstrations()
    actor = learn(replace(SMALL, iterations=1), tmp_path, data)
    for batch, _, _ in actor.calls:
        action = batch.chosen.inputs["step", "action"][:, 0]
        expected = START.log().log_softmax(-1)[action]
        assert batch.chosen.reference_log_prob[:, 0] == pytest.approx(expected, abs=1e-5)


# --- resuming, options ------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


@pytest.mark.parametrize("lookahead", [False, True])
def test_a_resumed_run_goes_on_to_the_bit(lookahead: bool, tmp_path: Path) -> None:
    method = replace(SMALL, lookahead=lookahead)

    class Fails(Judge):
        def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
            if self.shown > 900:
                raise KilledError
            return super().compare(a, b)

    whole = learn(method, tmp_path / "whole", checkpoint_steps=1)
    with pytest.raises(KilledError):
        learn(method, tmp_path / "parts", judge=Fails(CYCLE), checkpoint_steps=1)
    assert 0 < len(records(tmp_path / "parts")) < len(records(tmp_path / "whole"))
    again = learn(method, tmp_path / "parts", checkpoint_steps=1, resume=True)
    assert torch.equal(whole.model.logits, again.model.logits)  # type: ignore[union-attr,arg-type]
    metrics = [(tmp_path / name / "run" / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert metrics[0] == metrics[1]


def test_an_adapter_learns_too(tmp_path: Path) -> None:
    policy = LanguagePolicy(tiny_llama(width=32, layers=1), tokenizer(), max_new_tokens=4)
    prompts = list(LETTERS) * 2
    data = InMemory(policy.encode(prompts, [" ".join(p * 4) for p in prompts], end=False))
    method = replace(SMALL, validation=4, lora_rank=2, lr=1e-2, pairs="spin", lookahead=True)
    actor = learn(method, tmp_path, data, Echo(), policy)
    first, last = actor.calls[0][0], actor.calls[-1][0]
    assert actor.updates > 0
    assert float(first.chosen.reference_log_prob.mean()) != float(last.chosen.reference_log_prob.mean())


def test_options_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="samples is 1"):
        DNO(mode="soft", samples=1)
    with pytest.raises(UsageError, match="30 rows cannot be split"):
        learn(SMALL, tmp_path, demonstrations(30))
