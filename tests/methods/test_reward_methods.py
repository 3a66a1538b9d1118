"""Methods that learn the judge: what they find out about pairs that they did not see, beside what cannot be learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.batch import Preferences, Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.errors import UsageError
from guerdon.experience.datasets import InMemory
from guerdon.feedback.functions import FunctionReward
from guerdon.feedback.preference_model import PreferenceModel
from guerdon.feedback.reward_model import RewardModel
from guerdon.feedback.teachers import BradleyTerry as Teacher
from guerdon.feedback.teachers import MatrixOracle, label
from guerdon.methods.reward.bradley_terry import BradleyTerry
from guerdon.methods.reward.preference_model import PairwisePreference
from guerdon.objectives.judges import AttributeRegression
from guerdon.optim import AdamW
from guerdon.policies.language import LanguagePolicy
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.tasks.tokens import LETTERS, tiny_llama, tokenizer


def policy(layers: int = 1) -> LanguagePolicy:
    return LanguagePolicy(tiny_llama(width=32, layers=layers), tokenizer(), max_new_tokens=6)


def answers(actor: LanguagePolicy, count: int, length: int, seed: int) -> Trajectories:
    """Random letters in answer to random letters."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(len(LETTERS), (count, length + 1), generator=generator).tolist()
    texts = [" ".join(LETTERS[i] for i in row) for row in words]
    return actor.encode(["a"] * count, [text[2:] for text in texts])


def early(prompts: list[str], texts: list[str]) -> list[float]:
    """Letters from the first half of the alphabet, and a little for 'a', so that ties are few."""
    return [sum(c in "abcd" for c in t.split()) + 0.3 * t.count("a") for t in texts]


def pairs(actor: LanguagePolicy, count: int, seed: int, teacher: Any, length: int = 4) -> Preferences:
    a, b = answers(actor, count, length, seed), answers(actor, count, length, seed + 50)
    return label(a, b, teacher, seed)


def train(method: Any, model: Any, data: Preferences, folder: Path, seed: int = 0) -> Role:
    engine = LocalEngine("cpu", threads=1)
    role = engine.role("reward", model, settings=method.roles()["reward"])
    with Run(folder / "run", engine=engine, seed=seed, progress=False, checkpoint_every=1e9) as run:
        method.train(run, reward=role, preferences=InMemory(data))
    engine.close()
    return role


def accuracy(judge: Role, test: Preferences) -> float:
    return float((judge.compare(test.chosen, test.rejected) > 0.5).float().mean())


SURE = Teacher(FunctionReward(early), float("inf"))
FAST: dict[str, Any] = {"lr": 3e-3, "batch_size": 32}


# --- Bradley and Terry ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"lora_rank": 4, "lr": 1e-2}, {"loss": "hinge"}], ids=["full", "lora", "hinge"]
)
def test_a_reward_model_learns_what_a_teacher_likes(options: dict[str, Any], tmp_path: Path) -> None:
    actor = policy()
    data, unseen = pairs(actor, 800, 0, SURE), pairs(actor, 300, 7, SURE)
    judge = train(BradleyTerry(**(FAST | options)), RewardModel.from_policy(actor), data, tmp_path)
    assert accuracy(judge, unseen) > 0.8
    assert accuracy(Role("untrained", RewardModel.from_policy(actor)), unseen) < 0.65


def test_from_labels_at_random_nothing_is_learned(tmp_path: Path) -> None:
    actor = policy()
    judge = train(
        BradleyTerry(**FAST),
        RewardModel.from_policy(actor),
        pairs(actor, 800, 0, Teacher(FunctionReward(early), 0.0)),
        tmp_path,
    )
    assert accuracy(judge, pairs(actor, 300, 7, SURE)) < 0.7


def test_the_scores_find_the_teachers_scale(tmp_path: Path) -> None:
    """Maximum likelihood: from labels with P = sigmoid(difference) the differences themselves come out."""
    actor = policy()
    soft = Teacher(FunctionReward(early), 1.0)
    judge = train(
        BradleyTerry(lr=3e-3, batch_size=64, epochs=3, normalise=False),
        RewardModel.from_policy(actor),
        pairs(actor, 1500, 0, soft),
        tmp_path,
    )
    a, b = answers(actor, 400, 4, 11), answers(actor, 400, 4, 61)
    true = soft.score(a) - soft.score(b)
    found = judge.score(a) - judge.score(b)
    slope = float((true * found).sum() / true.square().sum())
    assert slope == pytest.approx(1.0, abs=0.25)
    assert float(torch.corrcoef(torch.stack([true, found]))[0, 1]) > 0.85


def test_the_finished_model_has_mean_zero_and_deviation_one(tmp_path: Path) -> None:
    actor = policy()
    data = pairs(actor, 200, 0, SURE)
    judge = train(BradleyTerry(**FAST), RewardModel.from_policy(actor), data, tmp_path)
    scores = torch.cat([judge.score(data.chosen), judge.score(data.rejected)])
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1, abs=1e-4)
    raw = train(BradleyTerry(**FAST, normalise=False), RewardModel.from_policy(actor), data, tmp_path / "raw")
    assert not raw.model.normalised
    judge.save(tmp_path / "saved")
    again = RewardModel.from_pretrained(tmp_path / "saved", actor)
    torch.testing.assert_close(
        again.score(data.chosen).detach(), raw.score(data.chosen), atol=1e-4, rtol=1e-4
    )


