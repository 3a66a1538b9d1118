"""A-LoL: what a faithful implementation has, item by item, on a tiny language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.errors import DataError, UsageError
from guerdon.experience.datasets import TextCompletions
from guerdon.experience.prompts import Prompted
from guerdon.feedback.functions import FunctionReward
from guerdon.methods.offline.a_lol import ALoL
from guerdon.objectives.likelihood import WeightedLikelihood
from guerdon.policies.language import LanguagePolicy
from guerdon.roles import Role
from guerdon.run import Run
from guerdon.tasks.tokens import LETTERS, echo, tiny_llama, tokenizer

SMALL: dict[str, Any] = {
    "steps": 12,
    "batch_size": 8,
    "lr": 1e-3,
    "lora_rank": 0,
    "max_grad_norm": 1.0,
    "value_answers": 16,
    "value_epochs": 2,
    "value_lr": 1e-3,
    "value_greedy": False,
    "shown": 0,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "A-LoL": {},
    "ref-free": {"importance": "none"},
    "seq": {"importance": "token"},
    "KL": {"importance": "none", "kl": 0.1},
    "R-LoL": {"weight": "reward"},
    "wBC": {"weight": "reward", "importance": "none"},
    "R-GOLD": {"weight": "reward", "importance": "none", "gold": 0.1},
    "NLL": {"weight": "none", "importance": "none"},
}


def small_policy(seed: int = 0) -> LanguagePolicy:
    return LanguagePolicy(tiny_llama(width=16, layers=1, seed=seed), tokenizer(), max_new_tokens=4)


def recorded(policy: LanguagePolicy, rows: int = 64, right: float = 0.4) -> TextCompletions:
    """Answers of one to four letters, each of which is the prompt's with probability ``right``; reward: their share."""
    generator = torch.Generator().manual_seed(0)

    def number(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    prompts = [LETTERS[number(8)] for _ in range(rows)]
    texts = []
    for prompt in prompts:
        same = torch.rand(1 + number(4), generator=generator) < right
        texts.append(" ".join(prompt if s else LETTERS[number(8)] for s in same))
    shares = [sum(a == p for a in t.split()) / len(t.split()) for p, t in zip(prompts, texts, strict=True)]
    tokens = [policy.tokens(p) for p in prompts], [policy.answer_tokens(t) for t in texts]
    return TextCompletions(policy, *tokens, reward=torch.tensor(shares), texts=(prompts, texts))


class Spy(Role):
    """Keeps what it learned from, what was sampled meanwhile, and may stop."""

    stop_at: int | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.batches: list[Any] = []
        self.events: list[str] = []
        self.metrics: list[dict[str, Tensor]] = []

    def update(self, batch: Any, objective: Any, **others: Any) -> Any:
        if self.stop_at == self.updates:
            raise KeyboardInterrupt
        self.batches.append(batch)
        self.objective = objective
        self.events.append("update")
        metrics = super().update(batch, objective, **others)
        self.metrics.append(dict(metrics))
        return metrics

    def sample(self, *args: Any, **options: Any) -> Trajectories:
        self.events.append("sample")
        return super().sample(*args, **options)


class Judge(FunctionReward):
    """The echo reward, with a memory."""

    def __init__(self) -> None:
        super().__init__(echo)
        self.seen: list[tuple[str, str]] = []

    def score(self, traj: Trajectories) -> Tensor:
        self.seen += zip(traj.prompts, traj.texts, strict=True)
        return super().score(traj)


def learned(
    folder: Path,
    stop_at: int | None = None,
    resume: bool = False,
    data: Any = None,
    every: int = 1000,
    **options: Any,
) -> tuple[Spy, Judge]:
    method = ALoL(**{**SMALL, **options})
    policy = small_policy()
    actor = Spy("actor", policy, method.roles()["actor"])
    actor.stop_at = stop_at
    judge = Judge()
    experience = Prompted(list("abcd"), seed=5)
    rated = recorded(policy) if data is None else data(policy)
    with Run(
        folder, engine=LocalEngine("cpu", 1), progress=False, checkpoint_steps=every, resume=resume
    ) as run:
        run.adopt("actor", actor)
        run.track("experience", experience)
        method.train(run, actor, rated, experience, judge)
    return actor, judge


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the checklist ----------------------------------------------------------------------------------------


def test_the_loss_is_the_sum_of_token_nll_with_the_end_of_text_times_ratio_and_advantage(
    tmp_path: Path,
) -> None:
    actor, _ = learned(tmp_path / "run", steps=30)
    batch = actor.batches[3]
    last = batch.inputs["step", "token"].gather(1, batch.lengths[:, None] - 1)
    assert (last == 0).all()  # the end-of-text token, one of the steps that count
    log_prob = actor.model.log_prob(batch)
    ratio = (log_prob - batch.reference_log_prob).sum(1).exp()
    assert (ratio - 1).abs().max() > 0.05  # the policy has moved since
    rho = ratio.clamp(0.1, 1.9).detach()
    expected = -(log_prob.sum(1) * rho * batch.advantage[:, 0]).mean()
    loss, metrics = actor.objective(actor.model, batch)
    torch.testing.assert_close(loss, expected)
    weights = list(actor.model.parameters())
    for found, wanted in zip(
        torch.autograd.grad(loss, weights, retain_graph=True),
        torch.autograd.grad(expected, weights),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)  # so ratio and advantage carry no gradient
    assert metrics["rho"].item() == pytest.approx(rho.mean().item())


def test_the_value_is_fitted_to_the_references_own_answers_to_held_out_prompts(tmp_path: Path) -> None:
    _, judge = learned(tmp_path / "run", value_answers=8)
    fresh = small_policy()
    own = Prompted(list("abcd"), seed=5).collect(Role("fresh", fresh), 8)
    assert judge.seen == list(zip(own.prompts, own.texts, strict=True))
    first = records(tmp_path / "run")[0]
    assert first["value_error"] > 0


def test_the_published_answers_for_the_value_are_the_likeliest(tmp_path: Path) -> None:
    _, judge = learned(tmp_path / "run", value_answers=8, value_greedy=True)
    assert len(judge.seen) == 8
    assert len(set(judge.seen)) == 4  # a prompt has one likeliest answer, whatever the seed
    fresh, (prompt, text) = small_policy(), judge.seen[0]
    step = fresh.distribution(fresh.encode([prompt], [text]))["logits"].argmax(-1)[0]
    letters = fresh.answer_tokens(text, end=False)
    assert step[: len(letters)].tolist() == letters


def test_scores_of_a_reward_model_go_through_a_sigmoid(tmp_path: Path) -> None:
    def scored(policy: LanguagePolicy) -> TextCompletions:
        data = recorded(policy)
        assert data.reward is not None
        data.reward = 8 * data.reward - 4
        return data

    with pytest.raises(DataError, match="sigmoid"):
        learned(tmp_path / "plain", data=scored)
    actor, _ = learned(tmp_path / "run", data=scored, sigmoid=True)
    reward = torch.cat([batch.score() for batch in actor.batches])
    advantage = torch.cat([batch.advantage[:, 0] for batch in actor.batches])
    assert ((reward > 0) & (reward < 1)).all()
    # the value of an untrained head's prompts is near the middle of the judged rewards, sigmoid(0) to sigmoid(1)
    assert ((reward - advantage - 0.55).abs() < 0.15).all()


def test_answers_at_or_below_the_value_are_dropped_and_the_steps_are_scaled_by_the_share_kept(
    tmp_path: Path,
) -> None:
    actor, _ = learned(tmp_path / "run", steps=40)
    first = records(tmp_path / "run")[0]
    assert 0.1 < first["kept"] < 0.9
    assert actor.updates == round(40 * first["kept"]) == len(records(tmp_path / "run"))
    drawn = torch.cat([batch.advantage[:, 0] for batch in actor.batches])
    assert (drawn > 0).all()
    assert first["advantage_all"] < first["advantage_kept"]


def test_advantages_are_computed_once_from_the_frozen_reference(tmp_path: Path) -> None:
    actor, _ = learned(tmp_path / "run", steps=60, lr=3e-2)
    seen: dict[tuple[str, str], set[float]] = {}
    for batch in actor.batches:
        for key, a in zip(
            zip(batch.prompts, batch.texts, strict=True), batch.advantage[:, 0].tolist(), strict=True
        ):
            seen.setdefault(key, set()).add(a)
    assert max(len(v) for v in seen.values()) == 1
    counts = [len(b.prompts) for b in actor.batches]
    assert sum(counts) > 2 * len(seen)  # many were drawn again, after the actor had moved


@pytest.mark.parametrize("priority", ["good_priority", "good_random"])
def test_answers_are_drawn_by_exact_probabilities(tmp_path: Path, priority: str) -> None:
    """A chi-square test of the rows that a run drew."""
    policy = small_policy()
    data = recorded(policy, 24)
    advantage = torch.linspace(-0.5, 0.8, 24)
    method = ALoL(**{**SMALL, "steps": 150, "batch_size": 32, "priority": priority, "importance": "none"})
    actor = Spy("actor", policy, method.roles()["actor"])
    with Run(tmp_path / "run", engine=LocalEngine("cpu", 1), progress=False, checkpoint_every=1e9) as run:
        method.learn(run, actor, actor.copy(frozen=True), data, advantage)
    drawn = torch.cat([batch.advantage[:, 0] for batch in actor.batches])
    count = torch.stack([(drawn - a).abs() < 1e-6 for a in advantage.tolist()]).sum(1)
    good = advantage > 0
    assert count[~good].sum() == 0
    weight = advantage[good] if priority == "good_priority" else torch.ones(int(good.sum()))
    wanted = weight / weight.sum() * len(drawn)
    statistic = ((count[good] - wanted) ** 2 / wanted).sum()
    assert statistic < 40  # 14 degrees of freedom: exceeded once in 4000 seeds
    if priority == "good_priority":
        flat = torch.full_like(wanted, len(drawn) / len(wanted))
        assert ((count[good] - flat) ** 2 / flat).sum() > 200


def test_the_clip_is_a_plain_clamp_that_keeps_a_gradient_alive() -> None:
    policy = small_policy()
    batch = recorded(policy).take(torch.arange(8))
    log_prob = policy.log_prob(batch).detach()
    batch = batch.with_(advantage=batch.per_step(torch.ones(8)))
    far = batch.with_(reference_log_prob=log_prob + 3.0)  # the policy has lost these answers: a ratio near 0
    plain, clipped = gradients(policy, batch, importance="none"), gradients(policy, far)
    torch.testing.assert_close(clipped, 0.1 * plain)
    torch.testing.assert_close(gradients(policy, batch.with_(reference_log_prob=log_prob - 3)), 1.9 * plain)
    assert gradients(policy, far, clip=None).norm() < 0.2 * clipped.norm()


def test_all_forms_have_one_gradient_at_step_0() -> None:
    policy = small_policy()
    batch = recorded(policy).take(torch.arange(16))
    batch = batch.with_(
        advantage=batch.per_step(batch.score()), reference_log_prob=policy.log_prob(batch).detach()
    )
    plain = gradients(policy, batch, importance="none")
    for importance in ("sequence", "token"):
        torch.testing.assert_close(gradients(policy, batch, importance=importance), plain)
    # the KL form adds the gradient of the mean log-ratio
    likelihood = gradients(policy, batch, importance="none", by="none")
    torch.testing.assert_close(
        gradients(policy, batch, importance="none", kl=0.1), plain - 0.1 * likelihood, atol=1e-6, rtol=1e-4
    )
    # R-LoL is A-LoL with the advantage replaced by the reward
    torch.testing.assert_close(gradients(policy, batch, by="reward"), plain)


def gradients(
    policy: LanguagePolicy, batch: Trajectories, by: str = "advantage", importance: str = "sequence", **o: Any
) -> Tensor:
    objective = WeightedLikelihood("sum", by, importance=importance, **o)  # type: ignore[arg-type]
    loss, _ = objective(policy, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()))])


