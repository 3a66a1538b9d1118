"""RND-PPO: PPO where there is no bonus, the two ways to combine, what each stream knows of episodes, what is saved."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from tests.experience.environments_for_tests import Terminates
from torch import Tensor

from guerdon.credit import gae, normalise
from guerdon.critics.state import StateCritic
from guerdon.engine.local import LocalEngine
from guerdon.errors import UsageError
from guerdon.experience.environments import Environments, make
from guerdon.experience.rollouts import Rollouts
from guerdon.feedback.intrinsic import RNDBonus, next_observation
from guerdon.methods.online import rnd_ppo
from guerdon.methods.online.ppo import PPO
from guerdon.methods.online.rnd_ppo import RNDPPO
from guerdon.policies.control import make_controller
from guerdon.policies.features import Features, describe, to_tensor
from guerdon.run import Run
from guerdon.tasks.control import EnvironmentReward
from guerdon.tasks.warehouse import Warehouse

SMALL: dict[str, Any] = {
    "rounds": 3,
    "samples": 128,
    "minibatch": 64,
    "epochs": 2,
    "environments": 4,
    "hidden": (16,),
    "novelty_hidden": (16,),
    "embedding": 8,
    "warm_up": 32,
}


class Training:
    """One run in a small room, or in another environment, and what it left."""

    def __init__(
        self,
        folder: Path,
        method: Any,
        seed: int = 0,
        resume: bool = False,
        env: Environments | None = None,
        watch: Any = None,
        compile: Any = None,
        **settings: Any,
    ) -> None:
        torch.manual_seed(seed)
        env = env or Environments(
            Warehouse(method.environments, "room", time_limit=20), "room", seed, "array"
        )
        self.experience = Rollouts(env, seed, warm_up=32)
        if watch is not None:
            watch(self.experience)
        entries = describe(env.observation_space)

        def features(scaler: Any = None) -> Features:
            return Features(entries, method.hidden, "tanh", method.normalise_observation, scaler=scaler)

        actor = make_controller("gaussian", features(), env.action_space)
        models = {"actor": actor, "critic": StateCritic(features(actor.features.scaler))}
        engine = LocalEngine("cpu", threads=1, compile=compile)
        with Run(
            folder,
            engine=engine,
            seed=seed,
            resume=resume,
            progress=False,
            **{"checkpoint_steps": 1, **settings},
        ) as run:
            run.track("experience", self.experience)
            self.roles = {
                name: run.role(name, m, settings=method.roles()[name]) for name, m in models.items()
            }
            method.train(run, experience=self.experience, feedback=EnvironmentReward(), **self.roles)
            self.objects = dict(run._objects)
        engine.close()
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        self.records = [json.loads(line) for line in lines]

    def weights(self, name: str) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.objects[name].model.parameters()])


class Spy(RNDBonus):
    """The bonus, with a diary."""

    diary: list[tuple[str, Any]]

    def observe(self, observation: Tensor) -> None:
        self.diary.append(("observe", observation.clone()))
        super().observe(observation)

    def reward(self, following: Tensor) -> Tensor:
        reward = super().reward(following)
        self.diary.append(("reward", (following.clone(), reward.clone())))
        return reward

    def learn(self, following: Tensor, *arguments: Any, **settings: Any) -> Any:
        self.diary.append(("learn", (following.clone(), arguments)))
        return super().learn(following, *arguments, **settings)


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """What the bonus was asked, in order."""
    Spy.diary = []
    monkeypatch.setattr(rnd_ppo, "RNDBonus", Spy)
    return Spy.diary


@pytest.fixture
def advantages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``gae`` was asked by the method, and what it answered."""
    calls: list[dict[str, Any]] = []

    def spy(reward: Tensor, value: Tensor, mask: Tensor, *flags: Any, **options: Any) -> Any:
        answer = gae(reward, value, mask, *flags, **options)
        calls.append({"reward": reward, "value": value, "flags": flags, "answer": answer, **options})
        return answer

    monkeypatch.setattr(rnd_ppo, "gae", spy)
    return calls


# --- PPO underneath ---------------------------------------------------------------------------------------


