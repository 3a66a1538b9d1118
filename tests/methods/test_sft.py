"""SFT: maximum likelihood of answers' tokens, and the Preferred-FT baseline of DPO."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.engine.local import LocalEngine
from guerdon.experience.datasets import InMemory
from guerdon.methods.imitation.sft import SFT
from guerdon.optim import SGD
from guerdon.policies.language import LanguagePolicy
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run, read_metrics
from guerdon.tasks.tokens import tiny_llama, tokenizer

PROMPTS = ["a", "b c d", "e f", "h h g a b", "c", "d d"]
ANSWERS = ["a b", "c", "d e f g", "b", "", "h g"]


class Stopped(Role):
    """A role that is interrupted before an update."""

    stop_at = -1

    def update(self, *args: Any, **others: Any) -> Any:
        if self.updates == self.stop_at:
            raise KeyboardInterrupt
        return super().update(*args, **others)


def policy() -> LanguagePolicy:
    return LanguagePolicy(tiny_llama(), tokenizer(), max_new_tokens=6)


def weights(role: Role) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in role.model.named_parameters()}


def small(**options: Any) -> SFT:
    return SFT(**({"batch_size": 3, "lr": 1e-2, "epochs": 2} | options))


def train(folder: Path, method: SFT, actor: Role | None = None, data: Any = None, **options: Any) -> Role:
    actor = actor or Role("actor", policy(), method.roles()["actor"])
    engine = LocalEngine("cpu", threads=1)
    try:
        with Run(
            folder, engine=engine, seed=3, progress=False, **{"checkpoint_every": 1e9, **options}
        ) as run:
            run.adopt("actor", actor)
            method.train(run, actor, InMemory(policy().encode(PROMPTS, ANSWERS)) if data is None else data)
    finally:
        engine.close()
    return actor


def test_the_loss_is_the_mean_over_answer_tokens_the_end_among_them(tmp_path: Path) -> None:
    train(tmp_path / "run", small(batch_size=6, epochs=1))
    blank, total, count = policy(), 0.0, 0
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        p, a = blank.tokens(prompt), blank.answer_tokens(answer)
        assert a[-1] == blank.tokenizer.eos_token_id
        with torch.no_grad():
            log_p = blank.model(input_ids=torch.tensor([p + a])).logits[0].log_softmax(-1)
        total -= sum(float(log_p[len(p) - 1 + i, token]) for i, token in enumerate(a))
        count += len(a)
    assert read_metrics(tmp_path / "run")[0]["loss"] == pytest.approx(total / count, abs=1e-4)


def test_a_long_answer_weighs_as_many_tokens_as_it_has_in_any_split(tmp_path: Path) -> None:
    ends = []
    for micro in (None, 1, 4):
        method = small(batch_size=6)
        settings = RoleSettings(SGD(0.5), micro_batch=micro)
        ends.append(weights(train(tmp_path / str(micro), method, Role("actor", policy(), settings))))
    for end in ends[1:]:
        assert all(torch.allclose(value, end[name], atol=1e-5) for name, value in ends[0].items())


@pytest.mark.parametrize("options", [{}, {"lora_rank": 4, "lr": 2e-2}])
def test_it_learns_its_demonstrations(options: dict[str, Any], tmp_path: Path) -> None:
    before = weights(Role("actor", policy()))
    actor = train(tmp_path / "run", small(epochs=40, **options))
    data = policy().encode(PROMPTS, ANSWERS)
    old, new = (float(-model.log_prob(data).sum().detach() / data.mask.sum()) for model in (policy(), actor))
    assert new < (0.9 if options else 0.5) * old  # under an adapter the output layer stays as it was drawn
    if options:
        after = weights(actor)
        assert all(torch.equal(v, after[n]) for n, v in before.items() if n in after)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_run_that_was_interrupted_goes_on_bit_by_bit(schedule: Any, tmp_path: Path) -> None:
    method = small(schedule=schedule, warmup=2, epochs=5, weight_decay=0.1)
    whole = train(tmp_path / "whole", method)
    stopped = Stopped("actor", policy(), method.roles()["actor"])
    stopped.stop_at = 7
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "torn", method, stopped, checkpoint_steps=3)
    torn = train(tmp_path / "torn", method, resume=True)
    assert torn.updates == 10
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (
        tmp_path / "torn" / "metrics.jsonl"
    ).read_bytes()
    assert all(torch.equal(value, weights(torn)[name]) for name, value in weights(whole).items())
    flat = train(tmp_path / "flat", replace(method, schedule="constant"))
    assert not all(torch.equal(value, weights(flat)[name]) for name, value in weights(whole).items())


def test_on_preferred_answers_the_reward_rises_a_little(tmp_path: Path) -> None:
    """Preferred-FT, on the world whose answers can all be enumerated: it goes where the chosen answers are, which is far
    from the optimum."""
    from guerdon.tasks.enumlm import world

    enumerated = world(0)
    data = InMemory(enumerated.pairs(6_000, seed=5).chosen)
    method = SFT(batch_size=64, lr=1e-3, epochs=1, schedule="linear", warmup=5)
    actor = train(tmp_path / "run", method, Role("actor", enumerated.policy(), method.roles()["actor"]), data)
    figures = enumerated.measures(actor)
    assert 0.15 < figures["reward"] < 0.7
    assert 0.1 < figures["gap"] < 0.6
