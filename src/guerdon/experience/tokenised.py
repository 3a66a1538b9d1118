"""From rows to token ids: what a model reads of them, cut to its limits, kept without padding."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from guerdon.errors import DataError, UsageError
from guerdon.experience.conventions import Example, Message, check_option, content
from guerdon.experience.rows import Row
from guerdon.policies.language import LanguagePolicy

DEFAULT_MAX_LENGTH = 2048  # tokens of prompt and answer, where the model's own limit is larger or unknown
_CHUNK = 1024  # examples that are tokenised together

Keep = Literal["auto", "start", "end"]
TooLong = Literal["cut", "drop", "error"]


class Ragged:
    """Rows of different lengths in one flat tensor: row ``i`` is ``values[starts[i]:starts[i + 1]]``.

    Args:
        values: ``[total]``.
        starts: int64 ``[N + 1]``.
    """

    def __init__(self, values: Tensor, starts: Tensor) -> None:
        self.values, self.starts = values, starts
        self._bounds = starts.numpy()

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]] | Ragged) -> Ragged:
        """Token ids of each row, kept as int32."""
        if isinstance(rows, Ragged):
            return rows
        arrays = [np.asarray(row, dtype=np.int32) for row in rows]
        flat = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int32)
        starts = np.concatenate([[0], np.cumsum([len(a) for a in arrays])]).astype(np.int64)
        return cls(torch.from_numpy(flat), torch.from_numpy(starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 ``[N]``."""
        return self.starts.diff()

    def row(self, i: int) -> Tensor:
        """Row ``i``, a view."""
        return self.values[self._bounds[i] : self._bounds[i + 1]]

    def lists(self, rows: Iterable[int]) -> list[list[int]]:
        """These rows as lists of numbers."""
        return [self.row(i).tolist() for i in rows]

    def fill(self, rows: Iterable[int], mask: Tensor) -> Tensor:
        """The values of these rows where ``mask [B, T]`` is true (as many a row as it is long), zeros elsewhere."""
        flat = torch.cat([self.row(i) for i in rows]).to(mask.device)
        return torch.zeros(mask.shape, dtype=flat.dtype, device=mask.device).masked_scatter(mask, flat)


