"""The alphabet of EnumLM: its tokens, all its answers as batches, and reading answers back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import FeedbackError, UsageError
from guerdon.evaluation import enumerable
from guerdon.evaluation.enumerable import Table
from guerdon.policies.language import LanguagePolicy

LETTERS = "abcdefgh"
PROMPTS = LETTERS.upper()
HORIZON = 4
END, UNKNOWN, FIRST_LETTER, FIRST_PROMPT = 0, 1, 2, 2 + len(LETTERS)
VOCABULARY = FIRST_PROMPT + len(PROMPTS)
ALPHABET = tuple(range(FIRST_LETTER, FIRST_PROMPT))
ANSWERS = len(LETTERS) ** HORIZON
GROUPS = (0, 0, 0, 1, 1, 1, 2, 2)  # letters a to c, d to f, g and h: the classes of the cyclic judge


def tokenizer() -> Any:
    """A word-level tokenizer of transformers over the letters and the prompts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<end>", "<unk>", *LETTERS, *PROMPTS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<end>", unk_token="<unk>", padding_side="left"
    )


def allowed() -> Tensor:
    """``[V]`` bool: the letters."""
    mask = torch.zeros(VOCABULARY, dtype=torch.bool)
    mask[list(ALPHABET)] = True
    return mask


def load_policy(folder: str | Path) -> LanguagePolicy:
    """A model of this world from a folder in transformers' format. Raises `UsageError` for another vocabulary."""
    policy = LanguagePolicy.from_pretrained(str(folder), max_new_tokens=HORIZON)
    size = policy.model.config.vocab_size  # type: ignore[union-attr]
    if size != VOCABULARY:
        raise UsageError(
            f"the model at '{folder}' has {size} tokens; EnumLM's alphabet needs {VOCABULARY} (guerdon.tasks.enumlm)"
        )
    return LanguagePolicy(policy.model, tokenizer(), HORIZON, allowed=allowed())


def place(traj: Trajectories) -> tuple[Int[Tensor, "row"], Int[Tensor, "row"]]:
    """The numbers of prompt and answer of each row, read from the texts.

    Raises `FeedbackError` for texts that are not of this world."""
    outputs = traj.outputs
    if outputs is None or "text" not in outputs or "prompt" not in outputs:
        raise FeedbackError("EnumLM judges texts, but these trajectories carry none")
    prompt, text = outputs["prompt"].cpu().long(), outputs["text"].cpu().long()
    letters = text[:, 0 : 2 * HORIZON : 2] - ord("a")
    fits = (
        letters.shape[1] == HORIZON
        and bool(((letters >= 0) & (letters < len(LETTERS))).all())
        and bool((text[:, 1 : 2 * HORIZON - 1 : 2] == ord(" ")).all())
        and not bool(text[:, 2 * HORIZON - 1 :].any())
    )
    if not fits:
        bad = next(t for t in traj.texts if len(t.split()) != HORIZON or not set(t.split()) <= set(LETTERS))
        raise FeedbackError(f"EnumLM judges answers of {HORIZON} letters such as 'a b c d', not {bad!r}")
    number = prompt[:, 0] - ord(PROMPTS[0])
    if prompt[:, 1:].any() or bool(((number < 0) | (number >= len(PROMPTS))).any()):
        raise FeedbackError(f"EnumLM's prompts are the letters {PROMPTS[0]} to {PROMPTS[-1]}")
    power = len(LETTERS) ** torch.arange(HORIZON - 1, -1, -1)
    return number, (letters * power).sum(1)


@functools.cache
def blank() -> LanguagePolicy:
    """A policy that only makes batches: its weights are never used."""
    return LanguagePolicy(torch.nn.Linear(1, 1), tokenizer(), HORIZON, allowed=allowed())


@functools.cache
def prefixes() -> Trajectories:
    """The rows through which a policy is read as a table."""
    return enumerable.prefixes(blank(), [[FIRST_PROMPT + p] for p in range(len(PROMPTS))], ALPHABET, HORIZON)


@functools.cache
def every_row() -> Trajectories:
    """All answers to all prompts: row ``p N + i`` is answer ``i`` to prompt ``p``."""
    answers = enumerable.answers(ALPHABET, HORIZON).tolist()
    texts = [" ".join(LETTERS[i - FIRST_LETTER] for i in row) for row in answers]
    prompts = [p for p in range(len(PROMPTS)) for _ in answers]
    return blank().collate(
        [[FIRST_PROMPT + p] for p in prompts],
        answers * len(PROMPTS),
        ([PROMPTS[p] for p in prompts], texts * len(PROMPTS)),
    )


@functools.cache
def classes() -> Int[Tensor, "answer"]:
    """``[N]``: the class of each answer in the cyclic judge's circle."""
    group = torch.tensor(GROUPS)[enumerable.answers(range(len(LETTERS)), HORIZON)]  # [N, T]
    count = torch.nn.functional.one_hot(group, 3).sum(1).double()
    count.scatter_add_(1, group[:, :1], torch.full((ANSWERS, 1), 0.5, dtype=torch.float64))
    return count.argmax(1)


def sampled(log_p: Table, prompt: Int[Tensor, "row"], generator: torch.Generator) -> Int[Tensor, "row"]:
    """An answer to each prompt."""
    cumulative = log_p.exp().cumsum(-1)
    chance = torch.rand(len(prompt), generator=generator, dtype=torch.float64)
    found = torch.empty_like(prompt)
    for p in range(len(PROMPTS)):
        rows = prompt == p
        # the last answer that has a probability ends the scale
        found[rows] = torch.searchsorted(cumulative[p], chance[rows] * cumulative[p, -1], right=True)
    return found.clamp(max=log_p.shape[1] - 1)
