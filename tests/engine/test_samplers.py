"""Environments in worker processes: the steps of `Rollouts`, whoever takes them, and none lost or counted twice."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from control_for_tests import PaysOne
from experience.environments_for_tests import Chooses, Shows
from guerdon import launch
from guerdon.engine.local import LocalEngine
from guerdon.engine.ray import RayEngine
from guerdon.engine.samplers import RemoteRollouts, remote_rollouts
from guerdon.engine.workers import WorkerError, reset_traffic, traffic
from guerdon.errors import CheckpointError, UsageError
from guerdon.experience.environments import EnvironmentFailure, Environments, make
from guerdon.experience.replay import Replay
from guerdon.experience.rollouts import Rollouts
from guerdon.normalise import ScaleReward
from guerdon.optim import SGD
from guerdon.policies.control import make_controller
from guerdon.policies.features import Features, describe
from guerdon.randomness import mix
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import Control


def role_for(experience: Rollouts, which: str = "gaussian", **options: Any) -> Role:
    torch.manual_seed(0)
    env = experience.environments
    features = Features(describe(env.observation_space), **{"hidden": (8,), **options})
    policy = make_controller(which, features, env.action_space)
    for p in policy.parameters():
        p.data.mul_(3.0)
    return Role("actor", policy, RoleSettings(SGD(0.1)))


@pytest.fixture
def remote() -> Iterator[Callable[..., RemoteRollouts]]:
    """`RemoteRollouts` that are closed after the test."""
    made = []

    def build(env: Any = "Pendulum-v1", n: int = 4, samplers: int = 2, **options: Any) -> RemoteRollouts:
        factory = partial(make, env) if isinstance(env, (str, type)) else env
        made.append(RemoteRollouts(factory, n, samplers, **{"backend": "inline", **options}))
        return made[-1]

    yield build
    for experience in made:
        experience.close()


def equal(a: Any, b: Any) -> None:
    """Bit for bit, in whatever they are nested."""
    if isinstance(a, dict) or hasattr(a, "keys"):
        assert set(a.keys()) == set(b.keys())
        for name in a.keys():  # noqa: SIM118 (TensorDict)
            equal(a[name], b[name])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            equal(x, y)
    elif isinstance(a, (torch.Tensor, np.ndarray)):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    else:
        assert a == b


def same_trajectories(a: Any, b: Any) -> None:
    """Bit for bit but for the log-probabilities: how MKL rounds depends on where in memory its arguments lie."""
    a, b = (dict(traj.to_tensordict().items()) for traj in (a, b))
    torch.testing.assert_close(a.pop("log_prob"), b.pop("log_prob"), rtol=1e-5, atol=1e-6)
    equal(a, b)


def filled(experience: Rollouts, actor: Role | None, rounds: tuple[int, ...] = (1, 7)) -> Replay:
    replay = experience.replay(500, n_step=3)
    for steps in rounds:
        experience.advance(actor, steps, into=replay)
    return replay


# --- one sampler is `Rollouts` ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "which", "options", "settings"),
    [
        ("CartPole-v1", "categorical", {}, {}),
        ("Pendulum-v1", "gaussian", {"normalise": True}, {"scale_reward": 0.9, "warm_up": 50}),
        (PaysOne, "gaussian", {"normalise": True}, {"scale_reward": 0.9}),
        (Chooses, "greedy", {}, {}),
        (Shows, "gaussian", {}, {}),
    ],
)
def test_one_sampler_takes_the_steps_of_one_process(
    env: Any, which: str, options: Any, settings: Any, remote: Callable[..., RemoteRollouts]
) -> None:
    """Trajectories, statistics, replay and checkpoint, with normalised observations and scaled rewards."""
    here = Rollouts(make(env, 3, 5), seed=5, **settings)
    there = remote(env, 3, 1, seed=5, **settings)
    actors = [role_for(x, which, **options) for x in (here, there)]
    for round_ in range(3):
        for actor in actors:
            actor.model.epsilon = 0.5 / (1 + round_)  # type: ignore[assignment]
            actor.updates = round_
        a, b = (x.collect(actor, 30) for x, actor in zip((here, there), actors, strict=True))
        same_trajectories(a, b)
        assert b.version.tolist() == [round_] * 3
        equal(here.environments.observation, there.environments.observation)
        equal(here.statistics(a), there.statistics(b))
        for p, q in zip(*(actor.model.parameters() for actor in actors), strict=True):
            p.data.mul_(1.1)
            q.data.mul_(1.1)
        actors[1].flat_weights()  # as a compiled update keeps them
    equal(actors[0].model.state_dict(), actors[1].model.state_dict())
    for first, second in ((None, None), (actors[0], actors[1])):
        equal(filled(here, first).state_dict(), filled(there, second).state_dict())
    assert here.taken == there.taken == 90 + 2 * 8 * 3
    equal(here.statistics(), there.statistics())


SMALL: dict[str, Any] = {"steps": 200, "start": 80, "batch_size": 16, "hidden": (8,)}
RECIPES: dict[str, dict[str, Any]] = {
    "ppo": {"env": "CartPole-v1", "rounds": 2, "samples": 64, "minibatch": 32, "normalise_observation": True},
    "a2c": {"env": "CartPole-v1", "rounds": 2, "samples": 64},
    "sac": {"env": "Pendulum-v1", **SMALL, "every": 20},
    "dqn": {"env": "CartPole-v1", **SMALL, "update_every": 40, "updates": 2},
    "td3": {"env": "Pendulum-v1", **SMALL, "every": 20},
}


def trained(
    slug: str, samplers: int, folder: Path, engine: Any = None, backend: str = "inline"
) -> tuple[list[dict[str, Any]], Any]:
    """Records and weights of a method that was handed its experience by hand; 0 samplers are `Rollouts`."""
    options = {"environments": 2, **RECIPES[slug]}
    pieces = Pieces(env=options.pop("env"))
    method = launch.method_for(slug, "control", pieces, **options)
    torch.manual_seed(0)
    parts = launch.assemble(slug, method, "control", pieces, engine or LocalEngine("cpu", 1), 3)
    assert isinstance(parts.task, Control)
    experience: Rollouts = parts.task.experience(3)
    if samplers:
        experience = remote_rollouts(parts.task, samplers, 3, engine, backend=backend)
    with Run(folder, engine=parts.engine, seed=3, progress=False) as run:
        for name, role in parts.roles.items():
            run.adopt(name, role)
        judge = {"feedback": parts.feedback} if slug in ("ppo", "a2c") else {}
        method.train(run, experience=run.track("experience", experience), **parts.roles, **judge)
    weights = [p.detach().clone() for p in parts.roles["actor"].model.parameters()]
    if isinstance(experience, RemoteRollouts):
        experience.close()
    records = [{k: v for k, v in r.items() if k != "seconds"} for r in launch.read_records(folder)]
    return records, weights


@pytest.mark.parametrize("slug", RECIPES)
def test_methods_run_on_samplers_without_a_changed_line(slug: str, tmp_path: Path) -> None:
    here, there, two = (trained(slug, samplers, tmp_path / str(samplers)) for samplers in (0, 1, 2))
    torch.testing.assert_close(here[1], there[1], rtol=1e-5, atol=1e-6)
    assert [r.keys() for r in here[0]] == [r.keys() for r in there[0]]
    for a, b in zip(here[0], there[0], strict=True):
        for name in a.keys() & {"reward", "loss", "steps", "episodes", "value_loss"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6), name
    assert two[0][-1]["steps"] == here[0][-1]["steps"]
    assert all(torch.isfinite(p).all() for p in two[1])


@pytest.mark.parametrize("slug", ["ppo", "sac"])
def test_roles_in_workers_and_environments_in_samplers_learn_the_same(slug: str, tmp_path: Path) -> None:
    engine = RayEngine("cpu", 1, workers=2, roles=("actor", "critic"), backend="process")
    try:
        here = trained(slug, 0, tmp_path / "here")
        there = trained(slug, 1, tmp_path / "there", engine, "process")
    finally:
        engine.close()
    torch.testing.assert_close(here[1], there[1], rtol=1e-3, atol=1e-4)
    assert here[0][-1]["value_loss"] == pytest.approx(there[0][-1]["value_loss"], rel=1e-3)


def test_a_task_gives_the_same_experience(remote: Callable[..., RemoteRollouts]) -> None:
    method = launch.method_for("ppo", "control", Pieces(env="CartPole-v1"), environments=3, scale_reward=True)
    task = Control(Pieces(env="CartPole-v1"), method)
    here, there = task.experience(7), remote_rollouts(task, 1, 7, backend="inline")
    actor = role_for(here, "categorical")
    same_trajectories(here.collect(actor, 60), there.collect(actor, 60))


# --- several samplers -------------------------------------------------------------------------------------


def test_rows_are_those_of_each_sampler_in_order(remote: Callable[..., RemoteRollouts]) -> None:
    """Each is a `Rollouts` with a seed of its own; statistics and the scale of rewards are of all of them."""
    there = remote(PaysOne, 5, 2, seed=6, scale_reward=0.9, warm_up=50)
    actor = role_for(there, "gaussian", normalise=True)
    alone = [
        Rollouts(make(PaysOne, size, seed), seed=seed, warm_up=50 // 5 * size)
        for size, seed in ((3, 6), (2, mix(6, 0x5A3, 1)))
    ]
    twin = role_for(there, "gaussian", normalise=True)
    seen: list[Any] = []
    for each in alone:  # their warm-ups, apart; then both see the statistics of both
        probe = role_for(there, "gaussian", normalise=True)
        probe.observe = lambda found: seen.append(found)  # type: ignore[method-assign]
        each._take_statistics(probe)
        each.warm_up = 0
    twin.observe(torch.cat(seen))
    traj = there.collect(actor, 100)
    equal(actor.model.state_dict(), twin.model.state_dict())
    parts = [each.collect(twin, 20 * each.environments.n) for each in alone]
    scale = ScaleReward(0.9, 5, clip=10.0)
    ended = torch.cat([part.terminated | part.truncated for part in parts])
    rewards = torch.cat([part.reward for part in parts])
    scaled = np.stack([scale(rewards[:, t].numpy(), ended[:, t].numpy()) for t in range(20)], 1)
    np.testing.assert_array_equal(traj.reward.numpy(), scaled)
    equal(traj.inputs["step", "observation"], torch.cat([p.inputs["step", "observation"] for p in parts]))
    torch.testing.assert_close(traj.log_prob, torch.cat([p.log_prob for p in parts]), rtol=1e-5, atol=1e-6)
    assert (
        len({p.inputs["final", "step"].shape[1] for p in parts}) == 2
    )  # one was cut more often than the other
    for row in range(5):
        part, at = (parts[0], row) if row < 3 else (parts[1], row - 3)
        places = part.inputs["final", "step"][at]
        real, width = places >= 0, len(places)
        equal(traj.inputs["final", "step"][row, :width], places)
        assert (traj.inputs["final", "step"][row, width:] == -1).all()
        equal(
            traj.inputs["final", "observation"][row, :width][real],
            part.inputs["final", "observation"][at][real],
        )
    again = torch.cat([traj.inputs["step", "observation"].flatten(0, 1)])
    there.collect(actor, 100)
    twin.observe(again)  # what the first round saw moves the statistics of the second
    equal(actor.model.state_dict(), twin.model.state_dict())


def rounds(experience: RemoteRollouts) -> tuple[list[Any], Any]:
    """What two rounds of each verb bring."""
    actor = role_for(experience, "gaussian", normalise=True)
    found = [experience.collect(actor, 40) for _ in range(2)]
    return found, [filled(experience, actor).state_dict(), experience.statistics(), actor.model.state_dict()]


def test_the_backend_does_not_matter(backend: str, remote: Callable[..., RemoteRollouts]) -> None:
    settings: dict[str, Any] = {"scale_reward": 0.9, "warm_up": 40, "seed": 11}
    a = rounds(remote(n=4, samplers=2, **settings))
    b = rounds(remote(n=4, samplers=2, backend=backend, **settings))
    for x, y in zip(a[0], b[0], strict=True):
        same_trajectories(x, y)
    equal(a[1], b[1])


def test_seeds_differ_between_samplers(remote: Callable[..., RemoteRollouts]) -> None:
    there = remote(n=4, samplers=4, seed=0)
    traj = there.collect(role_for(there), 4)
    assert len(set(traj.inputs["step", "observation"][:, 0, 0].tolist())) == 4
    assert len(set(traj.inputs["step", "action"][:, 0, 0].tolist())) == 4


def test_weights_go_from_worker_to_worker(remote: Callable[..., RemoteRollouts]) -> None:
    """From the workers that train the actor to the samplers; this process passes on a reference."""
    engine = RayEngine("cpu", 1, workers=1, placement="colocate", roles=("actor",), backend="process")
    try:
        here = remote(n=4, samplers=2)
        there = remote(n=4, samplers=2, backend="process")
        actor = role_for(here, hidden=(300, 300))  # it would be seen if these passed through
        twin = engine.role("actor", role_for(here, hidden=(300, 300)).model, settings=actor.settings)
        same_trajectories(here.collect(actor, 40), there.collect(twin, 40))
        state = {**twin.state_dict(), "updates": 7}
        for name, value in state["weights"].items():
            if name.startswith("head"):
                value.mul_(2.0)
        for role in (actor, twin):
            role.load_state_dict(state)
        reset_traffic()
        a, b = here.collect(actor, 40), there.collect(twin, 40)
        assert traffic()["references"] == 2
        assert traffic()["materialised_bytes"] < 4 * 300 * 300
        same_trajectories(a, b)
        assert b.version.tolist() == [7] * 4
    finally:
        engine.close()


# --- what goes wrong --------------------------------------------------------------------------------------


def failing(how: str, flag: str, env: Any, n: int, seed: int) -> Environments:
    """Environments of which the second sampler's (they have another seed) fail at their 12th step: once, and leave a
    ``flag``; or with "always ...", every time."""
    made = make(env, n, seed)
    plain, taken = made.step, 0

    def step(action: Any) -> Any:
        nonlocal taken
        taken += 1
        if seed and taken == 12 and (how.startswith("always") or not Path(flag).exists()):
            Path(flag).touch()
            if how == "raises":
                raise EnvironmentFailure("the arm left the table")
            os.kill(os.getpid(), signal.SIGSTOP if how == "hangs" else signal.SIGKILL)
        return plain(action)

    made.step = step  # type: ignore[method-assign]
    return made


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_the_share_of_a_dead_sampler_is_collected_again(
    how: str, tmp_path: Path, remote: Callable[..., RemoteRollouts]
) -> None:
    """With environments that can be saved nobody sees a difference: no step is lost, none counted twice."""
    plain = remote(n=4, samplers=2)
    broken = remote(
        partial(failing, how, str(tmp_path / "flag"), "Pendulum-v1"), backend="process", patience=1.0
    )
    told: list[str] = []
    broken.note = told.append
    actor = role_for(plain)
    for _ in range(3):  # the second round holds the 12th step
        same_trajectories(plain.collect(actor, 32), broken.collect(actor, 32))
        equal(plain.statistics(), broken.statistics())
    assert broken.taken == 96
    assert broken.environments.deaths == len(told) == 1
    assert "worker 0 of 'sampler-1'" in told[0]
    assert "where it stood before the round" in told[0]
    assert (tmp_path / "flag").exists()


def test_a_sampler_of_ray_is_replaced(
    ray_cluster: None, tmp_path: Path, remote: Callable[..., RemoteRollouts]
) -> None:
    plain, broken = remote(n=2, samplers=1), remote(n=2, samplers=1, backend="ray")
    actor = role_for(plain)
    for round_ in range(3):
        if round_ == 1:
            os.kill(broken.environments._samplers[0].group.places[0].pid, signal.SIGKILL)
        same_trajectories(plain.collect(actor, 16), broken.collect(actor, 16))
    assert broken.environments.deaths == 1


def test_environments_that_cannot_be_saved_begin_new_episodes(
    tmp_path: Path, remote: Callable[..., RemoteRollouts]
) -> None:
    flag, verbs = str(tmp_path / "flag"), {"scale_reward": 0.9}
    plain = remote(PaysOne, n=4, samplers=2, **verbs)
    broken = remote(partial(failing, "dies", flag, PaysOne), backend="process", **verbs)
    actor = role_for(plain)
    memories = []
    for experience in (plain, broken):
        replay = experience.replay(200, n_step=3)
        for _ in range(3):
            experience.advance(actor, 8, into=replay)
        memories.append(replay.state_dict()["data"])
    assert not broken.environments.saveable
    assert "in new episodes" in broken.environments.notes[0]
    assert broken.taken == plain.taken == 96
    a, b = memories
    for name in ("observation", "action", "reward", "terminated"):
        np.testing.assert_array_equal(a[name][:8], b[name][:8], err_msg=name)
    assert (b["observation"][8, 2:, 0] == 0).all()  # Counter shows the steps of its episode
    assert not (b["observation"][8, :2, 0] == 0).all()
    # what came before does not run on into them: an n-step return stops there, and bootstraps
    assert (b["truncated"][7, 2:] | b["terminated"][7, 2:]).all()
    assert not (b["truncated"][7] & b["terminated"][7]).any()
    equal(a["truncated"][:7], b["truncated"][:7])


def test_too_many_deaths_stop_the_run(tmp_path: Path, remote: Callable[..., RemoteRollouts]) -> None:
    broken = remote(
        partial(failing, "always dies", str(tmp_path / "flag"), "Pendulum-v1"), backend="process", restarts=1
    )
    actor = role_for(broken)
    broken.collect(actor, 32)
    with pytest.raises(
        WorkerError, match=r"worker 0 of 'sampler-1'.*2 samplers have died, and no more than 1"
    ):
        broken.collect(actor, 64)
    assert broken.taken == 32


def test_what_an_environment_raises_is_no_death_and_the_round_can_be_repeated(
    tmp_path: Path, remote: Callable[..., RemoteRollouts]
) -> None:
    plain = remote(n=4, samplers=2)
    broken = remote(partial(failing, "raises", str(tmp_path / "flag"), "Pendulum-v1"))
    actor = role_for(plain)
    same_trajectories(plain.collect(actor, 32), broken.collect(actor, 32))
    with pytest.raises(EnvironmentFailure, match="left the table"):
        broken.collect(actor, 32)
    assert broken.taken == 32
    assert broken.environments.deaths == 0
    # the first sampler had gone on: it steps back
    same_trajectories(plain.collect(actor, 32), broken.collect(actor, 32))


# --- files ------------------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_middle(tmp_path: Path, remote: Callable[..., RemoteRollouts]) -> None:
    settings: dict[str, Any] = {"scale_reward": 0.9, "seed": 2, "warm_up": 40}
    first = remote("CartPole-v1", 4, 2, **settings)
    actor = role_for(first, "categorical", normalise=True)
    begun = first.state_dict()
    first.collect(actor, 80)
    torch.save({"e": first.state_dict(), "a": actor.state_dict()}, tmp_path / "state")
    figures = [first.collect(actor, 80), first.statistics()]
    second = remote("CartPole-v1", 4, 2, **settings)
    twin = role_for(second, "categorical", normalise=True)
    saved = torch.load(tmp_path / "state", weights_only=True)
    second.load_state_dict(saved["e"])
    twin.load_state_dict(saved["a"])
    assert second.taken == 80
    same_trajectories(figures[0], second.collect(twin, 80))
    equal(figures[1], second.statistics())
    second.load_state_dict(begun)
    fresh = role_for(second, "categorical", normalise=True)
    other = remote("CartPole-v1", 4, 2, **settings)
    same_trajectories(
        second.collect(fresh, 40), other.collect(role_for(other, "categorical", normalise=True), 40)
    )
    with pytest.raises(CheckpointError, match="in 2 samplers, and this run has 4 x CartPole-v1 in 1"):
        remote("CartPole-v1", 4, 1, **settings).load_state_dict(saved["e"])


def test_wrong_uses_are_named(remote: Callable[..., RemoteRollouts]) -> None:
    with pytest.raises(UsageError, match="1 environments cannot be shared among 2 samplers"):
        remote(n=1, samplers=2)
    there = remote(n=2, samplers=2)
    with pytest.raises(UsageError, match="leave out --samplers"):
        there.environments.reset()
    with pytest.raises(UsageError, match="use a multiple"):
        there.collect(role_for(there), 3)
    with pytest.raises(UsageError, match="'enumlm' has none"):
        remote_rollouts(SimpleNamespace(name="enumlm"), 2)
