"""PPO: proximal policy optimisation (Schulman et al., 2017, arXiv 1707.06347), with or without a critic.

The same file trains a controller, a table of logits, a language model and an image generator: it only sees
trajectories. Where the experience comes in steps of an environment rather than in whole trajectories, each step
is a row of a minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from guerdon.credit import advantages, normalise, returns_to_go
from guerdon.experience.base import Experience
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.objectives.value import ValueRegression
from guerdon.optim import Adam, Schedule
from guerdon.policies.features import Activation
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class PPO:
    """Proximal policy optimisation. Without a critic, the normalised return is every step's advantage."""

    rounds: int = 100  # rounds of sampling and learning
    samples: int = 256  # trajectories a round (of environments: steps)
    epochs: int = 4  # passes over each round's samples
    minibatch: int = 64  # trajectories (of environments: steps) an optimiser step
    clip: float = 0.2  # how far the probability ratio may move from 1
    gamma: float = 1.0  # discount of later rewards
    lam: float = 0.95  # lambda of generalised advantage estimation
    critic: bool = True  # learn a state value and use it for advantages
    value_clip: float | None = None  # how far a value may move in one update (none: free)
    lr: float = 3e-4  # of the actor's Adam
    critic_lr: float = 1e-3  # of the critic's Adam
    schedule: Schedule = "constant"  # of both learning rates and the clip range
    entropy: float = 0.0  # weight of an entropy bonus
    kl: float = 0.0  # weight of the KL divergence from the untrained policy
    target_kl: float | None = None  # stop a round's passes when the policy has moved this far
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this
    micro_batch: int | None = None  # trajectories a forward and backward pass
    environments: int = 8  # environments side by side (controllers)
    hidden: tuple[int, ...] = (64, 64)  # widths of a controller's networks
    activation: Activation = "tanh"  # of a controller's networks
    normalise_observation: bool = False  # by running statistics, saved with the controller
    scale_reward: bool = False  # divide rewards by the running deviation of the return
    head: Literal["mse", "hl_gauss", "two_hot", "mse_softmax"] = (
        "mse"  # how a controller's critic holds values
    )

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        total = self.rounds * self.epochs * -(-self.samples // max(1, self.minibatch))

        def settings(lr: float, lora: LoRA | None) -> RoleSettings:
            adam = Adam(lr, self.schedule, total=total, eps=1e-5)
            return RoleSettings(adam, self.max_grad_norm, lora, micro_batch=self.micro_batch)

        roles = {"actor": settings(self.lr, lora)}
        if self.critic:
            roles["critic"] = settings(self.critic_lr, None)
        return roles

    def train(
        self, run: Run, actor: Role, experience: Experience, feedback: Feedback, critic: Role | None = None
    ) -> None:
        """Sample, score, estimate advantages, take clipped steps over several epochs; repeat."""
        reference = actor.copy(frozen=True)
        objective = ClippedSurrogate(clip=self.clip, entropy=self.entropy, kl=self.kl)
        regression = ValueRegression(clip=self.value_clip)
        for step in run.steps(self.rounds):
            if self.schedule == "linear":
                objective.clip = torch.tensor(self.clip * (1 - step / self.rounds))
            traj = experience.collect(actor, self.samples)
            traj = traj.judged(feedback.score(traj))
            if critic is not None:
                traj.value = critic.value(traj)
                advantage, traj.target = advantages(
                    traj, critic.next_value(traj), gamma=self.gamma, lam=self.lam
                )
            else:
                ended = None if traj.truncated is None else traj.terminated | traj.truncated
                advantage = returns_to_go(traj.reward, traj.mask, self.gamma, ended=ended)
            traj.advantage = normalise(advantage, traj.mask)
            if self.kl:
                traj.reference = reference.distribution(traj)
            data = traj.as_rows() if experience.unit == "step" else traj
            passes = {"epochs": self.epochs, "minibatch": self.minibatch, "generator": run.generator}
            run.log(**actor.fit(data, objective, stop=self._moved_far, **passes))
            if critic is not None:
                run.log(value_loss=critic.fit(data, regression, **passes)["loss"])
            run.log(**experience.statistics(traj))

    def _moved_far(self, metrics: dict[str, torch.Tensor]) -> bool:
        return self.target_kl is not None and bool(metrics["approx_kl"] > self.target_kl)
