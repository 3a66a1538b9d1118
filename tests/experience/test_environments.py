"""Vector environments behind one checked class: every backend, every kind of misbehaviour."""

from __future__ import annotations

import io
import sys
import types

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces

from experience.environments_for_tests import (
    Chooses,
    ChoosesTwice,
    Counter,
    EndsInNaN,
    EndsTwice,
    GivesNaN,
    PaysInfinity,
    Raises,
    Shows,
    Terminates,
    Truncates,
    WrongShape,
)
from guerdon.errors import CheckpointError, ShapeError, UsageError
from guerdon.experience.environments import ARRAY, MUJOCO, EnvironmentFailure, Environments, Step, make


def act(environments: Environments, rng: np.random.Generator) -> np.ndarray:
    space, n = environments.action_space, environments.n
    if isinstance(space, spaces.Discrete):
        return rng.integers(space.n, size=n)
    return rng.uniform(-1, 1, (n, *space.shape)).astype(np.float32)


def go(environments: Environments, steps: int, seed: int = 0) -> list[Step]:
    rng = np.random.default_rng(seed)
    return [environments.step(act(environments, rng)) for _ in range(steps)]


def assert_same(a: Step, b: Step) -> None:
    assert (a.final is None) == (b.final is None)
    for x, y in zip(a, b, strict=True):
        if x is not None:
            np.testing.assert_array_equal(x, y)


# --- what comes back --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [Terminates, Truncates, EndsTwice])
def test_an_episode_ends_and_begins_anew_in_one_step(ends: type) -> None:
    environments = make(ends, 2, seed=0, length=3)
    first = environments.reset()
    assert first.dtype == np.float32
    assert first.shape == (2, 3)
    steps = go(environments, 6)
    for t, step in enumerate(steps, start=1):
        over = t % 3 == 0
        np.testing.assert_array_equal(step.reward, [(t - 1) % 3 + 1] * 2)
        assert step.terminated.tolist() == [over and ends is not Truncates] * 2
        assert step.truncated.tolist() == [over and ends is Truncates] * 2  # never both
        assert step.observation[:, 0].tolist() == [t % 3] * 2  # 0: after the reset
        if over:
            assert step.final.dtype == np.float32
            assert step.final[:, 0].tolist() == [3, 3]
            assert (step.final[:, 2] == (first if t == 3 else steps[2].observation)[:, 2]).all()
            assert (step.observation[:, 2] != step.final[:, 2]).all()
        else:
            assert step.final is None
    assert environments.finished() == [(6.0, 3)] * 4
    assert environments.finished() == []


def test_rows_that_did_not_end_are_untouched() -> None:
    environments = make("CartPole-v1", 8, seed=0, backend="gymnasium")
    environments.reset()
    for step in go(environments, 200):
        done = step.terminated | step.truncated
        if step.final is not None and not done.all():
            assert done.any()
            assert (np.abs(step.observation[done]) <= 0.05).all()
            assert (np.abs(step.final[done, 0]) > 2.4).any() or (np.abs(step.final[done, 2]) > 0.2).any()
    assert sum(length for _, length in environments.finished()) <= 200 * 8


@pytest.mark.parametrize("backend", ["auto", "gymnasium"])
def test_arrays_are_fresh(backend: str) -> None:
    environments = make("CartPole-v1", 3, seed=0, backend=backend)
    kept = [(environments.reset(), None)]
    kept += [(step.observation, step.reward) for step in go(environments, 60)]
    copies = [(o.copy(), None if r is None else r.copy()) for o, r in kept]
    go(environments, 60)
    for (o, r), (oo, rr) in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(o, oo)
        assert r is None or (r == rr).all()


def test_dicts_of_vectors_pixels_and_integers() -> None:
    environments = make(Shows, 2, seed=0, length=2)
    seen = environments.reset()
    assert {name: (a.dtype, a.shape) for name, a in seen.items()} == {
        "body": (np.float32, (2, 2)),
        "camera": (np.uint8, (2, 4, 4, 3)),
        "gear": (np.int64, (2,)),
    }
    assert environments.observation_space["body"].dtype == np.float32
    _, step = go(environments, 2)
    assert step.final["gear"].tolist() == [2, 2]
    assert (step.final["camera"] == 2).all()
    assert step.final["body"].dtype == np.float32
    assert step.observation["gear"].tolist() == [0, 0]


