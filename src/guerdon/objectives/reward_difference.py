"""Reward-difference regression: log-ratios of two answers must predict how their scores differ.

For two trajectories a, b of one prompt the loss is ``(eta (R_a - R_b) - (s_a - s_b))^2``, with ``s`` the
score and ``R = sum_t log pi(step t) - log pi_ref(step t)``. A constant added to the scores of a prompt
changes nothing. The reference tells two published methods apart:

    * REBEL (Gao et al., 2024): the policy that acted, ``reference="old"``;
    * PRDP (Deng et al., 2024): the frozen pretrained policy, ``reference="frozen"``, where zero
      loss is the optimum of the reward with a KL cost of ``eta``, and a clip that keeps a batch usable for
      several updates. PRDP writes the loss as ``(R_a - R_b - (s_a - s_b) / beta)^2``: that is this one with
      ``eta = beta``, divided by ``eta^2``; to train on its scale divide the scores by ``beta`` and leave
      ``eta`` at 1.

`pair_groups` says which rows form pairs, `pairs` makes them a `Preferences` batch (first and second in the
places of chosen and rejected), `RewardDifference` takes either form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from guerdon.batch import Preferences, Trajectories
from guerdon.errors import ShapeError, UsageError, nearest
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.groups import groups_of
from guerdon.objectives.reduction import Reduction, reduction_weight

Pairing = Literal["all", "adjacent", "random"]


def pair_groups(
    group: Int[Tensor, " batch"], how: Pairing = "all", generator: torch.Generator | None = None
) -> tuple[Int[Tensor, " pair"], Int[Tensor, " pair"]]:
    """Which rows form pairs: ``(first [P], second [P])``, row numbers, never across groups.

    Args:
        group: ``[B]``, which prompt each row answers; in any order.
        how: ``"all"``, each of the n(n-1)/2 pairs of a group once; ``"adjacent"``, the first row of a group
            with its second, the third with the fourth... (each row in at most one pair); ``"random"``, the
            same after a random reordering by ``generator``.

    Rows without a partner form no pair. In every pair ``first < second`` except with ``"random"``.
    Raises `UsageError` if ``how`` is none of these.
    """
    if how == "all":
        same = (group[:, None] == group[None, :]).triu(diagonal=1)
        first, second = same.nonzero(as_tuple=True)
        return first, second
    if how not in ("adjacent", "random"):
        raise UsageError(f"there is no pairing '{how}': {nearest(how, get_args(Pairing))}")
    rows = len(group)
    if how == "random":
        order = torch.randperm(rows, generator=generator).to(group.device)
    else:
        order = torch.arange(rows, device=group.device)
    order = order[group[order].argsort(stable=True)]  # a group's rows side by side
    arranged = group[order]
    place = torch.arange(rows, device=group.device)
    starts = torch.ones_like(arranged, dtype=torch.bool)
    starts[1:] = arranged[1:] != arranged[:-1]
    rank = place - torch.where(starts, place, 0).cummax(0).values if rows else place
    leads = (rank % 2 == 0)[:-1] & (arranged[1:] == arranged[:-1])
    lead = leads.nonzero().squeeze(1)
    return order[lead], order[lead + 1]


def pairs(traj: Trajectories, how: Pairing = "all", generator: torch.Generator | None = None) -> Preferences:
    """The pairs of each group of ``traj`` as a batch that can be shuffled and split at will.

    ``chosen`` is the first and ``rejected`` the second of a pair, whichever scored higher; their rewards and
    advantages are in the trajectories. Raises `ShapeError` if the trajectories carry no ``group``.
    """
    first, second = pair_groups(_group(traj), how, generator)
    return Preferences(chosen=traj[first], rejected=traj[second], batch_size=[len(first)])


def reward_difference(
    log_ratio_a: Float[Tensor, "pair step_a"],
    log_ratio_b: Float[Tensor, "pair step_b"],
    score_a: Float[Tensor, " pair"],
    score_b: Float[Tensor, " pair"],
    eta: float = 1.0,
) -> Float[Tensor, " pair"]:
    """``(eta (sum_t log_ratio_a - sum_t log_ratio_b) - (score_a - score_b))^2``, a loss for each pair.

    The log-ratios (policy over reference, zero where masked) are summed over time only: each pair stays
    itself. The two sides may differ in length.
    """
    return (eta * (log_ratio_a.sum(1) - log_ratio_b.sum(1)) - (score_a - score_b)).square()


def clip_log_ratio(
    log_ratio: Float[Tensor, "batch step"], sampled: Float[Tensor, "batch step"], clip: float
) -> Float[Tensor, "batch step"]:
    """Each step's log-ratio kept within ``clip`` of its value when it was ``sampled`` (PRDP)."""
    return sampled + (log_ratio - sampled).clamp(-clip, clip)


