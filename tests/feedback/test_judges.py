"""Language models as judges: what they are asked, how replies are read, and what an endpoint can do wrong."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from guerdon.batch import Trajectories
from guerdon.errors import FeedbackError, UsageError
from guerdon.feedback import judges
from guerdon.feedback.base import PairFeedback
from guerdon.feedback.judges import Endpoint, LanguageJudge, Local, Reply, read_rating, read_verdict
from guerdon.policies.language import LanguagePolicy
from guerdon.tasks.tokens import tiny_llama, tokenizer

POLICY = LanguagePolicy(tiny_llama(width=16, layers=1), tokenizer(), max_new_tokens=3)


def said(*texts: str) -> Trajectories:
    return POLICY.encode(["a b"] * len(texts), texts)


def shown(messages: list[dict[str, Any]]) -> tuple[str, str]:
    """The first and the second answer of a comparison."""
    found = re.search(r"\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\nFinish", messages[-1]["content"])
    assert found is not None
    return found[1], found[2]


def by_length(messages: list[dict[str, Any]]) -> str:
    """A fair judge: the longer answer, wherever it stands."""
    first, second = shown(messages)
    return f"Verdict: {'A' if len(first) > len(second) else 'B' if len(second) > len(first) else 'tie'}"


class Scripted:
    """A speaker that answers by a function and remembers what it was asked."""

    identity = "scripted"

    def __init__(self, answer: Callable[[list[dict[str, Any]]], str]) -> None:
        self.answer = answer
        self.asked: list[list[dict[str, Any]]] = []

    def reply(self, conversations: Sequence[list[dict[str, Any]]]) -> list[Reply]:
        self.asked += conversations
        return [Reply(self.answer(messages), 10, 2) for messages in conversations]


# --- reading replies --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("A", 1.0),
        (" b. ", 0.0),
        ("Answer A", 1.0),
        ("Tie", 0.5),
        ("Verdict: A", 1.0),
        ("A is longer, yet B is right.\n\n**Verdict: B**", 0.0),
        ("Verdict: B ... no, on reflection:\nVerdict: A", 1.0),
        ("[[C]]", 0.5),
        ("I compared them. [[B]]", 0.0),
        ("The better answer is B", 0.0),
        ("The winner is: Answer A.", 1.0),
        ("Both are fine.\nVerdict: tie", 0.5),
        ("They differ in tone.\nB", 0.0),
        ("A good question deserves an answer.", None),
        ("Both are a bit long", None),
        ("", None),
        ("c", None),
    ],
)
def test_verdicts_are_read_where_they_are_clear(text: str, verdict: float | None) -> None:
    assert read_verdict(text) == verdict


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("7", 7.0),
        ("Rating: 8", 8.0),
        ("It is good: 6/10", 6.0),
        ("Score: **9.5**", 9.5),
        ("Rating: 11", None),
        ("fine", None),
    ],
)
def test_ratings_are_read_where_they_are_clear(text: str, rating: float | None) -> None:
    assert read_rating(text) == rating


# --- comparing --------------------------------------------------------------------------------------------


def test_a_fair_judge_is_asked_in_both_orders() -> None:
    speaker = Scripted(by_length)
    judge = LanguageJudge(speaker)
    assert isinstance(judge, PairFeedback)
    a, b = said("a a a", "b", "c c"), said("d", "e e", "c c")
    assert judge.compare(a, b).tolist() == [1.0, 0.0, 0.5]
    assert [shown(m) for m in speaker.asked] == [("a a a", "d"), ("d", "a a a"), ("b", "e e"), ("e e", "b")]
    assert all("a b" in m[-1]["content"] for m in speaker.asked)
    assert judge.compare(b, a).tolist() == [0.0, 1.0, 0.5]
    assert len(speaker.asked) == 4  # the same questions: nothing new was asked
    assert (judge.tally.compared, judge.tally.disagreements, judge.tally.calls) == (4, 0, 4)
    assert judge.tally.first / judge.tally.decided == 0.5


def test_a_bias_of_place_cancels_and_is_counted() -> None:
    judge = LanguageJudge(Scripted(lambda messages: "Verdict: A"))
    assert judge.compare(said("a", "b"), said("c", "d d")).tolist() == [0.5, 0.5]
    assert judge.tally.disagreements == 2
    assert judge.tally.first / judge.tally.decided == 1.0


def test_one_tie_of_two_verdicts_leaves_a_lean() -> None:
    judge = LanguageJudge(Scripted(lambda m: "Verdict: A" if shown(m)[0] == "a" else "Verdict: tie"))
    assert judge.compare(said("a"), said("b")).tolist() == [0.75]
    assert judge.compare(said("b"), said("a")).tolist() == [0.25]
    assert judge.tally.disagreements == 0


def test_asking_once_shows_either_way_of_asking_the_same() -> None:
    speaker = Scripted(lambda messages: "Verdict: A")
    judge = LanguageJudge(speaker, order="one")
    texts, others = [f"a {'b ' * k}" for k in range(12)], [f"c {'d ' * k}" for k in range(12)]
    p = judge.compare(said(*texts), said(*others))
    torch.testing.assert_close(p + judge.compare(said(*others), said(*texts)), torch.ones(12))
    assert len(speaker.asked) == 12
    assert 0 < p.sum() < 12  # the place is drawn, so a bias of place is no bias for a or b


def test_unreadable_replies_are_ties_or_errors() -> None:
    mumble = Scripted(lambda messages: "Hard to say")
    judge = LanguageJudge(mumble)
    assert judge.compare(said("a"), said("b")).tolist() == [0.5]
    assert judge.tally.unreadable == 2
    with pytest.raises(FeedbackError, match="gave no verdict but 'Hard to say'"):
        LanguageJudge(mumble, strict=True).compare(said("a"), said("b"))


def test_ratings() -> None:
    judge = LanguageJudge(
        Scripted(lambda m: f"Rating: {3 + m[-1]['content'].count('h h')}"), system="Be strict."
    )
    assert judge.score(said("c", "h h a h h")).tolist() == [3.0, 5.0]
    assert judge.speaker.asked[0][0] == {"role": "system", "content": "Be strict."}  # type: ignore[attr-defined]
    with pytest.raises(FeedbackError, match="gave no rating from 1 to 10 but 'no'"):
        LanguageJudge(Scripted(lambda messages: "no")).score(said("a"))


def test_braces_in_texts_and_templates_are_kept() -> None:
    speaker = Scripted(lambda messages: "A")
    template = "{prompt} {first} {second} {other} {}"
    traj = POLICY.encode(["a"], ["b"])
    braces = traj.with_(outputs=POLICY.encode(["a"], ["{prompt}"], end=False).outputs)
    LanguageJudge(speaker, template).compare(traj, braces)
    assert speaker.asked[0][-1]["content"] == "a b {prompt} {other} {}"
    with pytest.raises(UsageError, match=r"lacks \{second\}"):
        LanguageJudge(speaker, "{prompt} {first}")
    with pytest.raises(UsageError, match="order is 'random'"):
        LanguageJudge(speaker, order="random")  # type: ignore[arg-type]


def test_trajectories_without_texts_are_refused() -> None:
    with pytest.raises(FeedbackError, match="these trajectories carry none"):
        LanguageJudge(Scripted(by_length)).compare(said("a").with_(outputs=None), said("b"))


# --- the cache --------------------------------------------------------------------------------------------


def test_replies_are_kept_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "kept" / "replies.jsonl"
    first = LanguageJudge(Scripted(by_length), cache=path, prices=(1000.0, 5000.0))
    wanted = first.compare(said("a a", "b"), said("c", "d d"))
    assert first.tally.cost == pytest.approx(4 * (10 * 1000 + 2 * 5000) / 1e6)
    again = LanguageJudge(Scripted(lambda messages: "never asked"), cache=path)
    assert torch.equal(again.compare(said("a a", "b"), said("c", "d d")), wanted)
    assert (again.tally.asked, again.tally.calls) == (4, 0)
    assert again.statistics()["judge_calls"] == 0
    other = Scripted(by_length)
    other.identity = "another model"  # its replies are its own
    LanguageJudge(other, cache=path).compare(said("a a"), said("c"))
    assert len(other.asked) == 2


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    LanguageJudge(Scripted(by_length), cache=path).compare(said("a a"), said("c"))
    whole = path.read_text()
    path.write_text(whole[:-9])
    speaker = Scripted(by_length)
    assert LanguageJudge(speaker, cache=path).compare(said("a a"), said("c")).tolist() == [1.0]
    assert len(speaker.asked) == 1
    assert sorted(path.read_text().splitlines()) == sorted(whole.splitlines())
    path.write_text("nonsense\n" + whole)
    with pytest.raises(UsageError, match=r"replies\.jsonl, row 1: not a judge's reply"):
        LanguageJudge(speaker, cache=path)


# --- an endpoint ------------------------------------------------------------------------------------------


class Server:
    """A tiny OpenAI-compatible endpoint. ``script`` holds statuses to give before it answers properly."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.script: list[tuple[int, str]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body | {"path": self.path})
                outer.headers.append(dict(self.headers))
                status, text = outer.script.pop(0) if outer.script else (200, "")
                if not text:
                    message = {"role": "assistant", "content": by_length(body["messages"])}
                    usage = {"prompt_tokens": 100, "completion_tokens": 3}
                    text = json.dumps({"choices": [{"message": message}], "usage": usage})
                self.send_response(status)
                self.send_header("Retry-After", "7")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the judge waited before its further tries, without waiting."""
    slept: list[float] = []
    monkeypatch.setattr(judges.time, "sleep", slept.append)
    return slept


def test_an_endpoint_is_asked_and_its_tokens_are_counted(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "abc")
    judge = LanguageJudge(Endpoint(server.url + "/", "m", "MY_KEY", max_tokens=9), prices=(2.0, 10.0))
    assert judge.compare(said("a a", "b"), said("c", "d d")).tolist() == [1.0, 0.0]
    assert len(server.requests) == 4
    request = server.requests[0]
    assert request["path"] == "/v1/chat/completions"
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.0, 9)
    assert server.headers[0]["Authorization"] == "Bearer abc"
    tally = judge.tally
    assert (tally.prompt_tokens, tally.completion_tokens) == (400, 12)
    assert tally.cost == pytest.approx((400 * 2 + 12 * 10) / 1e6)
    assert "abc" not in json.dumps(judge.statistics()) + repr(judge)


def test_without_a_key_none_is_sent(server: Server) -> None:
    LanguageJudge(Endpoint(server.url, "m")).compare(said("a a"), said("c"))
    assert "Authorization" not in server.headers[0]


def test_failures_that_may_pass_are_tried_again(server: Server, waits: list[float]) -> None:
    server.script = [(503, "{}"), (429, "{}"), (500, "oops")]
    judge = LanguageJudge(Endpoint(server.url, "m", parallel=1, backoff=4.0))
    assert judge.compare(said("a a"), said("c")).tolist() == [1.0]
    assert len(server.requests) == 5
    assert waits == [7.0, 8.0, 16.0]  # doubled each time, but not less than the endpoint asks


def test_an_endpoint_that_stays_away_is_named(server: Server, waits: list[float]) -> None:
    server.script = [(503, "{}")] * 3
    with pytest.raises(FeedbackError, match=r"the judge 'm' at http\S+ did not answer: HTTP 503"):
        LanguageJudge(Endpoint(server.url, "m", parallel=1, retries=2)).compare(said("a a"), said("c"))
    assert len(waits) == 2
    with pytest.raises(FeedbackError, match=r"did not answer: .*refused"):
        LanguageJudge(Endpoint("http://127.0.0.1:1/v1", "m", retries=1)).compare(said("a a"), said("c"))


def test_a_refusal_is_not_tried_again(server: Server, waits: list[float]) -> None:
    server.script = [(401, '{"error": {"message": "Incorrect API key"}}')]
    with pytest.raises(FeedbackError, match=r"did not answer: HTTP 401 Unauthorized \(Incorrect API key\)"):
        LanguageJudge(Endpoint(server.url, "m", parallel=1)).compare(said("a a"), said("c"))
    assert waits == []
    assert len(server.requests) == 1


def test_something_else_than_a_chat_completion_is_shown(server: Server) -> None:
    server.script = [(200, "<html>hello</html>")]
    with pytest.raises(FeedbackError, match="something else than a chat completion: '<html>hello"):
        LanguageJudge(Endpoint(server.url, "m", parallel=1)).compare(said("a a"), said("c"))
    with pytest.raises(UsageError, match="is no URL"):
        Endpoint("localhost:8000", "m")


def test_what_was_answered_before_a_failure_is_kept(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    judge = LanguageJudge(Endpoint(server.url, "m", parallel=4), cache=path)
    judge.compare(said(*["a " * k for k in range(1, 41)]), said(*["b"] * 40))  # more than are kept at a time
    assert len(path.read_text().splitlines()) == 80
    server.script = [(401, "{}")] * 2
    before = judge.tally.calls
    with pytest.raises(FeedbackError):
        judge.compare(said("c c c", "a"), said("d", "b"))
    assert judge.tally.calls == before
    assert judge.compare(said("a"), said("b")).tolist() == [0.5]  # known already


# --- a model in this process ------------------------------------------------------------------------------


def test_a_local_model_replies_the_same_whatever_else_is_asked() -> None:
    template = "{prompt} {first} {second}"
    for greedy in (True, False):
        speaker = Local(POLICY, greedy=greedy, max_new_tokens=3, batch=2)
        questions = [[{"role": "user", "content": text}] for text in ("a b c", "d", "e f g h a b")]
        replies = speaker.reply(questions)
        assert [speaker.reply([q])[0] for q in questions] == replies
        assert [r.prompt_tokens for r in replies] == [3, 1, 6]
        assert all(1 <= r.completion_tokens <= 3 for r in replies)
    judge = LanguageJudge(Local(POLICY), template)
    p = judge.compare(said("a", "b c"), said("d", "e"))
    torch.testing.assert_close(p + judge.compare(said("d", "e"), said("a", "b c")), torch.ones(2))


def test_a_local_models_replies_are_its_own() -> None:
    other = LanguagePolicy(tiny_llama(width=16, layers=1, seed=3), tokenizer(), max_new_tokens=3)
    assert Local(POLICY).identity == Local(POLICY).identity
    assert Local(POLICY).identity != Local(other).identity
    assert Local(POLICY).identity != Local(POLICY, greedy=False).identity
