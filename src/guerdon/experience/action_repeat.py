"""Deciding less often than the environment steps: one action repeated, or a sequence carried out open loop."""

from __future__ import annotations

import json
from typing import Any

import gymnasium
import numpy as np

from guerdon.errors import UsageError
from guerdon.experience.environments import Environments, make
from guerdon.experience.replay import Replay
from guerdon.experience.rollouts import Rollouts, with_rows
from guerdon.policies.action_sequence import OpenLoop
from guerdon.randomness import mix
from guerdon.roles import Role


def make_repeating(env_id: str, repeat: int, n: int, seed: int, **kwargs: Any) -> Environments:
    """Environments that take each action ``repeat`` times and pay the sum of the rewards; the end of an episode cuts
    the repetition short. One step of them is one decision.

    Raises `UsageError` for a ``repeat`` below 1, and as `make` does.
    """
    if repeat < 1:
        raise UsageError(f"an action is repeated at least once, not {repeat} times")
    if repeat == 1:
        return make(env_id, n, seed, **kwargs)

    def single(**options: Any) -> gymnasium.Env:
        return gymnasium.wrappers.RepeatAction(gymnasium.make(env_id, **options), repeat)

    single.__name__ = f"{env_id} x {repeat}"
    return make(single, n, seed, **kwargs)


class SequenceSteps:
    """An actor of sequences in the environments of `Rollouts`: it looks every ``length`` steps and at the beginning of
    an episode, and every single step goes into the replay.

    Args:
        experience: where; its count of steps goes on.
        actor: a role whose model has ``actor(length)``, an `OpenLoop` (`SequenceGaussian`).
        length: J, actions in a sequence.
    """

    def __init__(self, experience: Rollouts, actor: Role, length: int) -> None:
        self.experience, self.length = experience, length
        self.act: OpenLoop = actor.model.actor(length)  # type: ignore[operator,assignment]
        self.random = np.random.Generator(np.random.PCG64(mix(experience.seed, 0x5E9)))

    @property
    def decisions(self) -> int:
        """Times that the actor looked, over all environments."""
        return self.act.decisions

    def advance(self, steps: int, into: Replay, random: bool = False) -> None:
        """Take ``steps`` steps in every environment; ``random`` ones are uniform and chosen step by step."""
        env = self.experience.environments
        observation = env.reset() if env.observation is None else env.observation
        space: Any = env.action_space
        for _ in range(steps):
            if random:
                action = self.random.uniform(space.low, space.high, (env.n, *space.shape)).astype(np.float32)
                self.act.took(action)
            else:
                noise = self.random.standard_normal((env.n, self.length * space.shape[0]), dtype=np.float32)
                action = self.act(observation, noise)["action"]
            step = env.step(action)
            ended = step.terminated | step.truncated
            following = step.observation
            if step.final is not None:
                following = with_rows(following, step.final, ended)
                self.act.begin(ended)
            into.add(observation, action, step.reward, following, step.terminated, step.truncated)
            observation = step.observation
        self.experience.taken += steps * env.n

    def state_dict(self) -> dict[str, Any]:
        """Random state, and what is left of the sequences under way."""
        return {"random": json.dumps(self.random.bit_generator.state), "act": self.act.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Environments that began new episodes begin new sequences."""
        self.random.bit_generator.state = json.loads(state["random"])
        self.act.load_state_dict(state["act"])
        if not self.experience.environments.saveable:
            self.act.begin()