def test_several_rewards_sum_to_a_known_maximum(tmp_path: Path) -> None:
    def summed(policy: LanguagePolicy) -> TextCompletions:
        data = recorded(policy)
        assert data.reward is not None
        data.reward = 3 * data.reward
        return data

    with pytest.raises(DataError, match="max_value"):
        learned(tmp_path / "one", data=summed)
    learned(tmp_path / "three", data=summed, max_value=3.0)
    assert 0 < records(tmp_path / "three")[0]["kept"] < 1


def test_the_log_has_what_the_paper_reports(tmp_path: Path) -> None:
    learned(tmp_path / "run", shown=32)
    first, last = (records(tmp_path / "run")[i] for i in (0, -1))
    assert {"kept", "advantage", "rho", "clip_fraction", "nll", "loss", "length", "grad_norm"} <= first.keys()
    for who in ("", "reference_"):
        assert {
            f"{who}{n}" for n in ("reward", "length", "distinct_1", "distinct_2", "distinct_3")
        } <= last.keys()
        assert 0 < last[f"{who}distinct_1"] < last[f"{who}distinct_2"] <= 1
    assert first["rho"] == pytest.approx(1.0, abs=1e-5)
    assert first["clip_fraction"] == 0


def test_nothing_is_generated_while_it_learns(tmp_path: Path) -> None:
    actor, judge = learned(tmp_path / "run", shown=8)
    text = " ".join(actor.events)
    assert "update sample update" not in text
    assert actor.events.count("update") == actor.updates
    assert len(judge.seen) == 16 + 2 * 8


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_and_baseline_starts_from_the_same_model_and_learns(
    tmp_path: Path, variant: str
) -> None:
    actor, _ = learned(tmp_path / "run", steps=20, shown=8, **VARIANTS[variant])
    start, end = actor.metrics[0]["nll"], actor.metrics[-1]["nll"]
    same = Role("untrained", small_policy()).log_prob(actor.batches[0])
    torch.testing.assert_close(start, -same.sum() / actor.batches[0].mask.sum())
    assert end < start


