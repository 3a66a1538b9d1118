"""Recorded data that language models learn from: pairs, demonstrations and rated answers, from a file to padded batches.

`Data` is what a method sees: so many rows, and ``take(rows)`` makes a batch of some of them. `batch_order` says which
rows form the minibatches of a pass; rows of similar length go together, so that little is padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import Tensor

from guerdon.batch import Batch, Preferences, Trajectories
from guerdon.errors import DataError, UsageError
from guerdon.experience import conventions
from guerdon.experience.conventions import Example, Ranked, check_option
from guerdon.experience.prompts import read_prompts
from guerdon.experience.rows import KINDS, read_rows
from guerdon.experience.tokenised import Keep, Limits, Ragged, Reader, TooLong, Words
from guerdon.policies.language import LanguagePolicy
from guerdon.randomness import mix

WINDOW = 64  # batches whose rows are sorted by length together


@runtime_checkable
class Data(Protocol):
    """Rows to learn from."""

    @property
    def lengths(self) -> Tensor | None:
        """int64 ``[N]``, tokens of each row (prompt and longest answer), by which `batch_order` puts rows together; None
        takes them as they come."""
        ...

    def __len__(self) -> int:
        """N."""
        ...

    def take(self, rows: Tensor) -> Batch:
        """The rows with these numbers (int64 ``[B]``), padded to the longest of them: `Preferences`, or
        `Trajectories`."""
        ...


def batch_count(n: int, size: int, passes: int = 1) -> int:
    """How many minibatches `batch_order` makes of ``n`` rows in so many passes."""
    return passes * -(-n // max(1, size))


def batch_order(
    n: int, size: int, seed: int, pass_number: int, lengths: Tensor | None = None
) -> list[Tensor]:
    """The minibatches of one pass over ``n`` rows: every row once, ``size`` in a batch, one batch with the rest. A pure
    function of its arguments, so a resumed run finds the same batches.

    With ``lengths [n]`` the shuffled rows are cut into windows of 64 batches, sorted by length inside a window, cut into
    batches, and the batches are shuffled: rows of similar length meet, others every time.

    Raises `UsageError` when there are no rows, or ``size`` is below 1.
    """
    if n < 1:
        raise UsageError("there are no rows to make batches of")
    if size < 1:
        raise UsageError(f"a minibatch holds at least one row, not {size}")
    generator = torch.Generator().manual_seed(mix(seed, pass_number))
    order = torch.randperm(n, generator=generator)
    if lengths is None or size == 1:
        return list(order.split(size))
    batches: list[Tensor] = []
    for window in order.split(WINDOW * size):
        batches += window[lengths[window].argsort(stable=True)].split(size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


class InMemory:
    """Any batch as `Data`: `Preferences` or `Trajectories` that are whole in memory.

    Args:
        batch: at least one row.
        lengths: see `Data`; None leaves the rows in random order.
    """

    def __init__(self, batch: Batch, lengths: Tensor | None = None) -> None:
        if not batch.batch_size or batch.batch_size[0] < 1:
            raise DataError("the batch holds no rows to learn from")
        self.batch, self.lengths = batch, lengths
        self.notes: list[str] = []

    def __len__(self) -> int:
        return int(self.batch.batch_size[0])

    @property
    def group(self) -> Tensor | None:
        """``[N]`` prompt numbers, where the batch has them."""
        traj = self.batch.chosen if isinstance(self.batch, Preferences) else self.batch
        return cast(Any, traj).group

    def take(self, rows: Tensor) -> Batch:
        return cast(Any, self.batch)[rows]


Tokens = Iterable[Sequence[int]] | Ragged


class _Texts:
    """What text data have in common: prompts and answers as token ids, batches by ``policy.collate``."""

    def __init__(self, policy: LanguagePolicy, prompts: Tokens, group: Tensor | None) -> None:
        self.policy = policy
        self.prompt = Ragged.of(prompts)
        if not len(self.prompt):
            raise DataError("there are no rows to learn from")
        self.group = _numbered(self.prompt) if group is None else group
        self.notes: list[str] = []  # what was dropped or cut when the rows were read

    def __len__(self) -> int:
        return len(self.prompt)

    def _collate(
        self, rows: list[int], answers: Ragged, texts: tuple[Sequence[str], Sequence[str]] | None
    ) -> Trajectories:
        prompts, tokens = self.prompt.lists(rows), answers.lists(rows)
        if texts is None:
            words = Words(self.policy)
            shown = [words.prompt(ids) for ids in prompts], [words.answer(ids) for ids in tokens]
        else:
            shown = [texts[0][i] for i in rows], [texts[1][i] for i in rows]
        traj = self.policy.collate(prompts, tokens, texts=shown)
        traj.group = self.group[rows].to(traj.mask.device)
        return traj


def _numbered(prompts: Ragged) -> Tensor:
    """int64 ``[N]``: equal prompts have the same number, counted in order of appearance."""
    seen: dict[bytes, int] = {}
    keys = (prompts.row(i).numpy().tobytes() for i in range(len(prompts)))
    return torch.tensor([seen.setdefault(key, len(seen)) for key in keys], dtype=torch.int64)


def _same_rows(n: int, **columns: Any) -> None:
    for name, column in columns.items():
        if column is not None and len(column) != n:
            raise DataError(f"there are {n} prompts but {len(column)} rows of '{name}'; give one for each")


class TextPreferences(_Texts):
    """Pairs of answers as token ids; ``take`` makes `Preferences`.

    Args:
        policy: whose tokens they are; its ``collate`` pads.
        prompts, chosen, rejected: token ids, N rows each; answers with their end-of-text token.
        strength: ``[N]``, the probability that the label is right.
        annotator: int64 ``[N]``.
        scores: ``[N, 2]``, what the chosen and the rejected answer were given; they become the rewards of the sides.
        margin: ``[N]``, by how much the chosen answer is better; found in ``chosen.inputs["margin"]`` of a batch.
        texts: prompts, chosen and rejected answers as texts, for judges and readers; None decodes the tokens when a
            batch is made.
        group: int64 ``[N]`` prompt numbers; None numbers equal prompts.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        prompts: Tokens,
        chosen: Tokens,
        rejected: Tokens,
        strength: Tensor | None = None,
        annotator: Tensor | None = None,
        scores: Tensor | None = None,
        margin: Tensor | None = None,
        texts: tuple[Sequence[str], Sequence[str], Sequence[str]] | None = None,
        group: Tensor | None = None,
    ) -> None:
        super().__init__(policy, prompts, group)
        self.chosen, self.rejected = Ragged.of(chosen), Ragged.of(rejected)
        self.strength, self.annotator, self.scores = strength, annotator, scores
        self.margin, self.texts = margin, texts
        _same_rows(
            len(self),
            chosen=self.chosen,
            rejected=self.rejected,
            strength=strength,
            annotator=annotator,
            scores=scores,
            margin=margin,
        )
        longest = torch.maximum(self.chosen.lengths, self.rejected.lengths)
        self.lengths = self.prompt.lengths + longest

    def take(self, rows: Tensor) -> Preferences:
        """`Preferences` of these rows."""
        numbers = rows.tolist()
        shown = None if self.texts is None else (self.texts[0], self.texts[1])
        chosen = self._collate(numbers, self.chosen, shown)
        shown = None if self.texts is None else (self.texts[0], self.texts[2])
        rejected = self._collate(numbers, self.rejected, shown)
        if self.scores is not None:
            chosen = chosen.judged(self.scores[numbers, 0])
            rejected = rejected.judged(self.scores[numbers, 1])
        device = chosen.mask.device
        if self.margin is not None:
            chosen.inputs["margin"] = self.margin[numbers].to(device)
        return Preferences(
            chosen,
            rejected,
            None if self.strength is None else self.strength[numbers].to(device),
            None if self.annotator is None else self.annotator[numbers].to(device),
        )


