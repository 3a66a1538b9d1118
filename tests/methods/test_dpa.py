"""DPA: what is kept for which direction, what is learned, what the reward model reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.errors import UsageError
from guerdon.experience.completions import Completions
from guerdon.experience.datasets import InMemory
from guerdon.experience.directions import at_angles
from guerdon.methods.online.dpa import DPA
from guerdon.run import Run
from guerdon.tasks import topics
from tiny import Watched

SMALL: dict[str, Any] = {
    "prompts_per_iteration": 4,
    "directions": 3,
    "candidates": 4,
    "epochs": 1,
    "batch_size": 12,
    "lr": 1e-3,
    "system": topics.SYSTEM,
}


class Oracle(torch.nn.Module):
    """The true rewards where a reward model is expected; keeps the prompts it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Trajectories] = []

    def scores(self, traj: Trajectories) -> Tensor:
        self.seen.append(traj)
        return topics.Gold().scores(traj)


def experience() -> Completions:
    return Completions(topics.prompts()[0][:6], seed=3)


def train(method: DPA, folder: Path, judge: Any = None, rated: Any = None, policy: Any = None) -> Any:
    """``(actor, judge)`` after training; the actor's ``calls`` are what it learned from."""
    if policy is None:
        policy = topics.fresh_policy(0, 16, 1)
        policy.max_new_tokens = 10
    judge = judge or Oracle()
    settings = method.roles()
    actor = Watched("actor", policy, settings["actor"])
    reward = Watched("reward", judge, settings["reward"])
    engine = LocalEngine("cpu", threads=1)
    with Run(folder / "run", engine=engine, progress=False, checkpoint_every=1e9) as run:
        method.train(run, actor=actor, reward=reward, experience=experience(), rated=rated)
    engine.close()
    return actor, reward


def learned(actor: Any) -> list[Trajectories]:
    return [batch for batch, _, _ in actor.calls]


class Spying(DPA):
    """Keeps the directions that were written, and the prompts that were answered."""

    def written(self, places: list[int], direction: Tensor, experience: Any) -> list[str]:
        texts = super().written(places, direction, experience)
        self.drawn = [*getattr(self, "drawn", []), (direction, texts)]
        return texts

    def objective_values(self, actor: Any, reward: Any, traj: Any, prompts: list[str]) -> Tensor:
        self.asked = [*getattr(self, "asked", []), traj.prompts]
        return super().objective_values(actor, reward, traj, prompts)


@pytest.mark.parametrize("iteration", [0, 1])
def test_the_kept_answer_is_the_best_for_the_very_direction_in_its_prompt(
    tmp_path: Path, iteration: int
) -> None:
    method = Spying(iterations=2, **SMALL)
    actor, reward = train(method, tmp_path)
    value = topics.Gold().scores(reward.model.seen[iteration])
    value = value.view(4, 3 if iteration else 1, 4, 2).expand(4, 3, 4, 2)
    direction, texts = method.drawn[iteration]
    best = torch.einsum("pdk,pdnk->pdn", direction, value).amax(-1).flatten()
    batch = learned(actor)[iteration]
    found = dict(zip(batch.prompts, topics.Gold().scores(batch), strict=True))
    assert len(found) == 12
    for text, v, most in zip(texts, direction.flatten(0, 1), best, strict=True):
        assert method.renderer.rating(v) in text
        assert float(found[text] @ v) == pytest.approx(float(most), abs=1e-3)


def test_candidates_of_the_first_iteration_are_shared_and_later_ones_are_asked_with_the_direction(
    tmp_path: Path,
) -> None:
    method = Spying(iterations=2, **SMALL)
    train(method, tmp_path)
    first, second = method.asked
    assert len(first) == 16  # four answers to each of four prompts, for all three directions
    assert not any("helpfulness" in text for text in first)
    assert all("helpfulness" in text for text in second)
    assert len(second) == 48
    assert len(set(second)) == 12


def test_the_reward_model_never_sees_a_direction(tmp_path: Path) -> None:
    _, reward = train(DPA(iterations=2, **SMALL), tmp_path)
    policy = topics.fresh_policy(0, 8, 1)
    for seen in reward.model.seen:
        assert not any("helpfulness" in text for text in seen.prompts)
        rows = zip(seen.inputs["prompt_token"], seen.inputs["prompt_mask"], seen.prompts, strict=True)
        assert all(token[mask].tolist() == policy.tokens(text) for token, mask, text in rows)


def test_only_answer_tokens_are_learned_and_the_model_sees_the_direction(tmp_path: Path) -> None:
    actor, _ = train(DPA(iterations=1, **SMALL), tmp_path)
    (batch,) = learned(actor)
    policy = topics.fresh_policy(0, 8, 1)
    for row in range(len(batch)):
        prompt = batch.inputs["prompt_token"][row][batch.inputs["prompt_mask"][row]].tolist()
        assert prompt == policy.tokens(batch.prompts[row])
    # the loss is the mean over answer tokens alone
    fresh = topics.fresh_policy(0, 16, 1)
    log_prob = fresh.log_prob(batch)
    assert actor.calls[0][2]["loss"].item() == pytest.approx(
        -(log_prob.sum() / batch.mask.sum()).item(), rel=1e-4
    )


def test_the_exact_direction_ranks_and_the_rounded_one_is_printed() -> None:
    method = DPA(**SMALL)
    v = at_angles([-44.7])
    (text,) = method.written([0], v[None], experience())
    assert method.renderer.rating(v[0]) in text
    assert not torch.allclose(method.renderer.read(text), v[0], atol=1e-5)


def test_normalising_puts_objectives_on_one_scale(tmp_path: Path) -> None:
    class Louder(Oracle):
        def scores(self, traj: Trajectories) -> Tensor:
            return super().scores(traj) * torch.tensor([1.0, 1000.0])

    batches = {}
    for name, judge in (("plain", Oracle()), ("louder", Louder())):
        actor, _ = train(DPA(iterations=1, normalise=True, **SMALL), tmp_path / name, judge)
        batches[name] = learned(actor)[0]
    assert batches["plain"].texts == batches["louder"].texts
    actor, _ = train(DPA(iterations=1, **SMALL), tmp_path / "raw", Louder())
    assert learned(actor)[0].texts != batches["plain"].texts


def test_the_reward_model_is_fitted_first_where_there_are_ratings(tmp_path: Path) -> None:
    policy = topics.fresh_policy(0, 16, 1)
    options = {**SMALL, "outputs": topics.OUTPUTS, "reward_batch": 32, "reward_lr": 1e-2}
    rated = InMemory(topics.ratings(320, 0))
    _, reward = train(DPA(iterations=1, **options), tmp_path, topics.reward_model(policy), rated, policy)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    errors = [line["reward_error"] for line in lines if "reward_error" in line]
    assert len(errors) == 10
    assert errors[-1] < 0.8 * errors[0]
    assert reward.updates == 10
    assert "best" in lines[-1]
    assert lines[-1]["best"] > lines[-1]["reward"]


def test_kept_answers_become_likelier(tmp_path: Path) -> None:
    actor, _ = train(DPA(iterations=1, **{**SMALL, "epochs": 6, "lr": 5e-3}), tmp_path)
    batch, fresh = learned(actor)[0], topics.fresh_policy(0, 16, 1)
    likelier = actor.log_prob(batch).sum(1) > fresh.log_prob(batch).sum(1)
    assert len(actor.calls) == 6
    assert likelier.float().mean() > 0.9


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="candidates is 0"):
        DPA(candidates=0)
    with pytest.raises(UsageError, match="at least 2"):
        DPA(objectives="helpfulness")