def test_a_ratio_and_a_kl_together_are_another_method() -> None:
    with pytest.raises(UsageError, match="different methods"):
        ALoL(kl=0.1)
    with pytest.raises(UsageError, match="different methods"):
        ALoL(weight="reward", gold=0.1)


# --- as a run ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(tmp_path: Path, cached: bool) -> None:
    options: dict[str, Any] = {"steps": 20, "shown": 8, "cache_reference": cached}
    whole, _ = learned(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        learned(tmp_path / "cut", stop_at=3, every=1, **options)
    cut, _ = learned(tmp_path / "cut", resume=True, **options)
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "cut")]
    assert metrics[0] == metrics[1]
    assert cut.updates == whole.updates > len(cut.batches)
    for a, b in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_cached_reference_changes_nothing(tmp_path: Path) -> None:
    actors = [learned(tmp_path / str(c), cache_reference=c)[0] for c in (False, True)]
    for a, b in zip(*(actor.model.parameters() for actor in actors), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_adapted_actor_is_its_own_reference(tmp_path: Path) -> None:
    actor, _ = learned(tmp_path / "run", lora_rank=4, steps=30, lr=1e-2)
    batch = actor.batches[-1]
    untouched = Role("untrained", small_policy()).log_prob(batch)
    torch.testing.assert_close(batch.reference_log_prob, untouched, atol=1e-5, rtol=1e-5)
    assert (actor.log_prob(batch) - untouched).abs().max() > 0.1


def test_it_learns_from_bad_answers_what_imitation_does_not(tmp_path: Path) -> None:
    """A fifth of the recorded letters are right. A-LoL keeps the answers above the reference's value."""
    shares = {}
    for name in ("A-LoL", "NLL"):
        options = {**VARIANTS[name], "steps": 120, "lr": 1e-2, "value_epochs": 8, "value_answers": 64}
        actor, _ = learned(tmp_path / name, data=lambda p: recorded(p, 400, 0.2), **options)
        traj = actor.sample(list(LETTERS) * 32, torch.arange(256))
        pairs = [(p, t.split()) for p, t in zip(traj.prompts, traj.texts, strict=True)]
        shares[name] = sum(a == p for p, t in pairs for a in t) / max(1, sum(len(t) for _, t in pairs))
    assert shares["A-LoL"] > shares["NLL"] + 0.2