@dataclass
class Limits:
    """How long prompts and answers may be, and what happens to longer ones.

    Args:
        max_prompt: tokens of a prompt; None means no limit as long as prompt and answer fit, else half of ``max_length``
            or what the answer leaves.
        max_length: tokens of prompt and answer together; None takes the model's limit, at most 2048.
        keep: which end of a prompt that is cut stays: ``"start"``, ``"end"``, or ``"auto"``: the end of conversations,
            whose last turn counts, and the start of plain texts. A beginning-of-text token stays in either case.
        too_long: ``"cut"`` shortens the prompt first, then the answers (both of a pair to the same limit; an answer that
            is cut has no end-of-text token), ``"drop"`` leaves the row out, ``"error"`` raises `DataError`.

    Raises `UsageError` for limits that leave no room.
    """

    max_prompt: int | None = None
    max_length: int | None = None
    keep: Keep = "auto"
    too_long: TooLong = "cut"

    def __post_init__(self) -> None:
        check_option("keep", self.keep, get_args(Keep))
        check_option("too_long", self.too_long, get_args(TooLong))

    def settle(self, policy: LanguagePolicy) -> Limits:
        """The same with numbers for None."""
        length = self.max_length
        if length is None:
            own = getattr(getattr(policy.model, "config", None), "max_position_embeddings", None)
            length = min(own or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
        if length < 2 or (self.max_prompt is not None and not 1 <= self.max_prompt < length):
            raise UsageError(
                f"max_prompt {self.max_prompt} and max_length {length} leave no room for a prompt and an answer; "
                "max_length holds both"
            )
        return Limits(self.max_prompt, length, self.keep, self.too_long)


class Words:
    """Texts and tokens of a policy, many at a time; the same as its ``tokens`` and ``answer_tokens``."""

    def __init__(self, policy: LanguagePolicy) -> None:
        self.policy, self.tokenizer = policy, policy.tokenizer
        self.end = int(self.tokenizer.eos_token_id)
        self.begin: str | None = getattr(self.tokenizer, "bos_token", None)
        begin_id = getattr(self.tokenizer, "bos_token_id", None)
        self.begin_id = -1 if begin_id is None else int(begin_id)
        self.begins = self.tokenizer("a", add_special_tokens=True)["input_ids"][:1] == [self.begin_id]

    def _ids(self, texts: list[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": special, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(texts, **options)["input_ids"]

    def prompts(self, texts: list[str]) -> list[list[int]]:
        """Token ids of prompts; empty for those that have none."""
        begun = [bool(self.begin and text.startswith(self.begin)) for text in texts]
        ids: list[list[int]] = [[] for _ in texts]
        for special in (True, False):
            places = [i for i, has in enumerate(begun) if has != special]
            for i, row in zip(places, self._ids([texts[i] for i in places], special), strict=True):
                ids[i] = row[:-1] if row and special and row[-1] == self.end else row
        return ids

    def answers(self, texts: list[str]) -> list[list[int]]:
        """Token ids of answers, an end-of-text token behind each that does not bring its own."""
        return [row if row and row[-1] == self.end else [*row, self.end] for row in self._ids(texts, False)]

    def start(self) -> list[int]:
        """What stands before a text that has no prompt: beginning-of-text, or where there is none, end-of-text."""
        return [self.begin_id if self.begin_id >= 0 else self.end]

    def prompt(self, ids: list[int]) -> str:
        """The text of a prompt that would be tokenised to these ids: a beginning-of-text token that the tokenizer adds
        itself is left out."""
        if self.begins and ids[:1] == [self.begin_id]:
            ids = ids[1:]
        return self._decoded(ids, False)

    def answer(self, ids: list[int]) -> str:
        """The words of an answer, special tokens left out."""
        return self._decoded(ids, True)

    def _decoded(self, ids: list[int], skip: bool) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)

    def render(self, example: Example) -> tuple[str, list[str]]:
        """Prompt and answers as the model reads them. An answer to a conversation is what the chat template writes
        behind the prompt."""
        prompt, row = example.prompt, example.row
        if not isinstance(prompt, list):
            return prompt or "", [content(answer) for answer in example.answers]
        if not getattr(self.tokenizer, "chat_template", None):
            raise UsageError(
                f"{row.source}, row {row.number} holds a conversation, but the tokenizer of this model has no chat "
                "template: take a chat model, set tokenizer.chat_template, or write prompts and answers as plain texts"
            )
        start = self._template(row, example.columns[0], prompt, True)
        answers = []
        for answer, column in zip(example.answers, example.columns[1:], strict=True):
            whole = self._template(row, column, [*prompt, cast(Message, answer)], False)
            if not whole.startswith(start):
                raise row.error(
                    "the chat template does not write the prompt in the same way before an answer, so the answer cannot "
                    "be told apart; use a template that does, or plain texts",
                    column,
                )
            written = whole[len(start) :]
            words, end, rest = written.rpartition(self.tokenizer.eos_token)
            answers.append(words + end if end and not rest.strip() else written.rstrip())
        return start, answers

    def _template(self, row: Row, column: str, messages: list[Message], begin_answer: bool) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=begin_answer
            )
        except Exception as error:  # templates raise what they like
            reason = str(error).partition("\n")[0]
            raise row.error(f"the chat template refuses these messages ({reason})", column) from error
        return cast(str, text)


@dataclass
class _Tally:
    """Rows that were left out or cut: how many, and the first."""

    count: int = 0
    first: int = 0

    def add(self, row: Row) -> None:
        self.first = self.first or row.number
        self.count += 1


@dataclass
class _Column:
    """Token ids of a growing number of rows, and their texts."""

    flat: array[int] = field(default_factory=lambda: array("i"))
    starts: array[int] = field(default_factory=lambda: array("q", [0]))
    texts: list[str] = field(default_factory=list)

    def add(self, ids: list[int], text: str | None) -> None:
        self.flat.extend(ids)
        self.starts.append(len(self.flat))
        if text is not None:
            self.texts.append(text)

    def ragged(self) -> Ragged:
        values = torch.from_numpy(np.array(self.flat, dtype=np.int32))
        return Ragged(values, torch.from_numpy(np.array(self.starts, dtype=np.int64)))


class Reader:
    """Examples of a source, tokenised a thousand at a time, cut to their limits, and kept as token ids."""

    def __init__(self, policy: LanguagePolicy, limits: Limits, texts: bool) -> None:
        self.words, self.limits, self.keeps_texts = Words(policy), limits.settle(policy), texts
        self.columns: list[_Column] = []
        self.extra: dict[str, list[Any]] = {}  # what came with the rows, by name
        self.seen = 0
        self._first: Example | None = None
        self._row: Row | None = None  # of the newest example
        self._first_of_row = array("q")
        self._long, self._short, self._same, self._left, self._tied = (_Tally() for _ in range(5))

    def read(self, name: str, rows: Iterable[Row], parse: Callable[[Row], Iterator[Example]]) -> list[str]:
        """Take everything in; returns notes on what was left out or cut. Raises `DataError` when nothing is left."""
        chunk: list[Example] = []
        for row in rows:
            found = len(chunk)
            for example in parse(row):
                self._check_form(example)
                chunk.append(example)
            if len(chunk) == found:
                self.seen += 1
                self._tied.add(row)
            if len(chunk) >= _CHUNK:
                self._tokenise(chunk)
                chunk = []
        self._tokenise(chunk)
        notes = self._notes(name)
        if not self.columns:
            raise DataError(f"{name}: no rows are left to learn from ({'; '.join(notes)})")
        return notes

    def _check_form(self, example: Example) -> None:
        """Every row has the form of the first."""
        first = self._first = self._first or example
        if example.talk != first.talk:
            forms = ("plain texts", "conversations")
            raise example.row.error(
                f"holds {forms[example.talk]}, but the rows before hold {forms[first.talk]}; use one form",
                example.columns[-1],
            )
        odd = example.extra.keys() ^ first.extra.keys()
        if odd:
            raise example.row.error(f"'{min(odd)}' is given in some rows and not in others; give it in all")

    def _tokenise(self, chunk: list[Example]) -> None:
        rendered = [self.words.render(example) for example in chunk]
        unique = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompt for prompt, _ in rendered))}
        prompts = self.words.prompts(list(unique))
        answers = iter(self.words.answers([text for _, texts in rendered for text in texts]))
        for example, (prompt, texts) in zip(chunk, rendered, strict=True):
            own = [next(answers) for _ in texts]
            self._add(example, prompt, list(prompts[unique[prompt]]), own)

    def _add(self, example: Example, prompt: str, prompt_ids: list[int], answers: list[list[int]]) -> None:
        row = example.row
        self.seen += 1
        if example.prompt is None:
            prompt_ids = self.words.start()
        if not prompt_ids:
            raise row.error("the prompt has no tokens; the model needs at least one", example.columns[0])
        for ids, column in zip(answers, example.columns[1:], strict=True):
            if len(ids) < 2:
                raise row.error("the answer has no tokens", column)
        shown: list[str] = [prompt, *map(content, example.answers)]
        lengths = len(prompt_ids), [len(ids) for ids in answers]
        if self._over(*lengths):
            if self.limits.too_long == "error":
                raise row.error(
                    f"the prompt has {lengths[0]} tokens and the answer {max(lengths[1])}, over the limit "
                    f"(max_prompt {self.limits.max_prompt}, max_length {self.limits.max_length})",
                    example.columns[0],
                )
            if self.limits.too_long == "drop":
                self._left.add(row)
                return
            prompt_ids, answers = self._cut(example, prompt_ids, answers)
            if len(prompt_ids) < lengths[0]:
                self._long.add(row)
                shown[0] = self.words.prompt(prompt_ids)
            if any(len(ids) < before for ids, before in zip(answers, lengths[1], strict=True)):
                self._short.add(row)
                shown[1:] = [
                    self.words.answer(ids) if len(ids) < before else text
                    for ids, before, text in zip(answers, lengths[1], shown[1:], strict=True)
                ]
        if len(answers) == 2 and answers[0] == answers[1]:
            self._same.add(row)
            return
        self.columns = self.columns or [_Column() for _ in shown]
        for kept, ids, text in zip(self.columns, [prompt_ids, *answers], shown, strict=True):
            kept.add(ids, text if self.keeps_texts else None)
        for name, value in example.extra.items():
            self.extra.setdefault(name, []).append(value)
        count = len(self._first_of_row)
        self._first_of_row.append(self._first_of_row[-1] if row is self._row else count)
        self._row = row

    def _over(self, prompt: int, answers: list[int]) -> bool:
        limits = self.limits
        assert limits.max_length is not None
        return prompt > (limits.max_prompt or prompt) or prompt + max(answers) > limits.max_length

    def _cut(
        self, example: Example, prompt: list[int], answers: list[list[int]]
    ) -> tuple[list[int], list[list[int]]]:
        limits = self.limits
        assert limits.max_length is not None
        longest = max(len(ids) for ids in answers)
        room = limits.max_prompt or max(limits.max_length // 2, limits.max_length - longest)
        if len(prompt) > room:
            if limits.keep == "end" or (limits.keep == "auto" and example.talk):
                begin = prompt[:1] if prompt[0] == self.words.begin_id and room > 1 else []
                prompt = begin + prompt[len(prompt) - room + len(begin) :]
            else:
                prompt = prompt[:room]
        rest = limits.max_length - len(prompt)
        return prompt, [ids[:rest] for ids in answers]

    def _notes(self, name: str) -> list[str]:
        most = f"{self.limits.max_length} tokens"
        if self.limits.max_prompt:
            most += f" (prompt {self.limits.max_prompt})"
        said = (
            (self._same, "left out {}: the two answers are the same"),
            (self._tied, "left out {}: no two answers of different scores"),
            (self._left, f"left out {{}}: longer than {most}"),
            (self._long, f"cut the prompt of {{}} to fit {most}"),
            (self._short, f"cut an answer of {{}} to fit {most}"),
        )
        return [
            f"{name}: " + what.format(f"{tally.count} of {self.seen} examples (first: row {tally.first})")
            for tally, what in said
            if tally.count
        ]

    def ragged(self) -> list[Ragged]:
        """Token ids of prompts and answers."""
        return [column.ragged() for column in self.columns]

    def texts(self) -> tuple[list[str], ...] | None:
        """Prompts and answers as texts, where they were kept."""
        return tuple(column.texts for column in self.columns) if self.keeps_texts else None

    def numbers(self, name: str) -> Tensor | None:
        """``[N]`` or ``[N, K]``, what came with the rows under this name."""
        if name not in self.extra:
            return None
        return torch.tensor(self.extra[name], dtype=torch.float32)

    def first_of_row(self) -> Tensor:
        """int64 ``[N]``, the first of the examples that came from the same row."""
        return torch.from_numpy(np.array(self._first_of_row, dtype=np.int64))
