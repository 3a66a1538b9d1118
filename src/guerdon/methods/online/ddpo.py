"""DDPO: a diffusion model learns from any reward (Black et al., 2023, arXiv 2305.13301).

The stochastic DDIM sampler (eta = 1) is a decision process of some fifty denoising steps; each is a Gaussian
whose probability is known. Clipped policy gradient on all of them, advantages from per-prompt statistics.
"""

from __future__ import annotations

from dataclasses import dataclass

from guerdon.credit import PromptStatistics
from guerdon.errors import UsageError
from guerdon.experience.prompts import Prompted
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class DDPO:
    """Denoising diffusion policy optimisation, importance-sampled form. Defaults are the paper's."""

    rounds: int = 100  # rounds of sampling and learning
    samples: int = 256  # images a round
    steps: int = 50  # denoising steps of the sampler
    eta: float = 1.0  # noise of the sampler: 1 is DDPM-like
    guidance: float = 5.0  # classifier-free guidance, in sampling and in training
    update_batch: int = 128  # images an optimiser step (two updates a round)
    clip: float = 1e-4  # how far the probability ratio may move from 1
    lr: float = 3e-4  # of AdamW, for LoRA weights (1e-5 for all weights)
    weight_decay: float = 1e-4  # of AdamW
    lora_rank: int = 4  # 0 trains all weights of the denoiser
    lora_alpha: float = 4.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    buffer_size: int = 32  # rewards remembered for each prompt
    min_count: int = 16  # with fewer, the whole round's mean and spread are used
    advantage_clamp: float = 5.0  # advantages are cut to plus or minus this
    kl: float = 0.0  # weight of the KL divergence from the untrained model
    micro_batch: int | None = None  # images a forward and backward pass
    micro_steps: int | None = None  # denoising steps a forward and backward pass

    def __post_init__(self) -> None:
        if self.eta <= 0:
            raise UsageError(f"eta is {self.eta}; a sampler without noise takes no actions to learn from")

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        optimiser = AdamW(self.lr, weight_decay=self.weight_decay)
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        parts = {"micro_batch": self.micro_batch, "micro_steps": self.micro_steps}
        return {"actor": RoleSettings(optimiser, self.max_grad_norm, lora, **parts)}

    def train(self, run: Run, actor: Role, experience: Prompted, feedback: Feedback) -> None:
        """Sample, score, compare with the prompt's own past rewards, take clipped steps; repeat."""
        reference = actor.copy(frozen=True)
        statistics = run.track("statistics", PromptStatistics(self.buffer_size, self.min_count))
        objective = ClippedSurrogate(clip=self.clip, kl=self.kl)
        for _ in run.steps(self.rounds):
            traj = experience.collect(
                actor, self.samples, steps=self.steps, eta=self.eta, guidance=self.guidance
            )
            traj = traj.judged(feedback.score(traj))
            advantage = statistics.update(traj.group, traj.score())
            traj.advantage = traj.per_step(advantage.clamp(-self.advantage_clamp, self.advantage_clamp))
            if self.kl:
                traj.reference = reference.distribution(traj)
            for batch in traj.minibatches(self.update_batch, run.generator):
                run.log(**actor.update(batch.shuffle_steps(run.generator), objective))
            run.log(reward=traj.score().mean())
