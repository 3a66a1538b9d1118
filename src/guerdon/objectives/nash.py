"""The policy gradient of a regularised game of preference: win more often, stay close to the reference.

A policy that plays against a fixed opponent improves ``P(pi > opponent) - tau KL(pi || mu)`` along (Munos et al., 2024)

    E_{y ~ pi} [ grad log pi(y) (P(y > y') - 1/2 - tau log(pi(y) / mu(y))) ],   y' ~ opponent.

The 1/2 is the baseline: no critic is needed. Only the log-probability of ``y`` carries a gradient; the opponent's
answer enters through the judge alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.policy_gradient import drift
from guerdon.objectives.reduction import reduce, reduction_weight, to_go


@dataclass
class PreferenceGradient:
    """See the module, on any policy's steps, from answers that the policy drew with its present weights.

    Reads ``advantage [B, T]``, ``P(y > y') - 1/2`` at each real step (`Trajectories.per_step`), or whatever stands in
    its place, and ``reference_log_prob``, that of ``mu``.

    Attributes:
        tau: what a nat of KL(pi || mu) costs, in units of the advantage; not negative.
        credit: ``"step"``, a step is charged with the log-ratios from it on (the terms before it have expectation zero);
            ``"trajectory"``, with the whole sum. Both are unbiased; charging a step with its own log-ratio alone is not.

    The loss's VALUE means nothing; its gradient estimates a mean over trajectories. Metrics: ``loss``, what it estimates
    the negative of, ``tau KL - (P - 1/2)``; ``kl``, the mean over trajectories of the sampled log-ratio;
    ``ratio_deviation_max``, the largest ``|rho - 1|`` against the stored log-probabilities, 0 up to rounding where
    samples are fresh.
    Raises `UsageError` on an option that makes no sense, `ShapeError` on a batch that lacks a field.
    """

    tau: float = 0.008
    credit: Literal["step", "trajectory"] = "step"

    def __post_init__(self) -> None:
        if self.tau < 0:
            raise UsageError(
                f"PreferenceGradient: tau is {self.tau}; a negative one rewards leaving the reference"
            )
        check_choices(self, credit=("step", "trajectory"))

    def weight(self, batch: Trajectories) -> Tensor:
        """The number of trajectories."""
        return reduction_weight(batch.mask, "sum")

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        advantage, mask = required(self, batch, "advantage"), batch.mask
        reference = required(self, batch, "reference_log_prob")
        log_prob = policy.log_prob(batch)
        ratio = torch.where(mask, log_prob.detach() - reference, 0.0)
        charge = ratio.sum(1, keepdim=True) if self.credit == "trajectory" else to_go(ratio)
        loss = reduce(-(advantage - self.tau * charge) * log_prob, mask, "sum")
        kl = reduce(ratio, mask, "sum")
        metrics = {
            "loss": self.tau * kl - reduce(advantage[:, :1], mask[:, :1], "sum"),
            "kl": kl,
            "ratio_deviation_max": drift(log_prob, batch.log_prob, mask)["ratio_deviation_max"],
        }
        return loss, metrics