def test_without_a_bonus_it_is_ppo(tmp_path: Path) -> None:
    same = {"rounds": 3, "samples": 128, "minibatch": 64, "epochs": 2, "environments": 4, "hidden": (16,)}
    more = {"gamma": 0.99, "entropy": 0.01, "lr": 1e-3, "critic_lr": 1e-3}
    one = Training(tmp_path / "ppo", PPO(**same, **more))
    two = Training(tmp_path / "none", RNDPPO(**same, **more, bonus="none"))
    for name in ("actor", "critic"):
        assert torch.equal(one.weights(name), two.weights(name))
    assert "predictor" not in two.objects


@pytest.mark.parametrize("mode", ["sum", "two_stream"])
def test_a_bonus_of_weight_zero_changes_nothing_for_the_policy(mode: Any, tmp_path: Path) -> None:
    """The predictor's randomness is the run's own, so one round is compared: the minibatches are then the same."""
    options = {**SMALL, "rounds": 1, "warm_up": 32, "mode": mode, "bonus_weight": 0.0}
    noise = Training(tmp_path / "a", RNDPPO(**options))
    real = Training(tmp_path / "b", RNDPPO(**{**options, "predictor_lr": 1e-2}))
    assert torch.equal(noise.weights("actor"), real.weights("actor"))
    assert not torch.equal(noise.weights("predictor"), real.weights("predictor"))


# --- when the bonus is computed ---------------------------------------------------------------------------