class TextCompletions(_Texts):
    """Prompts and answers as token ids, rated or not; ``take`` makes `Trajectories`.

    Args:
        policy: whose tokens they are; its ``collate`` pads.
        prompts, answers: token ids, N rows each; answers with their end-of-text token.
        reward: ``[N]``.
        rating: ``[N, K]``, several aspects, NaN where one is missing; found in ``inputs["rating"]`` of a batch.
        texts: prompts and answers as texts; None decodes the tokens when a batch is made.
        group: int64 ``[N]`` prompt numbers; None numbers equal prompts.
    """

    def __init__(
        self,
        policy: LanguagePolicy,
        prompts: Tokens,
        answers: Tokens,
        reward: Tensor | None = None,
        rating: Tensor | None = None,
        texts: tuple[Sequence[str], Sequence[str]] | None = None,
        group: Tensor | None = None,
    ) -> None:
        super().__init__(policy, prompts, group)
        self.answer = Ragged.of(answers)
        self.reward, self.rating, self.texts = reward, rating, texts
        _same_rows(len(self), answers=self.answer, reward=reward, rating=rating)
        if reward is not None and not bool(reward.isfinite().all()):
            row = int((~reward.isfinite()).nonzero()[0])
            raise DataError(f"the reward of row {row + 1} is {reward[row].item()}; expected a finite number")
        self.lengths = self.prompt.lengths + self.answer.lengths

    def take(self, rows: Tensor) -> Trajectories:
        """`Trajectories` of these rows, with ``reward`` on the last step where there is one."""
        numbers = rows.tolist()
        traj = self._collate(numbers, self.answer, self.texts)
        if self.reward is not None:
            traj = traj.judged(self.reward[numbers])
        if self.rating is not None:
            traj.inputs["rating"] = self.rating[numbers].to(traj.mask.device)
        return traj


