"""Classic control in array operations: gymnasium's environments, step for step, and what families add."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from guerdon.errors import UsageError
from guerdon.tasks.classic import Acrobot, CartPole, Classic, MountainCar, MountainCarContinuous, Pendulum

FAMILIES = [CartPole, Pendulum, Acrobot, MountainCar, MountainCarContinuous]
SEVERAL = 4


def actions(environments: Classic, rng: np.random.Generator) -> np.ndarray:
    space, n = environments.single_action_space, environments.num_envs
    if isinstance(space, gymnasium.spaces.Discrete):
        return rng.integers(space.n, size=n)
    return rng.uniform(1.2 * space.low, 1.2 * space.high, (n, 1)).astype(np.float32)


def lockstep(
    environments: Classic, singles: list[gymnasium.Env], steps: int, policy=actions, seed: int = 0
) -> tuple[int, int]:
    """Step both from the same states with the same actions, compare everything; terminations and truncations."""
    rng = np.random.default_rng(seed)
    observation, _ = environments.reset(seed=seed)
    for single in singles:
        single.reset(seed=0)
    fresh = np.ones(environments.num_envs, bool)
    terminations = truncations = 0
    for _ in range(steps):
        for row, single in enumerate(singles):
            # rounding differs in the last bit, which a chaotic arm would amplify: both go on from one state
            single.unwrapped.state = environments.state[:, row].copy()
            if fresh[row]:
                single._elapsed_steps = 0
                single.unwrapped.steps_beyond_terminated = None
        action = policy(environments, rng)
        observation, reward, terminated, truncated, infos = environments.step(action)
        assert observation.dtype == reward.dtype == np.float32
        assert not (terminated & truncated).any()
        fresh = terminated | truncated
        assert ("final_obs" in infos) == fresh.any()
        last = infos.get("final_obs", observation)
        for row, single in enumerate(singles):
            expected, pay, end, cut, _ = single.step(action[row])
            np.testing.assert_allclose(last[row], expected, rtol=2e-6, atol=2e-6)
            np.testing.assert_allclose(reward[row], pay, rtol=1e-5, atol=1e-6)
            assert terminated[row] == end
            assert truncated[row] == (cut and not end)
        terminations += int(terminated.sum())
        truncations += int(truncated.sum())
    return terminations, truncations


def singles(family: type[Classic], n: int, **kwargs) -> list[gymnasium.Env]:
    made = [gymnasium.make(family.gymnasium_id, disable_env_checker=True, **kwargs) for _ in range(n)]
    return [env.env if isinstance(env, gymnasium.wrappers.OrderEnforcing) else env for env in made]


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_gymnasium_step_for_step(family: type[Classic]) -> None:
    terminations, truncations = lockstep(family(SEVERAL), singles(family, SEVERAL), 2500)
    assert terminations + truncations >= 4  # thousands of steps: 10,000 over the rows
    if family is CartPole:
        assert terminations > 100
    else:
        assert truncations > 0


def pump(environments: Classic, rng: np.random.Generator) -> np.ndarray:
    """Push with the motion: reaches the goal of the cars and of the acrobot."""
    if isinstance(environments, Acrobot):
        return np.where(environments.state[3] > 0, 2, 0)
    push = np.sign(environments.state[1])
    if isinstance(environments, MountainCarContinuous):
        return push[:, None].astype(np.float32)
    return push.astype(np.int64) + 1


@pytest.mark.parametrize("family", [Acrobot, MountainCar, MountainCarContinuous])
def test_equal_to_gymnasium_where_goals_are_reached(family: type[Classic]) -> None:
    terminations, _ = lockstep(family(SEVERAL), singles(family, SEVERAL), 1200, pump)
    assert terminations >= 4


def steady(environments: Classic, rng: np.random.Generator) -> np.ndarray:
    return (environments.state[2] + 0.3 * environments.state[3] > 0).astype(np.int64)


def test_a_balanced_pole_is_truncated_at_500() -> None:
    terminations, truncations = lockstep(CartPole(SEVERAL), singles(CartPole, SEVERAL), 1100, steady)
    assert truncations >= 4
    assert terminations == 0


@pytest.mark.parametrize("family", [CartPole, Pendulum, MountainCar, MountainCarContinuous])
def test_whole_episodes_stay_together_with_gymnasium(family: type[Classic]) -> None:
    """Without putting the states side by side in between."""
    environments = family(1)
    single = singles(family, 1)[0]
    rng = np.random.default_rng(3)
    for seed in range(5):
        environments.reset(seed=seed)
        single.reset(seed=0)
        single.unwrapped.state = environments.state[:, 0].copy()
        for _ in range(150):
            action = actions(environments, rng)
            observation, _, terminated, truncated, infos = environments.step(action)
            expected, _, end, _, _ = single.step(action[0])
            ended = terminated[0] or truncated[0]
            last = infos["final_obs"] if ended else observation
            np.testing.assert_allclose(last[0], expected, rtol=1e-4, atol=1e-5)
            assert terminated[0] == end
            if ended:
                break


def test_sutton_and_bartos_reward() -> None:
    lockstep(
        CartPole(SEVERAL, sutton_barto_reward=True), singles(CartPole, SEVERAL, sutton_barto_reward=True), 300
    )
    environments = CartPole(2, sutton_barto_reward=[0, 1])
    environments.reset(seed=0)
    rewards = np.array([environments.step(np.ones(2, np.int64))[1] for _ in range(30)])
    assert set(rewards[:, 0]) == {1}
    assert set(rewards[:, 1]) == {0, -1}


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        (CartPole, {"length": [0.5, 1.5], "masspole": [0.1, 0.4], "gravity": 3.7, "force_mag": [10.0, 6.0], "tau": 0.01}),
        (Pendulum, {"l": [1.0, 0.6], "m": [2.0, 0.5], "g": [9.81, 1.6], "max_speed": 5.0, "max_torque": [1.0, 3.0]}),
        (Acrobot, {"link_mass_2": [1.0, 2.0], "link_length_1": [1.3, 0.7], "link_com_pos_1": 0.4, "link_moi": [1.0, 0.5]}),
        (MountainCar, {"force": [0.001, 0.002], "gravity": [0.0025, 0.002], "goal_velocity": 0.01, "max_speed": 0.05}),
        (MountainCarContinuous, {"power": [0.0015, 0.003], "max_speed": [0.07, 0.04], "goal_position": 0.3}),
    ],
)  # fmt: skip
def test_every_member_of_a_family_has_its_own_physics(family: type[Classic], parameters: dict) -> None:
    environments = family(2, **parameters)
    references = singles(family, 2)
    for row, single in enumerate(references):
        inner = single.unwrapped
        for name, value in environments.parameters.items():
            gymnasium_name = name.upper() if family is Acrobot else name
            if hasattr(inner, gymnasium_name):
                setattr(inner, gymnasium_name, float(value[row]))
        if family is CartPole:
            inner.total_mass = inner.masspole + inner.masscart
            inner.polemass_length = inner.masspole * inner.length
    lockstep(environments, references, 600, actions if family in (CartPole, Pendulum) else pump)


def test_parameters_are_checked() -> None:
    with pytest.raises(UsageError, match="no parameter 'lenght'; did you mean 'length'"):
        CartPole(2, lenght=1.0)
    with pytest.raises(UsageError, match=r"'length' must be a number or an array \[2\]"):
        CartPole(2, length=[1.0, 2.0, 3.0])


@pytest.mark.parametrize("family", FAMILIES)
def test_reset_ranges_are_gymnasiums(family: type[Classic]) -> None:
    environments = family(4000)
    environments.reset(seed=0)
    assert environments.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    single = gymnasium.make(family.gymnasium_id).unwrapped
    starts = []
    for seed in range(1000):
        single.reset(seed=seed)
        starts.append(np.array(single.state, dtype=np.float64))
    starts = np.array(starts)
    spread = np.ptp(starts, axis=0) + 1e-9
    np.testing.assert_allclose(environments.state.min(1), starts.min(0), atol=0.02 * spread.max())
    np.testing.assert_allclose(environments.state.max(1), starts.max(0), atol=0.02 * spread.max())
    np.testing.assert_allclose(environments.state.mean(1), starts.mean(0), atol=0.05 * spread.max())


def test_ended_rows_alone_begin_anew() -> None:
    environments = CartPole(16)
    environments.reset(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(200):
        observation, _, terminated, _, infos = environments.step(rng.integers(2, size=16))
        if terminated.any():
            assert (np.abs(observation[terminated]) <= 0.05).all()
            np.testing.assert_array_equal(observation[~terminated], infos["final_obs"][~terminated])


def test_time_limits() -> None:
    for limit, truncations in [(7, 2), (-1, 0), (None, 0)]:
        environments = Pendulum(3, max_episode_steps=limit)
        environments.reset(seed=0)
        cut = [environments.step(np.zeros((3, 1), np.float32))[3] for _ in range(20)]
        assert environments.max_episode_steps == {7: 7, -1: None, None: 200}[limit]
        assert np.sum(cut, axis=0).tolist() == [truncations] * 3


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_in_mid_episode_and_gone_on_exactly(family: type[Classic]) -> None:
    one, other = family(3, max_episode_steps=40), family(3, max_episode_steps=40)
    one.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(65):
        one.step(actions(one, rng))
    other.load_state_dict(one.state_dict())
    for _ in range(100):
        action = actions(one, rng)
        for a, b in zip(one.step(action)[:4], other.step(action)[:4], strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", FAMILIES)
def test_pictures_are_gymnasiums(family: type[Classic]) -> None:
    pytest.importorskip("pygame")
    environments = family(2)
    environments.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(10):
        action = actions(environments, rng)
        environments.step(action)
    single = gymnasium.make(family.gymnasium_id, render_mode="rgb_array").unwrapped
    single.reset(seed=0)
    single.state = environments.state[:, 1]
    if family is Pendulum:
        single.last_u = float(np.clip(action[1, 0], -2, 2))
    picture = environments.render(row=1)
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, single.render())
    assert (picture != environments.render(row=0)).any()
    environments.close()
