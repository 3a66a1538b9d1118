"""A reward model from comparisons (Christiano et al., 2017, arXiv 1706.03741; of language models Stiennon et al., 2020).

Bradley and Terry's model of choice: the better answer is named with probability ``sigmoid(r(better) - r(worse))``. The
scores that make the labels likeliest are the reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from guerdon.experience.datasets import Data, batch_count
from guerdon.objectives.judges import RewardPairs
from guerdon.objectives.sides import both_sides
from guerdon.optim import AdamW, Schedule
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class BradleyTerry:
    """A reward model by maximum likelihood. Optimisation as for InstructGPT's (Ouyang et al., 2022, appendix C.2)."""

    headline: ClassVar[str] = "accuracy"

    epochs: int = 1  # passes over the pairs; with more a reward model soon overfits
    batch_size: int = 64  # pairs an optimiser step
    lr: float = 9e-6  # of AdamW
    warmup: int = 0  # updates over which the learning rate rises from zero
    schedule: Schedule = "constant"  # how it falls to zero until the last update
    weight_decay: float = 0.0  # of AdamW
    loss: Literal["bradley_terry", "hinge"] = "bradley_terry"  # what is minimised of a pair's difference
    label_smoothing: float = 0.0  # share of labels taken to be wrong
    centering: float = 0.0  # weight of the squared sum of a pair's scores, which keeps them around zero
    normalise: bool = (
        True  # scale the finished model to mean 0 and deviation 1 on answers that it learned from
    )
    lora_rank: int = 0  # train low-rank adapters of the reward model instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # pairs a forward and backward pass

    def roles(self) -> dict[str, RoleSettings]:
        """How the reward model is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        optimiser = AdamW(self.lr, self.schedule, self.warmup, total=None, weight_decay=self.weight_decay)
        return {"reward": RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, reward: Role, preferences: Data) -> None:
        """Raise the likelihood of the labels, a batch at a time; then fix the scale. In a single pass every pair is new
        to the model when it is met, so that ``accuracy`` is that on unseen pairs."""
        objective = RewardPairs(
            loss=self.loss, label_smoothing=self.label_smoothing, centering=self.centering
        )
        reward.expect(batch_count(len(preferences), self.batch_size, self.epochs))
        for batch in run.batches(preferences, self.batch_size, self.epochs):
            run.log(**reward.update(batch, objective))
        if self.normalise:
            standardise(reward, preferences, self.batch_size)


def standardise(reward: Role, preferences: Data, batch_size: int, most: int = 1024) -> None:
    """Fix mean and deviation of a reward model on both answers of the first ``most`` pairs; models that know no scale are
    left as they are."""
    if not hasattr(reward.model, "standardise"):
        return

    def raw(model: Any, batch: Any) -> Any:
        model.normalised = False
        return model.scores(both_sides(batch, outputs=True))

    rows = torch.arange(min(most, len(preferences)))
    scores = [reward.evaluate(raw, preferences.take(part)) for part in rows.split(batch_size)]
    reward.evaluate(lambda model, found: model.standardise(found), torch.cat(scores))
