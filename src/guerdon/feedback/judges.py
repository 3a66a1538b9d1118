"""Language models as judges: at an OpenAI-compatible endpoint or in this process.

A judge is shown a prompt with two answers and asked which is better, in both orders, because such models favour a
place (Zheng et al., 2023). Replies are kept on disk, so that a question is paid for once; what calls, tokens and
disagreements came to is counted.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import FeedbackError, StorageError, UsageError, nearest
from guerdon.policies.language import LanguagePolicy, Message
from guerdon.randomness import row_seeds

Order = Literal["both", "one"]

COMPARE = """Two answers to the same request follow. Decide which is better: more helpful, correct and to the point.
Ignore their order and their length.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

Finish with one line: "Verdict: A" if answer A is better, "Verdict: B" if answer B is better, "Verdict: tie" if neither is."""

RATE = """Rate how helpful, correct and to the point the answer to this request is, on a scale from 1 to 10.

[Request]
{prompt}

[Answer]
{text}

Finish with one line: "Rating: N"."""


@dataclass(frozen=True)
class Reply:
    """What a model said, and the tokens that it took."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Speaker(Protocol):
    """Whatever answers messages. ``identity`` names everything that its replies depend on; it keys the cache."""

    @property
    def identity(self) -> str: ...

    def reply(self, conversations: Sequence[list[Message]]) -> list[Reply]: ...


# --- who answers ------------------------------------------------------------------------------------------


