"""Any environment as a task: networks that fit its spaces and the method's options, recipes, measuring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import control_for_tests  # noqa: F401 (registers the environments)
from control_for_tests import controller
from guerdon import catalog, launch
from guerdon.critics.action import ActionCritic
from guerdon.critics.greedy import Greedy
from guerdon.critics.state import StateCritic
from guerdon.errors import UsageError
from guerdon.methods.online.dqn import DQN
from guerdon.methods.online.ppo import PPO
from guerdon.methods.online.sac import SAC
from guerdon.methods.online.td3 import TD3
from guerdon.policies.control import Categorical, Deterministic, Gaussian, SquashedGaussian
from guerdon.roles import Role
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import Control, default_environment


def task(method: Any = None, env: str | None = "Pendulum-v1", **pieces: Any) -> Control:
    return Control(Pieces(env=env, **pieces), method)


@pytest.mark.parametrize(
    ("method", "env", "kind", "cls"),
    [
        (PPO(), "CartPole-v1", "categorical", Categorical),
        (PPO(), "Pendulum-v1", "gaussian", Gaussian),
        (SAC(), "Pendulum-v1", "gaussian", SquashedGaussian),
        (SAC(), "CartPole-v1", "categorical", Categorical),
        (TD3(), "Pendulum-v1", "deterministic", Deterministic),
        (DQN(head="c51", bins=7, low=0.0, high=3.0), "CartPole-v1", "categorical", Greedy),
    ],
)
def test_controllers_fit_method_and_environment(method: Any, env: str, kind: str, cls: type) -> None:
    made = task(method, env)
    assert kind in made.policy_kinds()
    policy = made.policy(kind)
    assert type(policy) is cls
    assert policy.features.hidden == method.hidden
    assert policy.features.activation == method.activation
    assert (policy.log_temperature is not None) == isinstance(method, SAC)
    if cls is Greedy:
        assert (policy.head.kind, policy.head.bins, policy.head.high) == ("c51", 7, 3.0)
        return
    critic = made.critic(policy)
    assert isinstance(critic, StateCritic if isinstance(method, PPO) else ActionCritic)
    observation = torch.zeros(2, 4 if env == "CartPole-v1" else 3)
    if isinstance(critic, ActionCritic):
        q = critic.q(observation, None if env == "CartPole-v1" else torch.zeros(2, 1))
        assert q.shape == ((2, 2, 2) if env == "CartPole-v1" else (2, 2))


def test_actor_and_critic_share_statistics() -> None:
    made = task(PPO(normalise_observation=True))
    policy = made.policy("gaussian")
    assert policy.features.scaler is not None
    assert made.critic(policy).features.scaler is policy.features.scaler
    plain = task(PPO())
    assert plain.critic(plain.policy("gaussian")).features.scaler is None


def test_the_experience_has_the_methods_settings() -> None:
    experience = task(PPO(environments=5, scale_reward=True, gamma=0.7)).experience(3)
    assert experience.environments.n == 5
    assert experience.scaler.gamma == 0.7
    assert task(PPO()).experience(0).scaler is None
    one, same, other = (task(PPO()).experience(seed).environments.reset() for seed in (1, 1, 2))
    assert (one == same).all()
    assert not (one == other).all()


def test_options_of_an_environment() -> None:
    made = task(env_options='{"g": 2.0}')
    assert made.env_options == {"g": 2.0}
    with pytest.raises(UsageError, match="--env-options is no JSON object"):
        task(env_options="{g: 2}")
    with pytest.raises(UsageError, match="gravity"):
        task(env_options='{"gravity": 2.0}')


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--prompts does not apply"):
        task(prompts="words.txt")
    with pytest.raises(UsageError, match="CartPole-v1"):
        task(env="CartPole-v11")
    with pytest.raises(UsageError, match="no environment to replace"):
        launch.train("ppo", "bandit", env="CartPole-v1", runs=tmp_path)
    with pytest.raises(UsageError, match="'td3' trains a deterministic"):
        launch.train("td3", env="CartPole-v1", runs=tmp_path, compile=False)
    assert not list(tmp_path.iterdir())


def test_dials_are_no_single_discrete_action() -> None:
    made = task(SAC(), "ChoosesTwice-v0")
    policy = made.policy("categorical")
    assert policy.dials == [3, 4]
    with pytest.raises(UsageError, match="values one discrete action"):
        made.critic(policy)


# --- recipes ----------------------------------------------------------------------------------------------


def test_recipes_stand_between_defaults_and_options() -> None:
    def method(**options: Any) -> Any:
        return launch.method_for("ppo", "control", Pieces(env="CartPole-v1"), **options)

    assert method().gamma == 0.98
    assert method(gamma=0.5).gamma == 0.5
    assert (
        launch.method_for("ppo", "control", Pieces(env="Acrobot-v1")).gamma == Control.recipes["ppo"]["gamma"]
    )
    assert launch.method_for("sac", "control", Pieces()).start == 100  # of Pendulum-v1, its default
    with_model = launch.method_for("ppo", "control", Pieces(env="CartPole-v1", model="somewhere"))
    assert with_model.gamma == PPO().gamma


@pytest.mark.parametrize("key", list(Control.by_environment), ids=str)
def test_recipes_name_options_that_exist(key: tuple[str, str]) -> None:
    slug, env = key
    made = launch.method_for(slug, "control", Pieces(env=env))
    for name, value in Control.by_environment[key].items():
        assert getattr(made, name) == value


def test_every_controls_default_environment_fits() -> None:
    for slug in ("ppo", "a2c", "sac", "td3", "dqn", "reinforce"):
        named, given = default_environment(slug), default_environment(launch.method_class(slug)())
        assert named == given
        kinds = Control(Pieces(), launch.method_class(slug)()).policy_kinds()
        assert set(kinds) & set(catalog.find(slug).policies), slug


# --- measuring, loading -----------------------------------------------------------------------------------


def test_measuring_is_of_the_same_episodes_every_time() -> None:
    made = task(PPO())
    torch.manual_seed(0)
    actor = Role("actor", made.policy("gaussian"))
    first = made.measure(actor, made.feedback()).figures
    assert made.measure(actor, made.feedback()).figures == first
    assert first["length"] == 200.0
    assert first["reward"] < 0


def test_a_loaded_controller_may_be_trained_on(tmp_path: Path) -> None:
    controller("squashed").save_pretrained(tmp_path / "squashed")
    controller("greedy").save_pretrained(tmp_path / "greedy")
    policy = task(SAC(alpha=0.5), model=str(tmp_path / "squashed")).policy("gaussian")
    assert policy.log_temperature.exp().item() == pytest.approx(0.5)
    assert (
        task(SAC(learn_temperature=False), model=str(tmp_path / "squashed"))
        .policy("gaussian")
        .log_temperature
        is None
    )
    assert isinstance(task(PPO(), model=str(tmp_path / "squashed")).policy("gaussian"), SquashedGaussian)
    assert isinstance(
        task(DQN(), "CartPole-v1", model=str(tmp_path / "greedy")).policy("categorical"), Greedy
    )
    controller("gaussian").save_pretrained(tmp_path / "gaussian")
    with pytest.raises(UsageError, match="is a gaussian controller, and this method trains a squashed one"):
        task(SAC(), model=str(tmp_path / "gaussian")).policy("gaussian")
    with pytest.raises(UsageError, match="is a greedy controller, and this method trains a categorical one"):
        task(PPO(), "CartPole-v1", model=str(tmp_path / "greedy")).policy("categorical")
