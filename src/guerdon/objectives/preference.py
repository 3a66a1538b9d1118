"""Policies that learn from comparisons: direct preference optimisation and its relatives, on pairs and on ranked lists.

`PairwiseObjective` asks any policy for the log-probabilities of both sides in one forward pass and applies one of the
losses of `guerdon.objectives.pair_losses`; `PlackettLuce` does the same for lists.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.batch import Preferences, Trajectories
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.base import Metrics, check_choices, required
from guerdon.objectives.divergence import FDivergence, f_score
from guerdon.objectives.pair_losses import (
    PairLoss,
    aot_loss,
    apo_down_loss,
    apo_zero_loss,
    bco_loss,
    cpl_loss,
    discopop_loss,
    exo_loss,
    hinge_loss,
    ipo_loss,
    nca_loss,
    plackett_luce,
    sigmoid_loss,
    soften,
    sppo_loss,
    unlikelihood_loss,
)
from guerdon.objectives.sides import bare, both_sides, check_smoothing, label_of, pairs_in

_ONE_PAIR: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid_loss,
    "sigmoid_norm": sigmoid_loss,
    "robust": sigmoid_loss,
    "hinge": hinge_loss,
    "slic": hinge_loss,
    "ipo": ipo_loss,
    "nca_pair": nca_loss,
    "bco_pair": bco_loss,
    "sppo_hard": sppo_loss,
    "apo_zero": apo_zero_loss,
    "apo_down": apo_down_loss,
    "discopop": discopop_loss,
    "cpl": cpl_loss,
}
_NO_REFERENCE = {"slic", "cpl", "unlikelihood"}  # as published; `reference_free` overrides it
_BY_DIFFERENCE = {"sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "exo_pair", "discopop"}
_READ_BY = {
    "target_margin": {"sigmoid", "sigmoid_norm", "robust"},
    "bias": {"cpl"},
    "unlikelihood": {"unlikelihood"},
    "discopop_tau": {"discopop"},
    "delta": {"bco_pair"},
}


@dataclass
class PairwiseObjective:
    """Direct preference optimisation and its relatives, on any policy's steps (see the module and each loss).

    Reads ``reference_log_prob`` of both sides (`with_reference`) unless the loss is reference-free, and ``strength``
    of the batch, the probability that a label is right, if present.

    Attributes:
        loss: ``sigmoid`` (DPO), ``sigmoid_norm`` (the same on length-averaged scores, see below), ``robust``, ``hinge``,
            ``slic`` (hinge on log-probabilities, no reference), ``ipo``, ``exo_pair``, ``nca_pair``, ``bco_pair``,
            ``sppo_hard``, ``apo_zero``, ``apo_down``, ``aot``, ``aot_unpaired``, ``discopop``, ``cpl`` (no reference; with
            one, CPL-KL), ``unlikelihood``.
        beta: scale of the log-ratios; a 0-d tensor if it changes between updates.
        label_smoothing: the share of labels taken to be wrong. ``robust`` corrects for it, ``exo_pair`` needs it, all
            others take the loss expected under it (`soften`).
        soft_labels: whether ``batch.strength`` softens the labels in the same way.
        length_normalise: divide each side's score by its number of steps. None is the convention of the loss: only
            ``sigmoid_norm`` does. IPO is published both ways: summed in the code of DPO's authors, averaged (True) in TRL,
            whose authors had that from IPO's.
        reference_free: take log-probabilities in place of log-ratios. None is the convention of the loss.
        divergence, alpha: what the optimum is held by (`divergence.f_score`); for losses of the difference alone.
        target_margin: of `sigmoid_loss`.
        bias: of `cpl_loss`.
        discount: step t counts ``discount**t`` (CPL's gamma).
        tail: weight of the steps beyond the length of the shorter side (length-desensitised DPO, Liu et al., 2024).
        unlikelihood: alpha of `unlikelihood_loss`; its authors tried 0.05 to 1.
        discopop_tau: tau of `discopop_loss`.
        delta: of `bco_loss`; a 0-d tensor that `track` moves.
        nll, nll_reduction: add this times the negative log-likelihood of the chosen side, averaged over its steps
            (``"trajectory"``, RPO, Pang et al., 2024) or summed (``"sum"``, SLiC).

    ``sigmoid_norm`` is TRL's name: normalised by LENGTH. In RSO (Liu et al., 2024, section 3) "norm" means normalised by the
    REFERENCE: what that paper calls sigmoid-norm is the loss of DPO, ``sigmoid`` here; its hinge-norm is ``hinge``, and its
    hinge ``slic``.

    ``aot`` and ``aot_unpaired`` compare the rows of a batch: they refuse to be split into micro-batches.

    ``weight`` is the number of pairs. Metrics: ``loss``; ``rewards_chosen``, ``rewards_rejected``, ``beta`` times what the
    loss compares; ``margin``, their difference; ``accuracy``, the share of pairs where it is positive;
    ``log_prob_chosen``, ``log_prob_rejected``, sums over steps; ``nll`` where it has a weight.
    Raises `UsageError` on an option that makes no sense, `ShapeError` on a batch that lacks a field.
    """

    loss: PairLoss = "sigmoid"
    beta: float | Tensor = 0.1
    label_smoothing: float = 0.0
    soft_labels: bool = True
    length_normalise: bool | None = None
    reference_free: bool | None = None
    divergence: FDivergence = "reverse_kl"
    alpha: float = 0.5
    target_margin: float = 0.0
    bias: float = 1.0
    discount: float = 1.0
    tail: float = 1.0
    unlikelihood: float = 1.0
    discopop_tau: float = 0.05
    delta: float | Tensor = 0.0
    nll: float = 0.0
    nll_reduction: Literal["trajectory", "sum"] = "trajectory"

    def __post_init__(self) -> None:
        check_choices(
            self,
            loss=get_args(PairLoss),
            divergence=get_args(FDivergence),
            nll_reduction=("trajectory", "sum"),
        )
        check_smoothing(self, self.label_smoothing)
        if self.beta <= 0:
            raise UsageError(f"PairwiseObjective: beta is {self.beta}; it must be positive")
        if self.loss == "exo_pair" and not self.label_smoothing:
            raise UsageError(
                "PairwiseObjective: exo_pair needs label_smoothing above 0; its authors take 0.001"
            )
        for field in fields(self):
            losses = _READ_BY.get(field.name)
            if losses and self.loss not in losses and getattr(self, field.name) != field.default:
                raise UsageError(
                    f"PairwiseObjective: {field.name} belongs to {', '.join(sorted(losses))}; loss is '{self.loss}'"
                )
        if self.divergence != "reverse_kl":
            if self.loss not in _BY_DIFFERENCE or not self.reads_reference:
                raise UsageError(
                    f"PairwiseObjective: divergence '{self.divergence}' is defined for losses of the difference of two "
                    f"log-ratios ({', '.join(sorted(_BY_DIFFERENCE))}) with a reference, not for '{self.loss}'"
                )
            f_score(torch.zeros(()), self.divergence, self.alpha)  # says what is wrong with alpha

    @property
    def reads_reference(self) -> bool:
        """Whether both sides of a batch need ``reference_log_prob``."""
        return not (self.loss in _NO_REFERENCE if self.reference_free is None else self.reference_free)

    @property
    def _sorts(self) -> bool:
        return self.loss in ("aot", "aot_unpaired")

    def weight(self, batch: Preferences) -> Tensor:
        """The number of pairs; its square where the rows are compared with one another, so that parts do not add up."""
        return pairs_in(batch, 2 if self._sorts else 1)

    def track(self, metrics: Metrics, rate: float = 0.1) -> None:
        """Move ``delta`` towards the mean reward of the pairs that an update has just seen (`bco_loss`)."""
        mean = 0.5 * (metrics["rewards_chosen"] + metrics["rewards_rejected"]).detach()
        self.delta = torch.as_tensor(self.delta, dtype=mean.dtype, device=mean.device).lerp(mean, rate)

    def __call__(self, policy: Any, batch: Preferences) -> tuple[Tensor, Metrics]:
        log_prob = policy.log_prob(both_sides(batch))
        rows = batch.chosen.mask.shape[0]
        weight_w, weight_l = self._step_weights(batch)
        chosen = self._side(log_prob[:rows], batch.chosen, weight_w)
        rejected = self._side(log_prob[rows:], batch.rejected, weight_l)
        win, lose = self._score(chosen), self._score(rejected)
        losses = self._losses(win, lose, chosen, rejected, batch)
        metrics: Metrics = {}
        if self.nll:
            nll = -chosen.log_prob
            nll = nll / chosen.steps if self.nll_reduction == "trajectory" else nll
            losses = torch.add(losses, nll, alpha=self.nll)
            metrics["nll"] = nll.detach().sum() / max(rows, 1)
        loss = losses.sum() / max(rows, 1)  # no pair at all: a loss of zero, not NaN
        with torch.no_grad():
            gap = self.beta * (win - lose)
            table = torch.stack(
                (
                    self.beta * win,
                    self.beta * lose,
                    gap,
                    (gap > 0).to(gap.dtype),
                    chosen.log_prob,
                    rejected.log_prob,
                )
            ).sum(1) / max(rows, 1)
        names = (
            "rewards_chosen",
            "rewards_rejected",
            "margin",
            "accuracy",
            "log_prob_chosen",
            "log_prob_rejected",
        )
        metrics |= zip(names, table.unbind(), strict=True)
        metrics["loss"] = loss.detach()
        return loss, metrics

    # -- inside --------------------------------------------------------------------------------------------------------

    def _step_weights(self, batch: Preferences) -> tuple[Tensor | None, Tensor | None]:
        """What each step counts, ``[B, T]`` a side; None where every step counts one."""
        if self.discount == 1 and self.tail == 1:
            return None, None
        shorter = torch.minimum(batch.chosen.lengths, batch.rejected.lengths)[:, None]
        weights = []
        for traj in (batch.chosen, batch.rejected):
            step = torch.arange(traj.steps, device=traj.mask.device)
            weights.append(torch.where(step < shorter, 1.0, self.tail) * self.discount**step)
        return weights[0], weights[1]

    def _side(self, log_prob: Tensor, traj: Trajectories, weight: Tensor | None) -> _Side:
        mask = traj.mask
        steps = torch.where(mask, log_prob[:, : traj.steps], 0.0)
        weigh = lambda values: (values if weight is None else values * weight).sum(1)
        length = mask.count_nonzero(1).clamp(min=1)
        if not self.reads_reference:
            total = weigh(steps)
            return _Side(steps.sum(1), total, torch.zeros_like(total), total, length)
        base = torch.where(mask, required(self, traj, "reference_log_prob", f"('{self.loss}')"), 0.0)
        # the log-ratio step by step: the difference of two long sums would have fewer digits
        return _Side(steps.sum(1), weigh(steps), weigh(base), weigh(steps - base), length)

    def _score(self, side: _Side) -> Tensor:
        score = f_score(side.ratio, self.divergence, self.alpha)
        normalise = self.loss == "sigmoid_norm" if self.length_normalise is None else self.length_normalise
        return score / side.steps if normalise else score

    def _losses(
        self, win: Tensor, lose: Tensor, chosen: _Side, rejected: _Side, batch: Preferences
    ) -> Tensor:
        if self._sorts:
            if self.soft_labels and batch.strength is not None:
                raise UsageError(
                    f"PairwiseObjective: '{self.loss}' has no pairs whose labels could be soft; set soft_labels=False"
                )
            if self.loss == "aot":
                win, lose = chosen.policy - rejected.policy, chosen.reference - rejected.reference
            return aot_loss(win, lose, self.beta, self.label_smoothing)
        p = label_of(batch, 0.0 if self.loss == "robust" else self.label_smoothing, self.soft_labels)
        if self.loss == "exo_pair":
            return exo_loss(win, lose, self.beta, 1.0 if p is None else p)
        if self.loss == "robust" and self.label_smoothing:
            p = ((1.0 if p is None else p) - self.label_smoothing) / (1 - 2 * self.label_smoothing)
        return self._one(win, lose) if p is None else soften(self._one, win, lose, p)

    def _one(self, win: Tensor, lose: Tensor) -> Tensor:
        if self.loss == "unlikelihood":
            return unlikelihood_loss(win, lose, self.unlikelihood)
        options: dict[str, Any] = {}
        if self.target_margin:
            options["margin"] = self.target_margin
        if self.loss == "bco_pair":
            options["delta"] = self.delta
        elif self.loss == "discopop":
            options["tau"] = self.discopop_tau
        elif self.loss == "cpl":
            options["bias"] = self.bias
        return _ONE_PAIR[self.loss](win, lose, self.beta, **options)


class _Side(NamedTuple):
    """What the losses need of a side, each ``[B]``: plain sum of log-probabilities; weighted sums of the policy, the
    reference and their difference; number of steps."""

    log_prob: Tensor
    policy: Tensor
    reference: Tensor
    ratio: Tensor
    steps: Tensor


def ranked(
    group: Int[Tensor, " batch"], score: Float[Tensor, " batch"]
) -> tuple[Int[Tensor, "list place"], Bool[Tensor, "list place"]]:
    """``(rows [N, K], mask [N, K])``: the row numbers of each group, the highest score first; equal scores keep their
    order. Groups are in ascending order, empty places hold 0."""
    order = (-score).argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    _, counts = group.unique(return_counts=True)
    width = int(counts.max()) if len(counts) else 0
    mask = torch.arange(width, device=group.device) < counts[:, None]
    rows = torch.zeros(mask.shape, dtype=order.dtype, device=group.device)
    return rows.masked_scatter(mask, order), mask


@dataclass
class PlackettLuce:
    """DPO on ranked lists (Rafailov et al., 2023, eq. 20): `plackett_luce` of the implicit rewards.

    The batch is `Trajectories` with ``group`` (the list that a row is in, at least two rows each) and ``reward``, whose sum
    along a trajectory ranks it in its list; equal scores keep the order of the rows. With lists of two it equals
    `PairwiseObjective`. Lists stay whole: a split through one is refused.

    Attributes:
        beta: scale of the log-ratios.
        reference_free: take log-probabilities in place of log-ratios.
        length_normalise: divide a trajectory's score by its number of steps.

    ``weight`` is the number of lists. Metrics: ``loss``; ``rewards_best``, ``rewards_worst``, the implicit rewards of the
    first and last of the lists; ``margin``, their difference; ``accuracy``, the share of lists whose first is ahead of
    their last.
    Raises `ShapeError` on a batch that lacks a field, or a list of one.
    """

    beta: float | Tensor = 0.1
    reference_free: bool = False
    length_normalise: bool = False

    def weight(self, batch: Trajectories) -> Tensor:
        """The number of lists."""
        return torch.full((), len(self._group(batch).unique()), device=batch.mask.device)

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        group = self._group(batch)
        rows, mask = ranked(group, batch.score())
        if rows.shape[1] < 2 or not bool(mask[:, 1].all()):
            raise ShapeError(
                "PlackettLuce: a list has one row alone in this batch; keep the rows of a list together and leave out "
                "lists of one"
            )
        steps = torch.where(batch.mask, policy.log_prob(bare(batch)), 0.0)
        if not self.reference_free:
            steps = steps - torch.where(batch.mask, required(self, batch, "reference_log_prob"), 0.0)
        score = self.beta * steps.sum(1)
        if self.length_normalise:
            score = score / batch.lengths.clamp(min=1)
        table = score[rows]
        loss = plackett_luce(table, mask).sum() / len(rows)
        with torch.no_grad():
            best, worst = table[:, 0], table.gather(1, mask.sum(1, keepdim=True) - 1)[:, 0]
            metrics = {
                "loss": loss.detach(),
                "rewards_best": best.mean(),
                "rewards_worst": worst.mean(),
                "margin": (best - worst).mean(),
                "accuracy": (best > worst).to(best.dtype).mean(),
            }
        return loss, metrics

    def _group(self, batch: Trajectories) -> Tensor:
        if batch.group is None:
            raise ShapeError(
                "PlackettLuce: these trajectories carry no group [B] to say which list a row is in"
            )
        return batch.group
