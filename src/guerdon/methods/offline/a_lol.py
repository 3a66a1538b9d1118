"""A-LoL: advantage-leftover lunch (Baheti et al., 2024, arXiv 2305.14718).

Any recorded answers with rewards teach a language model without a single answer being generated while it learns. A
whole answer is one action, so the value of a prompt needs no critic of tokens: it is fitted once, to the rewards of the
reference's own answers. Recorded answers below it are dropped, the rest are drawn and weighted by their advantage.

The method's variants and the baselines of the paper are settings:

    A-LoL                weight=advantage importance=sequence      R-LoL   weight=reward importance=sequence
    A-LoL seq            weight=advantage importance=token         wBC     weight=reward importance=none
    A-LoL reference-free weight=advantage importance=none          R-GOLD  weight=reward importance=none gold=0.1
    A-LoL KL             weight=advantage importance=none kl=0.1   NLL     weight=none importance=none
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from guerdon.critics.prompt_value import HeadName, PromptValue, advantages, fit_prompt_value, prompt_states
from guerdon.errors import UsageError
from guerdon.evaluation.language import answer_figures
from guerdon.experience.datasets import Data
from guerdon.experience.prompts import Prompted
from guerdon.experience.views import Rescored, Subset, cached_reference
from guerdon.feedback.base import Feedback
from guerdon.objectives.likelihood import Ratio, Weighing, WeightedLikelihood
from guerdon.objectives.sides import with_reference
from guerdon.optim import AdamW
from guerdon.policies.lora import LoRA
from guerdon.randomness import mix, row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run
from guerdon.sampling import PrioritySampler, priorities


@dataclass
class ALoL:
    """Weighted likelihood of recorded answers of positive advantage. Defaults are the paper's (7 billion weights)."""

    headline: ClassVar[str] = "nll"

    weight: Weighing = "advantage"  # what the likelihood of an answer is weighted by
    importance: Ratio = "sequence"  # times the ratio to the reference, of whole answers or of tokens
    clip: float | None = 0.9  # the ratio is clamped to 1 - clip and 1 + clip
    kl: float = 0.0  # instead of a ratio, add this times the mean log-ratio to the reference
    gold: float | None = None  # multiply each token by its own probability, at least this (R-GOLD)
    priority: Literal["good_priority", "good_random"] = "good_priority"  # draw by advantage, or all alike
    value_head: HeadName = "attention"  # that reads the value of a prompt from the reference's states
    max_value: float = 1.0  # the largest possible reward; the smallest is 0
    sigmoid: bool = False  # take the sigmoid of all rewards first, as for a reward model's scores
    value_answers: int | None = None  # answers of the reference to fit the value to; by default one a prompt
    value_greedy: bool = True  # its likeliest answers, as published, or drawn ones
    value_epochs: int = 10  # passes over them
    value_lr: float = 1e-5  # of AdamW, for the value
    steps: int = 9000  # updates if all recorded answers are kept; of fewer, their share of it
    batch_size: int = 16  # answers an optimiser step
    lr: float = 2e-4  # of AdamW
    lora_rank: int = 64  # train low-rank adapters of the actor; 0 trains its weights (the paper: at 2e-5)
    lora_alpha: float = 16.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 0.3  # longer gradients are scaled down to this
    micro_batch: int | None = None  # answers a forward and backward pass
    cache_reference: bool = False  # evaluate the reference once for all kept answers, before training
    shown: int = 256  # answers sampled after training for reward, length and diversity; 0 for none

    def __post_init__(self) -> None:
        if self.importance != "none" and (self.kl or self.gold is not None):
            raise UsageError(
                f"importance is '{self.importance}' together with kl {self.kl} and gold {self.gold}: they are different "
                "methods; set importance to none"
            )

    @property
    def judged(self) -> bool:
        """Whether a judge is needed: for the value of prompts."""
        return self.weight == "advantage"

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        optimiser = AdamW(self.lr, eps=1e-6)
        return {"actor": RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, rated: Data, experience: Prompted, feedback: Feedback) -> None:
        """Fit the value of prompts, keep the recorded answers above it, raise their likelihood by advantage."""
        reference, advantage = actor.copy(frozen=True), None
        rated = Rescored(rated, torch.sigmoid) if self.sigmoid else rated
        if self.weight == "advantage":
            value = self.fit_value(run, reference, experience, feedback)
            advantage = advantages(value, rated, lambda batch: reference.evaluate(prompt_states, batch))
        self.learn(run, actor, reference, rated, advantage)
        if self.shown and feedback.name != "none":
            prompts = (experience.prompts.texts * self.shown)[: self.shown]
            seeds = row_seeds(mix(run.seed, 0xA103), 0, self.shown)  # the same noise for both
            for name, role in (("", actor), ("reference_", reference)):
                found = answer_figures(role, feedback, prompts, seeds)
                run.log(**{name + figure: value for figure, value in found.items()})

    def fit_value(self, run: Run, reference: Role, experience: Prompted, feedback: Feedback) -> PromptValue:
        """The value of a prompt, from rewards of the reference's own answers to prompts of ``experience``."""
        count = self.value_answers or len(experience.prompts)
        answers = experience.collect(reference, count, group_size=1, greedy=self.value_greedy)
        reward = feedback.score(answers)
        reward = reward.sigmoid() if self.sigmoid else reward
        value, errors = fit_prompt_value(
            lambda rows: reference.evaluate(prompt_states, answers[rows]),
            reward,
            self.value_head,
            max_value=self.max_value,
            epochs=self.value_epochs,
            lr=self.value_lr,
            seed=mix(run.seed, 0xA101),
        )
        run.log(value_error=min(errors, default=float("nan")), value_variance=reward.var(correction=0))
        return value

    def learn(
        self, run: Run, actor: Role, reference: Role, rated: Data, advantage: Tensor | None = None
    ) -> None:
        """Draw kept answers by priority and update. Without ``advantage [N]`` all are kept and drawn alike."""
        objective = WeightedLikelihood(
            "sum", self.weight, importance=self.importance, clip=self.clip, gold=self.gold, kl=self.kl
        )
        probability = torch.ones(len(rated), dtype=torch.float64) / len(rated)
        if advantage is not None:
            probability = priorities(advantage, self.priority)
            run.log(advantage_all=advantage.mean(), advantage_kept=advantage[probability > 0].mean())
        kept = probability.nonzero().squeeze(1)
        data: Data = Subset(rated, kept)
        share = len(kept) / len(rated)
        against = self.importance != "none" or self.kl != 0
        if against and self.cache_reference:
            data = cached_reference(data, reference)
        sampler = run.track("rows", PrioritySampler(probability[kept], mix(run.seed, 0xA102)))
        run.log(kept=share)
        for _ in run.steps(max(1, round(self.steps * share)), "update"):
            rows = sampler.draw(self.batch_size)
            batch: Any = data.take(rows)
            if against and batch.reference_log_prob is None:
                batch = with_reference(batch, reference)
            if advantage is not None:
                drawn = advantage[kept[rows]].to(batch.mask.device)
                batch = batch.with_(advantage=batch.per_step(drawn))
                run.log(advantage=drawn.mean())
            run.log(**actor.update(batch, objective), length=batch.lengths.float().mean())
