"""Recorded text data: conventions, tokens, limits, the order of batches, what is kept of a file."""

from __future__ import annotations

import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from texts_for_tests import byte_policy, byte_tokenizer, said
from torch import Tensor

from guerdon.batch import Preferences, Trajectories
from guerdon.errors import DataError, UsageError
from guerdon.experience import conventions
from guerdon.experience.datasets import (
    Data,
    InMemory,
    TextCompletions,
    TextPreferences,
    batch_order,
    load_demonstrations,
    load_preferences,
    load_prompts,
    load_rated,
)
from guerdon.experience.rows import Rows, read_rows
from guerdon.experience.tokenised import DEFAULT_MAX_LENGTH, Words
from guerdon.experience.views import Groups, Rescored, Subset, cached_reference, split_rows, train_test_split
from guerdon.objectives.likelihood import WeightedLikelihood
from guerdon.objectives.sides import with_reference
from guerdon.optim import Adam
from guerdon.policies.language import LanguagePolicy, joined
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer

PAIR = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


@pytest.fixture(scope="module")
def plain() -> LanguagePolicy:
    return byte_policy(chat=False)


@pytest.fixture(scope="module")
def chat() -> LanguagePolicy:
    return byte_policy(chat=True)


def everything(data: Data) -> Any:
    return data.take(torch.arange(len(data)))


def pairs_of(data: Data) -> list[tuple[str, str, str]]:
    batch = everything(data)
    return list(zip(batch.chosen.prompts, batch.chosen.texts, batch.rejected.texts, strict=True))


def answers_of(data: Data) -> list[tuple[str, str]]:
    batch = everything(data)
    return list(zip(batch.prompts, batch.texts, strict=True))