@dataclass
class Endpoint:
    """A chat model behind an OpenAI-compatible endpoint (OpenAI, vLLM, llama.cpp, Ollama, ...).

    Args:
        url: up to ``/v1``: "http://localhost:8000/v1".
        model: as the endpoint calls it.
        key_variable: the environment variable that holds the key; it is sent if it is set, and never written anywhere.
        temperature, max_tokens: of the reply.
        timeout: seconds a call.
        retries: further tries after a failure that may pass (no connection, 408, 409, 429, 5xx); before try k the
            judge waits ``backoff * 2^(k-1)`` seconds, or as long as the endpoint asks, at most a minute.
        parallel: calls at a time.

    Raises (from `reply`): FeedbackError when the endpoint refuses, stays away, or answers with something else.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: int = 512
    timeout: float = 120.0
    retries: int = 4
    backoff: float = 1.0
    parallel: int = 8

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UsageError(
                f"the endpoint '{self.url}' is no URL; give one such as http://localhost:8000/v1"
            )

    @property
    def identity(self) -> str:
        """Address, model and settings of the reply."""
        return json.dumps([self.url.rstrip("/"), self.model, self.temperature, self.max_tokens])

    def reply(self, conversations: Sequence[list[Message]]) -> list[Reply]:
        """A reply to each conversation, in order."""
        if len(conversations) <= 1 or self.parallel <= 1:
            return [self._one(messages) for messages in conversations]
        with ThreadPoolExecutor(min(self.parallel, len(conversations))) as pool:
            return list(pool.map(self._one, conversations))

    def _one(self, messages: list[Message]) -> Reply:
        body = {
            "model": self.model,
            "messages": messages,
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }
        trouble = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                return self._read(self._post(json.dumps(body).encode("utf-8")))
            except urllib.error.HTTPError as error:
                trouble = f"HTTP {error.code} {error.reason}{_detail(error)}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    break
                asked = error.headers.get("Retry-After", "") if error.headers else ""
                wait = max(wait, float(asked)) if re.fullmatch(r"\d+(\.\d+)?", asked) else wait
            except (OSError, http.client.HTTPException) as error:  # no connection, a timeout, a broken answer
                reason = getattr(error, "reason", None) or error
                trouble = str(reason) or type(error).__name__
            if attempt < self.retries:
                time.sleep(min(wait, 60.0))
        raise FeedbackError(f"the judge '{self.model}' at {self.url} did not answer: {trouble}")

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url.rstrip('/')}/chat/completions", body, headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as answer:
            return answer.read()

    def _read(self, data: bytes) -> Reply:
        try:
            answer = json.loads(data)
            text = answer["choices"][0]["message"]["content"] or ""
            usage = answer.get("usage") or {}
            return Reply(
                str(text), int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            shown = data[:80].decode("utf-8", "replace")
            raise FeedbackError(
                f"the judge '{self.model}' at {self.url} answered with something else than a chat completion: {shown!r}"
            ) from error


def _detail(error: urllib.error.HTTPError) -> str:
    """What the endpoint says about its refusal, on one line."""
    try:
        said = json.loads(error.read())
        message = said["error"]["message"] if isinstance(said["error"], dict) else said["error"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f" ({' '.join(str(message).split())[:200]})"


@dataclass
class Local:
    """A language model in this process as the one who answers.

    Args:
        policy: messages go through its chat template; without one their texts are joined by blank lines.
        greedy: take the likeliest token at each place; otherwise sample, by ``seed`` and the question.
        max_new_tokens: of a reply.
        batch: questions at a time.
    """

    policy: LanguagePolicy
    greedy: bool = True
    max_new_tokens: int = 64
    seed: int = 0
    batch: int = 16
    name: str = "local"

    @property
    def identity(self) -> str:
        """Name, settings and a fingerprint of the weights."""
        total = sum(float(p.detach().double().abs().sum()) for p in self.policy.parameters())
        return json.dumps([self.name, self.greedy, self.max_new_tokens, self.seed, total])

    def reply(self, conversations: Sequence[list[Message]]) -> list[Reply]:
        """A reply to each conversation, in order."""
        if getattr(self.policy.tokenizer, "chat_template", None):
            prompts = [self.policy.render(messages) for messages in conversations]
        else:
            prompts = ["\n\n".join(str(m["content"]) for m in messages) for messages in conversations]
        replies: list[Reply] = []
        for start in range(0, len(prompts), self.batch):
            part = prompts[start : start + self.batch]
            # a reply depends on its question, not on what else is asked
            seeds = torch.cat([row_seeds(self.seed, int(_digest(text)[:12], 16), 1) for text in part])
            traj = self.policy.sample(part, seeds, max_new_tokens=self.max_new_tokens, greedy=self.greedy)
            taken = traj.inputs["prompt_mask"].sum(1).tolist()
            made = traj.lengths.tolist()
            replies += [Reply(t, n, m) for t, n, m in zip(traj.texts, taken, made, strict=True)]
        return replies


# --- reading replies --------------------------------------------------------------------------------------


def read_verdict(text: str) -> float | None:
    """1 for A, 0 for B, 1/2 for a tie, None where a reply says none of them clearly.

    The last of "Verdict: A", "[[A]]" and the like counts; else the whole reply, or its last line, must be the letter.
    An "A" within a sentence is an article, not a verdict.
    """
    values = {"a": 1.0, "b": 0.0, "c": 0.5, "tie": 0.5}
    marked = re.findall(
        r"\[\[\s*(a|b|c|tie)\s*\]\]"
        r"|\b(?:verdict|choice|winner|preferred|(?:better|best|final)\s+(?:answer|response|choice))\b"
        r"(?:\s+is)?\s*[:=]?\s*\W{0,3}(?:answer\s+|response\s+)?(a|b|tie)\b",
        text,
        flags=re.IGNORECASE,
    )
    if marked:
        last = marked[-1]
        return values[(last[0] or last[1]).lower()]
    lines = [line for line in text.strip().splitlines() if line.strip()]
    for candidate in (text, lines[-1] if lines else ""):
        bare = re.sub(r"^(?:answer|response)\b[\s:]*", "", candidate.strip().strip("\"'*()[].: \n").lower())
        if bare in values and bare != "c":
            return values[bare]
    return None


def read_rating(text: str, low: float = 1.0, high: float = 10.0) -> float | None:
    """The rating in a reply: the last "Rating: N" (or "N/10"), or a number alone; None where there is none from ``low`` to
    ``high``."""
    found = re.findall(
        r"(?:rating|score)\s*[:=]?\s*\W{0,3}(-?\d+(?:\.\d+)?)|(-?\d+(?:\.\d+)?)\s*/\s*\d+",
        text,
        re.IGNORECASE,
    )
    number = (found[-1][0] or found[-1][1]) if found else text.strip().strip("*[]. \n")
    try:
        value = float(number)
    except ValueError:
        return None
    return value if low <= value <= high else None


# --- the judge --------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What a judge's work came to.

    Args:
        asked: questions; calls: of them put to the model, the others came from the cache.
        unreadable: replies without a verdict, counted as ties.
        compared: pairs; disagreements: of them those whose two orders named different answers.
        first: verdicts for the answer shown first, of ``decided`` ones that were no tie: 1/2 is no bias of place.
        prompt_tokens, completion_tokens: of the calls; cost: their price.
    """

    asked: int = 0
    calls: int = 0
    unreadable: int = 0
    compared: int = 0
    disagreements: int = 0
    first: int = 0
    decided: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