def test_the_options_reach_objective_and_optimiser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    actor, seen = policy(), []
    update = Role.update
    monkeypatch.setattr(
        Role,
        "update",
        lambda self, batch, objective: seen.append((batch, objective)) or update(self, batch, objective),
    )
    method = BradleyTerry(epochs=2, batch_size=16, lr=0.0, centering=0.01, label_smoothing=0.1, micro_batch=4)
    model = RewardModel.from_policy(actor)
    before = [p.clone() for p in model.parameters()]
    train(method, model, pairs(actor, 40, 0, SURE), tmp_path)
    assert [batch.batch_size[0] for batch, _ in seen] == [16, 16, 8] * 2
    assert {(o.centering, o.label_smoothing) for _, o in seen} == {(0.01, 0.1)}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# --- models of pairs --------------------------------------------------------------------------------------

CIRCLE = torch.tensor([[0.5, 1.0, 0.0], [0.0, 0.5, 1.0], [1.0, 0.0, 0.5]])


def first_letter(traj: Trajectories) -> Tensor:
    """The class of an answer: its first letter, modulo 3."""
    return (traj.inputs["step", "token"][:, 0] - 2) % 3


def circular(actor: LanguagePolicy, count: int, seed: int) -> Preferences:
    data = pairs(actor, count, seed, MatrixOracle(CIRCLE, first_letter), length=1)
    return data[first_letter(data.chosen) != first_letter(data.rejected)]


def test_a_model_of_pairs_learns_a_circle_that_no_reward_explains(tmp_path: Path) -> None:
    actor = policy(layers=2)
    data, unseen = circular(actor, 1800, 0), circular(actor, 300, 7)
    own: Callable[..., Any] = PairwisePreference(**FAST, order="both").judge
    pairwise = train(PairwisePreference(**FAST, order="both"), own(actor), data, tmp_path / "pairs")
    assert accuracy(pairwise, unseen) > 0.9
    swapped = pairwise.compare(unseen.rejected, unseen.chosen) + pairwise.compare(
        unseen.chosen, unseen.rejected
    )
    torch.testing.assert_close(swapped, torch.ones_like(swapped))
    scored = train(BradleyTerry(**FAST), RewardModel.from_policy(actor), data[:600], tmp_path / "scores")
    assert accuracy(scored, unseen) < 0.75  # two of three at best


def test_pairs_are_shown_in_other_orders_in_each_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, seen = policy(), []
    update = Role.update
    monkeypatch.setattr(
        Role,
        "update",
        lambda self, batch, objective: (
            seen.append((objective.salt, objective.order)) or update(self, batch, objective)
        ),
    )
    method = PairwisePreference(epochs=3, batch_size=16)
    train(method, method.judge(actor), pairs(actor, 40, 0, SURE), tmp_path)
    assert seen == [(k, "random") for k in (0, 0, 0, 1, 1, 1, 2, 2, 2)]


def test_the_form_is_an_option_and_a_reward_model_is_refused(tmp_path: Path) -> None:
    actor = policy()
    judge = PairwisePreference().judge(actor)
    assert isinstance(judge, PreferenceModel)
    assert judge.form == "head"
    with pytest.raises(UsageError, match="does not know"):  # of a word tokenizer, which has no [CONTEXT]
        PairwisePreference(form="choice").judge(actor)
    with pytest.raises(UsageError, match="train it with bradley_terry"):
        train(PairwisePreference(), RewardModel.from_policy(actor), pairs(actor, 8, 0, SURE), tmp_path)


# --- several attributes -----------------------------------------------------------------------------------


def test_a_vector_head_learns_attributes_of_which_half_the_ratings_are_missing() -> None:
    actor = policy()

    def rated(count: int, seed: int) -> Trajectories:
        traj = answers(actor, count, 4, seed)
        token = torch.where(traj.mask, traj.inputs["step", "token"], 99)
        rating = torch.stack([(token < 6).sum(1) / 4, (token == 9).sum(1) / 4 - 0.5], dim=1)
        traj.inputs["rating"] = rating.float()
        return traj

    data, unseen = rated(1200, 0), rated(300, 7)
    missing = torch.rand(data.inputs["rating"].shape, generator=torch.Generator().manual_seed(0)) < 0.5
    data.inputs["rating"] = data.inputs["rating"].masked_fill(missing, torch.nan)
    role = Role("reward", RewardModel.from_policy(actor, outputs=2), RoleSettings(AdamW(3e-3)))
    role.fit(data, AttributeRegression(), epochs=2, minibatch=32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = role.model.scores(unseen)  # type: ignore[operator]
    for k in range(2):
        assert float(torch.corrcoef(torch.stack([found[:, k], unseen.inputs["rating"][:, k]]))[0, 1]) > 0.85
