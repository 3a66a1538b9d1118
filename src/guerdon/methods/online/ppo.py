"""PPO: proximal policy optimisation (Schulman et al., 2017, arXiv 1707.06347), with or without a critic.

The same file trains a table of logits, a language model and an image generator: it only sees trajectories.
"""

from __future__ import annotations

from dataclasses import dataclass

from guerdon.credit import gae, normalise
from guerdon.experience.prompts import Prompted
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.objectives.value import ValueRegression
from guerdon.optim import Adam
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class PPO:
    """Proximal policy optimisation. Without a critic, the normalised return is every step's advantage."""

    rounds: int = 100  # rounds of sampling and learning
    samples: int = 256  # trajectories a round
    epochs: int = 4  # passes over each round's trajectories
    minibatch: int = 64  # trajectories an optimiser step
    clip: float = 0.2  # how far the probability ratio may move from 1
    gamma: float = 1.0  # discount of later rewards
    lam: float = 0.95  # lambda of generalised advantage estimation
    critic: bool = True  # learn a state value and use it for advantages
    value_clip: float | None = None  # how far a value may move in one update (none: free)
    lr: float = 3e-4  # of the actor's Adam
    critic_lr: float = 1e-3  # of the critic's Adam
    entropy: float = 0.0  # weight of an entropy bonus
    kl: float = 0.0  # weight of the KL divergence from the untrained policy
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 0.5  # longer gradients are scaled down to this
    micro_batch: int | None = None  # trajectories a forward and backward pass

    def roles(self) -> dict[str, RoleSettings]:
        """How actor and critic are held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        settings = {
            "actor": RoleSettings(
                Adam(self.lr, eps=1e-5), self.max_grad_norm, lora, micro_batch=self.micro_batch
            )
        }
        if self.critic:
            settings["critic"] = RoleSettings(
                Adam(self.critic_lr, eps=1e-5), self.max_grad_norm, micro_batch=self.micro_batch
            )
        return settings

    def train(
        self, run: Run, actor: Role, experience: Prompted, feedback: Feedback, critic: Role | None = None
    ) -> None:
        """Sample, score, estimate advantages, take clipped steps over several epochs; repeat."""
        reference = actor.copy(frozen=True)
        objective = ClippedSurrogate(clip=self.clip, entropy=self.entropy, kl=self.kl)
        regression = ValueRegression(clip=self.value_clip)
        for _ in run.steps(self.rounds):
            traj = experience.collect(actor, self.samples)
            traj = traj.judged(feedback.score(traj))
            if critic is not None:
                traj.value = critic.value(traj)
                advantage, traj.target = gae(
                    traj.reward, traj.value, traj.mask, gamma=self.gamma, lam=self.lam
                )
            else:
                advantage = traj.per_step(traj.score())
            traj.advantage = normalise(advantage, traj.mask)
            if self.kl:
                traj.reference = reference.distribution(traj)
            for _ in range(self.epochs):
                for batch in traj.minibatches(self.minibatch, run.generator):
                    run.log(**actor.update(batch, objective))
                    if critic is not None:
                        run.log(value_loss=critic.update(batch, regression)["loss"])
            run.log(reward=traj.score().mean())
