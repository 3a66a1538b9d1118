"""The columns of the matrix: kinds of policy, each on a small problem with a known best reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from guerdon import tasks
from guerdon.experience.environments import make
from guerdon.experience.episodes import Episodes
from guerdon.feedback.base import Feedback
from guerdon.policies.base import Policy
from guerdon.policies.control import make_controller
from guerdon.policies.features import Features, describe
from guerdon.tasks.base import Pieces
from guerdon.tasks.control import EnvironmentReward


@dataclass(frozen=True)
class Column:
    """One kind of policy on one problem.

    Args:
        name, title: for files, and for people.
        policy: a fresh, untrained (or pretrained) policy; drawn from torch's random numbers, which are seeded.
        experience: where it acts, from a seed: ``collect(actor, n, group_size=...)``, whole answers in groups.
        feedback: who scores the answers.
        goal: the mean reward that counts as solved.
        problem: what is to be done, in a few words.
        rounds, samples, group_size: of sampling and learning; answers a round, and to each prompt.
        lr: of Adam.
        measured: answers on which success is measured.
        sampling: options of the policy's sampler.
        one_step: whether an answer is a single step.
    """

    name: str
    title: str
    policy: Callable[[], Policy]
    experience: Callable[[int], Any]
    feedback: Callable[[], Feedback]
    goal: float
    problem: str = ""
    rounds: int = 40
    samples: int = 64
    group_size: int = 8
    lr: float = 3e-3
    measured: int = 128
    sampling: Mapping[str, Any] = field(default_factory=dict)
    one_step: bool = False


def of_task(
    name: str, title: str, task: str, kind: str, goal: float, reward: str | None = None, **settings: Any
) -> Column:
    """A column of a ready problem: its policy of one kind, its experience, its judge (or ``reward``)."""

    def made() -> tasks.base.Task:
        return tasks.find(task)(Pieces(reward=reward))

    return Column(
        name,
        title,
        lambda: made().policy(kind),
        lambda seed: made().experience(seed),
        lambda: made().feedback(),
        goal,
        **settings,
    )


def controller(name: str, title: str, env_id: str, kind: str, limit: int, **settings: Any) -> Column:
    """A column of a controller with two layers of 64 units in episodes of at most ``limit`` steps, one reward a step."""

    def policy() -> Policy:
        environment = make(env_id, 1, 0)
        features = Features(describe(environment.observation_space), (64, 64), "tanh")
        environment.close()
        return make_controller(kind, features, environment.action_space)

    return Column(
        name,
        title,
        policy,
        lambda seed: Episodes(env_id, seed=seed, limit=limit),
        EnvironmentReward,
        float(limit),
        **settings,
    )


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        of_task(
            "table",
            "table of choices",
            "bandit",
            "categorical",
            0.825,
            problem="a contextual bandit: the mean reward of the choices",
            lr=0.05,
            one_step=True,
        ),
        controller(
            "categorical",
            "categorical controller",
            "CartPole-v1",
            "categorical",
            200,
            problem="CartPole-v1: balance for 200 steps",
        ),
        controller(
            "gaussian",
            "Gaussian controller",
            "InvertedPendulum-v5",
            "gaussian",
            200,
            problem="InvertedPendulum-v5: balance for 200 steps",
        ),
        of_task(
            "language",
            "language model",
            "tokens",
            "language",
            1.0,
            problem="repeat the letter of the prompt six times",
            rounds=80,
        ),
        of_task(
            "diffusion",
            "diffusion model",
            "shapes",
            "diffusion",
            1.0,
            "redness",
            problem="pictures of shapes, 6 denoising steps: red ones",
            rounds=60,
            samples=32,
            lr=3e-4,
            sampling={"steps": 6, "guidance": 1.0},
        ),
        of_task(
            "consistency",
            "consistency model",
            "shapes",
            "consistency",
            1.0,
            "redness",
            problem="pictures of shapes, 4 denoising steps: red ones",
            samples=32,
            lr=1e-4,
            sampling={"steps": 4, "guidance": 8.0},
        ),
    )
}