def many(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Plain pairs of different lengths."""
    r = random.Random(seed)
    word = lambda: "".join(r.choices("abcdefgh", k=r.randint(1, 12)))
    return [{"prompt": word(), "chosen": "+" + word(), "rejected": "-" + word()} for _ in range(n)]


# --- the order of batches ---------------------------------------------------------------------------------


@given(
    n=st.integers(1, 400),
    size=st.integers(1, 40),
    seed=st.integers(0, 9),
    number=st.integers(0, 9),
    by_length=st.booleans(),
)
def test_a_pass_visits_every_row_once_in_full_batches(
    n: int, size: int, seed: int, number: int, by_length: bool
) -> None:
    lengths = torch.arange(n) * 7 % 31 if by_length else None
    order = batch_order(n, size, seed, number, lengths)
    assert sorted(torch.cat(order).tolist()) == list(range(n))
    assert len(order) == -(-n // size)
    assert sorted(map(len, order), reverse=True)[:-1] == [size] * (len(order) - 1)


def test_the_order_follows_from_seed_and_pass_alone() -> None:
    lengths = torch.arange(300) % 37
    order = lambda seed, number: torch.cat(batch_order(300, 8, seed, number, lengths))
    torch.manual_seed(1)
    first = order(3, 1)
    torch.manual_seed(2)
    assert torch.equal(first, order(3, 1))
    assert not torch.equal(first, order(3, 2))
    assert not torch.equal(first, order(4, 1))


def test_rows_meet_others_in_another_pass() -> None:
    lengths = torch.arange(256) % 8  # many rows of each length
    batches = [{frozenset(b.tolist()) for b in batch_order(256, 8, 0, number, lengths)} for number in (0, 1)]
    assert not batches[0] & batches[1]


def test_short_and_long_batches_are_mixed_over_a_pass() -> None:
    lengths = torch.arange(640)
    means = torch.stack([lengths[b].float().mean() for b in batch_order(640, 10, 0, 0, lengths)])
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(64.0)]))[0, 1].item()) < 0.4


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(UsageError, match="no rows"):
        batch_order(0, 4, 0, 0)
    with pytest.raises(UsageError, match="at least one row, not 0"):
        batch_order(4, 0, 0, 0)


def log_normal(n: int, generator: torch.Generator, low: int, high: int) -> Tensor:
    middle = (low * high) ** 0.5
    return (torch.randn(n, generator=generator) * 0.7).exp().mul(middle).clamp(low, high).long()


@pytest.mark.parametrize("size", [8, 16, 32])
def test_length_bucketing_wastes_less_than_15_percent(size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = log_normal(2000, generator, 20, 500)

    def waste(order: list[Tensor]) -> float:
        return 1 - float(lengths.sum()) / sum(len(b) * int(lengths[b].max()) for b in order)

    assert waste(batch_order(2000, size, 0, 0, lengths)) < 0.15
    assert waste(batch_order(2000, size, 0, 0)) > 0.45  # what is saved


def test_the_model_sees_few_padded_tokens(plain: LanguagePolicy) -> None:
    generator = torch.Generator().manual_seed(0)
    split = [log_normal(600, generator, 20, 500) for _ in range(2)]  # prompt and answer, each of any length
    prompts, answers = ([[5] * n for n in lengths.tolist()] for lengths in split)
    data = TextCompletions(plain, prompts, answers)
    seen = real = 0
    for rows in batch_order(len(data), 16, 0, 0, data.lengths):
        traj = data.take(rows)
        seen += joined(traj)[0].numel()
        real += int(traj.inputs["prompt_mask"].sum() + traj.mask.sum())
    assert 1 - real / seen < 0.15


# --- batches ----------------------------------------------------------------------------------------------


def test_any_batch_is_data() -> None:
    policy = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer())
    batch = policy.encode(["a", "b", "c"], ["d", "e f", "g"])
    data = InMemory(batch)
    assert isinstance(data, Data)
    assert len(data) == 3
    assert data.lengths is None
    assert data.take(torch.tensor([2, 0])).texts == ["g", "d"]
    with pytest.raises(DataError, match="no rows"):
        InMemory(batch[:0])


def test_pairs_carry_all_that_came_with_them(plain: LanguagePolicy) -> None:
    rows = [
        {**PAIR, "strength": 0.9, "margin": 2, "annotator": "ann", "score_chosen": 4.0, "score_rejected": 1},
        {
            **PAIR,
            "prompt": "1+1=",
            "strength": 0.5,
            "margin": 1,
            "annotator": "bob",
            "score_chosen": 3,
            "score_rejected": 2,
        },
        {**PAIR, "strength": 1, "margin": 0, "annotator": "ann", "score_chosen": 1, "score_rejected": 1},
    ]
    batch = load_preferences(rows, plain).take(torch.tensor([1, 2]))
    assert isinstance(batch, Preferences)
    assert batch.strength.tolist() == [0.5, 1]
    assert batch.annotator.tolist() == [1, 0]
    assert batch.chosen.inputs["margin"].tolist() == [1, 0]
    assert batch.chosen.score().tolist() == [3, 1]
    assert batch.rejected.score().tolist() == [2, 1]
    assert (
        batch.chosen.group.tolist() == batch.rejected.group.tolist() == [1, 0]
    )  # row 3 has the prompt of row 1
    assert batch.chosen.prompts == ["1+1=", "2+2="]
    assert batch.chosen.texts == ["4", "4"]
    assert batch.rejected.texts == ["5", "5"]


def test_aspects_with_gaps(plain: LanguagePolicy) -> None:
    rows = [
        {"prompt": "a", "completion": "b", "helpful": 3, "verbose": None},
        {"prompt": "a", "completion": "c", "helpful": 1, "verbose": 4},
    ]
    data = load_rated(rows, plain, aspects=("helpful", "verbose"))
    rating = everything(data).inputs["rating"]
    assert torch.equal(rating.nan_to_num(-1), torch.tensor([[3.0, -1.0], [1.0, 4.0]]))
    rows[0]["helpful"] = None
    with pytest.raises(DataError, match=r"row 1: none of the aspects \(helpful, verbose\) is given"):
        load_rated(rows, plain, aspects=("helpful", "verbose"))


def test_columns_of_the_wrong_length_are_refused(plain: LanguagePolicy) -> None:
    with pytest.raises(DataError, match="2 prompts but 1 rows of 'answers'"):
        TextCompletions(plain, [[5], [6]], [[7]])
    with pytest.raises(DataError, match="reward of row 2 is nan"):
        TextCompletions(plain, [[5], [6]], [[7], [8]], reward=torch.tensor([0.0, float("nan")]))


# --- conventions ------------------------------------------------------------------------------------------

A, B = said("", "yes")[1:], said("", "no")[1:]
ASKED = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (PAIR, ("2+2=", "4", "5")),
        ({"chosen": "Q: hi A: I can", "rejected": "Q: hi A: I will"}, ("Q: hi A: I", " can", " will")),
        ({"chosen": "H: hi\n\nA: It is", "rejected": "H: hi\n\nA: I"}, ("H: hi\n\nA:", " It is", " I")),
        ({"chosen": "one two", "rejected": "one two three"}, ("one", " two", " two three")),
        ({"prompt": said("hi"), "chosen": A, "rejected": B}, (ASKED, "yes", "no")),
        ({"prompt": said("hi"), "chosen": "yes", "rejected": "no"}, (ASKED, "yes", "no")),
        ({"chosen": said("hi", "yes"), "rejected": said("hi", "no")}, (ASKED, "yes", "no")),
        (
            {"prompt": said("hi"), "chosen": said("hi", "yes"), "rejected": said("hi", "no")},
            (ASKED, "yes", "no"),
        ),
        ({"prompt": "hi", "chosen": said("hi", "yes"), "rejected": said("hi", "no")}, (ASKED, "yes", "no")),
        (
            {
                "prompt": [{"from": "human", "value": "hi"}],
                "chosen": [{"from": "gpt", "value": "yes"}],
                "rejected": B,
            },
            (ASKED, "yes", "no"),
        ),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}], "name": None}],
                "chosen": A,
                "rejected": B,
            },
            (ASKED, "yes", "no"),
        ),
        ({"prompt": "p", "completions": ["a", "b", "c"], "scores": [2, 3, 1]}, ("p", "b", "c")),
        ({"prompt": said("hi"), "completions": ["yes", "no"], "scores": [2, 1.5]}, (ASKED, "yes", "no")),
        ({"prompt": said("hi"), "completions": [A, B[0]], "scores": [1, 2]}, (ASKED, "no", "yes")),
    ],
)
def test_conventions_of_pairs(
    chat: LanguagePolicy, row: dict[str, Any], expected: tuple[str, str, str]
) -> None:
    assert pairs_of(load_preferences([row], chat, max_length=200)) == [expected]


def test_ranked_lists_give_all_pairs_of_different_scores(plain: LanguagePolicy) -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [2, 3, 2]}
    data = load_preferences([row], plain, ranked="all")
    assert pairs_of(data) == [("p", "b", "a"), ("p", "b", "c")]
    assert everything(data).chosen.score().tolist() == [3, 3]
    tied = {**row, "scores": [1, 1, 1]}
    with pytest.raises(
        DataError, match=r"no rows are left to learn from .*no two answers of different scores"
    ):
        load_preferences([tied], plain)
    assert load_preferences([row, tied], plain).notes == [
        "the given rows: left out 1 of 2 examples (first: row 2): no two answers of different scores"
    ]
    with pytest.raises(UsageError, match="ranked is 'some'"):
        load_preferences([row], plain, ranked="some")  # type: ignore[arg-type]


def test_the_implicit_prompt_of_a_conversation_is_the_fields(chat: LanguagePolicy) -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    row = {"chosen": said("a", "b", "c", "d"), "rejected": said("a", "b", "c", "e")}
    theirs = data_utils.extract_prompt(row)
    ours = next(conventions.pairs(next(iter(Rows("here", [(1, row)])))))
    assert ours.prompt == theirs["prompt"]
    assert [ours.answers[0]] == theirs["chosen"]
    assert [ours.answers[1]] == theirs["rejected"]


TALK = [{"role": "system", "content": "be"}, *said("hi", "yo", "so", "go")]
FIRST = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
SECOND = FIRST + "yo<|im_end|>\n<|im_start|>user\nso<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "p", "completion": "c"}, [("p", "c")]),
        ({"prompt": said("hi"), "completion": A}, [(ASKED, "yes")]),
        ({"messages": TALK}, [(FIRST, "yo"), (SECOND, "go")]),
        ({"messages": [*TALK, *said("more")]}, [(FIRST, "yo"), (SECOND, "go")]),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]},
            [(ASKED, "yes")],
        ),
        ({"text": "all of it"}, [("", "all of it")]),
        (PAIR, [("2+2=", "4")]),
        ({"chosen": said("hi", "yes"), "rejected": said("hi", "no")}, [(ASKED, "yes")]),
    ],
)
def test_conventions_of_demonstrations(
    chat: LanguagePolicy, row: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert answers_of(load_demonstrations([row], chat, max_length=300)) == expected


def test_the_last_turn_alone(chat: LanguagePolicy) -> None:
    data = load_demonstrations([{"messages": TALK}], chat, max_length=300, turns="last")
    assert answers_of(data) == [(SECOND, "go")]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"prompt": "p", "completion": "c", "reward": 2}], [("p", "c", 2.0)]),
        ([{"prompt": "p", "completion": "c", "score": -0.5}], [("p", "c", -0.5)]),
        (
            [
                {"prompt": "p", "completion": "c", "label": True},
                {"prompt": "p", "completion": "d", "label": False},
            ],
            [("p", "c", 1.0), ("p", "d", 0.0)],
        ),
        ([{"prompt": "p", "completions": ["a", "b"], "scores": [1, 2]}], [("p", "a", 1.0), ("p", "b", 2.0)]),
        ([PAIR], [("2+2=", "4", 1.0), ("2+2=", "5", 0.0)]),
        ([{**PAIR, "score_chosen": 9, "score_rejected": 3}], [("2+2=", "4", 9.0), ("2+2=", "5", 3.0)]),
    ],
)
def test_conventions_of_ratings(plain: LanguagePolicy, rows: list[Any], expected: list[Any]) -> None:
    data = load_rated(rows, plain)
    batch = everything(data)
    assert list(zip(batch.prompts, batch.texts, batch.score().tolist(), strict=True)) == expected
    assert set(batch.group.tolist()) == {0}  # one prompt


def test_columns_of_other_names(plain: LanguagePolicy) -> None:
    rows = [{"question": "q", "good": "a", "bad": "b"}]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert pairs_of(load_preferences(rows, plain, columns=columns)) == [("q", "a", "b")]


# --- tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", [False, True])
def test_tokens_are_those_that_the_policy_itself_makes(begin: bool) -> None:
    policy = byte_policy(begin=begin)
    rows = [*many(50), {"prompt": "<s>begun" if begin else "begun", "chosen": "ä", "rejected": "日本"}]
    data = load_preferences(rows, policy)
    for i, row in enumerate(rows):
        assert data.prompt.lists([i]) == [policy.tokens(row["prompt"])]
        assert data.chosen.lists([i]) == [policy.answer_tokens(row["chosen"])]
        assert data.rejected.lists([i]) == [policy.answer_tokens(row["rejected"])]
    words = Words(policy)  # a prompt that is decoded leads back to the same tokens
    assert all(policy.tokens(words.prompt(ids)) == ids for ids in data.prompt.lists(range(len(rows))))


@pytest.mark.parametrize("begin", [False, True])
def test_a_conversation_is_what_the_chat_template_writes(begin: bool) -> None:
    policy = byte_policy(begin=begin)
    data = load_demonstrations([{"messages": TALK}], policy, max_length=300)
    whole = policy.tokenizer.apply_chat_template(TALK, tokenize=True)["input_ids"]
    newline = policy.tokenizer("\n", add_special_tokens=False)[
        "input_ids"
    ]  # what the template writes after the end
    assert data.prompt.lists([1])[0] + data.answer.lists([1])[0] + newline == whole
    assert data.prompt.lists([0])[0] == policy.tokens(TALK[:2])
    assert policy.tokens(everything(data).prompts[0]) == data.prompt.lists([0])[0]  # to answer it again


def test_a_template_may_write_a_beginning_that_the_tokenizer_does_not() -> None:
    policy = byte_policy(begin=True)
    policy.tokenizer.backend_tokenizer.post_processor = byte_tokenizer().backend_tokenizer.post_processor
    words, ids = Words(policy), policy.tokens(said("hi"))
    assert ids[0] == policy.tokenizer.bos_token_id
    assert policy.tokens("hi")[0] != policy.tokenizer.bos_token_id
    assert policy.tokens(words.prompt(ids)) == ids


def test_a_template_without_an_end_gets_the_end_of_text() -> None:
    policy = byte_policy()
    policy.tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    policy.tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    data = load_demonstrations([{"messages": said("hi", "yo")}], policy)
    assert data.answer.lists([0]) == [policy.answer_tokens("yo")]
    assert answers_of(data) == [("user: hi\nassistant: ", "yo")]


def test_an_answer_that_brings_its_end_does_not_get_another(plain: LanguagePolicy) -> None:
    data = load_preferences([{"prompt": "p", "chosen": "a<|im_end|>", "rejected": "b"}], plain)
    assert data.chosen.lists([0]) == [plain.answer_tokens("a")]


def test_one_row_a_turn_has_the_likelihood_of_a_mask_over_turns() -> None:
    policy = LanguagePolicy(tiny_llama(3 + 256, width=16, layers=1), byte_tokenizer())
    policy.model.config.max_position_embeddings = 256
    data = load_demonstrations([{"messages": TALK}], policy)
    by_turn = policy.log_prob(everything(data)).sum()
    whole = data.prompt.lists([1])[0] + data.answer.lists([1])[0]
    logits = policy.model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
    each = logits.gather(1, torch.tensor(whole[1:])[:, None])[:, 0]
    first, n = len(data.prompt.lists([0])[0]), len(data.answer.lists([0])[0])
    spoken = [*range(first, first + n), *range(len(data.prompt.lists([1])[0]), len(whole))]
    assert torch.allclose(by_turn, each[[i - 1 for i in spoken]].sum(), atol=1e-4)


def test_texts_without_a_prompt_start_at_the_document_separator() -> None:
    for begin, first in ((True, "<s>"), (False, "<|im_end|>")):
        policy = byte_policy(begin=begin)
        data = load_demonstrations([{"text": "words"}], policy)
        assert data.prompt.lists([0]) == [[policy.tokenizer.convert_tokens_to_ids(first)]]


def test_tokenising_calls_the_tokenizer_for_many_rows_at_once() -> None:
    policy = byte_policy(chat=False)
    inner, calls = policy.tokenizer, Counter[str]()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def __call__(self, texts: list[str], **options: Any) -> Any:
            calls["texts"] += len(texts)
            calls["calls"] += 1
            return inner(texts, **options)

    policy.tokenizer = Counting()
    load_preferences(many(3000), policy)
    assert calls["texts"] > 6000
    assert calls["calls"] <= 8


# --- limits -----------------------------------------------------------------------------------------------


def fitted(policy: LanguagePolicy, row: dict[str, str] | None = None, **limits: Any) -> Any:
    row = row or {"prompt": "0123456789", "chosen": "abcdefgh", "rejected": "xyz"}
    data = load_preferences([row], policy, **limits)
    return *pairs_of(data)[0], data


def test_what_fits_is_left_alone(plain: LanguagePolicy) -> None:
    prompt, chosen, rejected, data = fitted(plain, max_length=19)  # 10 + 8 and the end
    assert (prompt, chosen, rejected) == ("0123456789", "abcdefgh", "xyz")
    assert data.notes == []


def test_the_prompt_is_cut_first(plain: LanguagePolicy) -> None:
    prompt, chosen, rejected, data = fitted(plain, max_length=18)
    assert (prompt, chosen, rejected) == ("012345678", "abcdefgh", "xyz")
    assert data.chosen.lists([0])[0][-1] == plain.tokenizer.eos_token_id
    assert data.notes == ["the given rows: cut the prompt of 1 of 1 examples (first: row 1) to fit 18 tokens"]


def test_then_the_answers_to_the_same_limit_without_an_end(plain: LanguagePolicy) -> None:
    prompt, chosen, rejected, data = fitted(plain, max_length=10)
    assert (prompt, chosen, rejected) == ("01234", "abcde", "xyz")  # half is for the prompt
    assert plain.tokenizer.eos_token_id not in data.chosen.lists([0])[0]
    assert data.rejected.lists([0])[0][-1] == plain.tokenizer.eos_token_id
    assert len(data.notes) == 2
    prompt, chosen, rejected, _ = fitted(plain, max_length=9, max_prompt=7)
    assert (prompt, chosen, rejected) == ("0123456", "ab", "xy")


def test_a_limit_of_the_prompt_holds_though_all_would_fit(plain: LanguagePolicy) -> None:
    assert fitted(plain, max_prompt=4)[:2] == ("0123", "abcdefgh")


def test_which_end_of_a_prompt_is_kept(plain: LanguagePolicy, chat: LanguagePolicy) -> None:
    assert fitted(plain, max_prompt=4, keep="end")[0] == "6789"
    assert fitted(plain, max_prompt=4, keep="start")[0] == "0123"
    row: Any = {"prompt": said("a long question"), "chosen": A, "rejected": B}
    assert fitted(chat, row, max_prompt=16)[0] == "ion<|im_end|>\n<|im_start|>assistant\n"
    assert fitted(chat, row, max_prompt=16, keep="start")[0] == "<|im_start|>user\na long que"
    begun = byte_policy(begin=True)
    data = fitted(begun, max_prompt=4, keep="end")[3]
    assert data.prompt.lists([0]) == [begun.tokens("789")]  # the token that begins a text stays


def test_long_rows_can_be_left_out_or_refused(plain: LanguagePolicy) -> None:
    rows = [{**PAIR, "prompt": "x" * n} for n in (3, 30, 5, 31)]
    data = load_preferences(rows, plain, max_length=20, too_long="drop")
    assert [len(p) for p, _, _ in pairs_of(data)] == [3, 5]
    assert data.notes == ["the given rows: left out 2 of 4 examples (first: row 2): longer than 20 tokens"]
    with pytest.raises(DataError, match="row 2, column 'prompt': the prompt has 30 tokens and the answer 2"):
        load_preferences(rows, plain, max_length=20, too_long="error")
    with pytest.raises(DataError, match=r"no rows are left to learn from .* left out 4 of 4"):
        load_preferences(rows, plain, max_length=4, too_long="drop")


def test_the_models_own_limit_is_the_default(plain: LanguagePolicy) -> None:
    row = {"prompt": "p", "chosen": "a" * 5000, "rejected": "b"}
    assert load_preferences([row], plain).lengths.tolist() == [64]  # the tiny model's positions
    large = byte_policy()
    large.model.config.max_position_embeddings = 100_000
    assert load_preferences([row], large).lengths.tolist() == [DEFAULT_MAX_LENGTH]


@pytest.mark.parametrize("limits", [{"max_length": 1}, {"max_prompt": 9, "max_length": 9}, {"max_prompt": 0}])
def test_limits_without_room_are_refused(plain: LanguagePolicy, limits: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="leave no room"):
        load_preferences([PAIR], plain, **limits)


def test_unknown_options_are_refused(plain: LanguagePolicy) -> None:
    with pytest.raises(UsageError, match="keep is 'middle'; expected one of auto, start, end"):
        load_preferences([PAIR], plain, keep="middle")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="turns is 'first'"):
        load_demonstrations([PAIR], plain, turns="first")  # type: ignore[arg-type]


def test_pairs_with_equal_answers_are_left_out_and_counted(plain: LanguagePolicy) -> None:
    rows = [PAIR, {**PAIR, "rejected": "4"}, {"chosen": "a b", "rejected": "a b"}, PAIR]
    data = load_preferences(rows, plain)
    assert len(data) == 2
    assert data.notes == [
        "the given rows: left out 2 of 4 examples (first: row 2): the two answers are the same"
    ]


# --- sources ----------------------------------------------------------------------------------------------


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"pairs{kind}"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if kind in (".jsonl", ".ndjson"):
        path.write_text("\n\n".join(lines), encoding="utf-8-sig")
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=7)
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".jsonl.gz", ".json", ".parquet", ".csv", ".tsv"])
def test_every_kind_of_file_holds_the_same_rows(plain: LanguagePolicy, tmp_path: Path, kind: str) -> None:
    rows = [
        {**row, "prompt": f'q{i}, "é\n{row["prompt"]}', "strength": 0.5 + i / 100}
        for i, row in enumerate(many(20))
    ]
    here, there = load_preferences(rows, plain), load_preferences(write(tmp_path, kind, rows), plain)
    assert pairs_of(here) == pairs_of(there)
    assert torch.equal(here.strength, there.strength)
    assert torch.equal(here.chosen.values, there.chosen.values)
    assert len(load_preferences(str(tmp_path / f"pairs{kind}"), plain, limit=3)) == 3


def test_conversations_in_parquet(chat: LanguagePolicy, tmp_path: Path) -> None:
    rows = [{"prompt": said("hi"), "chosen": A, "rejected": B}] * 2
    data = load_preferences(write(tmp_path, ".parquet", rows), chat)
    assert pairs_of(data) == [(ASKED, "yes", "no")] * 2


@pytest.mark.parametrize("text", ['{"version": 1, "rows": [%s]}', "[%s]", "%s", "%s\n"])
def test_shapes_of_json(plain: LanguagePolicy, tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text % json.dumps(PAIR))
    assert pairs_of(load_preferences(path, plain)) == [("2+2=", "4", "5")]


def test_one_conversation_as_json(chat: LanguagePolicy, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"messages": said("hi", "yes")}))
    assert answers_of(load_demonstrations(path, chat)) == [(ASKED, "yes")]


def test_a_folder_of_shards_and_one_saved_by_datasets(plain: LanguagePolicy, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = many(9)
    shards, saved, both = tmp_path / "shards", tmp_path / "saved", tmp_path / "both"
    shards.mkdir()
    for i in range(3):
        (shards / f"{i}.jsonl").write_text("\n".join(map(json.dumps, rows[3 * i : 3 * i + 3])))
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(saved)
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(both)
    expected = pairs_of(load_preferences(rows, plain))
    for folder in (shards, saved, both):
        assert pairs_of(load_preferences(str(folder), plain)) == expected
    assert pairs_of(load_preferences(both, plain, split="test")) == expected[:1]
    with pytest.raises(UsageError, match="no split 'dev'; it has: train, test"):
        load_preferences(both, plain, split="dev")


def test_objects_of_datasets(plain: LanguagePolicy) -> None:
    datasets = pytest.importorskip("datasets")
    rows = many(9)
    table = datasets.Dataset.from_list(rows)
    expected = pairs_of(load_preferences(rows, plain))
    assert pairs_of(load_preferences(table.with_format("numpy"), plain)) == expected
    assert pairs_of(load_preferences(table.to_iterable_dataset(), plain, limit=4)) == expected[:4]
    assert pairs_of(load_preferences(datasets.DatasetDict(dev=table), plain)) == expected


def test_a_name_on_the_hub_goes_to_datasets(plain: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load_dataset(name: str, **options: Any) -> Any:
        asked.append((name, options))
        if name == "me/nothing":
            raise FileNotFoundError("Dataset 'me/nothing' doesn't exist on the Hub")
        return datasets.DatasetDict(train=datasets.Dataset.from_list([PAIR]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(load_preferences("me/pairs", plain, streaming=True)) == 1
    assert asked == [("me/pairs", {"split": None, "streaming": True})]
    with pytest.raises(DataError, match=r"no file or folder 'me/nothing', .* doesn't exist on the Hub"):
        load_preferences("me/nothing", plain)


def test_an_endless_source_is_read_up_to_the_limit(plain: LanguagePolicy) -> None:
    taken = []

    def endless() -> Iterator[dict[str, str]]:
        i = 0
        while True:
            taken.append(i)
            yield {**PAIR, "prompt": str(i)}
            i += 1

    assert len(load_preferences(endless(), plain, limit=2500)) == 2500
    assert len(taken) == 2500
    with pytest.raises(UsageError, match="limit is 0"):
        read_rows([PAIR], limit=0)


def test_files_are_read_bit_by_bit(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR) + "\nbroken\n")
    assert next(iter(read_rows(path))).values == PAIR  # the second row was not looked at
    rows = iter(read_rows(write(tmp_path, ".parquet", many(100))))
    assert [next(rows).number for _ in range(3)] == [1, 2, 3]


def test_streaming_keeps_token_ids_alone(plain: LanguagePolicy, chat: LanguagePolicy) -> None:
    rows = many(30)
    kept, streamed = load_preferences(rows, plain), load_preferences(iter(rows), plain, streaming=True)
    assert streamed.texts is None
    assert kept.texts is not None
    assert pairs_of(streamed) == pairs_of(kept)  # decoded when they are asked for
    talk = [{"prompt": said("hi"), "chosen": A, "rejected": B}]
    assert pairs_of(load_preferences(talk, chat, streaming=True)) == [(ASKED, "yes", "no")]


# --- prompts ----------------------------------------------------------------------------------------------


def test_prompts_of_every_kind(chat: LanguagePolicy, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert load_prompts(path) == ["one", "two"]
    assert load_prompts(["one", "two"]) == ["one", "two"]
    rows = [{"prompt": "one", "x": 1}, {"prompt": "two", "x": 2}]
    for kind in (".jsonl", ".parquet", ".csv", ".json"):
        assert load_prompts(write(tmp_path, kind, rows)) == ["one", "two"]
    assert load_prompts([{"caption": "one"}], column="caption") == ["one"]
    assert load_prompts([{"prompt": said("hi")}, {"messages": said("hi", "yes")}], chat) == [ASKED, ASKED]
    with pytest.raises(
        UsageError, match="row 1 holds a conversation, which only a language model's chat template"
    ):
        load_prompts([{"prompt": said("hi")}])


# --- views ------------------------------------------------------------------------------------------------


def test_a_split_keeps_prompts_apart(plain: LanguagePolicy) -> None:
    rows = [{**row, "prompt": f"p{i % 30}"} for i, row in enumerate(many(120))]
    data = load_preferences(rows, plain)
    train, test = train_test_split(data, 0.2, seed=1)
    assert 24 <= len(test) <= 28
    assert len(train) + len(test) == 120
    seen = [set(everything(part).chosen.prompts) for part in (train, test)]
    assert not seen[0] & seen[1]
    assert torch.equal(test.lengths, data.lengths[test.rows])
    again = train_test_split(data, 24, seed=1)[1]
    assert torch.equal(again.rows, test.rows)
    assert not torch.equal(train_test_split(data, 24, seed=2)[1].rows, test.rows)
    rows = torch.arange(3)
    assert Subset(test, rows).take(torch.tensor([2])).chosen.texts == everything(test).chosen.texts[2:3]


def test_a_split_keeps_the_turns_of_a_conversation_together(chat: LanguagePolicy) -> None:
    talks = [
        said(*(f"{i}{turn}" for turn in "abcdef")) for i in (0, 1, 2, 3, 0)
    ]  # the last begins as the first
    data = load_demonstrations([{"messages": talk} for talk in talks], chat, max_length=300)
    assert data.group.view(5, 3).tolist() == [[3 * i] * 3 for i in (0, 1, 2, 3, 0)]
    for seed in range(5):
        test = train_test_split(data, 0.3, seed=seed)[1]
        assert len(test) in (6, 9)
        assert len(test) == sum(
            6 if g == 0 else 3 for g in set(test.take(torch.arange(len(test))).group.tolist())
        )


@pytest.mark.parametrize("share", [0.0, 1.0, 0, 120, 0.001])
def test_a_split_with_an_empty_part_is_refused(plain: LanguagePolicy, share: float) -> None:
    data = load_preferences(many(120), plain)
    if share == 1.0:
        assert len(train_test_split(data, share)[1]) == 1  # one row
        return
    with pytest.raises(UsageError, match=f"cannot keep {share} of 120"):
        train_test_split(data, share)


def test_a_split_of_one_prompt_is_refused(plain: LanguagePolicy) -> None:
    data = load_preferences([{**row, "prompt": "p"} for row in many(9)], plain)
    with pytest.raises(UsageError, match="the rest has the same prompts"):
        train_test_split(data, 3)


def test_groups_lie_side_by_side(plain: LanguagePolicy) -> None:
    rows = [{"prompt": p, "completion": f"{p}{i}", "reward": i} for i, p in enumerate("aabacbbcaad")]
    data = load_rated(rows, plain)
    groups = Groups(data, 2)
    assert len(groups) == 4  # five a, three b, two c, one d
    assert groups.notes == ["3 of 11 answers are left out: they do not fill a group of 2"]
    batch = groups.take(torch.tensor([3, 0]))
    assert batch.prompts == ["c", "c", "a", "a"]
    assert batch.group.view(2, 2).unique(dim=1).shape == (2, 1)
    assert groups.lengths.shape == (4,)
    with pytest.raises(DataError, match="no prompt has 6 answers"):
        Groups(data, 6)
    with pytest.raises(UsageError, match="at least two"):
        Groups(data, 1)


# --- a reference computed once ----------------------------------------------------------------------------


def actor_and_reference(lora: bool) -> tuple[LanguagePolicy, Role, Role]:
    policy = byte_policy(chat=False)
    actor = Role("actor", policy, RoleSettings(Adam(1e-2), lora=LoRA(2, 4) if lora else None, sample_batch=5))
    return policy, actor, actor.copy(frozen=True)


@pytest.mark.parametrize("lora", [False, True])
def test_a_cached_reference_equals_one_computed_on_the_way(lora: bool) -> None:
    policy, actor, reference = actor_and_reference(lora)
    data = load_preferences(many(41), policy)
    cached = cached_reference(data, reference, batch=6)
    actor.update(
        data.take(torch.arange(8)).chosen, WeightedLikelihood()
    )  # the actor moves on, the reference does not
    assert isinstance(cached, Data)
    assert torch.equal(cached.lengths, data.lengths)
    for rows in batch_order(len(cached), 7, 0, 0, cached.lengths):
        batch, expected = cached.take(rows), with_reference(data.take(rows), reference)
        for side in ("chosen", "rejected"):
            ours, theirs = (getattr(b, side).reference_log_prob for b in (batch, expected))
            assert ours.shape == theirs.shape
            assert torch.allclose(ours, theirs, atol=1e-5)
            assert (getattr(batch, side).texts) == getattr(expected, side).texts
    moved = actor.log_prob(batch.chosen)
    assert not torch.allclose(moved, batch.chosen.reference_log_prob, atol=1e-3)


def test_a_cached_reference_of_single_answers_and_of_any_batch() -> None:
    policy, _, reference = actor_and_reference(False)
    data = load_rated(
        [{"prompt": r["prompt"], "completion": r["chosen"], "reward": 1} for r in many(9)], policy
    )
    for source in (data, InMemory(everything(data))):
        batch = cached_reference(source, reference, batch=4).take(torch.tensor([8, 2]))
        assert isinstance(batch, Trajectories)
        assert torch.allclose(batch.reference_log_prob, reference.log_prob(batch), atol=1e-5)
        assert batch.score().tolist() == [1, 1]


def test_a_cached_reference_keeps_no_padding() -> None:
    policy, _, reference = actor_and_reference(False)
    data = load_preferences(many(20), policy)
    kept = cached_reference(data, reference).sides
    assert [len(side.values) for side in kept] == [len(data.chosen.values), len(data.rejected.values)]
    assert isinstance(data, TextPreferences)


def test_rows_are_split_into_parts_and_some_held_out() -> None:
    *parts, held_out = split_rows(23, 3, 5, seed=4)
    assert [len(part) for part in (*parts, held_out)] == [6, 6, 6, 5]
    assert sorted(torch.cat([*parts, held_out]).tolist()) == list(range(23))
    assert torch.equal(held_out, split_rows(23, 3, 5, seed=4)[-1])
    assert not torch.equal(held_out, split_rows(23, 3, 5, seed=5)[-1])
    with pytest.raises(UsageError, match="7 rows cannot be split into 3 parts with 5"):
        split_rows(7, 3, 5, seed=4)


def test_rewards_of_rated_answers_are_changed_on_the_way(plain: LanguagePolicy) -> None:
    ids = [plain.tokens("a"), plain.tokens("bc")], [plain.answer_tokens("x"), plain.answer_tokens("yyy")]
    data = TextCompletions(plain, *ids, reward=torch.tensor([-1.0, 2.0]))
    changed: Data = Rescored(data, torch.sigmoid)
    assert len(changed) == 2
    assert changed.lengths is not None
    assert torch.equal(changed.lengths, data.lengths)
    batch: Any = changed.take(torch.tensor([1, 0]))
    assert batch.score() == pytest.approx(torch.tensor([2.0, -1.0]).sigmoid())
    assert everything(data).score().tolist() == [-1.0, 2.0]
    unrated: Any = Rescored(TextCompletions(plain, *ids), torch.sigmoid).take(torch.tensor([0]))
    assert unrated.reward is None