# --- actions ----------------------------------------------------------------------------------------------


def test_box_actions_are_clipped_unless_told_otherwise() -> None:
    action = np.array([[3.0], [-0.5]])
    for clip, taken in [(True, [1.0, -0.5]), (False, [3.0, -0.5])]:
        environments = make(Counter, 2, seed=0, clip_actions=clip)
        environments.reset()
        assert environments.step(action).observation[:, 1].tolist() == taken
    assert action.tolist() == [[3.0], [-0.5]]


def test_discrete_actions_count_from_zero() -> None:
    environments = make(Chooses, 2, seed=0)
    environments.reset()
    assert environments.step(np.array([0, 2])).observation[:, 1].tolist() == [2, 4]
    for wrong in ([0, 3], [-1, 0]):
        with pytest.raises(UsageError, match="from 0 to 2"):
            environments.step(np.array(wrong))


def test_several_choices_and_tensors() -> None:
    environments = make(ChoosesTwice, 2, seed=0)
    environments.reset()
    assert environments.step(torch.tensor([[1, 3], [2, 0]])).observation[:, 1].tolist() == [1, 2]


def test_wrong_shape_of_an_action_and_a_step_before_reset() -> None:
    environments = make(Counter, 2, seed=0)
    with pytest.raises(UsageError, match="reset"):
        environments.step(np.zeros((2, 1)))
    environments.reset()
    with pytest.raises(ShapeError, match=r"\[2, 1\] but got \[2\]"):
        environments.step(np.zeros(2))


# --- what misbehaves --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (Raises, "raised ValueError: the arm left the table"),
        (GivesNaN, r"observation \[.*nan.*\], which is not finite"),
        (EndsInNaN, r"observation \[.*inf.*\], which is not finite"),
        (PaysInfinity, "the reward inf"),
        (WrongShape, r"shape \[2\], not \[3\]"),
    ],
)
def test_a_failure_says_what_where_and_after_which_action(wrong: type, says: str) -> None:
    lengths = iter([99, 4, 99])
    environments = make(lambda: wrong(next(lengths)), 3, seed=7)
    environments.reset()
    for _ in range(3):
        environments.step(np.full((3, 1), 0.25))
    with pytest.raises(EnvironmentFailure, match=says) as caught:
        environments.step(np.array([[0.1], [0.2], [0.3]]))
    message = str(caught.value)
    assert "seed 7" in message
    assert "row 1" in message
    assert "after" in message
    assert "[0.2]" in message
    assert "[0.1]" not in message


def test_the_number_of_steps_is_told() -> None:
    environments = make(GivesNaN, 1, seed=0, length=4)
    environments.reset()
    with pytest.raises(EnvironmentFailure, match="after 4 steps"):
        go(environments, 10)


def test_large_finite_numbers_are_no_failure() -> None:
    class Large(Counter):
        def show(self, action: float) -> np.ndarray:
            return np.full(3, 1e30)  # the sum of squares overflows float32

    environments = make(Large, 2, seed=0)
    environments.reset()
    go(environments, 3)


def test_a_failing_reset() -> None:
    class Never(Counter):
        def reset(self, **kwargs: object) -> tuple:
            raise OSError("no such device")

    with pytest.raises(EnvironmentFailure, match=r"row 0.*OSError: no such device"):
        make(Never, 2, seed=0).reset()


def test_numbers_in_ended_rows_alone_count_in_the_last_observations() -> None:
    lengths = iter([2, 99])
    environments = make(lambda: Terminates(next(lengths)), 2, seed=0)
    environments.reset()
    step = go(environments, 2)[-1]
    assert step.terminated.tolist() == [True, False]
    assert step.final[0, 0] == 2


# --- ids --------------------------------------------------------------------------------------------------


