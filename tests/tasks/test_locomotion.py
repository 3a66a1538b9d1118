"""Batched MuJoCo robots beside gymnasium's own: the same numbers, ends, pictures and random starts."""

from __future__ import annotations

import gc
import io
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guerdon.errors import CheckpointError, ShapeError, UsageError
from guerdon.tasks.locomotion import ROBOTS, make_locomotion

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

# robots with a square that numpy takes by another way in a batch
ROUNDED = {"InvertedDoublePendulum-v5"}
COST = {"Humanoid-v5": 100, "HumanoidStandup-v5": 60, "Ant-v5": 250}  # steps, where physics is slow

OTHER_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    (
        "HalfCheetah-v5",
        {
            "forward_reward_weight": 2.0,
            "ctrl_cost_weight": 0.3,
            "reset_noise_scale": 0.2,
            "exclude_current_positions_from_observation": False,
            "frame_skip": 3,
        },
    ),
    ("Swimmer-v5", {"exclude_current_positions_from_observation": False, "forward_reward_weight": 3.0}),
    ("Hopper-v5", {"terminate_when_unhealthy": False, "healthy_reward": 0.5, "ctrl_cost_weight": 0.1}),
    ("Hopper-v5", {"healthy_state_range": (-2.0, 2.0), "healthy_angle_range": (-0.5, 0.5)}),
    (
        "Walker2d-v5",
        {"healthy_z_range": (1.0, 1.5), "exclude_current_positions_from_observation": False},
    ),
    ("Ant-v5", {"include_cfrc_ext_in_observation": False, "healthy_z_range": (0.4, 0.9)}),
    ("Ant-v5", {"contact_force_range": (-5.0, 3.0), "main_body": "aux_1", "contact_cost_weight": 0.1}),
    (
        "Humanoid-v5",
        {"include_cvel_in_observation": False, "include_qfrc_actuator_in_observation": False},
    ),
    ("Reacher-v5", {"reward_dist_weight": 2.0, "reward_control_weight": 0.2}),
    ("InvertedDoublePendulum-v5", {"healthy_reward": 3.0, "reset_noise_scale": 0.3}),
]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MuJoCo writes its warnings about gymnasium's HalfCheetah into the working directory."""
    monkeypatch.chdir(tmp_path)


def peer(env_id: str, n: int, **kwargs: Any) -> Any:
    """gymnasium's own environments in a row, in the same mode."""
    return gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.make(env_id, **kwargs)] * n,
        autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP,
    )


def assert_equal(env_id: str, steps: int, n: int = 3, **kwargs: Any) -> int:
    """Step both side by side with random actions; how many episodes ended."""
    ours = make_locomotion(env_id, n, dtype=np.float64, **kwargs)
    theirs = peer(env_id, n, **kwargs)
    same = np.array_equal
    if env_id in ROUNDED:
        same = lambda a, b: np.allclose(a, b, rtol=1e-12, atol=1e-10)
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.action_space == theirs.action_space
    observation, _ = ours.reset(seed=7)
    assert np.array_equal(observation, theirs.reset(seed=7)[0])
    rng = np.random.default_rng(0)
    ended = 0
    for step in range(steps):
        action = rng.uniform(theirs.action_space.low, theirs.action_space.high).astype(np.float32)
        mine, other = ours.step(action), theirs.step(action)
        assert np.array_equal(mine[0], other[0]), (step, np.abs(mine[0] - other[0]).max())
        assert same(mine[1], other[1]), (step, mine[1] - other[1])
        assert np.array_equal(mine[2], other[2]), step
        assert np.array_equal(mine[3], other[3] & ~other[2]), step
        done = other[2] | other[3]
        assert ("final_obs" in mine[4]) == done.any()
        for row in np.flatnonzero(done):
            assert np.array_equal(mine[4]["final_obs"][row], other[4]["final_obs"][row])
        ended += done.sum()
    theirs.close()
    ours.close()
    return ended


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ROBOTS)
def test_equal_to_gymnasium(env_id: str) -> None:
    ended = assert_equal(env_id, COST.get(env_id, 400), max_episode_steps=150)
    cut_only = COST.get(env_id, 400) < 150
    assert ended or cut_only


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("env_id", "options"), OTHER_OPTIONS)
def test_equal_with_other_options(env_id: str, options: dict[str, Any]) -> None:
    assert_equal(env_id, 60, n=2, max_episode_steps=40, **options)


