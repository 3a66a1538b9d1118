"""Stream Q(lambda) and SARSA(lambda): action values from each step once, as it arrives (Elsayed et al., 2024,
arXiv 2410.14606, algorithms 4 and 5).

No replay, no batch, no target network. With ``optimiser="sgd"`` and without LayerNorm, sparse weights and scaling
it is the classic Q(lambda) of Watkins (1989) with a neural network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from gymnasium import spaces

from guerdon.errors import UsageError, nearest
from guerdon.experience.environments import Environments
from guerdon.experience.rollouts import Rollouts
from guerdon.experience.stream import Stream, time_limit
from guerdon.optim import SGD
from guerdon.policies.small import SmallController, SmallNetwork, differentiable
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.streaming import Learner, RuleName, make_rule

Target = Literal["max", "sarsa"]


@dataclass
class StreamQ:
    """Action values from a stream; one setting for all domains."""

    steps: int = 500_000  # steps of the environment, and of the optimiser
    target: Target = "max"  # value of the next state: its best action (Q) or the one taken there (SARSA)
    gamma: float = 0.99  # discount of later rewards
    lam: float = 0.8  # decay of the eligibility trace beside gamma (0: no traces)
    optimiser: RuleName = "obgd"  # bounded steps, bounded and adaptive, or plain
    alpha: float = 1.0  # the largest step size; with "sgd" the step size
    kappa: float = 2.0  # caution of the bound
    epsilon_start: float = 1.0  # share of random actions at first
    epsilon_end: float = 0.01  # and from then on
    exploration_fraction: float = 0.05  # share of the steps over which it falls
    hidden: tuple[int, ...] = (32, 32)  # units of the fully connected layers
    layer_norm: bool = True  # normalise each layer before its non-linearity
    sparsity: float = 0.9  # share of initial weights that are 0
    normalise: bool = True  # normalise observations
    scale_reward: bool = True  # scale rewards
    time_feature: bool = True  # append the time in the episode to vector observations
    bootstrap_truncated: bool = False  # a cut episode goes on in its value (published: it ends)
    count_overshoots: bool = False  # how often a step changes the sign of its TD error; costs two passes
    log_every: int = 1000  # steps a record

    def __post_init__(self) -> None:
        if self.target not in get_args(Target):
            raise UsageError(f"unknown target '{self.target}'; {nearest(self.target, get_args(Target))}")

    def models(
        self, environments: Environments, generator: torch.Generator | None = None
    ) -> dict[str, SmallController]:
        """The network of the paper for an environment with discrete actions, its weights drawn by ``generator``
        (torch's own if None)."""
        space = environments.action_space
        if not isinstance(space, spaces.Discrete):
            raise UsageError(
                f"{environments.id} has no list of actions; stream_q needs one, stream_ac does not"
            )
        timed = self._time_limit(environments) is not None
        shape = tuple(environments.observation_space.shape or ())
        network = SmallNetwork(
            (shape[0] + 1,) if timed else shape,
            int(space.n),
            self.hidden,
            self.layer_norm,
            self.sparsity,
            generator,
        )
        return {"actor": SmallController(network, "greedy", timed)}

    def _time_limit(self, environments: Environments) -> int | None:
        vector = len(environments.observation_space.shape or ()) == 1
        return time_limit(environments) if self.time_feature and vector else None

    def roles(self) -> dict[str, RoleSettings]:
        """How the network is held: the steps are the learner's, the role only keeps its weights."""
        return {"actor": RoleSettings(SGD(self.alpha))}

    @np.errstate(over="ignore", invalid="ignore")  # the TD error tells
    def train(self, run: Run, actor: Role, experience: Rollouts) -> None:
        """Act, see what follows, step once along the trace, forget; repeat."""
        environments = experience.environments
        limit = self._time_limit(environments)
        stream = run.track(
            "stream", Stream(environments, self.gamma, self.normalise, self.scale_reward, limit)
        )
        network = differentiable(actor.model.features, actor.flat_weights())
        rule = make_rule(self.optimiser, self.alpha, self.kappa)
        learner = run.track("learner", Learner(network, rule, self.gamma * self.lam))
        sarsa, gamma, n = self.target == "sarsa", self.gamma, network.predict(stream.observation).size
        only = np.eye(n, dtype=np.float32)  # row a picks the value of action a
        fall = self.exploration_fraction * self.steps

        for record in run.steps(-(-self.steps // self.log_every)):
            first = record * self.log_every
            count = min(self.log_every, self.steps - first)
            chances = torch.rand(count, 4, generator=run.generator).tolist()
            ahead: int | None = run.state.pop("action", None)  # what SARSA has chosen already
            if stream.fresh:  # also where a resumed run had to leave an episode
                learner.reset()
                ahead = None
            errors, overshoots = 0.0, 0

            for t, (now, which, later, which_later) in enumerate(chances, first + 1):
                share = min(t / fall, 1.0) if fall else 1.0
                epsilon = self.epsilon_start + share * (self.epsilon_end - self.epsilon_start)

                observation = stream.observation
                q, tape = learner.forward(observation)
                best = int(q.argmax())
                drawn = int(which * n) if now < epsilon else best
                action = drawn if ahead is None else ahead
                move = stream.step(action)
                done = move.terminated or move.truncated
                over = move.terminated or (move.truncated and not self.bootstrap_truncated)

                following = learner.predict(move.observation)
                choice = int(following.argmax())
                if sarsa and later < epsilon:
                    choice = int(which_later * n)
                bootstrap = 0.0 if over else gamma * float(following[choice])
                delta = move.reward + bootstrap - float(q[action])

                learner.accumulate(tape, only[action])
                learner.step(delta)
                # cut after the step; a random action that is the best one is no departure from the policy
                if done or (action != best and not sarsa):
                    learner.reset()
                ahead = choice if sarsa and not done else None

                errors += abs(delta)
                if self.count_overshoots:
                    following = learner.predict(move.observation)
                    value = float(following[choice] if sarsa else following.max())
                    bootstrap = 0.0 if over else gamma * value
                    after = move.reward + bootstrap - float(learner.predict(observation)[action])
                    overshoots += after * delta < 0

            if ahead is not None:
                run.state["action"] = ahead
            actor.updates += count
            actor.model.epsilon = epsilon  # type: ignore[assignment]
            if stream.normalise is not None:
                actor.model.take_statistics(stream.normalise.statistics)  # type: ignore[operator]
            experience.taken += count
            run.log(**experience.statistics(), epsilon=epsilon, td_error=errors / count)
            if returns := stream.returns():
                run.log(episode_return=sum(returns) / len(returns))
            if self.count_overshoots:
                run.log(overshoots=overshoots / count)