def test_ids_go_to_the_quickest_implementation() -> None:
    for env_id in ARRAY:
        assert make(env_id, 2, seed=0).backend == "array"
    assert make("HalfCheetah-v5", 1, seed=0).backend == "mujoco"
    assert make("FrozenLake-v1", 1, seed=0).backend == "gymnasium"
    assert make("CartPole-v1", 1, seed=0, backend="gymnasium").backend == "gymnasium"


@pytest.mark.parametrize("env_id", [*ARRAY, *MUJOCO])
def test_fast_ids_have_gymnasiums_spaces_and_limits(env_id: str) -> None:
    fast = make(env_id, 2, seed=0)
    reference = gymnasium.make(env_id)
    assert fast.action_space == reference.action_space
    assert fast.observation_space.shape == reference.observation_space.shape
    assert fast.env.max_episode_steps == gymnasium.spec(env_id).max_episode_steps
    observation = fast.reset()
    assert observation.dtype == np.float32
    assert observation.shape == (2, *reference.observation_space.shape)


def test_modules_registered_ids_and_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("a_users_module")
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    monkeypatch.setattr(gymnasium, "registry", gymnasium.registry)
    gymnasium.register("AUsers-v0", entry_point=Terminates, max_episode_steps=4)
    try:
        for env_id in ("AUsers-v0", "a_users_module:AUsers-v0"):
            environments = make(env_id, 2, seed=0, length=9)
            environments.reset()
            assert go(environments, 4)[-1].truncated.all()
    finally:
        del gymnasium.registry["AUsers-v0"]


def test_refusals_name_a_way_out() -> None:
    with pytest.raises(UsageError, match="did you mean 'CartPole-v1'"):
        make("CartPol-v1", 1, seed=0)
    with pytest.raises(UsageError, match="no parameter 'gravty'; did you mean 'gravity'"):
        make("CartPole-v1", 1, seed=0, gravty=1.0)
    with pytest.raises(UsageError, match="array backend has no Ant-v5"):
        make("Ant-v5", 1, seed=0, backend="array")
    with pytest.raises(UsageError, match="no backend 'aray'; did you mean 'array'"):
        make("CartPole-v1", 1, seed=0, backend="aray")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="FlattenObservation"):
        make("Blackjack-v1", 1, seed=0)
    with pytest.raises(UsageError, match="only the gymnasium backend"):
        make(Counter, 1, seed=0, backend="array")
    with pytest.raises(UsageError, match=r"cannot be made.*no_such_module"):
        make("no_such_module:It-v0", 1, seed=0)
    with pytest.raises(UsageError, match="At least one"):
        make("CartPole-v1", 0, seed=0)


def test_a_vector_environment_in_another_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="SAME_STEP"):
        Environments(
            gymnasium.make_vec("CartPole-v1", 2, vectorization_mode="sync"), "CartPole-v1", 0, "gymnasium"
        )


# --- seeds and states -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env_id", "backend"), [("CartPole-v1", "auto"), ("Pendulum-v1", "gymnasium"), ("Hopper-v5", "auto")]
)
def test_the_same_seed_gives_the_same_run_and_another_another(env_id: str, backend: str) -> None:
    runs = [make(env_id, 3, seed, backend) for seed in (5, 5, 6)]
    starts = [run.reset() for run in runs]
    np.testing.assert_array_equal(starts[0], starts[1])
    assert (starts[0] != starts[2]).any(1).all()
    assert len(np.unique(starts[0], axis=0)) == 3
    for a, b in zip(go(runs[0], 120), go(runs[1], 120), strict=True):
        assert_same(a, b)
    again = runs[0].reset()
    assert (again != starts[0]).any(1).all()
    np.testing.assert_array_equal(again, runs[1].reset())


def through_a_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("env_id", [*ARRAY, "Hopper-v5"])
def test_saved_environments_go_on_exactly(env_id: str) -> None:
    one = make(env_id, 3, seed=1)
    one.reset()
    go(one, 130)
    one.finished()
    go(one, 117, seed=1)
    assert one.saveable
    state = through_a_file(one.state_dict())
    other = make(env_id, 3, seed=99)
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.observation, one.observation)
    for a, b in zip(go(one, 250, seed=2), go(other, 250, seed=2), strict=True):
        assert_same(a, b)
    finished = one.finished()
    assert finished == other.finished()
    assert all(isinstance(value, float) and isinstance(length, int) for value, length in finished)
    np.testing.assert_array_equal(one.reset(), make_reset_twice(env_id))


