"""Any gymnasium environment as a task: ``guerdon train METHOD --env ID``."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from guerdon import catalog
from guerdon.batch import Trajectories
from guerdon.critics.action import ActionCritic
from guerdon.critics.state import StateCritic
from guerdon.errors import UsageError
from guerdon.evaluation.control import evaluate
from guerdon.experience.base import wants_groups
from guerdon.experience.environments import make
from guerdon.experience.episodes import Episodes
from guerdon.experience.rollouts import Rollouts
from guerdon.feedback.base import Feedback
from guerdon.feedback.functions import parse_reward
from guerdon.policies.base import Policy
from guerdon.policies.control import Controller, kinds_for, load_controller, make_controller
from guerdon.policies.features import Features, describe
from guerdon.randomness import mix
from guerdon.roles import Role
from guerdon.tasks.base import Measured, Pieces, Task

# of a measurement
EPISODES = 10
SEED = 7_777


# of RND-PPO in the warehouse; novelty is judged on pose and static lidar
_VEHICLE: Mapping[str, Any] = {
    "samples": 4096,
    "minibatch": 512,
    "lr": 5e-4,
    "entropy": 0.003,
    "gamma": 0.995,
    "bonus_schedule": "linear",
    "novelty_columns": (0, 20),
}


# of methods that compare whole episodes from one starting state
_GROUPS: Mapping[str, Any] = {
    "rounds": 40,
    "prompts_per_round": 8,
    "group_size": 8,
    "minibatch": 32,
    "lr": 3e-3,
    "kl": 0.0,
    "epochs": 2,
}


class EnvironmentReward:
    """The judge that the environment itself is: rewards as they came."""

    name = "environment"

    def score(self, traj: Trajectories) -> Tensor:
        """``[B, T]``."""
        assert traj.reward is not None
        return traj.reward


class Control(Task):
    """A gymnasium environment, and controllers that fit its spaces.

    What a method says about itself decides the networks: its options ``hidden``, ``activation``,
    ``normalise_observation``, ``scale_reward``, ``environments`` and ``head``, its class attribute ``controllers``
    (which class for which kind of policy) and ``critic_kind`` (``"state"`` or ``"action"``).
    """

    name: ClassVar[str] = "control"
    summary: ClassVar[str] = "any gymnasium environment (--env ID)"
    kinds: ClassVar[tuple[str, ...]] = ("categorical", "gaussian", "deterministic")
    # Settings for one environment where the published defaults are not what is used there: those of RL Baselines3
    # Zoo where it has tuned ones.
    by_environment: ClassVar[Mapping[tuple[str, str], Mapping[str, Any]]] = {
        # those of the Zoo with twice the environments and half the passes: as good at equal steps, twice as fast
        ("ppo", "CartPole-v1"): {
            "rounds": 200,
            "samples": 512,
            "environments": 16,
            "minibatch": 256,
            "epochs": 10,
            "gamma": 0.98,
            "lam": 0.8,
            "lr": 1e-3,
            "critic_lr": 1e-3,
        },
        ("ppo", "Pendulum-v1"): {
            "rounds": 100,
            "samples": 4096,
            "environments": 4,
            "minibatch": 64,
            "epochs": 10,
            "gamma": 0.9,
            "lr": 1e-3,
            "critic_lr": 1e-3,
        },
        ("sac", "Pendulum-v1"): {"steps": 20_000, "lr": 1e-3, "start": 100},
        ("td3", "Pendulum-v1"): {"steps": 20_000, "lr": 1e-3, "start": 100},
        ("rnd_ppo", "guerdon/Warehouse-complex-static-v0"): {"rounds": 160, **_VEHICLE, "reward_weight": 1.0},
        ("rnd_ppo", "guerdon/Warehouse-simple-dynamic-v0"): {"rounds": 60, **_VEHICLE, "reward_weight": 4.0},
        ("mdpo_off", "Pendulum-v1"): {
            "steps": 10_000,
            "start": 1000,
            "lr": 1e-3,
            "m": 250,
            "hidden": (128, 128),
            "batch_size": 128,
        },
        ("sequence_sac", "Pendulum-v1"): {
            "steps": 16_000,
            "start": 1000,
            "lr": 1e-3,
            "batch_size": 128,
            "hidden": (64,),
            "critic_hidden": (64, 64),
            "model_hidden": (64, 64),
        },
        ("dqn", "CartPole-v1"): {
            "steps": 50_000,
            "lr": 1e-3,
            "double": False,
            "batch_size": 64,
            "buffer_size": 100_000,
            "start": 1000,
            "target_every": 10,
            "update_every": 256,
            "updates": 128,
            "exploration": 0.16,
            "final_epsilon": 0.04,
            "hidden": (256, 256),
        },
    }
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "ppo": {
            "rounds": 60,
            "samples": 16384,
            "epochs": 10,
            "minibatch": 64,
            "gamma": 0.99,
            "lr": 3e-4,
            "critic_lr": 3e-4,
        },
        "reinforce": {"rounds": 100, "samples": 2048, "lr": 3e-3},
        "grpo": _GROUPS,
        "rloo": _GROUPS,
        "rebel": {
            "rounds": 80,
            "prompts_per_round": 32,
            "epochs": 2,
            "minibatch": 32,
            "lr": 3e-3,
            "eta": 10.0,
        },
        "copg": {
            "source": "sampled",
            "rounds": 40,
            "prompts_per_round": 8,
            "group_size": 8,
            "beta": 0.5,
            "lr": 3e-3,
        },
        "rejection_sampling": {
            "rounds": 40,
            "prompts_per_round": 8,
            "group_size": 8,
            "epochs": 4,
            "lr": 3e-3,
        },
        "mdpo": {"rounds": 60, "environments": 8, "lr": 3e-3, "schedule": "constant"},
        "trpo": {"rounds": 60, "environments": 8},
    }

    def __init__(self, pieces: Pieces | None = None, method: Any = None) -> None:
        super().__init__(pieces)
        if self.pieces.prompts is not None:
            raise UsageError("a controller answers no prompts; --prompts does not apply to --env")
        self.env_id = self.pieces.env or default_environment(method)
        self.env_options = parse_options(self.pieces.env_options)
        self.method = method
        self.environments = make(self.env_id, 1, 0, **self.env_options)
        self.entries = describe(self.environments.observation_space)

    def _option(self, name: str, default: Any) -> Any:
        return getattr(self.method, name, default)

    @classmethod
    def recipe(cls, method: str, pieces: Pieces) -> Mapping[str, Any]:
        env = pieces.env or default_environment(method)
        return {**cls.recipes.get(method, {}), **cls.by_environment.get((method, env), {})}

    def policy_kinds(self) -> tuple[str, ...]:
        return kinds_for(self.environments.action_space)

    # -- pieces --------------------------------------------------------------------------------------------

    def _features(self, hidden: Any = None, normalise: bool | None = None, scaler: Any = None) -> Features:
        if normalise is None:
            normalise = bool(self._option("normalise_observation", False))
        return Features(
            self.entries,
            tuple(self._option("hidden", (64, 64)) if hidden is None else hidden),
            self._option("activation", "tanh"),
            normalise=normalise,
            scaler=scaler,
        )

    def policy(self, kind: str) -> Policy:
        if self.pieces.model is not None:
            return self._with_temperature(self._loaded(self.pieces.model))
        which = self._option("controllers", {}).get(kind, kind)
        options: dict[str, Any] = {}
        if which == "greedy":
            options = {"head": self._option("head", "mse"), "head_options": self._option("head_options", {})}
        options |= self._option("controller_options", {})
        return self._with_temperature(
            make_controller(which, self._features(), self.environments.action_space, **options)
        )

    def _loaded(self, folder: str) -> Controller:
        controller = load_controller(folder)
        wanted = self._option("controllers", {}).get(controller.kind)
        if (wanted or controller.name) != controller.name or (controller.name == "greedy" and not wanted):
            raise UsageError(
                f"the model at '{folder}' is a {controller.name} controller, and this method trains a "
                f"{wanted or controller.kind} one; give it a model of that class"
            )
        return controller

    def _with_temperature(self, controller: Controller) -> Controller:
        if self._option("learn_temperature", False):
            controller.learn_temperature(self._option("alpha", 1.0))
        return controller

    def critic(self, policy: Policy) -> nn.Module:
        assert isinstance(policy, Controller)
        head = {"head": self._option("head", "mse"), **self._option("head_options", {})}
        if self._option("critic_kind", "state") == "state":
            return StateCritic(self._features(scaler=policy.features.scaler), **head)
        space: Any = self.environments.action_space
        hidden = tuple(self._option("hidden", (256, 256)))
        discrete = policy.kind == "categorical"
        if discrete and not hasattr(space, "n"):
            raise UsageError(f"this method's critic values one discrete action, not the dials of {space}")
        return ActionCritic(
            self._features(hidden=(), normalise=False),
            action=0 if discrete else int(np.prod(space.shape)),
            actions=int(space.n) if discrete else 1,
            hidden=hidden,
            activation=self._option("activation", "relu"),
            members=self._option("critics", 2),
            **head,
        )

    def experience(self, seed: int) -> Rollouts | Episodes:
        """Whole episodes in groups for methods that compare them, else rows of steps."""
        if self.method is not None and wants_groups(self.method):
            return Episodes(self.env_id, seed=seed, **self.env_options)
        n = int(self._option("environments", 1))
        environments = make(self.env_id, n, mix(seed, 0xE17) % 2**31, **self.env_options)
        gamma = self._option("gamma", 0.99) if self._option("scale_reward", False) else None
        return Rollouts(environments, seed=seed, scale_reward=gamma)

    def feedback(self) -> Feedback:
        return parse_reward(self.pieces.reward or "environment", {"environment": EnvironmentReward})

    # -- measuring -----------------------------------------------------------------------------------------

    def measure(self, actor: Role, feedback: Feedback, **sampling: Any) -> Measured:
        """Mean return of the policy's mode over fixed episodes, in the environment's own reward."""
        # made anew, so that they are the same episodes every time
        environments = make(self.env_id, EPISODES, SEED, **self.env_options)
        figures = evaluate(actor.model, environments, EPISODES).figures()  # type: ignore[arg-type]
        environments.close()
        names = {"return": "reward", "std": "reward_std", "length": "length", "success": "success"}
        return Measured({names[name]: figures[name] for name in names if name in figures}, None)

    def report(
        self, before: Measured, after: Measured, folder: str | Path, records: list[dict[str, Any]]
    ) -> list[str]:
        return []


def parse_options(text: str | None) -> dict[str, Any]:
    """``--env-options``, a JSON object, as keyword arguments. Raises `UsageError` for anything else."""
    try:
        options = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(
            f"--env-options is no JSON object ({error}); write for example '{{\"g\": 9.8}}'"
        ) from error
    if not isinstance(options, dict):
        raise UsageError(f"--env-options is no JSON object; write for example '{{\"g\": 9.8}}', not '{text}'")
    return options


def default_environment(method: Any) -> str:
    """What ``guerdon train METHOD`` trains in when no ``--env`` is given: the method's own ``default_env``.

    Args:
        method: an instance, or a slug of the catalog.
    """
    cls = type(method)
    if isinstance(method, str):
        row = catalog.find(method)
        cls = getattr(importlib.import_module(row.method), row.cls) if row.method and row.cls else object
    return getattr(cls, "default_env", "CartPole-v1")
