"""Beams beside transformers; the token-level identity that makes beam search a search with values."""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from guerdon.errors import UsageError
from guerdon.policies.language import LanguagePolicy
from guerdon.search import Node, beam_search, mcts
from guerdon.tasks.tokens import tiny_llama, tokenizer

PROMPTS = ["a", "b c d", "e f", "h h g a b", "c", "b c d"]
END = 0


@functools.cache
def sharp(seed: int = 0, layers: int = 2) -> LanguagePolicy:
    """A random model whose distributions are neither flat nor certain."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    policy = LanguagePolicy(tiny_llama(seed=seed, layers=layers), tokenizer(), max_new_tokens=7)
    generator = torch.Generator().manual_seed(seed)
    for weight in policy.parameters():
        weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return policy


@torch.no_grad()
def beams_of_transformers(
    policy: LanguagePolicy, beams: int, **options: Any
) -> tuple[list[list[int]], Tensor]:
    """The best answer to each of `PROMPTS` and its score; ``every`` of them with ``num_return_sequences``."""
    rows = [policy.tokens(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    out = policy.model.generate(  # type: ignore[operator]
        torch.tensor([[END] * (width - len(row)) + row for row in rows]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
        num_beams=beams,
        do_sample=False,
        pad_token_id=END,
        eos_token_id=END,
        output_scores=True,
        return_dict_in_generate=True,
        **({"max_new_tokens": 7, "length_penalty": 0.0} | options),
    )
    answers = out.sequences[:, width:].tolist()
    cut = [row[: row.index(END) + 1] if END in row else row for row in answers]
    return cut, out.sequences_scores


def answers_of(traj: Any) -> list[list[int]]:
    token = traj.inputs["step", "token"]
    return [row[real].tolist() for row, real in zip(token, traj.mask, strict=True)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("beams", [2, 5, 16])
def test_beam_search_finds_what_transformers_finds(seed: int, beams: int) -> None:
    policy = sharp(seed)
    expected, score = beams_of_transformers(policy, beams)
    found = beam_search(policy, PROMPTS, beams)
    assert answers_of(found) == expected
    assert torch.allclose(found.outputs["score"], score, atol=1e-5)
    assert len({len(row) for row in expected}) > 1 or beams == 2
    assert found.prompts == PROMPTS
    assert found.group.tolist() == list(range(6))


def test_every_beam_is_that_of_transformers() -> None:
    policy = sharp(1)
    expected, score = beams_of_transformers(policy, 4, num_return_sequences=4)
    found = beam_search(policy, PROMPTS, 4, every_beam=True)
    assert answers_of(found) == expected
    assert torch.allclose(found.outputs["score"], score, atol=1e-5)
    assert found.group.tolist() == [i for i in range(6) for _ in range(4)]


def test_a_length_penalty_is_that_of_transformers_where_it_never_stops_early() -> None:
    for penalty in (1.0, 2.0):
        expected, score = beams_of_transformers(sharp(2), 4, length_penalty=penalty, early_stopping="never")
        found = beam_search(sharp(2), PROMPTS, 4, length_penalty=penalty)
        assert answers_of(found) == expected
        assert torch.allclose(found.outputs["score"], score, atol=1e-5)


def test_answers_have_no_end_before_their_least_length() -> None:
    expected, score = beams_of_transformers(sharp(0), 4, min_new_tokens=4)
    found = beam_search(sharp(0), PROMPTS, 4, min_new_tokens=4)
    assert answers_of(found) == expected
    assert torch.allclose(found.outputs["score"], score, atol=1e-5)


def test_the_score_is_the_total_log_probability_of_the_policy() -> None:
    traj = beam_search(sharp(1), PROMPTS, 3, every_beam=True)
    assert torch.allclose(sharp(1).log_prob(traj), traj.log_prob, atol=1e-5)
    assert torch.allclose(traj.log_prob.sum(1), traj.outputs["score"], atol=1e-5)
    best = traj.outputs["score"].view(6, 3)
    assert torch.equal(best, best.sort(dim=1, descending=True).values)


def test_enough_beams_find_the_likeliest_answer_of_all() -> None:
    policy, limit = sharp(0), 3
    found = beam_search(policy, ["b c"], 1000, max_new_tokens=limit, every_beam=True)
    everything = [
        list(answer)
        for n in range(1, limit + 1)
        for answer in itertools.product(range(10), repeat=n)
        if END not in answer[:-1] and (answer[-1] == END or n == limit)
    ]
    total = policy.log_prob(policy.collate([policy.tokens("b c")] * len(everything), everything)).sum(1)
    assert answers_of(found)[0] == everything[int(total.argmax())]
    assert len(found) == len(everything)
    assert torch.allclose(found.outputs["score"], total.sort(descending=True).values, atol=1e-5)


def test_more_beams_are_not_worse_and_one_is_greedy_until_something_ends() -> None:
    policy = sharp(1)
    one, some, many = (beam_search(policy, PROMPTS, n).outputs["score"] for n in (1, 2, 64))
    assert one.mean() + 0.5 < some.mean() < many.mean() + 1e-5
    policy.allowed = torch.tensor([False, False] + [True] * 8)  # no end of text
    try:
        one = beam_search(policy, PROMPTS, 1)
        greedy = policy.sample(PROMPTS, torch.arange(6), greedy=True)
    finally:
        policy.allowed = None
    assert answers_of(one) == answers_of(greedy)


def test_a_search_for_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="finds nothing"):
        beam_search(sharp(0), PROMPTS, 0)
    with pytest.raises(UsageError, match="the list of prompts is empty"):
        beam_search(sharp(0), [], 2)
    with pytest.raises(UsageError, match="must be positive"):
        mcts(sharp(0), sharp(1), "a", 0)


# --- the token-level decision process (Rafailov et al., 2024) ---------------------------------------------

SIZE, DEPTH, BETA = 4, 4, 0.5
FIRST = 2  # token ids 2 to 5 are the four actions


class Table(nn.Module):
    """A language model that looks the logits of an answer's next token up by what came after the prompt "a"."""

    def __init__(self, logits: dict[tuple[int, ...], Tensor]) -> None:
        super().__init__()
        self.logits, self.unused = logits, nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        rows = torch.full((*input_ids.shape, 10), -1e9, dtype=torch.float64)
        for i, row in enumerate(input_ids.tolist()):
            for t in range(len(row)):
                prefix = tuple(token - FIRST for token in row[1 : t + 1])
                if prefix in self.logits:
                    rows[i, t, FIRST : FIRST + SIZE] = self.logits[prefix]
        return type("Out", (), {"logits": rows})()


