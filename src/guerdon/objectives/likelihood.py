"""Weighted likelihood: fine-tuning on demonstrations, and its relatives that weigh each answer or token.

All are ``sum of weight * importance * -log pi`` over recorded steps, with weights that carry no gradient:

    * supervised fine-tuning and behaviour cloning: ``WeightedLikelihood()``;
    * reward-weighted cloning (wBC): ``by="reward"``, ``reduction="sum"``;
    * A-LoL (Baheti et al., 2024): ``by="advantage"``, ``reduction="sum"`` and ``importance="sequence"``; its variants are
      ``"none"`` (reference-free), ``"token"`` (seq) and ``"none"`` with ``kl=0.1`` (KL);
    * R-LoL: A-LoL with ``by="reward"``;
    * R-GOLD (Pang & He, 2021): ``by="reward"``, ``reduction="sum"``, ``gold=0.1``;
    * advantage-weighted regression: ``by="advantage"`` on batches whose advantage is the weight ``exp(A / beta)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import UsageError
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.policy_gradient import importance_weight
from guerdon.objectives.reduction import Reduction, reduce, reduction_weight

Weighing = Literal["none", "advantage", "reward"]
Ratio = Literal["none", "sequence", "token"]


def clipped_ratio(
    log_prob: Float[Tensor, "batch step"],
    reference_log_prob: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    how: Literal["sequence", "token"],
    clip: float | None = 0.9,
) -> tuple[Float[Tensor, "batch step"], Float[Tensor, "batch step"]]:
    """``(rho, raw)``, ``[B, T]`` without gradient: the ratio policy over reference, clamped and as it was.

    Args:
        how: ``"token"``, the ratio of each step; ``"sequence"``, the product along the trajectory, at each of its steps.
        clip: ``rho`` is clamped to ``[1 - clip, 1 + clip]`` (Baheti et al., 2024): not the minimum of two
            branches as in PPO, so a likelihood that has left the range keeps a gradient. None does not clamp.
    """
    raw = importance_weight(log_prob, reference_log_prob, mask, "trajectory" if how == "sequence" else "step")
    return (raw if clip is None else raw.clamp(1 - clip, 1 + clip)), raw


@dataclass
class WeightedLikelihood:
    """Negative log-likelihood of the recorded steps, weighted (see the module for what is which method).

    Attributes:
        reduction: see `reduction.reduce`: ``"step"``, the mean over all steps of the batch, as supervised fine-tuning
            has it; ``"sum"``, the mean over trajectories of their sums, as the sequence-level methods have it.
        by: what a step is weighted by: ``"none"``, 1; ``"advantage"``, ``batch.advantage [B, T]`` (``traj.per_step`` gives
            one weight to all steps of a row); ``"reward"``, the trajectory's score.
        positive: take negative weights as zero (A-LoL leaves such rows out of its data in the first place).
        importance, clip: multiply by the ratio to the reference; see `clipped_ratio`. Reads ``reference_log_prob``.
        gold: multiply each step by its own probability, at least this (R-GOLD's u).
        kl: add this times ``log pi - log pi_ref`` of each step, reduced alike (A-LoL KL). On recorded answers this is
            no estimate of a KL divergence; it lowers likelihoods that grew. Reads ``reference_log_prob``.

    Metrics: ``loss``; ``nll``, the mean over real steps, unweighted; with importance ``rho``, the mean of the clamped
    ratio, and ``clip_fraction``, the share that was clamped, over steps (``"token"``) or trajectories; with ``kl``,
    ``log_ratio``, the mean over real steps.
    Raises `UsageError` on an option that makes no sense, `ShapeError` on a batch that lacks a field.
    """

    reduction: Reduction = "step"
    by: Weighing = "none"
    positive: bool = False
    importance: Ratio = "none"
    clip: float | None = 0.9
    gold: float | None = None
    kl: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, reduction=get_args(Reduction), by=get_args(Weighing), importance=get_args(Ratio))
        if self.clip is not None and not 0 <= self.clip <= 1:
            raise UsageError(f"WeightedLikelihood: clip is {self.clip}; it must lie between 0 and 1")
        if self.gold is not None and not 0 <= self.gold <= 1:
            raise UsageError(f"WeightedLikelihood: gold is {self.gold}; it is a probability, between 0 and 1")

    def weight(self, batch: Trajectories) -> Tensor:
        """How much the loss counted (see `reduction.reduction_weight`)."""
        return reduction_weight(batch.mask, self.reduction)

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        mask = batch.mask
        log_prob = policy.log_prob(batch)
        fixed = log_prob.detach()
        metrics: Metrics = {"nll": -reduce(fixed, mask)}
        losses = -log_prob
        weight = self._weight(batch)
        if weight is not None:
            losses = losses * weight
        if self.importance != "none":
            rho, raw = clipped_ratio(fixed, self._reference(batch), mask, self.importance, self.clip)
            losses = losses * rho
            over: Reduction = "step" if self.importance == "token" else "trajectory"
            metrics["rho"] = reduce(rho, mask, over)
            metrics["clip_fraction"] = reduce((rho != raw).to(rho.dtype), mask, over)
        if self.gold is not None:
            losses = losses * fixed.exp().clamp(min=self.gold)
        if self.kl:
            log_ratio = log_prob - self._reference(batch)
            losses = torch.add(losses, log_ratio, alpha=self.kl)
            metrics["log_ratio"] = reduce(log_ratio.detach(), mask)
        loss = reduce(losses, mask, self.reduction)
        metrics["loss"] = loss.detach()
        return loss, metrics

    def _weight(self, batch: Trajectories) -> Tensor | None:
        if self.by == "none":
            return None
        rewarded = self.by == "reward"
        weight = batch.score()[:, None] if rewarded else required(self, batch, "advantage", "by advantage")
        return weight.clamp(min=0) if self.positive else weight

    def _reference(self, batch: Trajectories) -> Tensor:
        return required(self, batch, "reference_log_prob", "with importance or kl")