def test_episodes_are_as_long_as_gymnasium_s() -> None:
    env = make_locomotion("HalfCheetah-v5", 1)
    env.reset(seed=0)
    still = np.zeros((1, 6), np.float32)
    for _ in range(999):
        _, _, terminated, truncated, infos = env.step(still)
        assert not terminated.any()
        assert not truncated.any()
        assert not infos
    _, _, terminated, truncated, infos = env.step(still)
    assert truncated.all()
    assert not terminated.any()
    assert infos["final_obs"].shape == (1, 17)
    assert make_locomotion("Reacher-v5", 1).max_episode_steps == 50


def test_rows_are_cut_each_at_its_own_time() -> None:
    env = make_locomotion("Hopper-v5", 4, max_episode_steps=40)
    env.reset(seed=0)
    rng = np.random.default_rng(1)
    age = np.zeros(4, int)
    fell = cut = 0
    for _ in range(300):
        action = rng.uniform(-1, 1, (4, 3)).astype(np.float32) * 0.3
        _, _, terminated, truncated, _ = env.step(action)
        age += 1
        assert not (terminated & truncated).any()
        assert (terminated | truncated)[age >= 40].all()
        assert (age[truncated] == 40).all()
        fell, cut = fell + terminated.sum(), cut + truncated.sum()
        age[terminated | truncated] = 0
    assert fell > 0
    assert cut > 0


def run(env: Any, steps: int, rng: np.random.Generator) -> list[np.ndarray]:
    """All that the steps return, in one list."""
    returned = []
    for _ in range(steps):
        *arrays, infos = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        returned += [*arrays, *infos.values()]
    return returned


