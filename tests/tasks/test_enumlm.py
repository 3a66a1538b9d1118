"""EnumLM: its tables are those of the model, its data follow the tables, its judges are what they say."""

from __future__ import annotations

import json
import time

import pytest
import torch

from guerdon.batch import concatenate
from guerdon.errors import FeedbackError, UsageError
from guerdon.evaluation import enumerable as exact
from guerdon.randomness import row_seeds
from guerdon.roles import Role
from guerdon.tasks import enumlm
from guerdon.tasks.base import Pieces
from guerdon.tasks.enumlm import alphabet, train
from guerdon.tasks.enumlm.task import EnumLM


@pytest.fixture(scope="module")
def world():
    return enumlm.world(0)


# --- the reference ----------------------------------------------------------------------------------------


def test_reference_gives_the_4096_answers_all_probability(world):
    assert world.reference.shape == (8, 4096)
    torch.testing.assert_close(world.reference.logsumexp(-1), torch.zeros(8).double(), atol=1e-9, rtol=0)


def test_tables_go_through_the_models_own_forward_pass(world):
    policy = world.policy().eval()
    rows = torch.randint(8 * 4096, (300,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        direct = policy.log_prob(world.rows[rows]).sum(1).double()
    table = world.log_probs(policy)
    torch.testing.assert_close(table.flatten()[rows], direct, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(world.step_log_probs(policy).sum(-1), table)
    # a changed weight changes the table
    policy.model.lm_head.weight.data[3] += 0.5
    assert exact.kl(world.log_probs(policy), table).min() > 1e-3


def test_enumeration_takes_well_under_a_second(world):
    policy = world.policy().eval()
    world.log_probs(policy)
    start = time.process_time()
    for _ in range(3):
        world.log_probs(policy)
    assert (time.process_time() - start) / 3 < 1.0


def test_reference_fits_its_markov_chains(world):
    assert exact.kl(train.chains(0), world.reference).mean() < 0.02
    quality = json.loads((train.FIXTURES / "reference" / "quality.json").read_text())
    assert quality["kl_from_chains"] == pytest.approx(
        exact.kl(train.chains(0), world.reference).mean().item(), rel=0.02
    )


def test_samples_are_four_letters_with_the_tables_probabilities(world):
    policy = world.policy().eval()
    prompts = ["C"] * 3000
    traj = policy.sample(prompts, row_seeds(1, 0, 3000))
    assert all(len(t.split()) == 4 for t in traj.texts)
    prompt, answer = enumlm.place(traj)
    assert (prompt == 2).all()
    assert [world.texts[i] for i in answer[:20].tolist()] == traj.texts[:20]
    torch.testing.assert_close(
        traj.log_prob.sum(1).double(), world.reference[2, answer], atol=1e-4, rtol=1e-4
    )
    first = torch.bincount(answer // 512, minlength=8) / 3000
    expected = world.reference[2].exp().view(8, -1).sum(-1)
    assert ((first - expected).abs() < 4 * (expected * (1 - expected) / 3000).sqrt() + 1e-3).all()


def test_another_reference_is_trained_and_read_back(tmp_path):
    train.train_reference(tmp_path, seed=1, steps=30)
    policy = enumlm.load_policy(tmp_path).eval()
    table = enumlm.world(0).log_probs(policy)
    quality = json.loads((tmp_path / "quality.json").read_text())
    assert quality["kl_from_chains"] == pytest.approx(
        exact.kl(train.chains(1), table).mean().item(), rel=1e-4
    )
    assert exact.kl(train.chains(1), train.chains(0)).min() > 0.5


# --- the gold reward --------------------------------------------------------------------------------------


def test_reward_has_mean_zero_a_prompt_and_deviation_one(world):
    mean = exact.expected(world.reference, world.reward)
    torch.testing.assert_close(mean, torch.zeros(8).double(), atol=1e-12, rtol=0)
    assert exact.expected(world.reference, world.reward**2).mean().item() == pytest.approx(1)
    assert not torch.allclose(world.reward, enumlm.world(1).reward)
    assert torch.equal(world.reference, enumlm.world(1).reference)


def test_reward_is_the_sum_of_its_bigrams(world):
    torch.testing.assert_close(world.token_reward.sum(-1), world.reward)
    # answers that share a beginning share the rewards of its tokens
    same = world.token_reward[:, :, :2].view(8, 64, 64, 2)
    torch.testing.assert_close(same, same[:, :, :1].expand_as(same))
    # one bigram is worth the same wherever it stands and whatever the prompt (but for the prompt's mean)
    letters = (world.completions - 2).tolist()
    twice = [(i, row) for i, row in enumerate(letters) if row[0] == row[2] and row[1] == row[3]]
    for i, _ in twice[:10]:
        values = world.token_reward[:, i]
        torch.testing.assert_close(values[:, 1], values[:, 3])


def test_optimum_beats_every_other_table(world):
    figures = world.measures(world.optimum(0.5))
    assert figures["gap"] == pytest.approx(1)
    assert figures["kl_to_optimum"] == pytest.approx(0, abs=1e-12)
    start = world.measures(world.reference)
    assert (start["reward"], start["kl"], start["gap"]) == (pytest.approx(0, abs=1e-9),) * 3
    assert start["win_rate"] == pytest.approx(0.5)
    assert figures["win_rate"] > 0.7


# --- judges -----------------------------------------------------------------------------------------------


def test_gold_judge_scores_and_compares(world):
    pairs = world.pairs(200, 3)
    judge = world.gold()
    torch.testing.assert_close(judge.score(pairs.chosen), pairs.chosen.score())
    p = judge.compare(pairs.chosen, pairs.rejected)
    torch.testing.assert_close(p, torch.sigmoid(pairs.chosen.score() - pairs.rejected.score()))
    torch.testing.assert_close(p + judge.compare(pairs.rejected, pairs.chosen), torch.ones(200))


def test_cyclic_judge_goes_round(world):
    judge = world.cyclic()
    texts = [
        "a b c d",
        "d e f a",
        "g h g a",
        "a a d d",
        "d a d a",
    ]  # the last two: ties go to the first letter
    classes = [0, 1, 2, 0, 1]
    policy = world.policy()
    traj = policy.encode(["A"] * 5, texts, end=False)
    _, answer = enumlm.place(traj)
    assert alphabet.classes()[answer].tolist() == classes
    compare = lambda i, k: judge.compare(traj[[i]], traj[[k]]).item()
    assert [compare(0, 1), compare(1, 2), compare(2, 0)] == pytest.approx([0.8] * 3)
    assert [compare(1, 0), compare(2, 1), compare(0, 2)] == pytest.approx([0.2] * 3)
    difference = world.reward[0, answer[0]] - world.reward[0, answer[3]]
    assert compare(0, 3) == pytest.approx(torch.sigmoid(difference).item())
    assert compare(0, 0) == pytest.approx(0.5)
    # the score is how often an answer beats the reference's
    matches = judge.oracle.beats(world.reference)[0, answer].float()
    torch.testing.assert_close(judge.score(traj), matches)


def test_judges_refuse_other_texts_and_unlike_prompts(world):
    policy = world.policy()
    with pytest.raises(FeedbackError, match="answers of 4 letters"):
        world.gold().score(policy.encode(["A"], ["a b c"], end=False))
    with pytest.raises(FeedbackError, match="prompts are the letters"):
        world.gold().score(policy.encode(["a"], ["a b c d"], end=False))
    a, b = (policy.encode([p], ["a b c d"], end=False) for p in "AB")
    with pytest.raises(FeedbackError, match="same prompt"):
        world.gold().compare(a, b)


# --- recorded data ----------------------------------------------------------------------------------------


def test_pairs_are_quick_reproducible_and_never_alike(world):
    world.pairs(10, 0)
    start = time.process_time()
    pairs = world.pairs(20_000, 0)
    assert time.process_time() - start < 2
    again = world.pairs(20_000, 0)
    assert torch.equal(pairs.chosen.inputs["step", "token"], again.chosen.inputs["step", "token"])
    (prompt, chosen), (other, rejected) = enumlm.place(pairs.chosen), enumlm.place(pairs.rejected)
    assert torch.equal(prompt, other)
    assert not (chosen == rejected).any()
    assert torch.equal(prompt.bincount(), torch.full((8,), 2500))
    assert torch.equal(prompt, pairs.chosen.group)


def test_labels_follow_bradley_terry(world):
    pairs = world.pairs(20_000, 1)
    probability = torch.sigmoid(pairs.chosen.score() - pairs.rejected.score())
    # of pairs whose label has probability p (from the better answer's side), a share p is right
    right = probability > 0.5
    sure = torch.where(right, probability, 1 - probability)
    for low, high in ((0.5, 0.6), (0.6, 0.8), (0.8, 1.0)):
        band = (sure >= low) & (sure < high)
        error = (right[band].float().mean() - sure[band].mean()).abs()
        assert error < 4 * 0.5 / band.sum().sqrt()


def test_certain_soft_and_flipped_labels(world):
    certain = world.pairs(500, 2, labels="certain")
    assert (certain.chosen.score() >= certain.rejected.score()).all()
    soft = world.pairs(500, 2, labels="soft")
    torch.testing.assert_close(
        soft.strength, torch.sigmoid(soft.chosen.score() - soft.rejected.score()), atol=1e-5, rtol=1e-5
    )
    flipped = world.pairs(500, 2, labels="certain", flip=1.0)
    assert torch.equal(flipped.chosen.score(), certain.rejected.score())
    cyclic = world.pairs(500, 2, labels="certain", judge=world.cyclic())
    assert (world.cyclic().compare(cyclic.chosen, cyclic.rejected) >= 0.5).all()


def test_pairs_from_another_source(world):
    log_p = world.optimum(0.25)
    pairs = world.pairs(4000, 5, source=log_p)
    rewards = torch.cat([pairs.chosen.score(), pairs.rejected.score()])
    assert rewards.mean().item() == pytest.approx(exact.expected(log_p, world.reward).mean().item(), abs=0.1)
    hot = world.pairs(4000, 5, temperature=2.0)
    spread = lambda p: torch.cat(list(enumlm.place(p.chosen))[1:]).unique().numel()
    assert spread(hot) > spread(world.pairs(4000, 5))
    with pytest.raises(UsageError, match="no tokens to heat"):
        world.pairs(10, 0, source=log_p, temperature=2.0)
    certain = torch.full((8, 4096), -torch.inf, dtype=torch.float64)
    certain[:, 7] = 0
    with pytest.raises(UsageError, match="nothing to compare"):
        world.pairs(10, 0, source=certain)


def test_rated_answers_come_in_groups_with_their_reward(world):
    traj = world.rated(160, 0, group_size=4)
    assert (traj.group.view(-1, 4) == traj.group.view(-1, 4)[:, :1]).all()
    torch.testing.assert_close(world.gold().score(traj), traj.score())
    dense = world.answers(*enumlm.place(traj), dense=True)
    torch.testing.assert_close(dense.score(), traj.score(), atol=1e-5, rtol=1e-5)
    assert (dense.reward != 0).sum() > traj.reward.ne(0).sum()
    assert len(concatenate([traj, dense.with_(reward=traj.reward)])) == 320


def test_restricted_world_has_a_hole_in_its_data(world):
    hole = world.restricted(letters=3, penalty=-2.0)
    assert hole.covered.view(8, 8, 512).all(-1).sum(-1).tolist() == [3] * 8
    assert (hole.reward[~hole.covered] == -2).all()
    assert torch.equal(hole.reward[hole.covered], world.reward[hole.covered])
    torch.testing.assert_close(hole.token_reward.sum(-1), hole.reward)
    pairs = hole.pairs(500, 0)
    for side in (pairs.chosen, pairs.rejected):
        assert hole.covered[enumlm.place(side)].all()
    start = hole.measures(hole.reference)
    assert 0.1 < start["uncovered"] < 0.5
    assert hole.measures(hole.optimum(0.5))["uncovered"] < start["uncovered"] / 5


# --- the task ---------------------------------------------------------------------------------------------


def test_task_supplies_what_it_says(world):
    task = EnumLM()
    policy = task.policy("language")
    assert sum(p.numel() for p in policy.parameters()) == pytest.approx(100_000, rel=0.05)
    for name in ("preferences", "demonstrations", "rated"):
        data = getattr(task, name)(policy, seed=3)
        batch = data.take(torch.arange(4))
        assert len(data) > 1000
        assert len(batch) == 4
    traj = task.experience(0).collect(Role("actor", policy), 16, 2)
    assert task.feedback().score(traj).shape == (16,)


def test_task_measures_exactly(world):
    task = EnumLM()
    actor = Role("actor", task.policy("language"))
    found = task.measure(actor, task.feedback())
    assert found.figures["reward"] == pytest.approx(0, abs=1e-4)
    assert found.figures["kl"] == pytest.approx(0, abs=1e-6)
    assert found.samples.prompts[:3] == ["A", "A", "B"]
    best = exact.best_objective(world.reference, world.reward, 0.5).mean().item()
    actor.model.model.lm_head.weight.data[2] += 1.0
    moved = task.measure(actor, task.feedback()).figures
    assert moved["kl"] > 0.01
    assert moved["gap"] == pytest.approx(moved["objective"] / best, rel=1e-3)


def test_task_takes_a_reward_of_the_users(world, tmp_path):
    (tmp_path / "judge.py").write_text(
        "def score(texts, prompts):\n    return [t.count('a') for t in texts]\n"
    )
    task = EnumLM(Pieces(reward=f"{tmp_path}/judge.py:score"))
    found = task.measure(Role("actor", task.policy("language")), task.feedback())
    count = torch.tensor([t.count("a") for t in world.texts]).double().expand(8, -1)
    assert found.figures["reward"] == pytest.approx(
        exact.expected(world.reference, count).mean().item(), rel=1e-5
    )
    with pytest.raises(UsageError, match="own data"):
        EnumLM(Pieces(data="rows.jsonl"))


def test_task_draws_the_frontier(world, tmp_path):
    task = EnumLM()
    found = task.measure(Role("actor", task.policy("language")), task.feedback())
    (path,) = task.report(found, found, tmp_path, [])
    assert path.endswith("frontier.png")


def test_a_saved_model_is_read_back_with_its_alphabet(world, tmp_path):
    policy = world.policy().eval()
    policy.model.lm_head.weight.data[5] += 0.3
    policy.save_pretrained(tmp_path)
    again = EnumLM(Pieces(model=str(tmp_path))).policy("language").eval()
    torch.testing.assert_close(world.log_probs(again), world.log_probs(policy))
