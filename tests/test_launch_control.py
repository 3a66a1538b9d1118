"""Runs of controllers from end to end: the front door, resuming to the bit, environments that fail, the CLI."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import control_for_tests  # noqa: F401 (registers the environments)
from guerdon import compiled, launch
from guerdon.cli import main
from guerdon.experience.environments import EnvironmentFailure
from guerdon.experience.rollouts import Rollouts
from guerdon.policies.control import load_controller
from guerdon.run import checkpoint
from guerdon.tasks.control import Control

QUIET = {"progress": False, "threads": 1, "checkpoint_steps": 1}
PPO = {
    "env": "CartPole-v1",
    "rounds": 6,
    "samples": 64,
    "environments": 2,
    "minibatch": 32,
    "epochs": 2,
    "normalise_observation": True,
    "scale_reward": True,
    "schedule": "linear",
}
SMALL = {"steps": 2000, "batch_size": 8, "hidden": (8,), "environments": 2}
DQN = {
    **SMALL,
    "env": "CartPole-v1",
    "target_every": 600,
    "prioritised": True,
    "n_step": 3,
    "update_every": 16,
}
ACTOR_CRITIC = {**SMALL, "env": "Pendulum-v1", "start": 300, "every": 20, "n_step": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": ("ppo", PPO),
    "a2c": ("a2c", {"env": "Pendulum-v1", "rounds": 6, "samples": 16, "environments": 2}),
    "dqn": ("dqn", {**DQN, "updates": 1, "start": 100}),
    "sac": ("sac", ACTOR_CRITIC),
    "td3": ("td3", ACTOR_CRITIC),
    "reinforce": ("reinforce", {"env": "CartPole-v1", "rounds": 6, "samples": 32, "environments": 2}),
}


class Killed(BaseException):
    """The process is gone: nothing that runs afterwards may save anything."""


def killed_after(calls: int) -> Callable[[], None]:
    """Experience that dies at the ``calls``-th time it acts; the function revives it."""
    patch = pytest.MonkeyPatch()
    count = 0
    for name in ("collect", "advance"):
        genuine = getattr(Rollouts, name)

        def dying(*args: Any, _genuine: Any = genuine, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > calls:
                raise Killed
            return _genuine(*args, **kwargs)

        patch.setattr(Rollouts, name, dying)
    return patch.undo


def _same(a: Any, b: Any, path: str = "") -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            _same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            _same(x, y, f"{path}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


@pytest.mark.parametrize(
    ("case", "whole"),
    [*((case, False) for case in CASES), ("ppo", True), ("sac", True)],
)
def test_a_killed_and_resumed_run_ends_as_the_uninterrupted_one(
    case: str, whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replay, environments, optimisers, statistics and counters included, to the bit."""
    if whole:
        from test_compiled import _trace

        monkeypatch.setattr(compiled, "compile_function", _trace)
    slug, options = CASES[case]
    settings = {**QUIET, **options, "compile": whole, "runs": tmp_path, "seed": 4}
    calls = 0
    for name in ("collect", "advance"):
        genuine = getattr(Rollouts, name)

        def counted(*args: Any, _genuine: Any = genuine, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return _genuine(*args, **kwargs)

        monkeypatch.setattr(Rollouts, name, counted)
    launch.train(slug, name="whole", **settings)
    total = calls
    revive = killed_after(int(0.5 * total))
    with pytest.raises(Killed):
        launch.train(slug, name="killed", **settings)
    revive()
    revive = killed_after(int(0.45 * total))
    with pytest.raises(Killed):
        launch.resume(tmp_path / "killed", progress=False)
    revive()
    launch.resume(tmp_path / "killed", progress=False)
    one, other = tmp_path / "whole", tmp_path / "killed"
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert (one / "model/model.safetensors").read_bytes() == (other / "model/model.safetensors").read_bytes()
    _same(checkpoint.load_newest(one)[1]["objects"], checkpoint.load_newest(other)[1]["objects"])


# --- what a run leaves ------------------------------------------------------------------------------------


def test_a_run_leaves_a_controller_that_takes_raw_observations(tmp_path: Path) -> None:
    result = launch.train("ppo", name="run", runs=tmp_path, compile=False, **QUIET, **PPO)
    loaded = load_controller(result.folder / "model")
    assert float(loaded.features.scaler.count) > 1000
    observation = torch.randn(5, 4)
    torch.testing.assert_close(loaded.logits(observation), result.actor.model.logits(observation))
    again = launch.load(result.folder)
    torch.testing.assert_close(again.actor.model.logits(observation), loaded.logits(observation))
    figures = again.task.measure(again.actor, again.feedback).figures
    assert figures == result.after
    assert json.loads((result.folder / "result.json").read_text())["after"] == result.after
    untrained = launch.load(result.folder, untrained=True)
    assert untrained.task.measure(untrained.actor, untrained.feedback).figures == result.before
    records = launch.read_records(result.folder)
    assert [r["steps"] for r in records] == [64.0 * i for i in range(1, 7)]
    # a trained model goes on in another run
    more = launch.train(
        "ppo", name="more", runs=tmp_path, compile=False, **QUIET, **PPO, model=str(result.folder / "model")
    )
    assert more.before == result.after


def test_updates_are_compiled_unless_told_not_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_compiled import _trace

    monkeypatch.setattr(compiled, "compile_function", _trace)
    for given, expected in ((None, compiled.available() is None), (False, False)):
        result = launch.train(
            "ppo", name=f"run{given}", runs=tmp_path, compile=given, device="cpu", **QUIET, **PPO
        )
        assert (result.actor._whole is not None) is expected
        assert json.loads((result.folder / "config.json").read_text())["config"]["compile"] is expected
        loaded = launch.load(
            result.folder, device="cpu"
        )  # answers only: no matter how its optimiser was kept
        for name, value in result.actor.model.state_dict().items():
            assert torch.equal(loaded.actor.model.state_dict()[name], value)


def test_whole_updates_and_single_ones_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_compiled import _trace

    monkeypatch.setattr(compiled, "compile_function", _trace)
    results = [
        launch.train("ppo", name=f"{c}", runs=tmp_path, compile=c, **QUIET, **{**PPO, "rounds": 1})
        for c in (False, True)
    ]
    one, other = (launch.read_records(r.folder)[0] for r in results)
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, float):
            assert value == pytest.approx(other[key], rel=1e-3, abs=1e-5), key


