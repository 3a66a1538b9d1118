"""Models of pairs: antisymmetric whatever they hold, both answers in the input, and able to prefer in circles."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from guerdon.batch import Preferences, Trajectories, concatenate, pad_steps
from guerdon.errors import FeedbackError, ShapeError, UsageError
from guerdon.feedback.preference_model import PreferenceModel, join_rows, reward_against
from guerdon.feedback.reward_model import RewardModel
from guerdon.objectives.judges import PairClassifier, RewardPairs
from guerdon.optim import AdamW
from guerdon.policies.language import LanguagePolicy
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer

PROMPTS = ["a b c d", "h", "e f"]
CHOICE: dict[str, Any] = {"form": "choice", "marks": ("", "g", "h", "g g"), "labels": ("a", "b")}
FORMS = [pytest.param({"form": "head"}, id="head"), pytest.param(CHOICE, id="choice")]


def policy(width: int = 16, layers: int = 1) -> LanguagePolicy:
    return LanguagePolicy(tiny_llama(width=width, layers=layers), tokenizer(), max_new_tokens=5)


def answers(actor: LanguagePolicy, seed: int) -> Trajectories:
    return actor.sample(PROMPTS, row_seeds(seed, 0, len(PROMPTS)))


@pytest.mark.parametrize("options", FORMS)
@pytest.mark.parametrize("swap", ["probability", "logit"])
def test_preferences_are_antisymmetric_and_an_answer_ties_with_itself(
    options: dict[str, Any], swap: str
) -> None:
    actor = policy()
    judge = PreferenceModel.from_policy(actor, **options, swap=swap)
    with torch.no_grad():  # make it prefer whatever is first
        for p in judge.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    a, b = answers(actor, 0), answers(actor, 1)
    p = judge.compare(a, b)
    torch.testing.assert_close(p + judge.compare(b, a), torch.ones(3))
    torch.testing.assert_close(judge.compare(a, a), torch.full((3,), 0.5))
    assert (p != 0.5).any()
    ahead, behind = judge.logit(a, b), judge.logit(b, a)
    wanted = (
        torch.sigmoid((ahead - behind) / 2)
        if swap == "logit"
        else (torch.sigmoid(ahead) + 1 - torch.sigmoid(behind)) / 2
    )
    torch.testing.assert_close(p, wanted, atol=1e-6, rtol=1e-5)


def test_without_swapping_the_bias_of_place_shows() -> None:
    actor = policy()
    judge = PreferenceModel.from_policy(actor, swap="none")
    a, b = answers(actor, 0), answers(actor, 1)
    assert not torch.allclose(judge.compare(a, b) + judge.compare(b, a), torch.ones(3), atol=1e-3)


@pytest.mark.parametrize("options", FORMS)
def test_both_answers_stand_in_the_input_in_their_order(options: dict[str, Any]) -> None:
    """The logit of the bare sequence, marks and all, with nothing to pad."""
    actor = policy()
    judge = PreferenceModel.from_policy(actor, **options)
    a, b = actor.encode(PROMPTS, ["a b", "c", "d e f"]), actor.encode(PROMPTS, ["f", "a a a", "b"], end=False)
    marks = [tokenizer()(m)["input_ids"] if m else [] for m in judge.marks]
    found = judge.logit(a, b)
    for i, prompt in enumerate(PROMPTS):
        first = a.inputs["step", "token"][i][a.mask[i]].tolist()
        second = b.inputs["step", "token"][i][b.mask[i]].tolist()
        ids = [*marks[0], *actor.tokens(prompt), *marks[1], *first, *marks[2], *second, *marks[3]]
        model: Any = judge.model
        hidden = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        if judge.form == "head":
            wanted = model.score(hidden)[0]
        else:
            logits = model.lm_head(hidden)
            wanted = logits[tokenizer()("a")["input_ids"][0]] - logits[tokenizer()("b")["input_ids"][0]]
        torch.testing.assert_close(found[i], wanted, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    actor = policy()
    judge = PreferenceModel.from_policy(actor)
    a, b = answers(actor, 0), answers(actor, 1)
    found = judge.logit(a, b)
    torch.testing.assert_close(judge.logit(pad_steps(a, 9), pad_steps(b, 12)), found, atol=1e-5, rtol=1e-5)
    alone = torch.cat([judge.logit(a[i : i + 1], b[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(alone, found, atol=1e-5, rtol=1e-5)


def test_parts_are_joined_without_their_padding() -> None:
    left = torch.tensor([[0, 1, 2], [0, 0, 3]]), torch.tensor([[False, True, True], [False, False, True]])
    right = torch.tensor([[4, 0], [5, 6]]), torch.tensor([[True, False], [True, True]])
    tokens, mask = join_rows([left, right])
    assert tokens.tolist() == [[1, 2, 4], [3, 5, 6]]
    assert mask.all()


def rock_paper_scissors(actor: LanguagePolicy) -> Preferences:
    """Answers a, b and c: a beats b, b beats c, c beats a, to every prompt."""
    pairs = [("a", "b"), ("b", "c"), ("c", "a")] * len(PROMPTS)
    prompts = [p for p in PROMPTS for _ in range(3)]
    return Preferences(
        chosen=actor.encode(prompts, [w for w, _ in pairs]),
        rejected=actor.encode(prompts, [x for _, x in pairs]),
    )


@pytest.mark.parametrize("options", FORMS)
def test_it_learns_preferences_that_run_in_a_circle(options: dict[str, Any]) -> None:
    """What no score can: the reward model beside it is right on two of three pairs at most."""
    actor = policy(width=32, layers=2)  # which answer was first has to meet what it was
    data = rock_paper_scissors(actor)
    judge = Role("reward", PreferenceModel.from_policy(actor, **options), RoleSettings(AdamW(3e-3)))
    scorer = Role("reward", RewardModel.from_policy(actor), RoleSettings(AdamW(3e-3)))
    for _ in range(75):
        judge.update(data, PairClassifier(order="both"))
    for _ in range(30):
        scorer.update(data, RewardPairs())
    assert (judge.compare(data.chosen, data.rejected) > 0.8).all()
    right = (scorer.compare(data.chosen, data.rejected) > 0.5).view(-1, 3).sum(1)
    assert (right <= 2).all()


@pytest.mark.parametrize("options", FORMS)
def test_a_saved_model_compares_as_before(options: dict[str, Any], tmp_path: Path) -> None:
    actor = policy()
    judge = PreferenceModel.from_policy(actor, **options, swap="logit")
    judge.save_pretrained(tmp_path)
    again = PreferenceModel.from_pretrained(tmp_path, actor)
    assert (again.form, again.marks, again.labels, again.swap) == (
        judge.form,
        judge.marks,
        judge.labels,
        "logit",
    )
    a, b = answers(actor, 0), answers(actor, 1)
    torch.testing.assert_close(again.compare(a, b), judge.compare(a, b))
    texts = PreferenceModel.from_pretrained(tmp_path)
    assert texts.reads == "texts"
    ended = (
        actor.encode(PROMPTS, ["a", "b b", "c"], end=False),
        actor.encode(PROMPTS, ["c", "d", "e e"], end=False),
    )
    torch.testing.assert_close(texts.compare(*ended), judge.compare(*ended), atol=1e-5, rtol=1e-5)
    with pytest.raises(FeedbackError, match="carry none"):
        texts.compare(ended[0].with_(outputs=None), ended[1])


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    actor = policy()
    judge = PreferenceModel.from_policy(actor)
    a = answers(actor, 0)
    with pytest.raises(ShapeError, match="these prompts differ"):
        judge.compare(a, a[torch.tensor([2, 1, 0])])
    with pytest.raises(UsageError, match="does not know ' \\[RESPONSE A\\] '"):
        PreferenceModel.from_policy(actor, "choice", marks=("", " [RESPONSE A] ", "h", ""), labels=("a", "b"))
    with pytest.raises(UsageError, match="two different single tokens"):
        PreferenceModel.from_policy(actor, "choice", marks=("", "g", "h", ""), labels=("a", "a"))
    with pytest.raises(UsageError, match="did you mean 'choice'"):
        PreferenceModel(tiny_llama(width=16, layers=1), tokenizer(), "choise")  # type: ignore[arg-type]
    actor.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is no preference model"):
        PreferenceModel.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="no preference model at"):
        PreferenceModel.from_pretrained(tmp_path / "none")


class Sure:
    """A judge that gives fixed probabilities."""

    def __init__(self, *p: float) -> None:
        self.p = torch.tensor(p)

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        return self.p


def test_a_pointwise_reward_is_the_clipped_logit_against_a_baseline() -> None:
    actor = policy()
    a, b = answers(actor, 0), answers(actor, 1)
    reward = reward_against(Sure(0.5, 0.8, 1.0), a, b)
    assert reward[:2].tolist() == pytest.approx([0.0, math.log(4)], abs=1e-6)
    assert float(reward[2]) == pytest.approx(math.log((1 - 1e-6) / 1e-6), rel=1e-4)


def test_candidates_of_a_prompt_share_their_baseline() -> None:
    """With one baseline the order of rewards is the order of preference over it."""
    actor = policy()
    judge = PreferenceModel.from_policy(actor)
    candidates = concatenate([actor.encode(["a b"], [text]) for text in ("a", "b c", "d")])
    baseline = actor.encode(["a b"] * 3, ["e"] * 3)
    with torch.no_grad():
        reward = reward_against(judge, candidates, baseline)
        assert torch.equal(reward.argsort(), judge.compare(candidates, baseline).argsort())
