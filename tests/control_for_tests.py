"""Small controllers of every kind, and what they did, that several test files share."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from tensordict import TensorDict

from experience.environments_for_tests import ChoosesTwice, Counter
from guerdon.batch import Trajectories, Transitions
from guerdon.critics.greedy import Greedy
from guerdon.policies.control import Categorical, Controller, Deterministic, Gaussian, SquashedGaussian
from guerdon.policies.features import Entry, Features

KINDS = ("categorical", "dials", "gaussian", "squashed", "deterministic", "greedy", "greedy_hl")
LOW, HIGH = [-2.0, 0.0], [2.0, 1.0]  # two dimensions of different ranges, one of them not around zero


class PaysOne(Counter):
    """Pays 1 a step. Each episode draws its length, from 1 to ``length``, and whether it terminates (1) or is
    truncated (2) at its end; ``how`` fixes the latter."""

    def __init__(self, length: int = 5, how: int | None = None) -> None:
        super().__init__(length)
        self.how = how

    def reset(self, **kwargs: Any) -> tuple[Any, dict]:
        found = super().reset(**kwargs)
        self.last = int(self.np_random.integers(1, self.length + 1))
        self.ending = self.how or int(self.np_random.integers(1, 3))
        return found

    def reward(self) -> float:
        return 1.0

    def end(self) -> tuple[bool, bool]:
        ends = self.steps >= self.last
        return ends and self.ending == 1, ends and self.ending == 2


class Match(gymnasium.Env):
    """Eight times a number between -1 and 1, to be answered by itself (or by its third: 0, 1 or 2). Learned in a
    thousand steps; the best return is 8."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, discrete: bool = False) -> None:
        self.discrete = discrete
        self.action_space = spaces.Discrete(3) if discrete else spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.left = 8
        return self._ask(), {}

    def _ask(self) -> np.ndarray:
        self.asked = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.asked

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        asked = float(self.asked[0])
        right = (asked + 1) * 1.5  # between 0 and 3
        reward = float(action == int(right)) if self.discrete else 1 - abs(float(action[0]) - asked)
        self.left -= 1
        return self._ask(), reward, self.left == 0, False, {}


class Fails(Counter):
    """Terminates every 5 steps, and fails in its own way at step ``after`` of its life, which no measurement lasts."""

    def __init__(self, how: str = "raises", after: int = 12) -> None:
        super().__init__()
        self.how, self.after, self.life = how, after, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.life += 1
        return super().step(action)

    def end(self) -> tuple[bool, bool]:
        if self.life >= self.after and self.how == "raises":
            raise ValueError("the arm left the table")
        return self.steps >= 5, False

    def show(self, action: float) -> Any:
        seen = super().show(action)
        if self.life >= self.after and self.how == "NaN":
            seen[1] = np.nan
        return seen[:2] if self.life >= self.after and self.how == "shape" else seen

    def reward(self) -> float:
        return np.inf if self.life >= self.after and self.how == "infinite reward" else 1.0


for _entry in (Match, Fails, PaysOne, ChoosesTwice):
    _id = f"{_entry.__name__}-v0"
    if _id not in gymnasium.registry:
        gymnasium.register(_id, entry_point=_entry, disable_env_checker=True)


def features(size: int = 3, hidden: tuple[int, ...] = (8, 8), **options: Any) -> Features:
    """Of a plain vector, with a scaler that has seen something where there is one."""
    made = Features({"": Entry((size,))}, hidden, **options)
    if made.scaler is not None:
        made.scaler.update(torch.randn(50, size) * torch.arange(1.0, size + 1) + 3.0)
    return made


def controller(kind: str, seed: int = 0, **options: Any) -> Controller:
    """One of `KINDS`, with weights large enough that observations matter."""
    torch.manual_seed(seed)
    f = features(**options)
    made: Controller
    if kind == "categorical":
        made = Categorical(f, 4, init="default")
    elif kind == "dials":
        made = Categorical(f, [3, 2], init="default")
    elif kind == "gaussian":
        made = Gaussian(f, LOW, HIGH, log_std=-0.3, init="default")
    elif kind == "squashed":
        made = SquashedGaussian(f, LOW, HIGH)
    elif kind == "deterministic":
        made = Deterministic(f, LOW, HIGH, exploration=0.3)
    else:
        made = Greedy(
            f, 4, *([] if kind == "greedy" else ["hl_gauss", {"low": -3.0, "high": 3.0, "bins": 7}])
        )
        made.epsilon = 0.4
        with torch.no_grad():
            made.head.weight.normal_()
    return made.requires_grad_(False)


def noise_for(made: Controller, rows: int, seed: int = 0) -> np.ndarray:
    """float32 ``[rows, K]`` of the kind that the controller asks for."""
    random = np.random.default_rng(seed)
    kind, size = made.noise
    draw = {
        "normal": random.standard_normal,
        "uniform": random.random,
        "gumbel": lambda s: random.gumbel(size=s),
    }
    return draw[kind]((rows, size)).astype(np.float32)


def acted(made: Controller, rows: int = 5, steps: int = 4, seed: int = 0) -> Trajectories:
    """``[rows, steps]`` of random observations and what the controller did there, with random credit."""
    generator = torch.Generator().manual_seed(seed)
    count = rows * steps
    size = made.features.vectors
    observation = torch.randn(count, size, generator=generator)
    out = made.act(observation, torch.from_numpy(noise_for(made, count, seed)))
    step = {"observation": observation, **out}
    shape = (rows, steps)
    step_ = TensorDict({k: v.reshape(*shape, *v.shape[1:]) for k, v in step.items()}, batch_size=shape)
    traj = Trajectories(
        inputs=TensorDict({"step": step_}, batch_size=[rows]),
        log_prob=torch.zeros(shape),
        mask=torch.ones(shape, dtype=torch.bool),
        reward=torch.randn(shape, generator=generator),
        terminated=torch.zeros(shape, dtype=torch.bool),
        truncated=torch.zeros(shape, dtype=torch.bool),
    )
    with torch.no_grad():
        traj.log_prob = made.log_prob(traj)
    traj.advantage = torch.randn(shape, generator=generator)
    traj.target = torch.randn(shape, generator=generator)
    traj.value = torch.randn(shape, generator=generator)
    return traj


def transitions(rows: int = 16, size: int = 3, actions: int | None = None, seed: int = 0) -> Transitions:
    """Random rows for continuous actions within `LOW` and `HIGH`, or for one of ``actions``; a third terminated."""
    g = torch.Generator().manual_seed(seed)
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    continuous = torch.rand(rows, 2, generator=g) * (high - low) + low
    fields: dict[str, Any] = {
        "observation": torch.randn(rows, size, generator=g),
        "action": continuous if actions is None else torch.randint(actions, (rows,), generator=g),
        "reward": torch.randn(rows, generator=g),
        "next_observation": torch.randn(rows, size, generator=g),
        "terminated": torch.arange(rows) % 3 == 0,
        "truncated": torch.arange(rows) % 3 == 1,
        "discount": torch.full((rows,), 0.9),
    }
    if actions is None:
        fields["noise"] = torch.randn(rows, 2, 2, generator=g)
    return Transitions(**fields)
