"""DPO: direct preference optimisation (Rafailov et al., 2023, arXiv 2305.18290), and the losses that followed it.

The optimum of a reward under a KL penalty tells what the reward must have been: the log-ratio of the policy to the
reference. Put into the Bradley-Terry model of pairs, this turns reinforcement learning into one logistic loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from guerdon.evaluation.language import sequence_kl
from guerdon.experience.datasets import Data, batch_count
from guerdon.experience.views import cached_reference
from guerdon.objectives.divergence import FDivergence
from guerdon.objectives.pair_losses import PairLoss
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.sides import with_reference
from guerdon.optim import AdamW, RMSprop, Schedule
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix, row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class DPO:
    """Direct preference optimisation. Defaults are the paper's (6 billion weights, batches of 64)."""

    headline: ClassVar[str] = "accuracy"

    beta: float = 0.1  # strength of the KL anchor
    loss: PairLoss = "sigmoid"  # what is minimised of a pair's log-ratios
    label_smoothing: float = (
        0.0  # share of labels taken to be wrong (cDPO; robust and exo_pair read it their way)
    )
    reference_free: bool | None = None  # leave the reference out; by default as the loss was published
    length_normalise: bool | None = (
        None  # means over tokens instead of sums; by default as the loss was published
    )
    divergence: FDivergence = "reverse_kl"  # what holds the policy near the reference
    unlikelihood: float = 1.0  # weight of the rejected answers (loss unlikelihood)
    nll: float = 0.0  # weight of the chosen answers' negative log-likelihood (RPO)
    epochs: int = 1  # passes over the pairs
    batch_size: int = 64  # pairs an optimiser step
    optimiser: Literal["rmsprop", "adamw"] = "rmsprop"  # the paper's, or the usual one
    lr: float = 1e-6  # of the optimiser
    warmup: int = 150  # updates over which the learning rate rises from zero
    schedule: Schedule = "constant"  # how it falls to zero until the last update
    kl_every: int = 0  # updates between estimates of the KL to the reference, on fresh answers; 0 makes none
    cache_reference: bool = False  # evaluate the reference once for all pairs, before training
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 10.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # pairs a forward and backward pass

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        make = RMSprop if self.optimiser == "rmsprop" else AdamW
        optimiser = make(self.lr, self.schedule, self.warmup, total=None)
        return {"actor": RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, preferences: Data) -> None:
        """Fit the log-ratios to the pairs, a batch at a time; the reference is the actor as it was."""
        reference = actor.copy(frozen=True)
        objective = PairwiseObjective(
            loss=self.loss,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            reference_free=self.reference_free,
            length_normalise=self.length_normalise,
            divergence=self.divergence,
            unlikelihood=self.unlikelihood,
            nll=self.nll,
        )
        if self.cache_reference and objective.reads_reference:
            preferences = cached_reference(preferences, reference)
        actor.expect(batch_count(len(preferences), self.batch_size, self.epochs))
        for batch in run.batches(preferences, self.batch_size, self.epochs):
            if objective.reads_reference and batch.chosen.reference_log_prob is None:
                batch = with_reference(batch, reference)
            objective.delta = run.state.get("delta", 0.0)
            metrics = actor.update(batch, objective)
            if self.loss == "bco_pair":
                objective.track(metrics)
                run.state["delta"] = objective.delta
            run.log(**metrics)
            if self.kl_every and actor.updates % self.kl_every == 0:
                prompts = batch.chosen.prompts
                seeds = row_seeds(mix(run.seed, 0xD90), actor.updates * self.batch_size, len(prompts))
                run.log(kl=sequence_kl(actor, reference, actor.sample(prompts, seeds)).mean())