@pytest.mark.parametrize("env_id", ["HalfCheetah-v5", "Ant-v5"])
def test_threads_change_nothing(env_id: str) -> None:
    runs = []
    for threads in (1, 2, 5):
        env = make_locomotion(env_id, 5, threads=threads, max_episode_steps=20)
        assert env.threads == threads
        first, _ = env.reset(seed=3)
        runs.append([first, *run(env, 50, np.random.default_rng(0))])
        env.close()
    assert all(np.array_equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("env_id", ROBOTS)
def test_resumes_to_the_bit(env_id: str) -> None:
    env = make_locomotion(env_id, 2, max_episode_steps=30)
    env.reset(seed=5)
    rng = np.random.default_rng(0)
    run(env, 17, rng)
    buffer = io.BytesIO()
    torch.save(env.state_dict(), buffer)
    buffer.seek(0)
    follows = rng.bit_generator.state
    expected = run(env, 40, rng)

    other = make_locomotion(env_id, 2, max_episode_steps=30)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    rng.bit_generator.state = follows
    resumed = run(other, 40, rng)
    assert all(np.array_equal(a, b) for a, b in zip(expected, resumed, strict=True))


def test_the_warm_start_is_part_of_the_state() -> None:
    env = make_locomotion("Ant-v5", 1, dtype=np.float64)
    env.reset(seed=5)
    run(env, 30, np.random.default_rng(0))
    state = env.state_dict()
    expected = run(env, 5, np.random.default_rng(1))
    data = env._physics.data[0]
    env.load_state_dict(state)
    data.qacc_warmstart[:] = 0
    cold = run(env, 5, np.random.default_rng(1))
    assert not all(np.array_equal(a, b) for a, b in zip(expected, cold, strict=True))


def test_a_state_of_others_is_refused() -> None:
    env = make_locomotion("Hopper-v5", 2)
    for other in (make_locomotion("Hopper-v5", 3), make_locomotion("Walker2d-v5", 2)):
        with pytest.raises(CheckpointError, match="same environments"):
            env.load_state_dict(other.state_dict())


def test_seeds() -> None:
    env = make_locomotion("Walker2d-v5", 3)
    first, _ = env.reset(seed=1)
    again, _ = env.reset()
    assert not np.array_equal(first, again)
    assert np.array_equal(env.reset(seed=np.int64(1))[0], first)
    assert np.array_equal(env.reset(seed=[3, None, 1])[0][[2, 0]], first[[0, 2]])
    assert len(np.unique(first[:, 0])) == 3
    with pytest.raises(ShapeError, match="2 seeds"):
        env.reset(seed=[1, 2])


def test_what_is_returned_is_the_caller_s_to_keep() -> None:
    env = make_locomotion("Hopper-v5", 2, max_episode_steps=3)
    observation, _ = env.reset(seed=0)
    assert observation.dtype == np.float32
    kept, copies = [observation], [observation.copy()]
    for array in run(env, 10, np.random.default_rng(0)):
        kept.append(array)
        copies.append(array.copy())
    assert all(np.array_equal(a, b) for a, b in zip(kept, copies, strict=True))
    for array in kept:
        array.fill(0)  # nor does it matter what the caller does to it
    twin = make_locomotion("Hopper-v5", 2, max_episode_steps=3)
    twin.reset(seed=0)
    run(twin, 10, np.random.default_rng(0))
    ours, theirs = (run(e, 5, np.random.default_rng(1)) for e in (env, twin))
    assert all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_threads_end_with_the_environment() -> None:
    before = threading.active_count()
    env = make_locomotion("InvertedPendulum-v5", 4, threads=4)
    forgotten = make_locomotion("InvertedPendulum-v5", 4, threads=3)
    assert threading.active_count() == before + 5
    workers = [thread for thread in threading.enumerate() if thread.name.startswith("Thread-")][-5:]
    env.reset(seed=0)
    env.close()
    env.step(np.zeros((4, 1)))  # does not wait for threads that are gone
    del forgotten
    gc.collect()
    for worker in workers:
        worker.join(5)
    assert threading.active_count() == before


def test_what_a_thread_meets_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    import mujoco

    env = make_locomotion("InvertedPendulum-v5", 4, threads=2)
    env.reset(seed=0)
    with monkeypatch.context() as patch:
        patch.setattr(mujoco, "mj_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            env.step(np.zeros((4, 1)))
    env.step(np.zeros((4, 1)))  # and no thread hangs


def test_default_threads_follow_the_number_of_robots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    counts = [make_locomotion("InvertedPendulum-v5", n).threads for n in (1, 3, 4, 64)]
    assert counts == [1, 1, 2, 4]


def test_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match="did you mean 'HalfCheetah-v5'"):
        make_locomotion("HalfCheeta-v5", 1)
    with pytest.raises(UsageError, match="did you mean 'ctrl_cost_weight'"):
        make_locomotion("Hopper-v5", 1, control_cost_weight=1.0)
    with pytest.raises(UsageError, match="num_envs is 0"):
        make_locomotion("Hopper-v5", 0)
    with pytest.raises(UsageError, match="threads is 0"):
        make_locomotion("Hopper-v5", 1, threads=0)
    with pytest.raises(UsageError, match="render mode 'human'"):
        make_locomotion("Hopper-v5", 1, render_mode="human")
    with pytest.raises(UsageError, match=r"nowhere\.xml cannot be read"):
        make_locomotion("Hopper-v5", 1, xml_file="./nowhere.xml")
    with pytest.raises(UsageError, match="no body 'tail'"):
        make_locomotion("Ant-v5", 1, main_body="tail")
    env = make_locomotion("Hopper-v5", 2)
    with pytest.raises(UsageError, match="reset before step"):
        env.step(np.zeros((2, 3)))
    env.reset(seed=0)
    with pytest.raises(ShapeError, match=r"shape \[3\], expected \[2, 3\]"):
        env.step(np.zeros(3))


def test_loading_says_nothing_and_leaves_no_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    make_locomotion("HalfCheetah-v5", 1)
    printed = capfd.readouterr()
    assert printed.out + printed.err == ""
    assert not list(tmp_path.iterdir())


PICTURE = """
import sys, numpy as np
from guerdon.errors import UsageError
from guerdon.tasks.locomotion import make_locomotion
env = make_locomotion("HalfCheetah-v5", 2, width=96, height=64)
env.reset(seed=0)
try:
    first = env.render()
except UsageError:
    sys.exit(3)
import gymnasium
size = dict(width=96, height=64, camera_name="track")
peer = gymnasium.make("HalfCheetah-v5", render_mode="rgb_array", **size)
peer.reset(seed=0)
rng = np.random.default_rng(0)
for _ in range(5):
    action = rng.uniform(-1, 1, (2, 6)).astype(np.float32)
    env.step(action), peer.step(action[0])
second = env.render()
assert first.dtype == np.uint8 and first.shape == (64, 96, 3), first.shape
assert (first != second).any() and first.std() > 5
assert np.array_equal(second, peer.render())
env.close()
double = make_locomotion("InvertedDoublePendulum-v5", 1, width=96, height=64)  # no camera of its own
double.reset(seed=0)
assert double.render().std() > 5
"""


def test_pictures(tmp_path: Path) -> None:
    # in a process of its own, for OpenGL's libraries are chosen once and may crash
    done = subprocess.run(
        [sys.executable, "-c", PICTURE],
        env={"MUJOCO_GL": "egl", "PYTHONWARNINGS": "ignore", **os.environ},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode == 3:
        pytest.skip("no off-screen OpenGL here")
    assert done.returncode == 0, done.stderr


@pytest.mark.filterwarnings("ignore")
def test_without_opengl_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUJOCO_GL", "off")
    env = make_locomotion("HalfCheetah-v5", 1)
    env.reset(seed=0)
    with pytest.raises(UsageError, match="set MUJOCO_GL=egl or MUJOCO_GL=osmesa"):
        env.render()
