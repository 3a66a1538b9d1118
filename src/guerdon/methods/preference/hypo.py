"""HyPO: hybrid preference optimisation (Song et al., 2024, arXiv 2406.01462).

DPO on recorded pairs never looks at answers that no pair holds, and may move any mass there. HyPO adds the reverse KL on
answers that the actor gives itself, without labels: they come from wherever the mass went.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from guerdon.batch import Preferences, Trajectories
from guerdon.errors import UsageError
from guerdon.experience.datasets import Data, batch_count
from guerdon.experience.prompts import Prompted
from guerdon.objectives.hybrid import HybridPreference, PairsAndSamples
from guerdon.objectives.pair_losses import PairLoss
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.reverse_kl import ReverseKL
from guerdon.objectives.sides import with_reference
from guerdon.optim import AdamW, Schedule
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix, row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class HyPO:
    """DPO on recorded pairs plus a KL penalty on the policy's own samples. Defaults are the paper's (summaries)."""

    headline: ClassVar[str] = "accuracy"

    beta: float = 0.05  # strength of the anchor of the pairs' loss
    loss: PairLoss = "sigmoid"  # what is minimised of a pair's log-ratios
    kl: float = 1e-4  # weight of the KL on sampled answers, the paper's lambda; 0 is the pairs' loss alone
    target_kl: float | None = None  # nats that the weight is steered to, up and down; None keeps it
    dual_lr: float = 0.05  # how fast it is steered, up to a thousandfold either way
    k: int = 2  # sampled answers to a prompt; 2 and more are compared with one another
    credit: Literal["trajectory", "step"] = (
        "trajectory"  # a step pays for the whole answer or what follows it
    )
    online_prompts: Literal["pairs", "task", "both"] = (
        "pairs"  # whose prompts are answered: the batch's, unlabelled ones
    )
    epochs: int = 1  # passes over the pairs
    batch_size: int = 64  # pairs an optimiser step
    lr: float = 3e-6  # of AdamW
    schedule: Schedule = "constant"  # how it falls to zero until the last update (the paper: linear)
    lora_rank: int = 0  # train low-rank adapters instead of the weights (the paper: 1024)
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank (the paper: 2048)
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # pairs, with their samples, a forward and backward pass

    def __post_init__(self) -> None:
        if self.k < 1 or self.kl < 0:
            raise UsageError(f"k is {self.k} and kl is {self.kl}; expected at least 1 and at least 0")
        if self.target_kl is not None and (self.target_kl <= 0 or self.kl == 0):
            raise UsageError(
                f"target_kl is {self.target_kl} with kl {self.kl}; both must be positive to be steered"
            )

    @property
    def unread(self) -> set[str]:
        """Parameters of `train` that these options make no use of."""
        return {"experience"} if self.online_prompts == "pairs" else set()

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        optimiser = AdamW(self.lr, self.schedule, total=None)
        return {"actor": RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, preferences: Data, experience: Prompted | None = None) -> None:
        """A batch of pairs, fresh answers to its prompts, one update on both; repeat."""
        if self.online_prompts != "pairs" and experience is None:
            raise UsageError(
                f"online_prompts is '{self.online_prompts}', but there are no prompts beside the pairs; name a file with "
                "--prompts, or answer those of the pairs"
            )
        reference = actor.copy(frozen=True)
        pairs = PairwiseObjective(loss=self.loss, beta=self.beta)
        both = HybridPreference(pairs, ReverseKL(self.k > 1, self.credit), self.kl)
        actor.expect(batch_count(len(preferences), self.batch_size, self.epochs))
        for batch in run.batches(preferences, self.batch_size, self.epochs):
            batch = with_reference(batch, reference)
            if not self.kl:
                run.log(**actor.update(batch, pairs))
                continue
            answers = with_reference(self._answers(run, actor, batch, experience), reference)
            both.kl = run.state.get("kl", self.kl)
            metrics = actor.update(PairsAndSamples.joined(batch, answers, self.k), both)
            if self.target_kl is not None:
                run.log(kl_weight=both.kl)
                excess = min(max(float(metrics["kl"]) / self.target_kl - 1, -1.0), 1.0)
                weight = both.kl * math.exp(self.dual_lr * excess)
                run.state["kl"] = min(max(weight, self.kl / 1000), self.kl * 1000)
            run.log(**metrics)

    def _answers(
        self, run: Run, actor: Role, batch: Preferences, experience: Prompted | None
    ) -> Trajectories:
        """``k`` answers of the present actor to each prompt, drawn from its own distribution, untouched."""
        texts = batch.chosen.prompts
        more = experience.prompts.draw(len(texts)) if self.online_prompts != "pairs" else []
        new = [experience.prompts.texts[place] for place in more]
        if self.online_prompts == "both":
            texts = [text for pair in zip(texts, new, strict=True) for text in pair]
        elif self.online_prompts == "task":
            texts = new
        asked = [text for text in texts for _ in range(self.k)]
        first = actor.updates * 2 * self.batch_size * self.k  # no update shares a seed with another
        seeds = row_seeds(mix(run.seed, 0x4B4C), first, len(asked))
        return actor.sample(asked, seeds, temperature=1.0)
