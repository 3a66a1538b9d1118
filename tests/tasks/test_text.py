"""A user's own model and data, as typed on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from guerdon import cli, launch
from guerdon.errors import DataError, UsageError
from guerdon.policies.language import LanguagePolicy
from guerdon.tasks.base import Pieces
from guerdon.tasks.tokens import LETTERS, tiny_llama, tokenizer

SMALL = {"progress": False, "threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LanguagePolicy(tiny_llama(width=32, layers=1), tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer that repeats the prompt's letter is preferred."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    letters = [(a, b) for a in LETTERS for b in LETTERS if a != b]
    rows = [{"prompt": f"{a} {b}", "chosen": f"{a} {a}", "rejected": f"{b} {b}"} for a, b in letters]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 2))
    return str(path)


def test_dpo_on_a_users_pairs_raises_the_chosen_over_the_rejected(
    model: str, pairs: str, tmp_path: Path
) -> None:
    options = {"lr": 3e-3, "warmup": 0, "epochs": 6, "batch_size": 16, "optimiser": "adamw"}
    result = launch.train("dpo", model=model, data=pairs, runs=tmp_path, **SMALL, **options)
    gap = lambda figures: figures["log_prob_chosen"] - figures["log_prob_rejected"]
    assert gap(result.after) > gap(result.before) + 0.1
    records = launch.read_records(result.folder)
    assert records[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert records[-1]["loss"] < 0.65


def test_what_was_trained_loads_without_guerdon(model: str, pairs: str, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    for slug, options in {"sft": {}, "dpo": {"lora_rank": 2}}.items():
        result = launch.train(slug, model=model, data=pairs, runs=tmp_path, lr=1e-3, **SMALL, **options)
        load = AutoPeftModelForCausalLM if options else AutoModelForCausalLM
        theirs = LanguagePolicy(load.from_pretrained(result.folder / "model"), tokenizer())
        traj = theirs.encode(["a b"], ["a a"])
        assert torch.allclose(theirs.log_prob(traj), result.actor.log_prob(traj), atol=1e-5)


def test_a_reward_model_is_trained_saved_and_judges(model: str, pairs: str, tmp_path: Path) -> None:
    options = {"lr": 1e-2, "epochs": 30, "batch_size": 16}
    result = launch.train(
        "reward-model", model=model, data=pairs, runs=tmp_path, name="judge", **SMALL, **options
    )
    assert set(result.after) == {"accuracy", "margin"}
    assert launch.read_records(result.folder)[-1]["accuracy"] > 0.8
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a b\nc d\n")
    again = launch.train(
        "rloo",
        "text",
        model=model,
        prompts=str(prompts),
        reward=f"model={tmp_path / 'judge' / 'model'}",
        runs=tmp_path,
        rounds=1,
        prompts_per_round=2,
        max_new_tokens=4,
        **SMALL,
    )
    assert "reward" in again.after


def test_bad_rows_are_refused_before_anything_is_trained(model: str, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"prompt": "a", "rejected": "c"}) + "\n")
    with pytest.raises(DataError, match=r"pairs\.jsonl, row 2.*'chosen'"):
        launch.train("dpo", model=model, data=str(path), runs=tmp_path / "runs", **SMALL)
    assert not (tmp_path / "runs").exists() or not any((tmp_path / "runs").iterdir())


def test_left_out_pairs_are_counted(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b", "rejected": "b"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    launch.train("dpo", model=model, data=str(path), runs=tmp_path / "runs", threads=1)
    said = capsys.readouterr()
    assert "left out 3" in said.out + said.err


def test_pieces_that_are_missing_are_named(model: str, pairs: str, tmp_path: Path) -> None:
    for message, arguments in {
        "name it with --model": {"method": "dpo", "task": "text", "data": pairs},
        "name a file with --data": {"method": "dpo", "task": "text", "model": model},
        "name a file of them with --prompts": {"method": "grpo", "task": "text", "model": model},
    }.items():
        with pytest.raises(UsageError, match=message):
            launch.train(**arguments, runs=tmp_path, **SMALL)
    with pytest.raises(UsageError, match="takes no recorded data"):
        launch.train("grpo", "tokens", data=pairs, runs=tmp_path, **SMALL)


def test_a_users_model_or_data_mean_the_text_task(model: str, pairs: str) -> None:
    assert launch.task_for("dpo", Pieces(model=model, data=pairs)) == "text"
    assert launch.task_for("ppo", Pieces(model=model)) == "text"
    assert launch.task_for("dpo", Pieces()) == "reviews"
    assert launch.task_for("ppo", Pieces(env="CartPole-v1")) == "control"


def test_sample_and_evaluate_read_a_bare_model(
    model: str, pairs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", model, "--prompt", "a b", "--max-new-tokens", "3", "--greedy"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["prompt"] == "a b"
    assert cli.main(["sample", model, "--prompt", "a b", "--beams", "2", "--max-new-tokens", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a b"
    assert cli.main(["evaluate", model, "--data", pairs]) == 0
    assert "chosen_likelier" in capsys.readouterr().out
    assert cli.main(["evaluate", model]) == 2
    assert "say what to measure it on" in capsys.readouterr().err
