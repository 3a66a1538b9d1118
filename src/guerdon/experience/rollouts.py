"""Acting in vector environments: on-policy trajectories, and steps into a replay."""

from __future__ import annotations

import json
from collections import deque
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.experience.environments import Environments
from guerdon.experience.replay import Replay
from guerdon.normalise import ScaleReward
from guerdon.policies.features import to_tensor
from guerdon.randomness import mix
from guerdon.roles import Role


class Rollouts:
    """Experience of controllers in environments.

    Args:
        environments: where they act.
        seed: of the actions' randomness.
        scale_reward: discount of the running return whose deviation divides the rewards that are learned from
            (the statistics below stay in the environment's own units); None leaves rewards alone.
        reward_clip: scaled rewards are cut to plus or minus this.
        warm_up: random steps before the first action, for the statistics of a policy that normalises its
            observations.

    Attributes:
        unit: what ``collect`` counts.
        taken: steps taken so far, over all environments.
    """

    unit: Literal["trajectory", "step"] = "step"

    def __init__(
        self,
        environments: Environments,
        seed: int = 0,
        scale_reward: float | None = None,
        reward_clip: float | None = 10.0,
        warm_up: int = 1000,
    ) -> None:
        self.environments = environments
        self.seed = seed
        self.random = np.random.Generator(np.random.PCG64(mix(seed, 0xAC7)))
        self.scaler = (
            None if scale_reward is None else ScaleReward(scale_reward, environments.n, clip=reward_clip)
        )
        self.warm_up = warm_up
        self.taken = 0
        self.returns: deque[tuple[float, int]] = deque(maxlen=100)
        self._fresh: Tensor | TensorDict | None = None  # observations that no statistics hold yet

    @property
    def saveable(self) -> bool:
        """Whether a resumed run goes on in the middle of the episodes it was in."""
        return self.environments.saveable

    # -- on policy -----------------------------------------------------------------------------------------

    def collect(self, actor: Role, n: int, group_size: int | None = None) -> Trajectories:
        """``n`` steps, ``n / environments`` in each: `Trajectories` ``[environments, T]``.

        A row may hold several episodes; ``terminated`` and ``truncated`` tell where they end, and
        ``inputs["final"]`` holds the observations that followed the last step of an episode and of the row.
        Observations are stored as they came. Statistics that normalise them move only before the first step,
        so a log-probability computed afterwards is that of the acting policy.

        Raises `UsageError` when ``n`` is no positive multiple of the number of environments.
        """
        env, steps = self.environments, self._steps_each(n, group_size)
        self._take_statistics(actor)
        act, observation = actor.acting(), self._observation()
        noise = draw_noise(self.random, actor.model.noise, (steps, env.n))  # type: ignore[arg-type]
        kept: dict[str, Any] = {}
        reward = np.empty((steps, env.n), dtype=np.float32)
        terminated = np.empty((steps, env.n), dtype=bool)
        truncated = np.empty((steps, env.n), dtype=bool)
        cuts: list[tuple[int, int, Any]] = []  # row, step, the observation that followed
        for t in range(steps):
            out = act(observation, noise[t])
            if not kept:
                kept = {name: np.empty((steps, *v.shape), v.dtype) for name, v in out.items()}
                seen = room(observation, steps)
            put(seen, t, observation)
            for name, value in out.items():
                kept[name][t] = value
            step = env.step(out["action"])
            reward[t], terminated[t], truncated[t] = step.reward, step.terminated, step.truncated
            if step.final is not None:
                for row in np.flatnonzero(step.terminated | step.truncated):
                    cuts.append((int(row), t, at(step.final, int(row))))
            observation = step.observation
        self.taken += n
        for row in np.flatnonzero(~(terminated[-1] | truncated[-1])):
            cuts.append((int(row), steps - 1, at(observation, int(row))))
        scaled = self._scaled(reward, terminated | truncated)
        rows = env.n
        inputs = TensorDict(
            {
                "step": TensorDict(
                    {
                        "observation": rows_first(seen, rows, steps),
                        **{name: torch.from_numpy(v).transpose(0, 1) for name, v in kept.items()},
                    },
                    batch_size=[rows, steps],
                ),
                "final": _finals(cuts, rows, observation),
            },
            batch_size=[rows],
        )
        mask = torch.ones(rows, steps, dtype=torch.bool)
        fields = {
            "inputs": inputs,
            "log_prob": torch.zeros(rows, steps),
            "mask": mask,
            "reward": torch.from_numpy(scaled).transpose(0, 1),
            "terminated": torch.from_numpy(terminated).transpose(0, 1),
            "truncated": torch.from_numpy(truncated).transpose(0, 1),
            "version": torch.full((rows,), actor.updates, dtype=torch.int64),
        }
        traj = Trajectories.from_tensordict(TensorDict(fields, batch_size=[rows])).to(actor.device)
        traj.log_prob = actor.log_prob(traj)
        if self._normalises(actor):
            self._fresh = inputs["step", "observation"]
        return traj

    # -- off policy ----------------------------------------------------------------------------------------

    def replay(self, capacity: int, **settings: Any) -> Replay:
        """A replay that fits these environments; ``settings`` as for `Replay`."""
        return Replay(capacity, self.environments.n, **{"seed": self.seed, **settings})

    def advance(self, actor: Role | None, steps: int, into: Replay) -> None:
        """Take ``steps`` steps in every environment and keep them in a replay. Without an actor the actions are
        uniformly random (how most methods fill their memory before they learn)."""
        env, observation = self.environments, self._observation()
        act = None if actor is None else actor.acting()
        if actor is not None:
            noise = draw_noise(self.random, actor.model.noise, (steps, env.n))  # type: ignore[arg-type]
        for t in range(steps):
            action = self._random_action() if act is None else act(observation, noise[t])["action"]
            step = env.step(action)
            following = step.observation
            if step.final is not None:
                following = with_rows(following, step.final, step.terminated | step.truncated)
            reward = step.reward
            if self.scaler is not None:
                reward = self.scaler(reward, step.terminated | step.truncated)
            into.add(observation, action, reward, following, step.terminated, step.truncated)
            observation = step.observation
        self.taken += steps * env.n

    # -- figures -------------------------------------------------------------------------------------------

    def statistics(self, traj: Trajectories | None = None) -> dict[str, float]:
        """``reward``: the mean return of the last 100 episodes, in the environment's units; ``episodes`` that ended
        since last asked, their mean ``episode_length``; ``steps`` taken so far. No ``reward`` before an
        episode has ended."""
        ended = self.environments.finished()
        self.returns.extend(ended)
        figures: dict[str, float] = {"steps": float(self.taken), "episodes": float(len(ended))}
        if ended:
            figures["episode_length"] = sum(length for _, length in ended) / len(ended)
        if self.returns:
            figures["reward"] = sum(value for value, _ in self.returns) / len(self.returns)
        return figures

    # -- inside --------------------------------------------------------------------------------------------

    def _observation(self) -> Any:
        env = self.environments
        return env.reset() if env.observation is None else env.observation

    def _random_action(self) -> np.ndarray:
        space: Any = self.environments.action_space
        n = self.environments.n
        if hasattr(space, "nvec"):
            return self.random.integers(0, space.nvec, (n, *space.shape))
        if hasattr(space, "n") and np.ndim(space.n) == 0:
            return self.random.integers(0, int(space.n), n)
        if hasattr(space, "low") and np.isfinite(space.low).all() and np.isfinite(space.high).all():
            return self.random.uniform(space.low, space.high, (n, *space.shape)).astype(np.float32)
        return np.stack([space.sample() for _ in range(n)])

    def _steps_each(self, n: int, group_size: int | None) -> int:
        """The steps that each environment takes where `collect` is asked for ``n``. Raises `UsageError` for what it cannot
        be asked."""
        each, rest = divmod(n, self.environments.n)
        if n < 1 or rest:
            raise UsageError(
                f"cannot collect {n} steps from {self.environments.n} environments; use a multiple"
            )
        if group_size not in (None, 1):
            raise UsageError("environments cannot be asked for groups of answers to one prompt")
        return each

    def _scaled(self, reward: np.ndarray, ended: np.ndarray) -> np.ndarray:
        """Rewards ``[T, environments]`` as they are learned from: each by the deviation as it was at its step."""
        if self.scaler is None:
            return reward
        return np.stack([self.scaler(r, e) for r, e in zip(reward, ended, strict=True)])

    def _normalises(self, actor: Role) -> bool:
        """Whether the actor keeps statistics of its observations."""
        return normalises(actor)

    def _take_statistics(self, actor: Role) -> None:
        if not self._normalises(actor):
            return
        if self._fresh is None and not self.taken and self.warm_up:
            actor.observe(self.random_observations(-(-self.warm_up // self.environments.n)))
        elif self._fresh is not None:
            actor.observe(self._fresh)
        self._fresh = None

    def random_observations(self, steps: int) -> Any:
        """What ``steps`` random steps in every environment show, ``[(steps + 1) environments, ...]``; then new episodes."""
        env = self.environments
        parts = [to_tensor(self._observation())]
        for _ in range(steps):
            parts.append(to_tensor(env.step(self._random_action()).observation))
        env.finished()
        env.reset()
        return torch.cat(parts)

    # -- files ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Environments (where they can be saved), random state, statistics."""
        return {
            "environments": self.environments.state_dict(),
            "random": json.dumps(self.random.bit_generator.state),  # 128-bit numbers, as text
            "taken": self.taken,
            "returns": [[float(r), int(length)] for r, length in self.returns],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "fresh": None if self._fresh is None else _plain(self._fresh),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Environments that cannot be saved begin new episodes."""
        self.environments.load_state_dict(state["environments"])
        self.random.bit_generator.state = json.loads(state["random"])
        self.taken = state["taken"]
        self.returns = deque(((r, length) for r, length in state["returns"]), maxlen=100)
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        fresh = state["fresh"]
        if isinstance(fresh, dict):
            fresh = TensorDict(fresh, batch_size=next(iter(fresh.values())).shape[:2])
        self._fresh = fresh


# --- arrays, or dictionaries of arrays --------------------------------------------------------------------


def normalises(actor: Role) -> bool:
    """Whether the actor keeps statistics of its observations."""
    return actor.model.features.scaler is not None  # type: ignore[union-attr]


def draw_noise(random: np.random.Generator, kind: tuple[str, int], shape: tuple[int, ...]) -> np.ndarray:
    """float32 ``[*shape, K]``: the random numbers that acting needs (`Controller.noise`)."""
    what, size = kind
    if what == "normal":
        return random.standard_normal((*shape, size), dtype=np.float32)
    if what == "gumbel":
        exponential = random.standard_exponential((*shape, size), dtype=np.float32)
        return -np.log(np.maximum(exponential, np.float32(1e-30)))
    return random.random((*shape, size), dtype=np.float32)


def room(example: Any, steps: int) -> Any:
    """Arrays ``[steps, *shape]`` for as many of what ``example`` is."""
    if isinstance(example, dict):
        return {name: room(value, steps) for name, value in example.items()}
    return np.empty((steps, *example.shape), example.dtype)


def put(room: Any, t: int, value: Any) -> None:
    """Write ``value`` into place ``t`` of what `room` made."""
    if isinstance(room, dict):
        for name, array in room.items():
            array[t] = value[name]
    else:
        room[t] = value


def at(value: Any, place: int) -> Any:
    """What stands at ``place`` along the first axis."""
    return {k: v[place] for k, v in value.items()} if isinstance(value, dict) else value[place]


def with_rows(base: Any, other: Any, rows: np.ndarray) -> Any:
    """``base`` with the ``rows`` (bool) of ``other``."""
    if isinstance(base, dict):
        return {name: with_rows(value, other[name], rows) for name, value in base.items()}
    return np.where(rows.reshape(-1, *[1] * (base.ndim - 1)), other, base)


def rows_first(seen: Any, rows: int, steps: int) -> Any:
    """Arrays ``[steps, rows, ...]`` as tensors ``[rows, steps, ...]``."""
    if isinstance(seen, dict):
        return TensorDict({k: rows_first(v, rows, steps) for k, v in seen.items()}, batch_size=[rows, steps])
    return torch.from_numpy(seen).transpose(0, 1)


def _finals(cuts: list[tuple[int, int, Any]], rows: int, example: Any) -> TensorDict:
    """``step [B, K]`` and ``observation [B, K, ...]`` of the places where a row was cut; -1 marks unused places."""
    counts = np.zeros(rows, dtype=np.int64)
    for row, _, _ in cuts:
        counts[row] += 1
    width = max(1, int(counts.max(initial=0)))
    at = np.full((rows, width), -1, dtype=np.int64)

    def zeros(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: zeros(v) for k, v in value.items()}
        return np.zeros((rows, width, *value.shape[1:]), value.dtype)

    observation, used = zeros(example), np.zeros(rows, dtype=np.int64)
    for row, t, followed in cuts:
        place = used[row]
        at[row, place] = t
        if isinstance(observation, dict):
            for name, array in observation.items():
                array[row, place] = followed[name]
        else:
            observation[row, place] = followed
        used[row] += 1
    if isinstance(observation, dict):
        parts: Any = TensorDict(
            {k: torch.from_numpy(v) for k, v in observation.items()}, batch_size=[rows, width]
        )
    else:
        parts = torch.from_numpy(observation)
    return TensorDict({"step": torch.from_numpy(at), "observation": parts}, batch_size=[rows])


def _plain(value: Any) -> Any:
    return value if isinstance(value, Tensor) else {k: v.contiguous() for k, v in value.items()}