def make_reset_twice(env_id: str) -> np.ndarray:
    environments = make(env_id, 3, seed=1)
    environments.reset()
    return environments.reset()


def test_others_begin_new_episodes_and_keep_the_count() -> None:
    one = make(Terminates, 2, seed=3, length=3)
    before = one.reset()
    go(one, 4)
    assert not one.saveable
    state = through_a_file(one.state_dict())
    others = [make(Terminates, 2, seed=3, length=3) for _ in range(2)]
    for other in others:
        other.load_state_dict(state)
    assert others[0].observation[:, 0].tolist() == [0, 0]
    assert (others[0].observation[:, 2] != before[:, 2]).all()
    np.testing.assert_array_equal(others[0].observation, others[1].observation)
    go(others[0], 3)
    assert others[0].finished() == [(6.0, 3)] * 4  # two from before, two since


def test_a_state_of_other_environments_is_refused() -> None:
    state = make("CartPole-v1", 2, seed=0).state_dict()
    with pytest.raises(CheckpointError, match="2 x CartPole-v1, and this run has 3 x CartPole-v1"):
        make("CartPole-v1", 3, seed=0).load_state_dict(state)


# --- EnvPool ----------------------------------------------------------------------------------------------


def test_envpool_resets_in_the_step_that_ends() -> None:
    pytest.importorskip("envpool")
    environments = make("CartPole-v1", 3, seed=4, backend="envpool", max_episode_steps=12, num_threads=1)
    assert environments.reset().shape == (3, 4)
    truncated = 0
    for step in go(environments, 150):
        done = step.terminated | step.truncated
        assert not (step.terminated & step.truncated).any()
        assert (step.final is not None) == done.any()
        if done.any():
            assert (np.abs(step.observation[done]) <= 0.05).all()
            fallen = (np.abs(step.final[:, 0]) > 2.4) | (np.abs(step.final[:, 2]) > 12 * np.pi / 180)
            np.testing.assert_array_equal(fallen[step.terminated], True)
            np.testing.assert_array_equal(fallen[~done], False)
            np.testing.assert_array_equal(step.final[~done], step.observation[~done])
        truncated += int(step.truncated.sum())
    finished = environments.finished()
    assert truncated > 0
    assert max(length for _, length in finished) == 12
    assert all(value == length for value, length in finished)


def test_envpool_is_seeded_and_names_what_it_lacks() -> None:
    pytest.importorskip("envpool")
    runs = [make("Catch-v0", 2, seed, "envpool", num_threads=1) for seed in (5, 5)]
    for a, b in zip(*[[run.reset(), *go(run, 40)] for run in runs], strict=True):
        np.testing.assert_array_equal(
            a if isinstance(a, np.ndarray) else a.observation, getattr(b, "observation", b)
        )
    with pytest.raises(UsageError, match="EnvPool has no CartPole-v9; near it: CartPole"):
        make("CartPole-v9", 1, 0, "envpool")
    with pytest.raises(UsageError, match=r"cannot make Pong-v5.*nonsense"):
        make("Pong-v5", 1, 0, "envpool", nonsense=1)


def test_a_picture_of_the_first_environment() -> None:
    pytest.importorskip("pygame")
    for backend, kwargs in [("array", {}), ("gymnasium", {"render_mode": "rgb_array"})]:
        environments = make("CartPole-v1", 2, seed=0, backend=backend, **kwargs)
        environments.reset()
        picture = environments.render()
        assert (picture.dtype, picture.shape) == (np.uint8, (400, 600, 3))
        environments.close()
    environments = make("CartPole-v1", 2, seed=0, backend="gymnasium")
    environments.reset()
    with pytest.raises(UsageError, match="render_mode"):
        environments.render()
