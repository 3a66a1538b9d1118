"""Recorded pairs and the policy's own fresh samples in one update (HyPO, Song et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from guerdon.batch import Batch, Preferences, Trajectories
from guerdon.errors import ShapeError
from guerdon.objectives.base import Metrics
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.reverse_kl import ReverseKL


class PairsAndSamples(Batch):
    """``B`` pairs, and with each of them as many sampled answers.

    `joined` makes one. A row is a pair with its answers, so a batch may be split anywhere.

    Args:
        pairs: ``[B]``.
        samples: ``[B, n]``, the policy's own answers; ``group`` says which of them answer the same prompt.
    """

    pairs: Preferences
    samples: Trajectories

    @classmethod
    def joined(cls, pairs: Preferences, samples: Trajectories, group_size: int) -> PairsAndSamples:
        """Pairs ``[B]`` with samples ``[B n]``: the first ``n`` rows belong to the first pair, and so on.

        Args:
            group_size: answers to one prompt, which lie side by side; each pair has whole groups of them.

        Raises `ShapeError` when the samples cannot be dealt out that way.
        """
        rows, answers = len(pairs.chosen.mask), len(samples.mask)
        if not answers or answers % (rows * group_size):
            raise ShapeError(
                f"{answers} samples in groups of {group_size} cannot be dealt out to {rows} pairs; sample a multiple of "
                f"{rows * group_size}"
            )
        # the places are the groups: two pairs may share a prompt, and a split must not part a group
        group = torch.arange(answers, device=samples.mask.device) // group_size
        dealt = samples.with_(group=group, outputs=None).unflatten(0, torch.Size((rows, answers // rows)))
        return cls(pairs=pairs, samples=dealt, batch_size=[rows])


@dataclass
class HybridPreference:
    """A loss on recorded pairs plus ``kl`` times the reverse KL on the policy's own samples (HyPO, Song et al., 2024).

    The recorded pairs say nothing about answers they do not hold; the samples are where the policy puts its mass, so the
    second term sees what the first does not. It needs neither labels nor a reward.

    Attributes:
        pairs: the loss on the pairs, such as DPO's; both sides carry ``reference_log_prob``.
        samples: the gradient of the KL; the samples carry ``reference_log_prob`` too.
        kl: what a nat of KL costs (the paper's lambda); a 0-d tensor if it changes between updates.

    ``weight`` is that of the pairs. Metrics: those of ``pairs``, of which ``loss`` becomes the sum of both terms; ``kl``
    and ``ratio_deviation_max`` of the samples.
    """

    pairs: PairwiseObjective = field(default_factory=PairwiseObjective)
    samples: ReverseKL = field(default_factory=ReverseKL)
    kl: float | Tensor = 1e-4

    def weight(self, batch: PairsAndSamples) -> Tensor:
        """That of the pairs."""
        return self.pairs.weight(batch.pairs)

    def __call__(self, policy: Any, batch: PairsAndSamples) -> tuple[Tensor, Metrics]:
        loss, metrics = self.pairs(policy, batch.pairs)
        surrogate, sampled = self.samples(policy, batch.samples.flatten(0, 1))
        metrics |= {name: value for name, value in sampled.items() if name != "loss"}
        metrics["loss"] = metrics["loss"] + self.kl * sampled["kl"]
        return loss + self.kl * surrogate, metrics