def table_policy(logits: dict[tuple[int, ...], Tensor]) -> LanguagePolicy:
    allowed = torch.zeros(10, dtype=torch.bool)
    allowed[FIRST : FIRST + SIZE] = True
    return LanguagePolicy(Table(logits), tokenizer(), max_new_tokens=DEPTH, allowed=allowed)


class Process:
    """Four tokens, four deep: a Dirichlet reference and normal rewards at every prefix, solved exactly."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.log_reference: dict[tuple[int, ...], Tensor] = {}
        self.reward: dict[tuple[int, ...], Tensor] = {}
        self.q: dict[tuple[int, ...], Tensor] = {}
        self.v: dict[tuple[int, ...], float] = {}
        for depth in range(DEPTH):
            for prefix in itertools.product(range(SIZE), repeat=depth):
                share = -torch.rand(SIZE, generator=generator, dtype=torch.float64).log()
                self.log_reference[prefix] = (share / share.sum()).log()
                self.reward[prefix] = torch.randn(SIZE, generator=generator, dtype=torch.float64)
        for depth in reversed(range(DEPTH)):
            for prefix in itertools.product(range(SIZE), repeat=depth):
                after = torch.tensor(
                    [self.v.get((*prefix, a), 0.0) for a in range(SIZE)], dtype=torch.float64
                )
                self.q[prefix] = self.reward[prefix] + BETA * self.log_reference[prefix] + after
                self.v[prefix] = BETA * float((self.q[prefix] / BETA).logsumexp(0))

    def objective(self, answer: Sequence[int]) -> float:
        """``sum (r + beta log pi_ref)``."""
        places = [(tuple(answer[:t]), a) for t, a in enumerate(answer)]
        return sum(float(self.reward[p][a] + BETA * self.log_reference[p][a]) for p, a in places)

    def log_optimal(self, answer: Sequence[int]) -> float:
        """``log pi*``."""
        places = [(tuple(answer[:t]), a) for t, a in enumerate(answer)]
        return sum(float((self.q[p][a] - self.v[p]) / BETA) for p, a in places)

    def best(self) -> list[int]:
        return [a + FIRST for a in max(itertools.product(range(SIZE), repeat=DEPTH), key=self.objective)]

    def gold(self, tokens: list[int]) -> float:
        answer = tuple(token - FIRST for token in tokens)
        return float(self.reward[answer[:-1]][answer[-1]])


def below(node: Node) -> list[Node]:
    return [node] + [leaf for child in node.children.values() for leaf in below(child)]


@pytest.mark.parametrize("seed", range(5))
def test_search_with_values_is_likelihood_search(seed: int) -> None:
    """Wherever the lookahead stops, reward so far and value add up to ``V(s_0) + beta log pi*`` (identity 7)."""
    process = Process(seed)
    optimal = table_policy({p: q / BETA for p, q in process.q.items()})
    reference = table_policy(process.log_reference)
    for reward in (process.gold, None):
        traj, root = mcts(optimal, reference, "a", 300, BETA, reward=reward, exploration=100.0)
        nodes = below(root)
        assert len(nodes) > 30
        for node in nodes:
            answer = [token - FIRST for token in node.tokens]
            assert node.sum + node.value == pytest.approx(
                process.v[()] + BETA * process.log_optimal(answer), abs=1e-10
            )
            if answer:  # the reward that the logits imply is the gold one
                assert node.reward == pytest.approx(process.gold(node.tokens), abs=1e-10)
        assert answers_of(traj) == [process.best()]
        assert traj.outputs["score"].item() == pytest.approx(
            process.objective([token - FIRST for token in process.best()]), abs=1e-5
        )
    assert answers_of(beam_search(optimal, ["a"], SIZE**DEPTH)) == [process.best()]


@pytest.mark.parametrize("seed", range(5))
def test_a_shift_of_each_states_logits_is_a_shaped_reward_and_the_same_search(seed: int) -> None:
    """A policy tells its logits only up to a term of the state: another potential, the same answer."""
    process = Process(seed)
    generator = torch.Generator().manual_seed(100 + seed)
    shift = {p: torch.randn(1, generator=generator, dtype=torch.float64) * (p != ()) for p in process.q}
    optimal = table_policy({p: q / BETA + shift[p] for p, q in process.q.items()})
    traj, root = mcts(optimal, table_policy(process.log_reference), "a", 10_000, BETA)
    assert answers_of(traj) == [process.best()]
    for node in below(root)[1:]:
        answer = tuple(token - FIRST for token in node.tokens)
        potential = [BETA * float(shift.get(p, torch.zeros(1))) for p in (answer[:-1], answer)]
        assert node.reward == pytest.approx(
            process.gold(node.tokens) + potential[0] - potential[1], abs=1e-10
        )


def test_best_first_search_opens_few_leaves_and_says_so() -> None:
    process = Process(0)
    optimal = table_policy({p: q / BETA for p, q in process.q.items()})
    traj, root = mcts(optimal, table_policy(process.log_reference), "a", 10_000, BETA)
    assert answers_of(traj) == [process.best()]
    assert root.visits < 40  # of 256 answers: it stops when nothing open can beat a complete one
    assert len(below(root)) <= root.visits + 1
    assert root.visits >= sum(child.visits for child in root.children.values())


def test_a_short_search_is_completed_by_the_likeliest_tokens() -> None:
    policy = sharp(0)
    traj, root = mcts(policy, sharp(1), "b c", 1, beta=0.1)
    greedy = policy.sample(["b c"], torch.zeros(1, dtype=torch.int64), greedy=True)
    assert answers_of(traj) == answers_of(greedy)
    assert root.visits == 1
    assert torch.allclose(policy.log_prob(traj), traj.log_prob, atol=1e-5)
    assert traj.prompts == ["b c"]
    likely, _ = mcts(policy, sharp(1), "b c", 3000, beta=0.1)
    assert likely.log_prob.sum() == pytest.approx(
        beam_search(policy, ["b c"], 400).log_prob.sum().item(), abs=1e-4
    )
