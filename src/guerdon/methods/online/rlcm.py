"""RLCM: a few-step image generator learns from any reward (Oertell et al., 2024, arXiv 2404.03673).

The sampling loop of a consistency model is short (2 to 16 steps), so it can be treated as a small decision
process: the state is the noisy image, the action the next noisy image, the reward comes with the clean image
at the end. Clipped policy gradient with per-prompt reward statistics then trains it; no critic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from guerdon.credit import PromptStatistics
from guerdon.errors import UsageError, nearest
from guerdon.experience.prompts import Prompted
from guerdon.feedback.base import Feedback
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.objectives.reward_difference import RewardDifference, pairs
from guerdon.optim import Adam
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run

Objective = Literal["clip", "rebel"]


@dataclass
class RLCM:
    """Reinforcement learning for consistency models. Defaults are the paper's for compressibility."""

    rounds: int = 1000  # rounds of sampling and learning (100 epochs of 10)
    samples: int = 16  # images a round (4 on each of 4 GPUs)
    steps: int = 8  # sampling steps H of the consistency model
    guidance: float = 8.0  # guidance scale, embedded in the model
    update_batch: int = 16  # images an optimiser step; all their steps count together
    clip: float = 1e-4  # how far the probability ratio may move from 1
    lr: float = 1e-4  # of Adam, decaying linearly to 2/3 at the last round
    lora_rank: int = 16  # 0 trains all weights of the denoiser
    lora_alpha: float = 32.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 5.0  # longer gradients are scaled down to this
    buffer_size: int = 16  # rewards remembered for each prompt
    min_count: int = 16  # with fewer, the whole round's mean and spread are used
    advantage_clamp: float = 10.0  # advantages are cut to plus or minus this
    objective: Objective = "clip"  # clipped surrogate, or regression of reward differences
    eta: float = 1.0  # scale of the log-ratios in the rebel objective
    kl: float = 0.0  # weight of the KL divergence from the untrained model (0: as published)
    ghost: bool = False  # also train on the released code's last transition, which no reward depends on
    micro_batch: int | None = None  # images (or pairs) a forward and backward pass; less memory, same update

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise UsageError(
                f"unknown objective '{self.objective}'; {nearest(self.objective, get_args(Objective))}"
            )
        if self.steps < 2 and not self.ghost:
            raise UsageError(
                f"steps is {self.steps}; the last step is no action, so it takes at least 2 to learn"
            )
        if self.objective == "rebel" and (self.samples % 2 or self.update_batch < 2):
            raise UsageError(
                "the rebel objective compares pairs: samples must be even, update_batch at least 2"
            )
        if self.objective == "rebel" and self.kl:
            raise UsageError(
                "the rebel objective has no kl weight; its eta keeps it near the policy that sampled"
            )

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        updates = self.rounds * -(-self.samples // self.update_batch)
        optimiser = Adam(self.lr, schedule="linear", total=3 * updates)
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        actor = RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)
        return {"actor": actor}

    def train(self, run: Run, actor: Role, experience: Prompted, feedback: Feedback) -> None:
        """Sample, score, compare with the prompt's own past rewards, take clipped steps; repeat."""
        reference = actor.copy(frozen=True)
        statistics = run.track("statistics", PromptStatistics(self.buffer_size, self.min_count))
        rebel = self.objective == "rebel"
        regression = RewardDifference(eta=self.eta, target="advantage")
        surrogate = ClippedSurrogate(clip=self.clip, kl=self.kl)
        for _ in run.steps(self.rounds):
            traj = experience.collect(
                actor,
                self.samples,
                group_size=2 if rebel else 1,
                steps=self.steps,
                guidance=self.guidance,
                ghost=self.ghost,
            )
            traj = traj.judged(feedback.score(traj))
            advantage = statistics.update(traj.group, traj.score())
            traj.advantage = traj.per_step(advantage.clamp(-self.advantage_clamp, self.advantage_clamp))
            if self.kl:
                traj.reference = reference.distribution(traj)
            if rebel:
                for pair in pairs(traj, "adjacent").minibatches(self.update_batch // 2, run.generator):
                    run.log(**actor.update(pair, regression))
            else:
                for batch in traj.minibatches(self.update_batch, run.generator):
                    run.log(**actor.update(batch.shuffle_steps(run.generator), surrogate))
            run.log(reward=traj.score().mean())
