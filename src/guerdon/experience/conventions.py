"""What the columns of recorded text data mean: the field's conventions, read into pairs, demonstrations and ratings.

A text is plain, or part of a conversation: a list of messages ``{"role": ..., "content": ...}`` (ShareGPT's ``from`` and
``value`` are read too). Everything here is checked and nothing is tokenised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

from guerdon.errors import DataError, UsageError
from guerdon.experience.rows import Row, finite, what

Message = dict[str, Any]
Text = str | list[Message]
Ranked = Literal["best_worst", "all"]

_SHARE_GPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
_TALK = ("messages", "conversations", "conversation")


@dataclass(slots=True)
class Example:
    """A prompt with its answers, of one row.

    Attributes:
        prompt: plain text, or messages; None where a text has none.
        answers: one, or chosen and rejected: plain texts, or an assistant's messages.
        columns: where the prompt and the answers came from, for messages about them.
        extra: numbers that came with the row, by name.
    """

    row: Row
    prompt: Text | None
    answers: tuple[str | Message, ...]
    columns: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def talk(self) -> bool:
        """Whether it is a conversation."""
        return isinstance(self.prompt, list)


# --- texts and messages -----------------------------------------------------------------------------------


def read_text(row: Row, column: str, value: Any = None) -> Text:
    """A plain text or a list of messages from a column (or ``value`` of it). Raises `DataError` for anything else."""
    value = row.get(column) if value is None else value
    if isinstance(value, str):
        return row.valid(value, column)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise row.error(f"expected a text or a list of messages, found {what(value)}", column)
    if not value:
        raise row.error("expected messages, found an empty list", column)
    return [_message(row, column, n, message) for n, message in enumerate(value, 1)]


def _message(row: Row, column: str, number: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise row.error(
            f'message {number} is {what(message)}; expected {{"role": ..., "content": ...}}', column
        )
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message and "from" in message:
        message["role"] = _SHARE_GPT.get(str(message["from"]), message.pop("from"))
        message.pop("from", None)
        message["content"] = message.pop("value", message.get("content", ""))
    if not isinstance(message.get("role"), str):
        raise row.error(f"message {number} has no role; expected system, user or assistant", column)
    content = message.setdefault("content", "")
    if isinstance(content, list) and all(isinstance(part, dict) and "text" in part for part in content):
        content = message["content"] = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str):
        raise row.error(f"the content of message {number} is {what(content)}; expected a text", column)
    row.valid(content, column)
    return message


def content(answer: str | Message) -> str:
    """The words of an answer."""
    return answer if isinstance(answer, str) else answer["content"]


def _answer(row: Row, column: str, value: Any = None) -> str | Message:
    """A plain answer, or the only message of a list, which must be the assistant's. Raises `DataError` when it is
    another, or empty."""
    text = read_text(row, column, value)
    if isinstance(text, str):
        answer: str | Message = text
    elif len(text) == 1 and text[0]["role"] == "assistant":
        answer = text[0]
    else:
        found = ", ".join(message["role"] for message in text)
        raise row.error(f"expected one message of the assistant, found {len(text)} ({found})", column)
    return _not_empty(row, column, answer)


def _not_empty(row: Row, column: str, answer: str | Message) -> str | Message:
    if not content(answer).strip() and (isinstance(answer, str) or "tool_calls" not in answer):
        raise row.error("the answer is empty", column)
    return answer


def _fit(row: Row, prompt: Text, answers: Sequence[str | Message], columns: Sequence[str]) -> list[Any]:
    """Answers in the prompt's form: a plain text that answers a conversation is the assistant's. Raises `DataError` for
    messages that answer a plain text."""
    if isinstance(prompt, str):
        for answer, column in zip(answers, columns, strict=True):
            if not isinstance(answer, str):
                raise row.error("holds messages, but the prompt is a plain text; use one form", column)
        return list(answers)
    return [{"role": "assistant", "content": a} if isinstance(a, str) else a for a in answers]


# --- pairs ------------------------------------------------------------------------------------------------


def pairs(row: Row, ranked: Ranked = "best_worst") -> Iterator[Example]:
    """Chosen and rejected answers of a row.

    * ``prompt``, ``chosen``, ``rejected``: texts, or messages. Where the answers repeat the prompt's messages, these
      are taken off.
    * ``chosen``, ``rejected``: what both begin with is the prompt: whole messages of conversations, whole words of
      texts.
    * ``prompt``, ``completions``, ``scores``: a ranked list; its best and worst answer are a pair, or (``ranked="all"``)
      every two answers of different scores.

    Optional columns: ``strength`` (the probability that the label is right), ``margin``, ``score_chosen`` with
    ``score_rejected``, ``annotator``.
    """
    if "completions" in row and "chosen" not in row:
        yield from _ranked_pairs(row, ranked)
        return
    if "chosen" not in row or "rejected" not in row:
        raise _missing(row, "chosen" if "chosen" not in row else "rejected", _EXPECT_PAIRS)
    chosen, rejected = read_text(row, "chosen"), read_text(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise row.error("one answer is a plain text and the other messages; use one form", "rejected")
    prompt, sides = _two_sides(row, chosen, rejected)
    yield Example(row, prompt, sides, ("prompt", "chosen", "rejected"), _extras(row))


_EXPECT_PAIRS = "expected prompt, chosen and rejected, or prompt, completions and scores"


def _two_sides(row: Row, chosen: Text, rejected: Text) -> tuple[Text, tuple[str | Message, ...]]:
    """Prompt and answers of a row with ``chosen`` and ``rejected``."""
    names = ("chosen", "rejected")
    if isinstance(chosen, str) or isinstance(rejected, str):
        assert isinstance(chosen, str)
        assert isinstance(rejected, str)
        if "prompt" in row:
            prompt = read_text(row, "prompt")
        else:
            prompt = _common_words(chosen, rejected)
            if not prompt:
                raise row.error(
                    "no column 'prompt', and the answers do not begin alike, so there is no prompt", "chosen"
                )
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        sides = [_not_empty(row, name, text) for name, text in zip(names, (chosen, rejected), strict=True)]
        return prompt, tuple(_fit(row, prompt, sides, names))
    given = read_text(row, "prompt") if "prompt" in row else None
    if isinstance(given, list):
        start = given
        chosen, rejected = (t[len(start) :] if t[: len(start)] == start else t for t in (chosen, rejected))
    else:  # no prompt column, or one that repeats the user's words
        start = _common_messages(chosen, rejected)
        if given is not None and not any(message["content"].strip() == given.strip() for message in start):
            raise row.error("holds messages, but the prompt is a plain text; use one form", "chosen")
        if not start:
            raise row.error("no column 'prompt', and the conversations do not begin alike", "chosen")
        chosen, rejected = chosen[len(start) :], rejected[len(start) :]
    for name, side in zip(names, (chosen, rejected), strict=True):
        if not side:
            raise row.error("the answer is empty: the conversation ends with the prompt", name)
    return start, (_answer(row, "chosen", chosen), _answer(row, "rejected", rejected))


def _common_messages(a: list[Message], b: list[Message]) -> list[Message]:
    """What two conversations begin with; equal ones differ in their last message."""
    most = min(len(a), len(b))
    alike = next((i for i in range(most) if a[i] != b[i]), most)
    return a[: alike - 1] if alike == len(a) == len(b) else a[:alike]


def _common_words(a: str, b: str) -> str:
    """What two texts begin with, up to the end of a word; the space behind it belongs to the answers."""
    most = min(len(a), len(b))
    alike = next((i for i in range(most) if a[i] != b[i]), most)
    while alike and not (
        alike < most and a[alike].isspace() and b[alike].isspace() and not a[alike - 1].isspace()
    ):
        alike -= 1
    return a[:alike]


def _ranked_pairs(row: Row, ranked: Ranked) -> Iterator[Example]:
    prompt, answers, scores = _list(row)
    order = sorted(range(len(answers)), key=lambda i: -scores[i])  # stable: of equals the first
    two = (
        list(combinations(order, 2)) if ranked == "all" else [(order[0], order[-1])] if len(order) > 1 else []
    )
    name = ("prompt", "completions", "completions")
    for best, worst in two:
        if scores[best] > scores[worst]:
            extra = _extras(row) | {"scores": (scores[best], scores[worst])}
            yield Example(row, prompt, (answers[best], answers[worst]), name, extra)


def _list(row: Row) -> tuple[Text, list[str | Message], list[float]]:
    """Prompt, answers and scores of a row with several answers."""
    answers = row.get("completions")
    scores = row.get("scores")
    for column, value in (("completions", answers), ("scores", scores)):
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
            raise row.error(f"expected a list, found {what(value)}", column)
    if len(answers) != len(scores) or not len(answers):
        raise row.error(f"there are {len(scores)} scores for {len(answers)} completions", "scores")
    prompt = read_text(row, "prompt")
    read = [_answer(row, "completions", [a] if isinstance(a, dict) else a) for a in answers]
    fitting = _fit(row, prompt, read, ["completions"] * len(read))
    return prompt, fitting, [finite(row, score, "scores") for score in scores]


def _extras(row: Row) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    for name in ("strength", "margin"):
        if name in row:
            extra[name] = row.number_in(name)
    if not 0 <= extra.get("strength", 1) <= 1:
        raise row.error(
            f"is {extra['strength']}, expected the probability that the label is right, 0 to 1; "
            "a difference of scores belongs into 'margin'",
            "strength",
        )
    if "score_chosen" in row or "score_rejected" in row:
        extra["scores"] = (row.number_in("score_chosen"), row.number_in("score_rejected"))
    if "annotator" in row:
        who = row.get("annotator")
        if not isinstance(who, (str, int)):
            raise row.error(f"expected a name or a number, found {what(who)}", "annotator")
        extra["annotator"] = who
    return extra


# --- demonstrations ---------------------------------------------------------------------------------------


def demonstrations(row: Row, turns: Literal["all", "last"] = "all") -> Iterator[Example]:
    """Answers to imitate, of a row.

    * ``messages`` (or ``conversations``): what the assistant says, with all that was said before as prompt: one example
      for each of its turns, or for the ``"last"``.
    * ``prompt``, ``completion``: texts or messages. ``prompt``, ``chosen`` likewise; a chosen answer is one to imitate.
    * ``text``: all of it, without a prompt.
    """
    if (column := next((name for name in _TALK if name in row), None)) is not None:
        talk = read_text(row, column)
        if isinstance(talk, str):
            raise row.error("expected a list of messages, found a text", column)
        places = [i for i, message in enumerate(talk) if message["role"] == "assistant"]
        if not places:
            raise row.error("no message of the assistant to learn from", column)
        if places[0] == 0:
            raise row.error("the assistant speaks first, so there is no prompt", column)
        for i in places if turns == "all" else places[-1:]:
            yield Example(row, talk[:i], (_not_empty(row, column, talk[i]),), (column, column))
    elif "completion" in row:
        yield _one(row, "completion")
    elif "chosen" in row:
        if "prompt" not in row:
            if "rejected" not in row:
                raise _missing(row, "prompt", _EXPECT_DEMONSTRATIONS)
            example = next(pairs(row))
            yield Example(row, example.prompt, example.answers[:1], ("prompt", "chosen"))
        else:
            yield _one(row, "chosen")
    elif "text" in row:
        yield Example(row, None, (_not_empty(row, "text", row.text("text")),), ("text", "text"))
    else:
        raise _missing(row, "completion", _EXPECT_DEMONSTRATIONS)


_EXPECT_DEMONSTRATIONS = "expected prompt and completion, or messages, or text"


def _one(row: Row, column: str) -> Example:
    """``prompt`` and one answer."""
    prompt = read_text(row, "prompt")
    value = read_text(row, column)
    if isinstance(prompt, list) and isinstance(value, list) and value[: len(prompt)] == prompt:
        value = value[len(prompt) :]
        if not value:
            raise row.error("the answer is empty: the conversation ends with the prompt", column)
    (answer,) = _fit(row, prompt, [_answer(row, column, value)], [column])
    return Example(row, prompt, (answer,), ("prompt", column))


# --- ratings ----------------------------------------------------------------------------------------------

_REWARDS = ("reward", "score", "label", "rating")


def ratings(row: Row, aspects: Sequence[str] = ()) -> Iterator[Example]:
    """Answers with what they were given (``extra["reward"]``), of a row.

    * ``prompt``, ``completion`` with ``reward``, ``score``, ``rating`` or ``label`` (true is 1, false 0).
    * ``prompt``, ``completions``, ``scores``: one example for each answer.
    * ``prompt``, ``chosen``, ``rejected``: two examples, with ``score_chosen`` and ``score_rejected`` where there are
      such, else 1 and 0.

    ``aspects`` are columns of numbers besides (``extra["aspects"]``); an empty one is NaN.
    """
    if aspects:
        found = [row.number_in(name) if name in row else float("nan") for name in aspects]
        if "completion" not in row:
            raise _missing(row, "completion", "aspects are read beside prompt and completion")
        if all(value != value for value in found):
            raise row.error(f"none of the aspects ({', '.join(aspects)}) is given")
        example = _one(row, "completion")
        example.extra["aspects"] = found
        reward = next((name for name in _REWARDS if name in row and name not in aspects), None)
        example.extra["reward"] = row.number_in(reward) if reward else 0.0
        yield example
    elif "completions" in row:
        prompt, answers, scores = _list(row)
        for answer, score in zip(answers, scores, strict=True):
            yield Example(row, prompt, (answer,), ("prompt", "completions"), {"reward": score})
    elif "completion" in row:
        reward = next((name for name in _REWARDS if name in row), None)
        if reward is None:
            raise _missing(row, "reward", "expected prompt and completion with reward, score or label")
        example = _one(row, "completion")
        example.extra["reward"] = row.number_in(reward)
        yield example
    elif "chosen" in row or "rejected" in row:
        for both in pairs(row):
            scores = both.extra.get("scores", (1.0, 0.0))
            for answer, name, score in zip(both.answers, both.columns[1:], scores, strict=True):
                yield Example(row, both.prompt, (answer,), ("prompt", name), {"reward": score})
    else:
        raise _missing(
            row, "completion", "expected prompt and completion with reward, or prompt, completions and scores"
        )


# --- prompts ----------------------------------------------------------------------------------------------


def prompt_of(row: Row, column: str = "prompt") -> Text:
    """The prompt of a row: ``column``, or the conversation in ``messages`` up to the assistant's last turn."""
    if column not in row and (talk := next((name for name in _TALK if name in row), None)) is not None:
        messages = read_text(row, talk)
        if isinstance(messages, str):
            raise row.error("expected a list of messages, found a text", talk)
        if messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        column = talk
        prompt: Text = messages
    else:
        prompt = read_text(row, column)
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise row.error("the prompt is empty", column)
    return prompt


# --- messages about columns -------------------------------------------------------------------------------


_OTHER: tuple[tuple[str, Callable[[Row], bool]], ...] = (
    ("load_preferences (methods on pairs)", lambda row: "chosen" in row and "rejected" in row),
    (
        "load_rated (methods on rated answers)",
        lambda row: "completion" in row and any(n in row for n in _REWARDS),
    ),
    ("load_demonstrations (sft)", lambda row: any(n in row for n in (*_TALK, "completion", "text"))),
)


def _missing(row: Row, column: str, expected: str) -> DataError:
    """A `DataError` about a column that is not there, naming what the rows would be good for."""
    if column in row.values:
        return row.error(f"expected a value, found none ({expected})", column)
    has = ", ".join(map(str, row.values)) or "nothing"
    good_for = next((name for name, fits in _OTHER if fits(row)), None)
    hint = f"; these rows suit {good_for}" if good_for else "; columns of other names are given with columns="
    return row.error(f"no column '{column}' (it has: {has}); {expected}{hint}")


def check_option(name: str, value: str, known: Sequence[str]) -> None:
    """Raise `UsageError` unless ``value`` is one of ``known``."""
    if value not in known:
        raise UsageError(f"{name} is '{value}'; expected one of {', '.join(known)}")