@dataclass
class RewardDifference:
    """REBEL's and PRDP's objective on any policy's steps (see the module).

    Attributes:
        eta: what a nat of log-ratio counts in units of score (REBEL's eta, PRDP's beta).
        clip: PRDP's proximal form: the loss of a pair is the larger of the plain one and the one whose
            per-step log-ratios are kept within ``clip`` of their value at sampling time; None for none.
        reference: ``"old"`` reads ``batch.log_prob``, ``"frozen"`` reads ``batch.reference_log_prob``.
        target: ``"score"``, the sum of a trajectory's rewards, or ``"advantage"``, the mean of its advantages
            over its steps (they are equal where one advantage is given to all steps).

    Two kinds of batch:
        * `Preferences` as `pairs` makes them. Rows may be split into micro-batches anywhere; a trajectory
          that is in several pairs is evaluated once for each.
        * `Trajectories` with ``group``: all pairs within groups, each trajectory evaluated once. Do not
          split such a batch, or pairs across the parts are lost; a row left without a partner is an error.
          Where memory does not allow one pass, use `as_advantage`.

    ``weight`` is the number of pairs. Metrics: ``loss``; ``agreement``, the share of pairs whose predicted
    and true difference have the same sign; ``log_ratio``, the mean over trajectories of R; with ``clip``,
    ``clip_fraction``, the share of pairs where the clipped loss is the larger.
    Raises `UsageError` on an option that makes no sense, `ShapeError` on a batch that lacks a field.
    """

    eta: float = 1.0
    clip: float | None = None
    reference: Literal["old", "frozen"] = "old"
    target: Literal["score", "advantage"] = "score"

    def __post_init__(self) -> None:
        check_choices(self, reference=("old", "frozen"), target=("score", "advantage"))
        if self.clip is not None and self.clip <= 0:
            raise UsageError(
                f"RewardDifference: clip is {self.clip}; it must be positive (None for no clipping)"
            )

    def weight(self, batch: Preferences | Trajectories) -> Tensor:
        """The number of pairs."""
        if isinstance(batch, Preferences):
            mask = batch.chosen.mask
            return torch.full((), mask.shape[0], device=mask.device)
        _, counts = _group(batch).unique(return_counts=True)
        return (counts * (counts - 1) // 2).sum()

    def __call__(self, policy: Any, batch: Preferences | Trajectories) -> tuple[Tensor, Metrics]:
        if isinstance(batch, Preferences):
            a = self._rows(policy.log_prob(batch.chosen), batch.chosen)
            b = self._rows(policy.log_prob(batch.rejected), batch.rejected)
            return self._loss(a, b)
        return self._grouped(policy.log_prob(batch), batch)

    def as_advantage(
        self, log_prob: Float[Tensor, "batch step"], traj: Trajectories, reduction: Reduction = "step"
    ) -> Float[Tensor, "batch step"]:
        """Advantages with which `Reinforce` of the same ``reduction`` has this objective's gradient.

        The loss couples all steps of all trajectories of a group, but only through one number for each step,
        its derivative by that step's log-probability. Pass the policy's current ``log_prob [B, T]``, computed
        without gradient; then the batch with the result as its ``advantage`` can be split into
        micro-batches of rows (with ``"step"`` and ``"constant"`` also of steps) and costs the memory of one
        part. They hold for one update: compute them anew after the weights moved.
        """
        with torch.enable_grad():
            leaf = log_prob.detach().requires_grad_(True)
            loss, _ = self._grouped(leaf, traj)
            (slope,) = torch.autograd.grad(loss, leaf)
        scale = reduction_weight(traj.mask, reduction).to(slope.dtype)
        if reduction == "trajectory":
            return -slope * scale * traj.mask.count_nonzero(1)[:, None]
        return -slope * scale

    # -- inside --------------------------------------------------------------------------------------------

    def _rows(self, log_prob: Tensor, traj: Trajectories) -> _Rows:
        mask, old = traj.mask, traj.log_prob
        base = old
        if self.reference == "frozen":
            base = required(self, traj, "reference_log_prob", "with the frozen reference")
        log_ratio = torch.where(mask, log_prob - base, 0.0)
        clipped = None
        if self.clip is not None:
            sampled = torch.where(mask, old - base, 0.0)
            clipped = clip_log_ratio(log_ratio, sampled, self.clip).sum(1)
        if self.target == "score":
            score = traj.score()
        else:
            advantage = required(self, traj, "advantage", "on advantages")
            score = torch.where(mask, advantage, 0.0).sum(1) / mask.count_nonzero(1).clamp(min=1)
        return _Rows(log_ratio.sum(1), clipped, score)

    def _grouped(self, log_prob: Tensor, traj: Trajectories) -> tuple[Tensor, Metrics]:
        first, second = pair_groups(groups_of(traj, self)[0])
        rows = self._rows(log_prob, traj)
        return self._loss(rows.take(first), rows.take(second))

    def _loss(self, a: _Rows, b: _Rows) -> tuple[Tensor, Metrics]:
        count = max(len(a.score), 1)  # no pair at all: a loss of zero, not NaN
        losses = reward_difference(a.ratio[:, None], b.ratio[:, None], a.score, b.score, self.eta)
        metrics: Metrics = {}
        with torch.no_grad():
            agree = ((a.ratio - b.ratio) * (a.score - b.score) > 0).count_nonzero()
            metrics["agreement"] = agree / count
            metrics["log_ratio"] = (a.ratio.sum() + b.ratio.sum()) / (2 * count)
        if a.clipped is not None and b.clipped is not None:
            near = reward_difference(a.clipped[:, None], b.clipped[:, None], a.score, b.score, self.eta)
            metrics["clip_fraction"] = (near > losses).count_nonzero() / count
            losses = torch.maximum(losses, near)
        loss = losses.sum() / count
        metrics["loss"] = loss.detach()
        return loss, metrics


class _Rows(NamedTuple):
    """What a pair needs of its sides, each ``[B]``: log-ratio, log-ratio of clipped steps, score."""

    ratio: Tensor
    clipped: Tensor | None
    score: Tensor

    def take(self, rows: Tensor) -> _Rows:
        return _Rows(self.ratio[rows], None if self.clipped is None else self.clipped[rows], self.score[rows])


def _group(traj: Trajectories) -> Tensor:
    if traj.group is None:
        raise ShapeError("pairs are formed within groups, but these trajectories carry no group [B]")
    return traj.group