def test_the_bonus_is_computed_once_a_round_on_next_observations_before_anything_learns(
    tmp_path: Path, diary: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    collected: list[Any] = []

    def watch(experience: Rollouts) -> None:
        collect = experience.collect

        def spy(*arguments: Any) -> Any:
            traj = collect(*arguments)
            collected.append((traj, to_tensor(experience.environments.observation)))
            return traj

        monkeypatch.setattr(experience, "collect", spy)

    Training(tmp_path / "run", RNDPPO(**SMALL), watch=watch)
    assert [what for what, _ in diary] == ["observe", *["observe", "reward", "learn"] * 3]
    warm, *rounds = collected
    assert warm[0].mask.numel() == 32  # the warm-up's steps
    assert torch.equal(diary[0][1], warm[0].inputs["step", "observation"])
    for (traj, present), (_, (following, reward)), (_, (learned, _)) in zip(
        rounds, diary[2::3], diary[3::3], strict=True
    ):
        assert torch.equal(following, next_observation(traj, present))
        assert torch.equal(following, learned)
        assert reward.shape == traj.mask.shape
        assert not reward.requires_grad


def test_the_predictor_learns_with_the_given_proportion_in_one_pass(
    tmp_path: Path, diary: list[tuple[str, Any]]
) -> None:
    Training(tmp_path / "run", RNDPPO(**{**SMALL, "proportion": 0.4}))
    learned = [arguments for what, (_, arguments) in (d for d in diary if d[0] == "learn")]
    assert [a[:3] for a in learned] == [(0.4, 1, 64)] * 3


# --- the two modes ----------------------------------------------------------------------------------------


def test_in_two_streams_novelty_knows_no_episodes_and_the_reward_does(
    tmp_path: Path, diary: list[tuple[str, Any]], advantages: list[dict[str, Any]]
) -> None:
    """Episodes of 20 steps in rows of 32: each is truncated inside its row, and the time limit bootstraps."""
    Training(tmp_path / "run", RNDPPO(**SMALL))
    rewards = [content[1] for what, content in diary if what == "reward"]
    for extrinsic, intrinsic, novel in zip(advantages[::2], advantages[1::2], rewards, strict=True):
        terminated, truncated = extrinsic["flags"]
        assert truncated.any()
        assert not terminated.any()
        assert (extrinsic["gamma"], intrinsic["gamma"]) == (0.999, 0.99)
        # the reward: nothing flows over the end, but the value of where the time ran out counts
        advantage, _ = extrinsic["answer"]
        row, step = truncated.nonzero()[0].tolist()
        expected = (
            extrinsic["reward"][row, step]
            + 0.999 * extrinsic["next_value"][row, step]
            - extrinsic["value"][row, step]
        )
        torch.testing.assert_close(advantage[row, step], expected)
        assert extrinsic["next_value"][row, step] != 0
        # novelty: one long life, naively
        assert intrinsic["flags"] == ()
        assert torch.equal(intrinsic["reward"], novel)
        value = torch.cat([intrinsic["value"], intrinsic["bootstrap"][:, None]], 1)
        running = torch.zeros(4)
        for t in reversed(range(32)):
            running = novel[:, t] + 0.99 * value[:, t + 1] - value[:, t] + 0.99 * 0.95 * running
            torch.testing.assert_close(intrinsic["answer"][0][:, t], running, rtol=1e-4, atol=1e-5)


def test_nothing_is_worth_anything_after_a_terminated_step_but_novelty_is(
    tmp_path: Path, advantages: list[dict[str, Any]]
) -> None:
    """Every fifth step terminates. (Observations without bounds: there is no grid to count coverage on.)"""
    training = Training(tmp_path / "run", RNDPPO(**SMALL), env=make(Terminates, 4, 0))
    assert "coverage" not in training.objects
    for extrinsic, intrinsic in zip(advantages[::2], advantages[1::2], strict=True):
        terminated, truncated = extrinsic["flags"]
        assert terminated.any()
        assert not truncated.any()
        advantage, _ = extrinsic["answer"]
        alone = extrinsic["reward"] - extrinsic["value"]
        torch.testing.assert_close(advantage[terminated], alone[terminated])
        assert (intrinsic["answer"][0] != intrinsic["reward"] - intrinsic["value"])[terminated].all()


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_two_streams_are_weighted_then_standardised(
    schedule: Any, tmp_path: Path, advantages: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Tensor] = []
    monkeypatch.setattr(rnd_ppo, "normalise", lambda a, mask: given.append(a) or normalise(a, mask))
    method = RNDPPO(**SMALL, reward_weight=3.0, bonus_weight=0.5, bonus_schedule=schedule)
    records = Training(tmp_path / "run", method).records
    weights = [0.5, 0.5, 0.5] if schedule == "constant" else [0.5, 0.5 * 2 / 3, 0.5 / 3]
    assert [r["bonus_weight"] for r in records] == pytest.approx(weights)
    for i, weight in enumerate(weights):
        extrinsic, intrinsic = advantages[2 * i]["answer"][0], advantages[2 * i + 1]["answer"][0]
        torch.testing.assert_close(given[i], 3.0 * extrinsic + weight * intrinsic)


def test_in_one_stream_the_bonus_is_added_to_the_reward(
    tmp_path: Path, diary: list[tuple[str, Any]], advantages: list[dict[str, Any]]
) -> None:
    training = Training(tmp_path / "run", RNDPPO(**SMALL, mode="sum", bonus_weight=0.3))
    assert "intrinsic_critic" not in training.objects
    rewards = [content[1] for what, content in diary if what == "reward"]
    assert len(advantages) == 3  # one stream
    for call, novel in zip(advantages, rewards, strict=True):
        # 20 steps in the room touch no target: whatever is not bonus is a collision's 0.01
        rest = call["reward"] - 0.3 * novel
        assert ((rest.abs() < 1e-5) | ((rest + 0.01).abs() < 1e-5)).all()
        assert len(call["flags"]) == 2
        assert call["next_value"] is not None


def test_no_gradient_of_policy_or_values_reaches_the_predictor(tmp_path: Path) -> None:
    still = Training(tmp_path / "a", RNDPPO(**SMALL, predictor_lr=0.0))
    again = Training(tmp_path / "b", RNDPPO(**{**SMALL, "rounds": 1}, predictor_lr=0.0))
    assert torch.equal(still.weights("predictor"), again.weights("predictor"))
    assert not torch.equal(still.weights("actor"), again.weights("actor"))
    learner = Training(tmp_path / "c", RNDPPO(**SMALL))
    assert not torch.equal(learner.weights("predictor"), still.weights("predictor"))


@pytest.mark.parametrize("bonus", ["shuffled", "noise"])
def test_controls_pay_bonuses_of_the_same_kind(bonus: Any, tmp_path: Path) -> None:
    records = Training(tmp_path / "run", RNDPPO(**SMALL, bonus=bonus)).records
    assert all(r["bonus"] > 0 and math.isfinite(r["predictor_loss"]) for r in records)


# --- what is kept -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise_observation", [False, True])
def test_a_resumed_run_goes_on_bit_for_bit(normalise_observation: bool, tmp_path: Path) -> None:
    method = RNDPPO(**{**SMALL, "rounds": 4}, normalise_observation=normalise_observation)
    whole = Training(tmp_path / "whole", method)
    folder = tmp_path / "parts"

    def cut(experience: Rollouts) -> None:
        collect, calls = experience.collect, iter(range(99))

        def breaks(*arguments: Any) -> Any:
            if next(calls) == 3:  # the warm-up and two rounds went well
                raise RuntimeError("the power went")
            return collect(*arguments)

        experience.collect = breaks  # type: ignore[method-assign]

    with pytest.raises(RuntimeError, match="power"):
        Training(folder, method, watch=cut)
    rest = Training(folder, method, resume=True)
    assert len(rest.records) == 4
    for name in ("actor", "critic", "intrinsic_critic", "predictor"):
        assert torch.equal(rest.weights(name), whole.weights(name)), name
    buffers = [dict(t.objects["predictor"].model.named_buffers()) for t in (rest, whole)]
    assert all(torch.equal(buffers[0][name], buffers[1][name]) for name in buffers[1])
    assert torch.equal(
        rest.objects["bonus"].state_dict()["scale"]["sum"],
        whole.objects["bonus"].state_dict()["scale"]["sum"],
    )


def test_the_target_is_in_the_checkpoint(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", RNDPPO(**SMALL))
    saved = training.objects["predictor"].state_dict()["weights"]
    assert torch.equal(saved["target_weight0"], training.objects["predictor"].model.target_weight0)


def test_coverage_is_logged_and_never_falls(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", RNDPPO(**SMALL))
    course = [r["coverage"] for r in training.records]
    assert course == sorted(course)
    assert course[0] > 0
    assert course[-1] <= training.experience.environments.env.coverage()  # type: ignore[attr-defined]


def test_critics_share_what_normalises_observations(tmp_path: Path) -> None:
    training = Training(tmp_path / "run", RNDPPO(**SMALL, normalise_observation=True))
    scalers = {id(training.objects[n].model.features.scaler) for n in ("actor", "critic", "intrinsic_critic")}
    assert len(scalers) == 1
    assert training.objects["predictor"].model.features.scaler.limit == 5.0


def test_whole_updates_traced_as_one_function_train_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything but the C++ compiler, which would take its time."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(function: Any, examples: Any) -> Any:
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
        return lambda inputs: graph(*inputs)

    monkeypatch.setattr("guerdon.compiled.compile_function", traced)
    method = RNDPPO(**SMALL, normalise_observation=True)
    plain, whole = Training(tmp_path / "a", method), Training(tmp_path / "b", method, compile="update")
    for name in ("actor", "critic", "intrinsic_critic", "predictor"):
        torch.testing.assert_close(whole.weights(name), plain.weights(name), rtol=1e-3, atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="two_stream"):
        RNDPPO(mode="two_streams")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="shuffled"):
        RNDPPO(bonus="shufled")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="proportion"):
        RNDPPO(proportion=0.0)
    with pytest.raises(UsageError, match="25 entries"):
        Training(tmp_path / "a", RNDPPO(**SMALL, novelty_columns=(0, 40)))


class Corridor(gymnasium.Env):
    """A line from 0 to 1 with the reward at its end: a step goes at most 0.1, and time is short."""

    observation_space = gymnasium.spaces.Box(0.0, 1.0, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.place, self.time = 0.0, 0
        return self._show(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.place = float(np.clip(self.place + 0.05 * float(action[0]), 0, 1))
        self.time += 1
        there = self.place >= 1
        return self._show(), float(there), there, self.time >= 40 and not there, {}

    def _show(self) -> np.ndarray:
        return np.array([self.place, 0.5], np.float32)


def test_it_walks_a_corridor_whose_end_pays(tmp_path: Path) -> None:
    """A random walk of 40 steps goes a quarter of the way."""
    method = RNDPPO(
        rounds=25,
        samples=640,
        minibatch=160,
        environments=8,
        hidden=(32,),
        novelty_hidden=(32, 32),
        embedding=16,
        warm_up=320,
        lr=1e-3,
        predictor_lr=1e-3,
        entropy=0.0,
    )
    records = Training(tmp_path / "run", method, env=make(Corridor, 8, 0), checkpoint_steps=99).records
    assert records[0]["reward"] == 0.0
    assert records[-1]["reward"] > 0.8
