"""The reward that a preference-tuned policy stands for, as a judge (Rafailov et al., 2023, section 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Trajectories


@dataclass
class ImplicitReward:
    """``beta (log pi - log pi_ref)``, of whole answers, or token by token.

    Args:
        policy, reference: roles or policies.
        beta: what the policy was trained with.
        dense: give each token its own reward ``[B, T]`` instead of their sum ``[B]``.
    """

    policy: Any
    reference: Any
    beta: float = 0.1
    dense: bool = False
    name: str = "implicit"

    @torch.no_grad()
    def score(self, traj: Trajectories) -> Tensor:
        """``[B]``, or ``[B, T]`` where ``dense``."""
        reward = self.beta * (self.policy.log_prob(traj) - self.reference.log_prob(traj))
        return reward if self.dense else reward.sum(1)

    def compare(self, a: Trajectories, b: Trajectories) -> Tensor:
        """``[B]``: Bradley and Terry's probability that ``a`` is preferred to ``b``."""
        return torch.sigmoid(self._total(a) - self._total(b))

    def _total(self, traj: Trajectories) -> Tensor:
        score = self.score(traj)
        return score.sum(1) if self.dense else score
