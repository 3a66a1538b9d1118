"""A contextual bandit with known means: the smallest problem on which a policy can learn from reward.

Four contexts, five actions. The mean reward of an action is a fixed table with values in [0, 1]; the best
action differs by context. Everything about it has a closed form: a policy that has learned it earns
`Bandit.best`, a uniform one `Bandit.uniform`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from guerdon.critics.state import TableCritic
from guerdon.errors import UsageError
from guerdon.experience.prompts import Prompted, Prompts
from guerdon.feedback.base import Feedback
from guerdon.feedback.functions import FunctionReward, parse_reward
from guerdon.policies.base import Policy
from guerdon.policies.tabular import CategoricalTable
from guerdon.randomness import row_seeds
from guerdon.roles import Role
from guerdon.tasks.base import Measured, Task

CONTEXTS = ("north", "east", "south", "west")
# rows: contexts; columns: actions
MEANS = np.array(
    [
        [0.1, 0.2, 0.9, 0.3, 0.4],
        [0.8, 0.1, 0.3, 0.5, 0.2],
        [0.2, 0.4, 0.1, 0.3, 0.7],
        [0.3, 0.9, 0.2, 0.6, 0.1],
    ],
    dtype=np.float32,
)


def payoff(actions: np.ndarray, prompts: list[str]) -> np.ndarray:
    """The mean reward of each chosen action in its context."""
    rows = [CONTEXTS.index(p) for p in prompts]
    return MEANS[rows, actions[:, 0]]


class Bandit(Task):
    """See the module."""

    name: ClassVar[str] = "bandit"
    summary: ClassVar[str] = "a contextual bandit with known means"
    kinds: ClassVar[tuple[str, ...]] = ("categorical",)
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "reinforce": {"rounds": 100, "samples": 64, "lr": 0.05},
        "ppo": {"rounds": 60, "samples": 64, "minibatch": 64, "lr": 0.05, "critic_lr": 0.05, "entropy": 0.0},
        "grpo": {"rounds": 60, "prompts_per_round": 8, "group_size": 8, "minibatch": 64, "lr": 0.05},
        "rebel": {"rounds": 100, "prompts_per_round": 32, "lr": 0.05},
    }
    best: ClassVar[float] = float(MEANS.max(1).mean())
    uniform: ClassVar[float] = float(MEANS.mean())

    def policy(self, kind: str) -> Policy:
        if self.pieces.model is not None:
            return CategoricalTable.from_pretrained(self.pieces.model)
        return CategoricalTable(CONTEXTS, MEANS.shape[1])

    def critic(self, policy: Policy) -> nn.Module:
        return TableCritic(CONTEXTS)

    def experience(self, seed: int) -> Prompted:
        if self.pieces.prompts is not None:
            raise UsageError("task 'bandit' has fixed contexts; --prompts does not apply")
        return Prompted(Prompts(CONTEXTS, seed=seed), seed=seed)

    def feedback(self) -> Feedback:
        return parse_reward(self.pieces.reward or "payoff", {"payoff": lambda: FunctionReward(payoff)})

    def measure(self, actor: Role, feedback: Feedback, **sampling: Any) -> Measured:
        prompts = list(CONTEXTS) * 64
        traj = actor.sample(prompts, row_seeds(7, 0, len(prompts)))
        traj = traj.judged(feedback.score(traj))
        probabilities = torch.stack(
            [actor.distribution(traj[i : i + 1])["logits"][0, 0].softmax(-1) for i in range(4)]
        )
        expected = float((probabilities.cpu() * torch.from_numpy(MEANS)).sum(1).mean())
        return Measured({"reward": traj.score().mean().item(), "expected": expected}, traj)
