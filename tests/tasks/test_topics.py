"""The world of topics: its rewards, its words, its ratings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from guerdon.errors import UsageError
from guerdon.objectives.judges import AttributeRegression
from guerdon.optim import AdamW
from guerdon.roles import Role, RoleSettings
from guerdon.tasks import topics
from guerdon.tasks.base import Pieces


@pytest.fixture
def tiny() -> topics.LanguagePolicy:
    return topics.fresh_policy(0, 16, 1)


def test_rewards_count_words_of_the_topic_and_words(tiny: topics.LanguagePolicy) -> None:
    prompt = "about wave reef tide :"
    answers = [
        "the wave of reef",  # two of two
        "the wave of oven",  # one of two
        "the oven of soil a kettle",  # none of three
        " ".join(["the wave"] * 12),  # one word twelve times
    ]
    traj = tiny.encode([prompt] * 4, answers)
    value = topics.Gold().scores(traj)
    enough = 1 - torch.exp(-torch.tensor([2.0, 1.0, 0.0, 1.0]) / 3)
    assert torch.allclose(value[:, 0], 100 * torch.tensor([1.0, 0.5, 0.0, 1 / 12]) * enough, atol=1e-4)
    assert value[:, 1].tolist() == [0, 0, 10, 100]
    assert torch.allclose(topics.Gold((0.6, -0.8)).score(traj), 0.6 * value[:, 0] - 0.8 * value[:, 1])
    # another prompt, other words count; the direction in front changes nothing
    other = topics.RENDERER.write("about oven salt bowl :", [0.6, -0.8])
    value = topics.Gold().scores(tiny.encode([other] * 4, answers))
    assert value[1, 0] == pytest.approx(50 * enough[1].item(), rel=1e-4)


def test_directions_are_read_digit_by_digit(tiny: topics.LanguagePolicy) -> None:
    ids = tiny.tokens(topics.RENDERER.write("about wave reef tide :", [0.9659, -0.2588]))
    words = [topics.WORDS[i] for i in ids]
    assert " ".join(words) == "helpfulness * 9 7 + verbosity * - 2 6 . about wave reef tide :"
    assert len(topics.WORDS) == len(set(topics.WORDS)) == 64


def test_prompts_to_measure_on_are_held_out() -> None:
    train, held_out = topics.prompts()
    assert (len(train), len(held_out)) == (topics.TRAIN, topics.HELD_OUT)
    assert not set(train) & set(held_out)
    assert set(topics._topic(held_out).tolist()) == {0, 1, 2, 3}


def test_written_answers_are_of_all_lengths_and_mostly_on_the_topic() -> None:
    asked = topics.prompts()[0] * 8
    rows = topics.written_answers(asked, torch.Generator().manual_seed(0))
    assert {len(row) - 1 for row in rows} == set(range(4, 25, 2))
    assert all(row[-1] == 0 for row in rows)
    policy = topics.fresh_policy(0, 8, 1)
    traj = policy.collate([policy.tokens(text) for text in asked], rows)
    value = topics.gold(topics._topic(asked), traj.inputs["step", "token"], traj.mask)
    assert 25 < value[:, 0].mean() < 50
    assert value[:, 1].mean().item() == pytest.approx(50, abs=3)


def test_half_of_the_ratings_are_missing() -> None:
    rating = topics.ratings(400, 0).inputs["rating"]
    known = ~rating.isnan()
    assert known.float().mean() == 0.5
    assert torch.equal(known[:, :5].all(1), ~known[:, 5:].any(1))
    assert 150 < known[:, 0].sum() < 250
    assert rating[known].min() >= 0
    assert rating[known].max() <= 100
    assert torch.equal(torch.nan_to_num(topics.ratings(400, 0).inputs["rating"]), torch.nan_to_num(rating))


def test_a_reward_model_learns_from_half_of_the_ratings() -> None:
    model = topics.reward_model(topics.fresh_policy(0, 32, 1))
    held_out = topics.ratings(300, 5)
    rating = held_out.inputs["rating"]

    def scored() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            found = model.scores(held_out)
        return found, (found - rating).abs().nanmean(0)

    found, before = scored()
    assert 20 < found.mean() < 80  # on the ratings' scale before it has learned anything
    role = Role("reward", model, RoleSettings(AdamW(3e-3)))
    role.fit(topics.ratings(1000, 0), AttributeRegression(), 2, 64, torch.Generator().manual_seed(0))
    found, after = scored()
    assert bool((after < before).all())
    known = ~rating[:, 4].isnan()
    assert torch.corrcoef(torch.stack([found[known, 4], rating[known, 4]]))[0, 1] > 0.9


def test_pretraining_teaches_the_template_and_is_kept_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GUERDON_CACHE", str(tmp_path))
    calls = []

    def short(policy: topics.LanguagePolicy, seed: int) -> None:
        calls.append(seed)
        pretrain(policy, seed, updates=3, batch=8)

    pretrain = topics.pretrain
    monkeypatch.setattr(topics, "pretrain", short)
    first, again = topics.base_policy(3), topics.base_policy(3)
    assert calls == [3]
    for a, b in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(list((tmp_path / "topics").iterdir())) == 1


def test_fronts_follow_the_angle_of_best_of_n(tiny: topics.LanguagePolicy) -> None:
    one = topics.front(tiny, 0, samples=1, directed=False, angles=(-45.0, 0.0, 45.0))
    best = topics.front(tiny, 0, samples=1, best_of=4, directed=False, angles=(-45.0, 0.0, 45.0))
    assert len(set(one["length"])) == 1
    assert best["length"][0] < best["length"][2]
    assert all(b > a for a, b in zip(one["value"], best["value"], strict=True))
    assert 0 <= one["hypervolume"] <= best["hypervolume"] <= 1


def test_a_model_of_other_words_is_refused() -> None:
    with pytest.raises(UsageError, match="words of its own"):
        topics.Topics(Pieces(model="somewhere"))


def test_the_task_measures_policies_with_and_without_directions(tiny: topics.LanguagePolicy) -> None:
    from guerdon.methods.online.dpa import DPA

    actor = Role("actor", tiny)
    plain, directed = topics.Topics(), topics.Topics(method=DPA(system=topics.SYSTEM, outputs=topics.OUTPUTS))
    assert (
        topics.ratings(3, 0).inputs["rating"].shape
        == topics.reward_model(tiny).scores(topics.ratings(3, 0)).shape
    )
    assert set(plain.measure(actor, plain.feedback()).figures) == {"reward"}
    figures = directed.measure(actor, directed.feedback()).figures
    assert set(figures) == {"reward", "directed", "words_at_-45", "words_at_45", "hypervolume"}
    assert plain.feedback().score(directed.measure(actor, directed.feedback()).samples).shape == (64,)