@dataclass
class LanguageJudge:
    """A language model that compares answers, or rates them.

    Args:
        speaker: `Endpoint`, `Local`, or anything with ``identity`` and ``reply``.
        template: of a comparison, with ``{prompt}``, ``{first}`` and ``{second}``; rating: with ``{prompt}`` and ``{text}``.
        system: a system message before them; None for none.
        order: ``"both"`` asks about each pair in both orders and averages; ``"one"`` asks once, in an order drawn from the
            texts alone, so that either way of asking shows the same.
        cache: a JSONL file of replies, made if there is none. None keeps them in memory.
        strict: raise at a reply without a verdict instead of calling it a tie.
        prices: of a million prompt and completion tokens, for `tally`.

    `compare` gives 1, 0 or 1/2; with ``"both"``, one tie of two verdicts gives 3/4 or 1/4. ``compare(a, b)`` and
    ``compare(b, a)`` sum to 1 and equal texts tie without a question.
    """

    speaker: Speaker
    template: str = COMPARE
    rating: str = RATE
    system: str | None = None
    order: Order = "both"
    cache: str | Path | None = None
    strict: bool = False
    prices: tuple[float, float] = (0.0, 0.0)
    name: str = "language_judge"
    tally: Tally = field(default_factory=Tally)
    _known: dict[str, Reply] = field(default_factory=dict, repr=False)
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise UsageError(
                f"LanguageJudge: order is '{self.order}'; {nearest(self.order, get_args(Order))}"
            )
        for what, names in (("template", ("prompt", "first", "second")), ("rating", ("prompt", "text"))):
            lacking = [name for name in names if f"{{{name}}}" not in getattr(self, what)]
            if lacking:
                raise UsageError(
                    f"LanguageJudge: the {what} lacks {{{lacking[0]}}}, so the judge would not see it"
                )
        if self.cache is not None:
            self._known.update(_read_cache(Path(self.cache)))

    # -- what it is asked ------------------------------------------------------------------------------------

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``, how far ``a`` is preferred. Raises `FeedbackError` for trajectories without texts, when the model does not
        answer and, if ``strict``, when it gives no verdict."""
        prompts, first, second = a.prompts, self._texts(a), self._texts(b)
        questions: list[str] = []
        shown: list[tuple[int, bool]] = []  # the pair, and whether its a was shown first
        result = [0.5] * len(prompts)
        for i, (prompt, x, y) in enumerate(zip(prompts, first, second, strict=True)):
            if x == y:
                continue
            orders = (
                (True, False) if self.order == "both" else (_digest(prompt, x, y) < _digest(prompt, y, x),)
            )
            for ahead in orders:
                one, two = (x, y) if ahead else (y, x)
                questions.append(_fill(self.template, prompt=prompt, first=one, second=two))
                shown.append((i, ahead))
        verdicts = self._verdicts(questions)
        votes: dict[int, list[float]] = {}
        for (i, ahead), verdict in zip(shown, verdicts, strict=True):
            self.tally.decided += verdict != 0.5
            self.tally.first += verdict == 1.0
            votes.setdefault(i, []).append(verdict if ahead else 1 - verdict)
        for i, said in votes.items():
            result[i] = sum(said) / len(said)
            self.tally.disagreements += len(said) == 2 and abs(said[0] - said[1]) == 1
        self.tally.compared += len(votes)
        return torch.tensor(result, device=a.log_prob.device)

    def score(self, traj: Trajectories) -> Tensor:
        """``[B]`` ratings from 1 to 10. Raises `FeedbackError` as `compare` does, and for any reply without a rating."""
        questions = [
            _fill(self.rating, prompt=p, text=t) for p, t in zip(traj.prompts, self._texts(traj), strict=True)
        ]
        scores = []
        for question, reply in zip(questions, self._ask(questions), strict=True):
            value = read_rating(reply.text)
            if value is None:
                raise FeedbackError(
                    f"judge '{self.name}' gave no rating from 1 to 10 but {reply.text[:80]!r}, asked {question[:80]!r}"
                )
            scores.append(value)
        return torch.tensor(scores, device=traj.log_prob.device)

    def statistics(self) -> dict[str, float]:
        """The tally by name, for a log."""
        return {f"judge_{name}": float(value) for name, value in asdict(self.tally).items()}

    # -- how it gets answers ---------------------------------------------------------------------------------

    def _texts(self, traj: Trajectories) -> list[str]:
        try:
            return traj.texts
        except KeyError:
            raise FeedbackError(
                f"judge '{self.name}' reads texts, but these trajectories carry none"
            ) from None

    def _verdicts(self, questions: list[str]) -> list[float]:
        verdicts = []
        for question, reply in zip(questions, self._ask(questions), strict=True):
            verdict = read_verdict(reply.text)
            if verdict is None:
                self.tally.unreadable += 1
                if self.strict:
                    raise FeedbackError(
                        f"judge '{self.name}' gave no verdict but {reply.text[:80]!r}, asked {question[:80]!r}"
                    )
            verdicts.append(0.5 if verdict is None else verdict)
        return verdicts

    def _ask(self, questions: list[str]) -> list[Reply]:
        identity = self.speaker.identity
        keys = [_digest(identity, self.system or "", question) for question in questions]
        self.tally.asked += len(questions)
        new: dict[str, list[Message]] = {}
        for key, question in zip(keys, questions, strict=True):
            if key not in self._known and key not in new:
                head = [] if self.system is None else [{"role": "system", "content": self.system}]
                new[key] = [*head, {"role": "user", "content": question}]
        waiting = list(new)
        for start in range(0, len(waiting), 64):  # kept as they come: an interruption loses little
            part = waiting[start : start + 64]
            replies = self.speaker.reply([new[key] for key in part])
            self._keep(part, replies)
        return [self._known[key] for key in keys]

    def _keep(self, keys: Sequence[str], replies: Sequence[Reply]) -> None:
        with self._lock:
            self._known.update(zip(keys, replies, strict=True))
            self.tally.calls += len(replies)
            prompt, completion = (
                sum(r.prompt_tokens for r in replies),
                sum(r.completion_tokens for r in replies),
            )
            self.tally.prompt_tokens += prompt
            self.tally.completion_tokens += completion
            self.tally.cost += (prompt * self.prices[0] + completion * self.prices[1]) / 1e6
            if self.cache is None:
                return
            try:
                path = Path(self.cache)
                path.parent.mkdir(parents=True, exist_ok=True)
                lines = [
                    json.dumps({"key": k, **asdict(r)}) + "\n" for k, r in zip(keys, replies, strict=True)
                ]
                with path.open("a", encoding="utf-8") as file:
                    file.write("".join(lines))
            except OSError as error:
                raise StorageError(
                    f"{self.cache}: the judge's replies cannot be kept ({error.strerror})"
                ) from error


def _fill(template: str, **values: str) -> str:
    """The template with its fields filled in; braces in the values, and others in the template, stay as they are."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match.group(1)], template)


def _digest(*texts: str) -> str:
    """A hash of several texts, each apart."""
    return hashlib.sha256(json.dumps(texts).encode("utf-8")).hexdigest()


def _read_cache(path: Path) -> dict[str, Reply]:
    """The replies in a cache file. A last line that an interruption cut off is passed over, and the next reply begins
    a line of its own. Raises `UsageError` when a whole line is no reply."""
    if not path.is_file():
        return {}
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the judge's cache cannot be read ({error})") from error
    known: dict[str, Reply] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            known[row["key"]] = Reply(row["text"], row["prompt_tokens"], row["completion_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # cut off: everything before ended with a line break
                beside = path.with_name(path.name + ".tmp")
                beside.write_text("".join(f"{whole}\n" for whole in lines[:-1]), encoding="utf-8")
                beside.replace(path)
                break
            raise UsageError(
                f"{path}, row {number}: not a judge's reply; delete the row, or the file"
            ) from error
    return known
