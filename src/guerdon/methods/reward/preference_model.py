"""A model of pairs (Jiang et al., 2023, LLM-Blender, arXiv 2306.02561; Munos et al., 2024, NLHF, arXiv 2312.00886).

It reads a prompt with two answers and says how likely the first is preferred. No score stands behind it, so that its
preferences may run in circles, as people's do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import nn

from guerdon.errors import UsageError
from guerdon.experience.datasets import Data, batch_count
from guerdon.feedback.preference_model import Form, PreferenceModel
from guerdon.objectives.judges import PairClassifier
from guerdon.optim import AdamW, Schedule
from guerdon.policies.language import LanguagePolicy
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class PairwisePreference:
    """A model of pairs by cross-entropy. The papers leave optimisation to their models' recipes; the values are ours."""

    headline: ClassVar[str] = "accuracy"

    form: Form = "head"  # a scalar head over "x SEP y1 SEP y2", or a choice between two tokens
    order: Literal["random", "both", "antisymmetric", "given"] = (
        "random"  # in which pairs are shown in training
    )
    epochs: int = 1  # passes over the pairs
    batch_size: int = 64  # pairs an optimiser step
    lr: float = 1e-5  # of AdamW
    warmup: int = 0  # updates over which the learning rate rises from zero
    schedule: Schedule = "constant"  # how it falls to zero until the last update
    weight_decay: float = 0.0  # of AdamW
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    lora_rank: int = 0  # train low-rank adapters of the model instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # pairs a forward and backward pass

    def roles(self) -> dict[str, RoleSettings]:
        """How the model is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        optimiser = AdamW(self.lr, self.schedule, self.warmup, total=None, weight_decay=self.weight_decay)
        return {"reward": RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def judge(self, policy: LanguagePolicy) -> nn.Module:
        """The model to train, made of the policy's."""
        return PreferenceModel.from_policy(policy, self.form)

    def train(self, run: Run, reward: Role, preferences: Data) -> None:
        """Raise the likelihood of the labels, each pair in an order of its own, a batch at a time."""
        if not hasattr(reward.model, "logit"):
            raise UsageError(
                f"a model of pairs is trained here, but {type(reward.model).__name__} judges one answer at a time; "
                "train it with bradley_terry"
            )
        a_pass = batch_count(len(preferences), self.batch_size)
        reward.expect(a_pass * self.epochs)
        objective = PairClassifier(order=self.order, label_smoothing=self.label_smoothing)
        for batch in run.batches(preferences, self.batch_size, self.epochs):
            objective.salt = reward.updates // a_pass  # other orders in each pass
            run.log(**reward.update(batch, objective))
