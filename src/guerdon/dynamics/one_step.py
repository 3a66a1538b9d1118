"""One-step models of an environment, ``(state, action) -> next state``, and a planner that shoots through them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.policies.action_sequence import Encoder, OpenLoop, SequenceGaussian
from guerdon.policies.features import to_tensor


class OneStepModel(nn.Module):
    """A perceptron from state and action to the next state itself (not to the difference), unnormalised.

    Args:
        state: width of the state; action: number of action dimensions.
        hidden: widths of the perceptron.
        encoder: from observations to latent states, learned with the model; None where the state is the
            observation as a vector.
    """

    def __init__(
        self, state: int, action: int, hidden: Sequence[int] = (400, 300), encoder: Encoder | None = None
    ) -> None:
        super().__init__()
        self.encoder = encoder
        layers: list[nn.Module] = []
        width = state + action
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            width = size
        self.layers = nn.Sequential(*layers, nn.Linear(width, state))

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        """``[N, S]``, the states after ``action [N, A]`` in ``state [N, S]``."""
        return self.layers(torch.cat([state, action], -1))


class Shooting:
    """Plans action sequences at test time by the cross-entropy method, with the model, the critic and the actor that
    training left behind.

    A sequence is worth ``sum_j gamma^j (Q(s_j, a_j) - V(s_j))`` over the states that the model foresees, with ``Q``
    the least of the critic's members and ``V(s) = Q(s, pi(s))``. That is the discounted reward of the sequence plus
    the value of its end, up to a constant, with rewards as the critic implies them, ``r = Q(s, a) - gamma V(s')``: the
    sum telescopes. So no reward has to be learned.

    Args:
        actor: gives ``V``, and the action's range.
        critic: ``q(state, action) -> [members, N]``.
        model: ``(state, action) -> next state``.
        gamma: discount.
        samples: sequences drawn in a round; elites: the best of them, to which the distribution is fitted.
        rounds: how often.
        seed: of the draws.
    """

    def __init__(
        self,
        actor: SequenceGaussian,
        critic: Any,
        model: OneStepModel,
        gamma: float = 0.99,
        samples: int = 64,
        elites: int = 8,
        rounds: int = 4,
        seed: int = 0,
    ) -> None:
        self.policy, self.critic, self.model, self.gamma = actor, critic, model, gamma
        self.samples, self.elites, self.rounds = samples, elites, rounds
        self.generator = torch.Generator().manual_seed(seed)

    def actor(self, length: int = 1) -> OpenLoop:
        """An `OpenLoop` that plans every ``length`` steps."""

        @torch.no_grad()
        def plan(observation: Any, previous: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
            return self.plan(to_tensor(observation), torch.from_numpy(previous), length).numpy()

        return OpenLoop(plan, length, np.zeros(len(self.policy.low), np.float32))

    @torch.no_grad()
    def plan(self, observation: Any, previous_action: Tensor, length: int) -> Tensor:
        """``[N, length, A]`` for observations ``[N, ...]`` after ``previous_action [N, A]``."""
        state = self.policy.state(observation)
        rows, size = len(state), len(self.policy.low)
        low, high = self.policy.centre - self.policy.scale, self.policy.centre + self.policy.scale
        mean = self.policy.centre.expand(rows, 1, length, size)
        std = self.policy.scale.expand(rows, 1, length, size)
        for _ in range(self.rounds):
            noise = torch.randn(rows, self.samples, length, size, generator=self.generator)
            drawn = torch.maximum(torch.minimum(mean + std * noise, high), low)
            worth = self.worth(state, previous_action, drawn)
            best = worth.topk(self.elites, dim=1).indices[..., None, None].expand(-1, -1, length, size)
            elite = drawn.gather(1, best)
            mean = elite.mean(1, keepdim=True)
            std = elite.std(1, keepdim=True)
        return mean.squeeze(1)

    def worth(self, state: Tensor, previous_action: Tensor, actions: Tensor) -> Tensor:
        """``[N, K]``: what the ``actions [N, K, J, A]`` are worth from ``state [N, S]``."""
        rows, count, length, size = actions.shape
        state = state.repeat_interleave(count, 0)
        before, flat = previous_action.repeat_interleave(count, 0), actions.reshape(-1, length, size)
        total = torch.zeros(rows * count)
        for j in range(length):
            action = flat[:, j]
            habit = self.policy.mode_at(state, before)
            gain = self.critic.q(state, action).amin(0) - self.critic.q(state, habit).amin(0)
            total += self.gamma**j * gain
            state, before = self.model(state, action), action
        return total.view(rows, count)