# --- environments that fail -------------------------------------------------------------------------------


@pytest.mark.parametrize("slug", ["ppo", "sac"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "raised ValueError: the arm left the table"),
        ("NaN", "which is not finite"),
        ("shape", r"an observation of shape \[2\], not \[3\]"),
        ("infinite reward", "returned the reward inf"),
    ],
)
def test_a_failing_environment_stops_the_run(slug: str, how: str, message: str, tmp_path: Path) -> None:
    options = {"rounds": 3, "samples": 30} if slug == "ppo" else {"steps": 1000, "start": 100}
    with pytest.raises(EnvironmentFailure, match=message) as found:
        launch.train(
            slug,
            env="Fails-v0",
            env_options={"how": how},
            name="run",
            runs=tmp_path,
            environments=2,
            compile=False,
            **QUIET,
            **options,
        )
    said = str(found.value)
    assert re.search(r"seed \d+", said)
    assert "after 11 steps" in said or "after 12 steps" in said  # in the step, or in what it returned
    assert re.search(r"the action taken was \[", said)
    assert not (tmp_path / "run").exists()  # nothing was learned, nothing is left behind


def test_what_was_learned_before_a_failure_is_kept(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFailure):
        launch.train(
            "ppo",
            env="Fails-v0",
            env_options={"after": 40},
            name="run",
            runs=tmp_path,
            environments=2,
            compile=False,
            rounds=3,
            samples=60,
            **QUIET,
        )
    assert [r["step"] for r in launch.read_records(tmp_path / "run")] == [0]
    assert checkpoint.load_newest(tmp_path / "run")[0] == 1


# --- the command line -------------------------------------------------------------------------------------


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = "train dqn --env CartPole-v1 --steps 1000 --start 100 --update-every 64 --updates 1 --compile False --quiet"
    assert main([*command.split(), "--hidden", "8", "8", "--name", "poles", "--env-options", "{}"]) == 0
    said = capsys.readouterr()
    assert re.search(r"reward +\d", said.out)
    assert "runs/poles" in said.out
    config = json.loads((tmp_path / "runs/poles/config.json").read_text())["config"]
    assert config["options"]["hidden"] == [8, 8]
    assert config["pieces"]["env"] == "CartPole-v1"
    assert config["options"]["lr"] == Control.by_environment["dqn", "CartPole-v1"]["lr"]
    assert main(["resume", "runs/poles", "--quiet"]) == 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train dqn --env CartPole-v2000", ["CartPole"]),
        ("train dqn --env Pendulum-v1", ["dqn", "categorical"]),
        ("train rlcm --env CartPole-v1", ["rlcm"]),
        ("train ppo --env CartPole-v1 --env-options {", ["env-options"]),
    ],
)
def test_the_command_line_refuses_in_one_line(
    command: str,
    words: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*command.split(), "--quiet"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("guerdon: ")
    assert said.err.count("\n") == 1
    assert all(word in said.err for word in words), said.err
    assert not (tmp_path / "runs").exists()
