"""What is wrong with a file is said before training: which file, which row, which column, and what was expected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from texts_for_tests import byte_policy, said

from guerdon.errors import DataError, UsageError
from guerdon.experience.datasets import load_demonstrations, load_preferences, load_prompts, load_rated
from guerdon.policies.language import LanguagePolicy

GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
TALK = {"prompt": said("hi"), "chosen": said("", "a")[1:], "rejected": said("", "b")[1:]}
NAN = float("nan")


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return byte_policy()


def line(**changes: Any) -> dict[str, Any]:
    """A good row with some columns changed; None takes one away."""
    row = {**GOOD, **changes}
    return {name: value for name, value in row.items() if name not in changes or changes[name] is not None}


# --- rows of pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            line(chosen=None),
            r"row 3: no column 'chosen' \(it has: prompt, rejected\); expected prompt, chosen and",
        ),
        ({**GOOD, "chosen": None}, r"row 3, column 'chosen': expected a value, found none"),
        (line(rejected=None), r"row 3: no column 'rejected' \(it has: prompt, chosen\)"),
        (line(chosen=3), r"row 3, column 'chosen': expected a text or a list of messages, found int"),
        (line(rejected={"a": 1}), r"row 3, column 'rejected': expected a text or .*, found an object"),
        (line(prompt=3.5), r"row 3, column 'prompt': expected a text or .*, found float"),
        (line(prompt=""), r"row 3, column 'prompt': the prompt has no tokens"),
        (line(chosen=""), r"row 3, column 'chosen': the answer is empty"),
        (line(rejected=" \n"), r"row 3, column 'rejected': the answer is empty"),
        (line(chosen="\ud800"), r"row 3, column 'chosen': no valid Unicode \(surrogates not allowed\)"),
        (line(strength="high"), r"row 3, column 'strength': expected a number, found a text"),
        (line(strength=1.5), r"row 3, column 'strength': is 1\.5, expected the probability .* into 'margin'"),
        (line(margin=NAN), r"row 3, column 'margin': expected a finite number, found nan"),
        (line(score_chosen=1), r"row 3: no column 'score_rejected'"),
        (line(annotator=[1]), r"row 3, column 'annotator': expected a name or a number, found a list"),
        (
            line(prompt=None),
            r"row 3, column 'chosen': no column 'prompt', and the answers do not begin alike",
        ),
        (
            line(chosen=said("p", "a")),
            r"row 3, column 'rejected': one answer is a plain text and the other messages",
        ),
        (
            {"prompt": "other", "chosen": said("hi", "a"), "rejected": said("hi", "b")},
            r"row 3, column 'chosen': holds messages, but the prompt is a plain text; use one form",
        ),
        (
            TALK,
            r"row 3, column 'rejected': holds conversations, but the rows before hold plain texts; use one form",
        ),
        ({"prompt": "p", "completion": "c", "label": True}, r"row 3: .*these rows suit load_rated"),
        ({"question": "p"}, r"row 3: no column 'chosen' \(it has: question\).*given with columns="),
        ({}, r"row 3: no column 'chosen' \(it has: nothing\)"),
        ([1, 2], r"row 3: expected named columns, found a list"),
        ("words", r"row 3: expected named columns, found a text"),
    ],
)
def test_a_bad_pair(policy: LanguagePolicy, tmp_path: Path, row: Any, message: str) -> None:
    rows = [GOOD, row]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)))  # the blank line counts: an editor shows line 3
    with pytest.raises(DataError, match=r"pairs\.jsonl, " + message):
        load_preferences(path, policy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [], "chosen": "a", "rejected": "b"}, r"'prompt': expected messages, found an empty list"),
        ({"prompt": ["hi"]}, r"'prompt': message 1 is a text; expected \{\"role\""),
        (
            {"prompt": [{"content": "hi"}]},
            r"'prompt': message 1 has no role; expected system, user or assistant",
        ),
        (
            {"prompt": [{"role": "user", "content": 3}]},
            r"'prompt': the content of message 1 is int; expected a text",
        ),
        (
            {"chosen": said("", "a", "b")[1:]},
            r"'chosen': expected one message of the assistant, found 2 \(assistant, ",
        ),
        ({"chosen": said("a")}, r"'chosen': expected one message of the assistant, found 1 \(user\)"),
        ({"chosen": said("", " ")[1:]}, r"'chosen': the answer is empty"),
        ({"chosen": said("hi")}, r"'chosen': the answer is empty: the conversation ends with the prompt"),
        ({"prompt": [{"role": "user", "content": "\ud800"}]}, r"'prompt': no valid Unicode"),
    ],
)
def test_a_bad_conversation(policy: LanguagePolicy, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"the given rows, row 2, column " + message):
        load_preferences([TALK, {**TALK, **changes}], policy)


def test_conversations_that_begin_differently_have_no_prompt(policy: LanguagePolicy) -> None:
    row = {"chosen": said("hi", "a"), "rejected": said("ho", "b")}
    with pytest.raises(
        DataError, match="row 1, column 'chosen': no column 'prompt', and the conversations do not"
    ):
        load_preferences([row], policy)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"completions": ["a"], "scores": [1, 2]},
            r"row 1, column 'scores': there are 2 scores for 1 completions",
        ),
        (
            {"completions": "ab", "scores": [1, 2]},
            r"row 1, column 'completions': expected a list, found a text",
        ),
        ({"completions": ["a", ""], "scores": [1, 2]}, r"row 1, column 'completions': the answer is empty"),
        (
            {"completions": ["a", "b"], "scores": [1, "x"]},
            r"row 1, column 'scores': expected a number, found a text",
        ),
        (
            {"completions": ["a", "b"], "scores": [1, NAN]},
            r"row 1, column 'scores': expected a finite number",
        ),
        ({"completions": ["a", "b"]}, r"row 1: no column 'scores'"),
        (
            {"completions": [said("a"), "b"], "scores": [1, 2]},
            r"row 1, column 'completions': expected one message of",
        ),
    ],
)
def test_a_bad_ranked_list(policy: LanguagePolicy, row: dict[str, Any], message: str) -> None:
    for load in (load_preferences, load_rated):
        with pytest.raises(DataError, match=message):
            load([{"prompt": "p", **row}], policy)


def test_optional_columns_are_in_all_rows_or_in_none(policy: LanguagePolicy) -> None:
    with pytest.raises(
        DataError, match="row 2: 'strength' is given in some rows and not in others; give it in all"
    ):
        load_preferences([{**GOOD, "strength": 0.9}, GOOD], policy)


# --- other rows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "c"}, r"no column 'prompt' \(it has: completion\)"),
        ({"prompt": "p"}, r"no column 'completion' .*expected prompt and completion, or messages, or text"),
        ({"chosen": "c"}, r"no column 'prompt'"),
        ({"prompt": "p", "completion": ""}, r"column 'completion': the answer is empty"),
        (
            {"prompt": "p", "completion": said("", "a")[1:]},
            r"column 'completion': holds messages, but the prompt is",
        ),
        ({"messages": said("hi")}, r"column 'messages': no message of the assistant to learn from"),
        (
            {"messages": said("", "yo")[1:]},
            r"column 'messages': the assistant speaks first, so there is no prompt",
        ),
        ({"messages": said("hi", "")}, r"column 'messages': the answer is empty"),
        ({"messages": "hi"}, r"column 'messages': expected a list of messages, found a text"),
        ({"text": ["a"]}, r"column 'text': expected a text, found a list"),
        ({"text": ""}, r"column 'text': the answer is empty"),
    ],
)
def test_a_bad_demonstration(policy: LanguagePolicy, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"the given rows, row 1(: |, )" + message):
        load_demonstrations([row], policy)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "completion": "c"}, r"no column 'reward' .*these rows suit load_demonstrations"),
        (
            {"prompt": "p", "completion": "c", "reward": None},
            r"column 'reward': expected a value, found none",
        ),
        (
            {"prompt": "p", "completion": "c", "label": "good"},
            r"column 'label': expected a number, found a text",
        ),
        (
            {"prompt": "p", "completion": "c", "reward": float("inf")},
            r"column 'reward': expected a finite number",
        ),
        ({"prompt": "p", "text": "c"}, r"no column 'completion'"),
    ],
)
def test_a_bad_rating(policy: LanguagePolicy, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=r"the given rows, row 1(: |, )" + message):
        load_rated([row], policy)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": " "}], "row 1, column 'prompt': the prompt is empty"),
        ([{"prompt": "a"}, {"prompt": said("a")}], "row 2: plain texts and conversations are mixed"),
        ([{"messages": said("a", "b")[1:]}], "row 1, column 'messages': the prompt is empty"),
        ([{"caption": "a"}], "row 1: no column 'prompt'"),
    ],
)
def test_a_bad_prompt(policy: LanguagePolicy, rows: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_prompts(rows, policy)


# --- chat templates ---------------------------------------------------------------------------------------


def test_a_model_without_a_chat_template_cannot_read_conversations() -> None:
    plain = byte_policy(chat=False)
    with pytest.raises(
        UsageError, match=r"row 1 holds a conversation, but .* no chat template: take a chat model"
    ):
        load_preferences([TALK], plain)


def test_a_template_that_refuses_the_messages(policy: LanguagePolicy) -> None:
    strict = byte_policy()
    strict.tokenizer.chat_template = (
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}"
        + strict.tokenizer.chat_template
    )
    row = {**TALK, "prompt": [{"role": "system", "content": "be"}, *said("hi")]}
    message = r"row 2, column 'prompt': the chat template refuses these messages \(the user speaks first\)"
    with pytest.raises(DataError, match=message):
        load_preferences([TALK, row], strict)


def test_a_template_that_writes_prompts_in_two_ways() -> None:
    odd = byte_policy()
    odd.tokenizer.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(
        DataError, match="row 1, column 'chosen': the chat template does not write the prompt in the"
    ):
        load_preferences([TALK], odd)


# --- files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: holds no rows"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: holds no rows"),
        ("a.json", b"", r"a\.json: holds no rows"),
        ("a.json", b"[]", r"a\.json: holds no rows"),
        ("a.csv", b"prompt,chosen,rejected\n", r"a\.csv: holds no rows"),
        ("a.jsonl", b'{"prompt": "p"\n', r"a\.jsonl, row 1: not a JSON object"),
        ("a.jsonl", json.dumps(GOOD).encode() + b"\n{]\n", r"a\.jsonl, row 2: not a JSON object"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, row 1: not a JSON object"),
        ("a.jsonl", json.dumps(GOOD).encode() + b"\n\xff\xfe\n", r"a\.jsonl, row 2: not UTF-8 \(byte 0xff\)"),
        ("a.csv", b"prompt,chosen,rejected\np,a,b\np,\xe4,b\n", r"a\.csv, row 3: not UTF-8 \(byte 0xe4\)"),
        ("a.json", b'[{"prompt": "p"},\n {"prompt"]', r"a\.json, line 2: not valid JSON"),
        ("a.json", b"3", r"a\.json: expected a list of rows, found int"),
        ("a.json", b"[3]", r"a\.json, row 1: expected named columns, found int"),
        (
            "a.csv",
            b'prompt,chosen,rejected\np,"a\nb",c\np,a\n',
            r"a\.csv, row 4: has 2 columns, expected 3 \(prompt, ",
        ),
        ("a.csv", b'prompt,chosen,rejected\np,a,"b\n', r"a\.csv, row 2: not valid CSV"),
        (
            "a.csv",
            b"prompt,chosen,rejected\np,,b\n",
            r"a\.csv, row 2, column 'chosen': expected a value, found none",
        ),
        (
            "a.csv",
            b"prompt,chosen,rejected,strength\np,a,b,x\n",
            r"a\.csv, row 2, column 'strength': .* found 'x'",
        ),
        (
            "a.csv",
            b"prompt,chosen,rejected,strength\np,a,b,nan\n",
            r"a\.csv, row 2, column 'strength': expected a",
        ),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"", r"a\.parquet: not a readable Parquet file"),
        ("a.parquet", b"words", r"a\.parquet: not a readable Parquet file"),
        ("a.docx", b"words", r"a\.docx: unknown kind of file; expected one of \.jsonl"),
    ],
)
def test_a_bad_file(policy: LanguagePolicy, tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_preferences(tmp_path / name, policy)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "else.txt", "no/such/thing"])
def test_a_file_that_is_not_there(policy: LanguagePolicy, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"(cannot be read|no such file)"):
        load_preferences(str(tmp_path / name), policy)
    if "." in name:  # what looks like a file is not looked for on the hub
        with pytest.raises(DataError, match=rf"^{name}: (cannot be read|no such file)"):
            load_preferences(name, policy)
        with pytest.raises(DataError, match=rf"^{name}: cannot be read"):
            load_prompts(name)


def parquet(path: Path, rows: int = 5000) -> bytes:
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    table = [{**GOOD, "prompt": f"prompt {i * i}"} for i in range(rows)]
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(table),
        path,
        row_group_size=500,
        compression="none",
        use_dictionary=False,
        write_page_checksum=True,
    )
    return path.read_bytes()


def test_a_truncated_parquet_file(policy: LanguagePolicy, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    data = parquet(path)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        DataError, match=r"a\.parquet: not a readable Parquet file, perhaps cut short .* fetch it again"
    ):
        load_preferences(path, policy)


def test_a_parquet_file_that_breaks_in_the_middle_names_the_row(
    policy: LanguagePolicy, tmp_path: Path
) -> None:
    path = tmp_path / "a.parquet"
    data = bytearray(parquet(path))
    middle = len(data) // 2
    data[middle : middle + 2000] = b"\xff" * 2000
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"a\.parquet, row \d+: not a readable Parquet file"):
        load_preferences(path, policy)


def test_folders(policy: LanguagePolicy, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no data files"):
        load_preferences(tmp_path, policy)
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("")
    with pytest.raises(
        DataError, match=r"holds files of several kinds or parts \(a\.jsonl, b\.csv\); name one of"
    ):
        load_preferences(tmp_path, policy)
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_preferences(tmp_path, policy)


@pytest.mark.parametrize(("source", "what"), [(3, "int"), ({"prompt": ["p"]}, "an object"), (b"x", "bytes")])
def test_what_cannot_be_rows(policy: LanguagePolicy, source: Any, what: str) -> None:
    with pytest.raises(UsageError, match=f"rows cannot be read from {what}; give a file, a folder"):
        load_preferences(source, policy)


def test_no_rows_in_memory(policy: LanguagePolicy) -> None:
    with pytest.raises(DataError, match="the given rows: holds no rows"):
        load_preferences([], policy)


def test_the_errors_of_a_users_own_iterator_are_its_own(policy: LanguagePolicy) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield GOOD
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        load_preferences(rows(), policy)


def test_an_iterator_of_datasets_that_fails_names_the_row(policy: LanguagePolicy) -> None:
    datasets = pytest.importorskip("datasets")

    def rows() -> Iterator[dict[str, str]]:
        yield GOOD
        raise ConnectionError("the line is dead")

    source = datasets.IterableDataset.from_generator(rows)
    with pytest.raises(DataError, match=r"the data set, row 2: cannot be read .*the line is dead"):
        load_preferences(source, policy)


@pytest.mark.parametrize("load", [load_preferences, load_demonstrations, load_rated])
def test_a_wrong_column_name_is_named(policy: LanguagePolicy, load: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match=r"row 1: no column 'question' \(it has: prompt, chosen, rejected\)"):
        load([GOOD], policy, columns={"prompt": "question"})
