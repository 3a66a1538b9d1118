"""Prompts, their order and their files; the experience of answering them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories, encode_text
from guerdon.errors import DataError, UsageError
from guerdon.experience.prompts import Prompted, Prompts, read_prompts
from guerdon.randomness import row_seeds, uniform

TEXTS = ["one", "two", "three", "four", "five"]


class Echo:
    """Answers each prompt with a number drawn from the row's seed."""

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: object
    ) -> Trajectories:
        self.options = options
        inputs = TensorDict({"seed": seeds}, batch_size=[len(prompts)])
        outputs = TensorDict({"prompt": encode_text(prompts)}, batch_size=[len(prompts)])
        mask = torch.ones(len(prompts), 1, dtype=torch.bool)
        return Trajectories(inputs, -uniform(seeds, (1,)), mask, outputs=outputs, group=group)


# --- order ------------------------------------------------------------------------------------------------


def test_a_pass_draws_every_prompt_once() -> None:
    prompts = Prompts(TEXTS, seed=4)
    passes = [prompts.draw(5) for _ in range(8)]
    assert all(sorted(p) == [0, 1, 2, 3, 4] for p in passes)
    assert len({tuple(p) for p in passes}) > 1  # each in an order of its own


def test_the_order_does_not_depend_on_how_much_is_drawn_at_a_time() -> None:
    at_once, bit_by_bit = Prompts(TEXTS, seed=1), Prompts(TEXTS, seed=1)
    expected = at_once.draw(17)
    assert [p for n in (3, 1, 9, 4) for p in bit_by_bit.draw(n)] == expected
    assert Prompts(TEXTS, seed=2).draw(17) != expected
    assert Prompts(TEXTS, shuffle=False).draw(7) == [0, 1, 2, 3, 4, 0, 1]


def test_the_cursor_resumes() -> None:
    first = Prompts(TEXTS, seed=1)
    first.draw(7)
    second = Prompts(TEXTS, seed=1)
    second.load_state_dict(first.state_dict())
    assert first.state_dict() == {"drawn": 7}
    assert second.draw(9) == first.draw(9)


def test_no_prompts_is_an_error() -> None:
    with pytest.raises(DataError, match="empty"):
        Prompts([])


# --- files ------------------------------------------------------------------------------------------------


def test_text_and_jsonl_files(tmp_path: Path) -> None:
    text = tmp_path / "prompts.txt"
    text.write_text("a cat\r\n\n  a dög\u2028and more \n", encoding="utf-8")
    assert read_prompts(text) == ["a cat", "a dög\u2028and more"]
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a cat", "id": 1}\n\n{"prompt": "a\\nb"}\n', encoding="utf-8-sig")
    assert read_prompts(lines) == ["a cat", "a\nb"]
    lines.write_text('{"caption": "x"}\n')
    assert Prompts.from_file(lines, column="caption").texts == ["x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: holds no prompts"),
        ("a.jsonl", b"\n\n", "a.jsonl: holds no prompts"),
        ("a.txt", b"fine\n\xff\xfe\n", r"a.txt, row 2: not UTF-8 \(byte 0xff\)"),
        (
            "a.jsonl",
            b'{"prompt": "x"}\n{"text": "y"}\n',
            r"a.jsonl, row 2: no column 'prompt' \(it has: text\)",
        ),
        ("a.jsonl", b'{"prompt": 3}\n', "a.jsonl, row 1, column 'prompt': expected a text, found int"),
        ("a.jsonl", b"hello\n", "a.jsonl, row 1: not a JSON object"),
        ("a.jsonl", b"[1]\n", "a.jsonl, row 1: no column 'prompt'"),
    ],
)
def test_bad_files_are_named_with_their_row(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt: cannot be read"):
        read_prompts(tmp_path / "nothing.txt")


# --- answering --------------------------------------------------------------------------------------------


def test_groups_lie_together_and_name_their_prompt() -> None:
    experience = Prompted(TEXTS, group_size=3, seed=2)
    traj = experience.collect(Echo(), 15)
    assert traj.group.view(5, 3).eq(traj.group.view(5, 3)[:, :1]).all()
    assert [TEXTS[g] for g in traj.group.tolist()] == traj.prompts
    assert Counter(traj.group.tolist()) == dict.fromkeys(range(5), 3)
    again = experience.collect(Echo(), 15)  # the same prompt has the same number in another round
    assert [TEXTS[g] for g in again.group.tolist()] == again.prompts


def test_every_row_of_a_run_has_its_own_seed() -> None:
    experience = Prompted(TEXTS, group_size=2, seed=2)
    seeds = torch.cat([experience.collect(Echo(), n).inputs["seed"] for n in (4, 2, 6)])
    assert torch.equal(seeds, row_seeds(2, 0, 12))


def test_experience_resumes_exactly() -> None:
    first = Prompted(TEXTS, group_size=2, seed=2)
    first.collect(Echo(), 6)
    second = Prompted(TEXTS, group_size=2, seed=2)
    second.load_state_dict(first.state_dict())
    a, b = first.collect(Echo(), 8), second.collect(Echo(), 8)
    assert torch.equal(a.log_prob, b.log_prob)
    assert a.prompts == b.prompts


def test_options_reach_the_sampler() -> None:
    echo = Echo()
    Prompted(TEXTS).collect(echo, 2, steps=4)
    assert echo.options == {"steps": 4}


def test_incomplete_groups_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot collect 5 trajectories in groups of 2"):
        Prompted(TEXTS, group_size=2).collect(Echo(), 5)
    with pytest.raises(UsageError, match="at least 1"):
        Prompted(TEXTS, group_size=0)