# --- from files --------------------------------------------------------------------------------------------


def load_preferences(
    source: Any,
    policy: LanguagePolicy,
    max_prompt: int | None = None,
    max_length: int | None = None,
    *,
    keep: Keep = "auto",
    too_long: TooLong = "cut",
    ranked: Ranked = "best_worst",
    **where: Any,
) -> TextPreferences:
    """Pairs of answers from a file or an object; `conventions.pairs` says which columns are read. Every row is checked
    here, before anything is trained.

    Pairs whose answers are the same are left out, as their tokens say nothing; ``notes`` of the result say how many, and
    what else was left out or cut. ``strength`` and ``annotator`` are those of `Preferences` (names of annotators are
    numbered as they appear), ``score_chosen`` and ``score_rejected`` the rewards of the two sides, ``margin`` is found
    in ``chosen.inputs["margin"]``.

    Args:
        source: see `read_rows`.
        policy: whose tokenizer and chat template are used, and whose ``collate`` makes the batches.
        max_prompt, max_length, keep, too_long: see `Limits`.
        ranked: pairs of a ranked list: its best and worst answer, or ``"all"`` of different scores.
        where: ``split``, ``columns``, ``limit`` and ``streaming`` of `read_rows`; ``streaming`` also keeps token ids
            alone, and texts are decoded when they are asked for.

    Raises:
        DataError: anything wrong with a file or a row, naming both.
        UsageError: conversations for a model without a chat template, or limits that leave no room.
    """
    check_option("ranked", ranked, get_args(Ranked))
    reader = Reader(policy, Limits(max_prompt, max_length, keep, too_long), not where.get("streaming"))
    rows = read_rows(source, **where)
    notes = reader.read(rows.name, rows, lambda row: conventions.pairs(row, ranked))
    prompt, chosen, rejected = reader.ragged()
    data = TextPreferences(
        policy,
        prompt,
        chosen,
        rejected,
        strength=reader.numbers("strength"),
        annotator=_annotators(reader.extra.get("annotator")),
        scores=reader.numbers("scores"),
        margin=reader.numbers("margin"),
        texts=cast(Any, reader.texts()),
    )
    data.notes = notes
    return data


def _annotators(who: list[Any] | None) -> Tensor | None:
    """int64 ``[N]``: numbers as they are, names numbered in order of appearance."""
    if who is None:
        return None
    if all(isinstance(name, int) for name in who):
        return torch.tensor(who, dtype=torch.int64)
    known: dict[Any, int] = {}
    return torch.tensor([known.setdefault(name, len(known)) for name in who], dtype=torch.int64)


