"""The answers of the last rounds: groups stay whole, old rounds go, and a saved memory is the same memory."""

from __future__ import annotations

import io

import pytest
import torch

from guerdon.batch import Trajectories
from guerdon.errors import ShapeError, UsageError
from guerdon.experience.datasets import Data
from guerdon.experience.recent import Recent, distinct, regrouped
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.tabular import CategoricalTable
from guerdon.randomness import row_seeds
from guerdon.tasks.tokens import tiny_llama, tokenizer


def answers(rows: int, start: int = 0) -> Trajectories:
    policy = CategoricalTable(["x", "y"], 50)
    with torch.no_grad():
        return policy.sample([("x", "y")[i // 2 % 2] for i in range(rows)], row_seeds(0, start, rows))


def actions(traj: Trajectories) -> list[int]:
    return traj.inputs["step", "action"][:, 0].tolist()


def test_old_rounds_go_and_groups_stay_whole() -> None:
    recent = Recent(rounds=2, size=2)
    assert isinstance(recent, Data)
    assert len(recent) == 0
    rounds = [answers(6, 10 * i) for i in range(3)]
    for traj in rounds:
        recent.add(traj)
    assert len(recent) == 6
    held = actions(rounds[1]) + actions(rounds[2])
    batch = recent.take(torch.tensor([5, 0]))
    assert actions(batch) == held[10:12] + held[0:2]
    assert batch.group.tolist() == [0, 0, 1, 1]
    pairs = sorted(held[i : i + 2] for i in range(0, 12, 2))
    found = []
    for batch in recent.minibatches(4, torch.Generator().manual_seed(0)):
        assert batch.group.tolist() == [i // 2 for i in range(len(batch.mask))]
        found += [actions(batch)[i : i + 2] for i in range(0, len(batch.mask), 2)]
    assert sorted(found) == pairs
    assert found != [held[i : i + 2] for i in range(0, 12, 2)]


def test_a_saved_memory_goes_on_as_if_never_saved() -> None:
    policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer(), max_new_tokens=4)
    rounds = []
    for i in range(4):
        traj = policy.sample(["a", "a", "b", "b"], row_seeds(i, 0, 4)).judged(torch.arange(4.0))
        rounds.append(traj.with_(reference_log_prob=traj.log_prob - 1))
    kept, again = Recent(3, 2), Recent(3, 2)
    for traj in rounds[:3]:
        kept.add(traj)
    file = io.BytesIO()
    torch.save(kept.state_dict(), file)
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    for memory in (kept, again):
        memory.add(rounds[3])
    assert len(kept) == len(again) == 6
    a, b = (m.take(torch.arange(6)) for m in (kept, again))
    for name in ("log_prob", "mask", "reward", "reference_log_prob", "group"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(policy.log_prob(a), policy.log_prob(b))
    assert a.texts == b.texts


def test_one_round_is_not_worth_saving() -> None:
    recent = Recent(1, 2)
    recent.add(answers(4))
    assert recent.state_dict() == {"rounds": []}


def test_groups_of_equal_answers_are_found() -> None:
    traj = answers(8)
    traj.inputs["step", "action"][:] = torch.tensor([3, 3, 3, 4, 5, 5, 5, 5])[:, None]
    traj.inputs["step", "context"][:] = 0
    assert distinct(traj, 2).tolist() == [False, True, False, False]
    assert distinct(traj, 4).tolist() == [True, False]


def test_answers_of_different_length_differ_whatever_pads_them() -> None:
    policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer(), max_new_tokens=4)
    traj = policy.collate([[2]] * 4, [[3, 4], [3, 4], [3, 0], [3]])
    assert distinct(traj, 2).tolist() == [False, True]


def test_what_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(ShapeError, match="a round of 5 answers does not consist of groups of 2"):
        Recent(1, 2).add(answers(5))
    with pytest.raises(ShapeError, match="5 rows are not groups of 2"):
        regrouped(answers(5), 2)
    with pytest.raises(UsageError, match="nothing to learn from yet"):
        Recent(1, 2).take(torch.tensor([0]))
    with pytest.raises(UsageError, match="at least one round of groups of two"):
        Recent(0, 2)
