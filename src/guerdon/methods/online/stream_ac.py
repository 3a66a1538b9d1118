"""Stream AC(lambda): an actor and a critic from each step once, as it arrives (Elsayed et al., 2024,
arXiv 2410.14606, algorithm 6). Discrete actions by a softmax, continuous ones by a Gaussian.

No replay, no batch, no parallel environments. With ``optimiser="sgd"`` and without LayerNorm, sparse weights and
scaling it is the classic actor-critic with eligibility traces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from guerdon.errors import NonFiniteError, UsageError
from guerdon.experience.environments import Environments
from guerdon.experience.rollouts import Rollouts
from guerdon.experience.stream import Stream, time_limit
from guerdon.optim import SGD
from guerdon.policies.small import Choice, Normal, SmallController, SmallNetwork, differentiable
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.streaming import Learner, RuleName, make_rule


@dataclass
class StreamAC:
    """Actor and critic from a stream; one setting for all domains."""

    steps: int = 2_000_000  # steps of the environment, and of the optimisers
    gamma: float = 0.99  # discount of later rewards
    lam: float = 0.8  # decay of the eligibility traces beside gamma (0: no traces)
    optimiser: RuleName = "obgd"  # bounded steps, bounded and adaptive, or plain
    alpha: float = 1.0  # the largest step size; with "sgd" the step size
    kappa_policy: float = 3.0  # caution of the actor's bound
    kappa_value: float = 2.0  # caution of the critic's bound
    entropy: float = 0.01  # weight of the policy's entropy
    hidden: tuple[int, ...] = (128, 128)  # units of the fully connected layers
    layer_norm: bool = True  # normalise each layer before its non-linearity
    sparsity: float = 0.9  # share of initial weights that are 0
    normalise: bool = True  # normalise observations
    scale_reward: bool = True  # scale rewards
    time_feature: bool = True  # append the time in the episode to vector observations
    bootstrap_truncated: bool = False  # a cut episode goes on in its value (published: it ends)
    count_overshoots: bool = False  # how often a step changes the sign of its TD error; costs two passes
    log_every: int = 1000  # steps a record

    def models(
        self, environments: Environments, generator: torch.Generator | None = None
    ) -> dict[str, nn.Module]:
        """The networks of the paper for an environment, their weights drawn by ``generator`` (torch's own if None)."""
        timed = self._time_limit(environments) is not None
        shape = tuple(environments.observation_space.shape or ())
        inputs = (shape[0] + 1,) if timed else shape
        head = _head(environments)

        def network(outputs: int) -> SmallNetwork:
            return SmallNetwork(inputs, outputs, self.hidden, self.layer_norm, self.sparsity, generator)

        name = "choice" if isinstance(head, Choice) else "normal"
        return {"actor": SmallController(network(head.outputs), name, timed), "critic": network(1)}

    def _time_limit(self, environments: Environments) -> int | None:
        vector = len(environments.observation_space.shape or ()) == 1
        return time_limit(environments) if self.time_feature and vector else None

    def roles(self) -> dict[str, RoleSettings]:
        """How the networks are held: the steps are the learners', the roles only keep the weights."""
        return {"actor": RoleSettings(SGD(self.alpha)), "critic": RoleSettings(SGD(self.alpha))}

    @np.errstate(over="ignore", invalid="ignore", divide="ignore")  # the TD error tells
    def train(self, run: Run, actor: Role, critic: Role, experience: Rollouts) -> None:
        """Act, see what follows, step both once along their traces, forget; repeat."""
        environments = experience.environments
        limit = self._time_limit(environments)
        stream = run.track(
            "stream", Stream(environments, self.gamma, self.normalise, self.scale_reward, limit)
        )
        decay = self.gamma * self.lam
        policy = run.track(
            "policy_learner",
            Learner(
                differentiable(actor.model.features, actor.flat_weights()),
                make_rule(self.optimiser, self.alpha, self.kappa_policy),
                decay,
            ),
        )
        value = run.track(
            "value_learner",
            Learner(
                differentiable(critic.model, critic.flat_weights()),
                make_rule(self.optimiser, self.alpha, self.kappa_value),
                decay,
            ),
        )
        head = _head(environments)
        kind, width = head.noise
        draw = torch.randn if kind == "normal" else torch.rand
        one = np.ones(1, dtype=np.float32)

        for record in run.steps(-(-self.steps // self.log_every)):
            count = min(self.log_every, self.steps - record * self.log_every)
            if stream.fresh:  # also where a resumed run had to leave an episode
                policy.reset()
                value.reset()
            errors, overshoots = 0.0, 0

            for noise in draw(count, width, generator=run.generator).numpy():
                observation = stream.observation
                output, policy_tape = policy.forward(observation)
                if not math.isfinite(output.sum()):
                    raise NonFiniteError(
                        "the policy's outputs are not finite: its weights have diverged; try a smaller step size, "
                        "or ObGD, which bounds it"
                    )
                action, drawn = head.draw(output, noise)
                v, value_tape = value.forward(observation)
                move = stream.step(action)
                done = move.terminated or move.truncated
                over = move.terminated or (move.truncated and not self.bootstrap_truncated)

                bootstrap = 0.0 if over else self.gamma * float(value.predict(move.observation)[0])
                delta = move.reward + bootstrap - float(v[0])

                # the sign cancels that of the delta which multiplies the trace: entropy is always pushed up
                push = math.copysign(self.entropy, delta) if delta else 0.0
                policy.accumulate(policy_tape, head.gradient(drawn, push))
                value.accumulate(value_tape, one)
                policy.step(delta)
                value.step(delta)
                if done:
                    policy.reset()
                    value.reset()

                errors += abs(delta)
                if self.count_overshoots:
                    bootstrap = 0.0 if over else self.gamma * float(value.predict(move.observation)[0])
                    after = move.reward + bootstrap - float(value.predict(observation)[0])
                    overshoots += after * delta < 0

            actor.updates += count
            critic.updates += count
            if stream.normalise is not None:
                actor.model.take_statistics(stream.normalise.statistics)  # type: ignore[operator]
            experience.taken += count
            run.log(**experience.statistics(), td_error=errors / count)
            if returns := stream.returns():
                run.log(episode_return=sum(returns) / len(returns))
            if self.count_overshoots:
                run.log(overshoots=overshoots / count)


def _head(environments: Environments) -> Choice | Normal:
    """The distribution for an environment's actions."""
    space = environments.action_space
    if isinstance(space, spaces.Discrete):
        return Choice(int(space.n))
    if isinstance(space, spaces.Box) and len(space.shape) == 1:
        return Normal(space.shape[0])
    raise UsageError(
        f"{environments.id} takes actions from {space}; stream_ac knows Discrete and Box with one axis"
    )
