"""SFT: supervised fine-tuning on written answers (Ouyang et al., 2022, arXiv 2203.02155).

Maximum likelihood of the answers' tokens given their prompts; the prompts themselves are not learned. On the chosen
answers of preference pairs this is the Preferred-FT baseline of DPO (Rafailov et al., 2023).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from guerdon.experience.datasets import Data, batch_count
from guerdon.objectives.likelihood import WeightedLikelihood
from guerdon.optim import AdamW, Schedule
from guerdon.policies.lora import LoRA
from guerdon.roles import Role, RoleSettings
from guerdon.run import Run


@dataclass
class SFT:
    """Supervised fine-tuning."""

    headline: ClassVar[str] = "loss"

    epochs: int = 2  # passes over the demonstrations
    batch_size: int = 32  # demonstrations an optimiser step
    lr: float = 1e-5  # of AdamW
    warmup: int = 0  # updates over which the learning rate rises from zero
    schedule: Schedule = "constant"  # how it falls to zero until the last update
    weight_decay: float = 0.0  # of AdamW
    lora_rank: int = 0  # train low-rank adapters of the actor instead of its weights
    lora_alpha: float = 8.0  # the adapter's output is scaled by alpha / rank
    max_grad_norm: float = 1.0  # longer gradients are scaled down to this
    micro_batch: int | None = None  # demonstrations a forward and backward pass

    def roles(self) -> dict[str, RoleSettings]:
        """How the actor is held and trained."""
        lora = LoRA(self.lora_rank, self.lora_alpha) if self.lora_rank else None
        optimiser = AdamW(self.lr, self.schedule, self.warmup, total=None, weight_decay=self.weight_decay)
        return {"actor": RoleSettings(optimiser, self.max_grad_norm, lora, micro_batch=self.micro_batch)}

    def train(self, run: Run, actor: Role, demonstrations: Data) -> None:
        """Minimise the mean negative log-likelihood of a token, a batch at a time."""
        objective = WeightedLikelihood(reduction="step")
        actor.expect(batch_count(len(demonstrations), self.batch_size, self.epochs))
        for batch in run.batches(demonstrations, self.batch_size, self.epochs):
            run.log(**actor.update(batch, objective))
