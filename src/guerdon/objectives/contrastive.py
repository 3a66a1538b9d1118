"""The contrastive policy gradient, which learns from anybody's answers (CoPG, Flet-Berliac et al., 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guerdon.batch import Preferences, Trajectories
from guerdon.errors import UsageError
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.groups import group_sum, groups_of
from guerdon.objectives.sides import both_sides

Baseline = Literal["contrast", "none", "reward", "regularised"]


def contrast(
    value: Float[Tensor, " batch"], index: Int[Tensor, " batch"], counts: Int[Tensor, " group"]
) -> Float[Tensor, " batch"]:
    """``value_i`` minus the mean value of the other rows of its group; differentiable.

    Args:
        index: ``[B]``, the number of each row's group, from 0; counts: how many rows each group has, 2 or more.
    """
    n = counts.to(value.dtype)
    mean = group_sum(value, index, counts) / n
    return (value - mean[index]) * (n / (n - 1))[index]


def contrastive_loss(
    value: Float[Tensor, " batch"],
    index: Int[Tensor, " batch"],
    counts: Int[Tensor, " group"],
    beta: float,
) -> Float[Tensor, " group"]:
    """``1 / (2 beta (k - 1)) sum_{i > j} (value_i - value_j)^2``, a loss for each group of ``k`` rows: the squared
    form of the contrastive policy gradient (Flet-Berliac et al., 2024), where ``value`` is the regularised reward.

    For a pair that is ``(value_1 - value_2)^2 / (2 beta)``. The sum over pairs is taken as ``k`` times the sum of
    squared distances from the group's mean, which is the same number.
    """
    n = counts.to(value.dtype)
    centred = value - (group_sum(value, index, counts) / n)[index]
    return group_sum(centred.square(), index, counts) * n / (2 * beta * (n - 1))


@dataclass
class ContrastivePolicyGradient:
    """CoPG (Flet-Berliac et al., 2024): each answer's baseline is the regularised reward of the others to its prompt.

    With ``R_b(y) = R(y) - beta (log pi(y) - log pi_ref(y))``, the gradient (ascent) of a pair is ``(R_b(y) - R_b(y'))
    (grad log pi(y) - grad log pi(y'))``, whoever drew the two. Where the data cover the reference, it vanishes only
    at the optimum of the reward with a KL cost of ``beta``, so that neither importance weights nor fresh samples are
    needed. Rewards ``+1/4`` and ``-1/4`` make it IPO; fresh samples make it REINFORCE with a leave-one-out baseline.

    Attributes:
        beta: what a nat of log-ratio costs in units of reward; above 0.
        form: ``"squared"``, the square of the gap over ``2 beta``, differentiated through the log-ratios;
            ``"detached"``, minus the advantage, without gradient, times log pi. Their gradients are equal. The metric
            ``loss`` is the square in either form: its minimum is 0.
        baseline: what is subtracted from ``R_b`` (detached form; all but the first are there to be compared with it).
            ``"contrast"``, the others' mean ``R_b``; ``"regularised"``, the group's mean ``R_b``, the answer itself
            included, which has the same fixed point at ``(k - 1) / k`` of the step; ``"none"``, 0; ``"reward"``, the
            others' mean plain reward. The last two converge elsewhere unless the data are fresh samples.
        length_average: divide a trajectory's log-probabilities by its length. Off by default: it changes the optimum.

    Two kinds of batch, each with ``reward`` and ``reference_log_prob``:
        * `Preferences`: pairs, whichever side was better. Their rows may be split into micro-batches anywhere.
        * `Trajectories` with ``group``: all pairs within groups of two and more answers, each evaluated once. They
          may be split between groups, not within.

    The loss is the mean over groups of ``1 / (k - 1)`` times the sum over a group's pairs: the step's size does not
    depend on ``k``, and its gradient is that of the sum over a group of leave-one-out advantages times log pi.
    ``weight`` is the number of groups. Metrics: ``loss``; ``spread``, the standard deviation of ``R_b`` within a
    group, 0 at the optimum; ``regularised_reward``, its mean; ``log_ratio``, the mean of log pi - log pi_ref over
    trajectories (on fresh samples, the KL).

    Raises `UsageError` on an option that makes no sense, `ShapeError` on a batch that lacks a field or a row whose
    group has no other.
    """

    beta: float = 0.1
    form: Literal["squared", "detached"] = "squared"
    baseline: Baseline = "contrast"
    length_average: bool = False

    def __post_init__(self) -> None:
        check_choices(self, form=("squared", "detached"), baseline=get_args(Baseline))
        if self.beta <= 0:
            raise UsageError(f"ContrastivePolicyGradient: beta is {self.beta}; it must be positive")
        if self.form == "squared" and self.baseline != "contrast":
            raise UsageError(
                f"ContrastivePolicyGradient: there is no squared form with the baseline '{self.baseline}'; choose "
                "form='detached'"
            )

    def weight(self, batch: Preferences | Trajectories) -> Tensor:
        """The number of groups."""
        if isinstance(batch, Preferences):
            mask = batch.chosen.mask
            return torch.full((), mask.shape[0], device=mask.device)
        index, counts = groups_of(batch, self)
        return torch.full((), len(counts), device=index.device)

    def __call__(self, policy: Any, batch: Preferences | Trajectories) -> tuple[Tensor, Metrics]:
        if isinstance(batch, Preferences):
            traj, sides = both_sides(batch), [batch.chosen, batch.rejected]
            index = torch.arange(len(traj.mask) // 2, device=traj.mask.device).repeat(2)
            counts = torch.full_like(index[: len(traj.mask) // 2], 2)
        else:
            traj, sides = batch, [batch]
            index, counts = groups_of(batch, self)
        score = torch.cat([side.score() for side in sides])
        reference = torch.cat([self._reference(side) for side in sides])
        length = traj.mask.count_nonzero(1).clamp(min=1) if self.length_average else 1
        likelihood = torch.where(traj.mask, policy.log_prob(traj), 0.0).sum(1) / length
        ratio = likelihood - reference / length
        value = score - self.beta * ratio
        squares = contrastive_loss(value, index, counts, self.beta)
        if self.form == "squared":
            losses = squares
        else:
            losses = -group_sum(self._advantage(value, score, index, counts) * likelihood, index, counts)
        loss = losses.sum() / max(len(counts), 1)
        with torch.no_grad():
            mean = lambda values: (group_sum(values, index, counts) / counts).sum() / max(len(counts), 1)
            metrics: Metrics = {
                "loss": squares.sum() / max(len(counts), 1),
                # squares are n / (2 beta) times the variance, so this is the deviation without another pass
                "spread": (squares * 2 * self.beta / counts).sqrt().sum() / max(len(counts), 1),
                "regularised_reward": mean(value),
                "log_ratio": mean(ratio),
            }
        return loss, metrics

    def _advantage(self, value: Tensor, score: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        """``[B]``, without gradient: the regularised reward minus the baseline."""
        value = value.detach()
        if self.baseline == "none":
            return value
        if self.baseline == "reward":
            return value - (score - contrast(score, index, counts))
        advantage = contrast(value, index, counts)
        return advantage if self.baseline == "contrast" else advantage * ((counts - 1) / counts)[index]

    def _reference(self, traj: Trajectories) -> Tensor:
        """``[B]``: the reference's log-probability of each trajectory."""
        return torch.where(traj.mask, required(self, traj, "reference_log_prob"), 0.0).sum(1)
