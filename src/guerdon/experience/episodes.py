"""Whole episodes as trajectories, in groups that begin in the same state.

What answers to one prompt are for a language model, episodes from one starting state are for a controller: methods that
compare a group's answers (group-relative advantages, leave-one-out baselines, pairs) then train controllers as they are.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.experience.base import check_groups
from guerdon.experience.environments import Environments, make
from guerdon.experience.rollouts import draw_noise, normalises, put, room, rows_first
from guerdon.randomness import mix
from guerdon.roles import Role


class Episodes:
    """Experience of controllers that act in whole episodes.

    Args:
        env_id: any environment that `make` knows.
        group_size: episodes from each starting state. They lie next to each other.
        seed: of starting states and actions. The rows of the k-th draw have the same start in every run.
        limit: steps after which an episode is truncated; None leaves that to the environment.
        **options: for the environments.

    The environments of one draw step side by side until the last of them has ended; ``mask`` tells how long each
    episode was. A policy that normalises its observations is refused: its statistics would move between the groups.
    """

    unit: Literal["trajectory", "step"] = "trajectory"

    def __init__(
        self, env_id: str, group_size: int = 1, seed: int = 0, limit: int | None = None, **options: Any
    ) -> None:
        if group_size < 1:
            raise UsageError(f"group_size must be at least 1, not {group_size}")
        if limit is not None and limit < 1:
            raise UsageError(f"an episode has at least one step, not {limit}")
        self.env_id, self.group_size, self.seed, self.limit = env_id, group_size, seed, limit
        self.options = options
        self.rows = 0
        self._environments: Environments | None = None

    def collect(self, actor: Role, n: int, group_size: int | None = None) -> Trajectories:
        """``n`` episodes of ``actor``, ``group_size`` (by default the usual one) from each starting state.

        ``reward [n, T]`` is the environment's, ``group`` numbers the starting states of the run.
        Raises `UsageError` when ``n`` is not a positive multiple of ``group_size``, for an environment whose rows
        cannot be seeded, or an actor that normalises its observations.
        """
        size = group_size or self.group_size
        check_groups(n, size)
        if normalises(actor):
            raise UsageError(
                f"'{actor.name}' normalises its observations, which whole episodes in groups cannot serve; leave that out"
            )
        env = self._side_by_side(n)
        start = np.arange(n) // size + self.rows
        random = np.random.Generator(np.random.PCG64(mix(self.seed, 0xE9, self.rows)))
        self.rows += n
        observation = env.reset([mix(self.seed, 0x57A, int(k)) % 2**31 for k in start])
        act, kind = actor.acting(), cast(tuple[str, int], actor.model.noise)
        running = np.ones(n, dtype=bool)
        steps: list[tuple[Any, dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
        while running.any():
            out = act(observation, draw_noise(random, kind, (n,)))
            step = env.step(out["action"])
            cut = step.truncated | (len(steps) + 1 == self.limit)
            steps.append((observation, out, step.reward, running, step.terminated, cut & ~step.terminated))
            running = running & ~(step.terminated | cut)
            observation = step.observation
        env.finished()
        return self._trajectories(actor, steps, torch.from_numpy(start))

    def _trajectories(self, actor: Role, steps: list[Any], group: Tensor) -> Trajectories:
        rows, length = len(group), len(steps)
        seen = room(steps[0][0], length)
        kept: dict[str, np.ndarray] = {}
        for t, (observation, out, *_) in enumerate(steps):
            put(seen, t, observation)
            for name, value in out.items():
                kept.setdefault(name, np.empty((length, *value.shape), value.dtype))[t] = value
        reward, mask, terminated, truncated = (
            torch.from_numpy(np.stack([step[i] for step in steps], 1)) for i in (2, 3, 4, 5)
        )
        step = {name: torch.from_numpy(value).transpose(0, 1) for name, value in kept.items()}
        step["observation"] = rows_first(seen, rows, length)
        traj = Trajectories(
            inputs=TensorDict({"step": TensorDict(step, batch_size=[rows, length])}, batch_size=[rows]),
            log_prob=torch.zeros(rows, length),
            mask=mask,
            reward=torch.where(mask, reward, 0.0),
            terminated=terminated & mask,
            truncated=truncated & mask,
            group=group,
            version=torch.full((rows,), actor.updates, dtype=torch.int64),
            batch_size=[rows],
        ).to(actor.device)
        traj.log_prob = actor.log_prob(traj)
        return traj

    def _side_by_side(self, n: int) -> Environments:
        if self._environments is None or self._environments.n != n:
            if self._environments is not None:
                self._environments.close()
            self._environments = make(self.env_id, n, mix(self.seed, 0xE17) % 2**31, **self.options)
        return self._environments

    def statistics(self, traj: Trajectories) -> dict[str, Tensor]:
        """``reward``: the mean score; ``length``: mean number of steps."""
        return {"reward": traj.score().mean(), "length": traj.lengths.float().mean()}

    def state_dict(self) -> dict[str, int]:
        """The cursor: episodes begun."""
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state_dict` was taken."""
        self.rows = state["rows"]
