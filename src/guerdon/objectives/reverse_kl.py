"""The gradient of a KL divergence from the policy's own samples (HyPO, Song et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.groups import group_sum, groups_of
from guerdon.objectives.policy_gradient import drift
from guerdon.objectives.reduction import to_go


@dataclass
class ReverseKL:
    """The gradient of ``KL(pi || pi_ref)`` from the policy's own fresh samples (HyPO, Song et al., 2024).

    With ``l_t = log pi(a_t) - log pi_ref(a_t)`` taken without gradient, ``grad KL = E_pi[sum_t l_t grad log pi]``:
    the score function, not the log-ratio, carries the gradient (backpropagating the mean of ``l`` itself has
    expectation zero). Reads ``reference_log_prob`` of samples that the policy drew with its present weights.

    Attributes:
        leave_one_out: subtract the mean of the other answers to the same prompt (``group``). That leaves the
            expectation; it lowers the variance once the KL is larger than the spread of the log-ratios.
        credit: ``"trajectory"``, every step is charged with the whole sum of ``l``; ``"step"``, with what comes from
            it on (the terms before it have expectation zero).

    The loss's VALUE means nothing, its gradient is an estimate for a mean over prompts of sums over steps. With
    ``leave_one_out``, ``weight`` is the number of groups and a batch may be split between groups, not within.
    Metrics: ``loss`` and ``kl``, the mean over prompts of the sampled ``sum_t l_t``; ``ratio_deviation_max``, the
    largest ``|rho - 1|`` against the stored log-probabilities, which is 0 up to rounding where samples are fresh.

    Raises `UsageError` on an unknown option, `ShapeError` on a batch that lacks a field or a row whose group has no
    other.
    """

    leave_one_out: bool = True
    credit: Literal["trajectory", "step"] = "trajectory"

    def __post_init__(self) -> None:
        check_choices(self, credit=("trajectory", "step"))

    def weight(self, batch: Trajectories) -> Tensor:
        """The number of groups, or of trajectories where these are not compared."""
        return torch.full((), len(self._groups(batch)[1]), device=batch.mask.device)

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        reference = required(self, batch, "reference_log_prob")
        index, counts = self._groups(batch)
        log_prob = policy.log_prob(batch)
        cost = torch.where(batch.mask, log_prob.detach() - reference, 0.0)
        total = cost.sum(1)
        charge = total[:, None].expand_as(cost) if self.credit == "trajectory" else to_go(cost)
        if self.leave_one_out:
            n = counts.to(charge.dtype)[:, None]
            mean = group_sum(charge, index, counts) / n
            charge = (charge - mean[index]) * (n / (n - 1))[index]
        rows = torch.where(batch.mask, charge * log_prob, 0.0).sum(1)
        groups = max(len(counts), 1)
        loss = (group_sum(rows, index, counts) / counts).sum() / groups
        kl = (group_sum(total, index, counts) / counts).sum() / groups
        metrics = drift(log_prob, batch.log_prob, batch.mask)
        return loss, {"loss": kl, "kl": kl, "ratio_deviation_max": metrics["ratio_deviation_max"]}

    def _groups(self, batch: Trajectories) -> tuple[Tensor, Tensor]:
        if self.leave_one_out:
            return groups_of(batch, self)
        index = torch.arange(len(batch.mask), device=batch.mask.device)
        return index, torch.ones_like(index)