def load_demonstrations(
    source: Any,
    policy: LanguagePolicy,
    max_prompt: int | None = None,
    max_length: int | None = None,
    *,
    keep: Keep = "auto",
    too_long: TooLong = "cut",
    turns: Literal["all", "last"] = "all",
    **where: Any,
) -> TextCompletions:
    """Answers to imitate from a file or an object; `conventions.demonstrations` says which columns are read.

    Of a conversation only what the assistant says is learned. Each of its turns is a row of its own, with all that was
    said before as prompt, because the steps of a trajectory have no gaps. The likelihood is that of one long row with a
    mask over the turns (where the template writes past turns as it writes the last); the price is that n turns of equal
    length cost about n / 2 times the tokens. ``turns="last"`` learns the last turn alone. The turns of a conversation have one
    ``group``, so that `train_test_split` keeps them together.

    Args and errors are those of `load_preferences`.
    """
    check_option("turns", turns, ("all", "last"))
    reader = Reader(policy, Limits(max_prompt, max_length, keep, too_long), not where.get("streaming"))
    rows = read_rows(source, **where)
    notes = reader.read(rows.name, rows, lambda row: conventions.demonstrations(row, turns))
    prompt, answer = reader.ragged()
    group = _numbered(prompt)[reader.first_of_row()]
    data = TextCompletions(policy, prompt, answer, texts=cast(Any, reader.texts()), group=group)
    data.notes = notes
    return data


def load_rated(
    source: Any,
    policy: LanguagePolicy,
    max_prompt: int | None = None,
    max_length: int | None = None,
    *,
    keep: Keep = "auto",
    too_long: TooLong = "cut",
    aspects: Sequence[str] = (),
    **where: Any,
) -> TextCompletions:
    """Answers with a reward from a file or an object; `conventions.ratings` says which columns are read. ``group`` of a
    row is the number of its prompt.

    Args:
        aspects: columns of several ratings besides (helpfulness, verbosity, ...), found in ``inputs["rating"] [B, K]``,
            NaN where one is missing.

    Other args and errors are those of `load_preferences`.
    """
    reader = Reader(policy, Limits(max_prompt, max_length, keep, too_long), not where.get("streaming"))
    rows = read_rows(source, **where)
    notes = reader.read(rows.name, rows, lambda row: conventions.ratings(row, aspects))
    prompt, answer = reader.ragged()
    data = TextCompletions(
        policy,
        prompt,
        answer,
        reward=reader.numbers("reward"),
        rating=reader.numbers("aspects"),
        texts=cast(Any, reader.texts()),
    )
    data.notes = notes
    return data


def load_prompts(
    source: Any, policy: LanguagePolicy | None = None, column: str = "prompt", **where: Any
) -> list[str]:
    """Prompts from a file or an object: a text file (one a line), or rows with a ``column`` of texts or messages, or with
    ``messages`` (up to the assistant's last turn). Conversations are written out by the chat template of ``policy``.

    Raises:
        DataError: anything wrong with a file or a row, naming both.
        UsageError: conversations without a policy that can read them.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        suffix = path.suffix.lower()
        if suffix not in (*KINDS, ".gz") and (path.is_file() or suffix):
            return read_prompts(path)
    elif isinstance(source, Sequence) and source and all(isinstance(text, str) for text in source):
        return list(source)
    rows = read_rows(source, **where)
    prompts: list[str] = []
    form: type | None = None
    for row in rows:
        prompt = conventions.prompt_of(row, column)
        form = form or type(prompt)
        if type(prompt) is not form:
            raise row.error("plain texts and conversations are mixed; use one form")
        if isinstance(prompt, list):
            if policy is None:
                raise UsageError(
                    f"{row.source}, row {row.number} holds a conversation, which only a language model's chat template "
                    "can write out; give prompts as plain texts"
                )
            prompts.append(Words(policy).render(Example(row, prompt, (), (column,)))[0])
        else:
            prompts.append(prompt)
    return prompts
