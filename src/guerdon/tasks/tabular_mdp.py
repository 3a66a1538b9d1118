"""A finite Markov decision process whose values have closed forms, to hold policy improvement against the truth.

Policies are probabilities ``[S, A]``; learned ones are `guerdon.policies.tabular.CategoricalTable`s with the states as
contexts. `TabularMDP.batch` holds every action of every state, weighted so that the mean of an objective over it is the
exact expectation: what is left of an algorithm's error is its optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import ShapeError
from guerdon.policies.tabular import CategoricalTable


@dataclass
class TabularMDP:
    """S states, A actions, an infinite discounted horizon.

    Args:
        transition: ``[S, A, S]``, probabilities of the next state.
        reward: ``[S, A]``, the mean reward.
        start: ``[S]``, probabilities of the first state.
        gamma: discount.

    Raises `ShapeError` when the shapes do not fit or probabilities do not sum to one. Values are computed in the dtype
    of ``transition``.
    """

    transition: Float[Tensor, "state action next"]
    reward: Float[Tensor, "state action"]
    start: Float[Tensor, " state"]
    gamma: float = 0.9

    def __post_init__(self) -> None:
        states, actions, following = self.transition.shape
        if following != states or self.reward.shape != (states, actions) or self.start.shape != (states,):
            raise ShapeError(
                f"TabularMDP: transition {list(self.transition.shape)}, reward {list(self.reward.shape)} and start "
                f"{list(self.start.shape)} do not fit; they are [S, A, S], [S, A] and [S]"
            )
        sums = torch.cat([self.transition.sum(-1).flatten(), self.start.sum()[None]])
        if not torch.allclose(sums, torch.ones_like(sums)):
            raise ShapeError(
                "TabularMDP: the probabilities of next states, or of first states, do not sum to one"
            )

    @classmethod
    def random(cls, states: int = 5, actions: int = 4, gamma: float = 0.9, seed: int = 0) -> TabularMDP:
        """Next states from a flat Dirichlet distribution, rewards standard normal, first states uniform; float64."""
        generator = torch.Generator().manual_seed(seed)
        shares = torch.empty(states, actions, states, dtype=torch.float64).exponential_(generator=generator)
        reward = torch.randn(states, actions, generator=generator, dtype=torch.float64)
        start = torch.full((states,), 1.0 / states, dtype=torch.float64)
        return cls(shares / shares.sum(-1, keepdim=True), reward, start, gamma)

    # -- exact values --------------------------------------------------------------------------------------

    def value(self, policy: Float[Tensor, "state action"], entropy: float = 0.0) -> Float[Tensor, " state"]:
        """``[S]``, the expected return from each state. Each step also earns ``entropy`` times the policy's entropy."""
        reward = (policy * (self.reward - entropy * policy.clamp(min=1e-300).log())).sum(-1)
        onward = torch.einsum("sa,sat->st", policy, self.transition)
        return torch.linalg.solve(torch.eye(len(reward), dtype=reward.dtype) - self.gamma * onward, reward)

    def q(self, policy: Float[Tensor, "state action"], entropy: float = 0.0) -> Float[Tensor, "state action"]:
        """``[S, A]``, the expected return after each action; the entropy of this first step is not counted."""
        return self.reward + self.gamma * self.transition @ self.value(policy, entropy)

    def advantage(self, policy: Float[Tensor, "state action"]) -> Float[Tensor, "state action"]:
        """``[S, A]``: `q` minus `value`."""
        return self.q(policy) - self.value(policy)[:, None]

    def occupancy(self, policy: Float[Tensor, "state action"]) -> Float[Tensor, " state"]:
        """``[S]``, the discounted share of time spent in each state; sums to one."""
        onward = torch.einsum("sa,sat->st", policy, self.transition)
        visits = torch.linalg.solve(
            torch.eye(len(self.start), dtype=onward.dtype) - self.gamma * onward.T, self.start
        )
        return (1.0 - self.gamma) * visits

    def performance(self, policy: Float[Tensor, "state action"]) -> float:
        """The expected return from the first state."""
        return float(self.start @ self.value(policy))

    # -- learned policies ----------------------------------------------------------------------------------

    def policy(self) -> CategoricalTable:
        """A softmax policy, uniform to begin with."""
        states, actions = self.reward.shape
        return CategoricalTable([str(s) for s in range(states)], actions)

    def batch(self, policy: Float[Tensor, "state action"]) -> Trajectories:
        """Every action of every state, as ``S * A`` trajectories of one step.

        ``advantage`` is the exact one times ``A pi(a|s)``, so that the mean over the rows of ``rho advantage`` is the mean
        over states of ``sum_a pi_new(a|s) advantage(s, a)``. ``reference`` is the policy.
        """
        states, actions = policy.shape
        context = torch.arange(states).repeat_interleave(actions)[:, None]
        action = torch.arange(actions).repeat(states)[:, None]
        weighted = actions * policy * self.advantage(policy)
        log_policy = policy.log().float()
        rows = states * actions
        step = TensorDict({"context": context, "action": action}, batch_size=[rows, 1])
        return Trajectories(
            inputs=TensorDict({"step": step}, batch_size=[rows]),
            log_prob=log_policy.reshape(rows, 1),
            mask=torch.ones(rows, 1, dtype=torch.bool),
            advantage=weighted.float().reshape(rows, 1),
            reference=TensorDict({"logits": log_policy[context]}, batch_size=[rows, 1]),
        )


def mirror_step(
    policy: Float[Tensor, "state action"],
    gain: Float[Tensor, "state action"],
    step_size: float,
    entropy: float = 0.0,
) -> Float[Tensor, "state action"]:
    """The exact mirror-descent step with the KL divergence, ``pi^(1 - entropy t) exp(t gain)``, normalised: what maximises
    ``sum_a pi'(a) (gain(a) - entropy log pi(a)) - KL(pi' || pi) / t`` in each state (Tomar et al., 2022, section 4).

    Args:
        policy: ``pi_k``; gain: its advantages, or action values (a constant a state changes nothing).
        step_size: ``t``; entropy: the weight of an entropy term linearised at ``pi_k``.
    """
    return ((1.0 - entropy * step_size) * policy.log() + step_size * gain).softmax(-1)
