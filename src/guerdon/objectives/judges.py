"""What judges are fitted by: `RewardPairs` (a score for each side of a pair), `PairClassifier` (a model that reads both
sides), `AttributeRegression` (several ratings of one trajectory)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn.functional import softplus

from guerdon.batch import Preferences, Trajectories
from guerdon.errors import ShapeError
from guerdon.objectives.base import Metrics, check_choices
from guerdon.objectives.sides import bare, both_sides, check_smoothing, label_of, pairs_in


@dataclass
class RewardPairs:
    """A reward model from comparisons: ``-log sigma(r_w - r_l - margin)`` (Bradley & Terry, 1952), or a hinge.

    The model gives ``model.score(traj)``, ``[B]`` or ``[B, T]`` (then summed over real steps). Both sides are
    evaluated in one pass.

    Attributes:
        loss: ``"bradley_terry"``, or ``"hinge"``, ``max(0, 1 - (r_w - r_l - margin))``.
        margin: by how much the scores should differ beyond the label's demand. A number for each pair in
            ``chosen.inputs["margin"] [B]`` is added to it (an adaptive margin, Wang et al., 2024, "Secrets of RLHF II"; it
            may be negative).
        label_smoothing, soft_labels: as for `PairwiseObjective`: a label that is right with probability p gives
            ``-p log sigma(z) - (1 - p) log sigma(-z)`` with ``z = r_w - r_l - margin``.
        centering: add this times the mean of ``(r_w + r_l)^2``, which fixes the constant that comparisons leave open
            (Eisenstein et al., 2023).
        l2: add this times the mean of ``r_w^2 + r_l^2`` (Coste et al., 2024).

    ``weight`` is the number of pairs. Metrics: ``loss``; ``accuracy``, the share of pairs with ``r_w > r_l``; ``margin``,
    the mean of ``r_w - r_l``; ``score_chosen``, ``score_rejected``.
    """

    loss: Literal["bradley_terry", "hinge"] = "bradley_terry"
    margin: float = 0.0
    label_smoothing: float = 0.0
    soft_labels: bool = True
    centering: float = 0.0
    l2: float = 0.0

    def __post_init__(self) -> None:
        check_choices(self, loss=("bradley_terry", "hinge"))
        check_smoothing(self, self.label_smoothing)

    def weight(self, batch: Preferences) -> Tensor:
        """The number of pairs."""
        return pairs_in(batch)

    def __call__(self, model: Any, batch: Preferences) -> tuple[Tensor, Metrics]:
        joined = both_sides(batch, outputs=True)
        score = model.score(joined)
        if score.ndim == 2:
            score = torch.where(joined.mask, score, 0.0).sum(1)
        rows = batch.chosen.mask.shape[0]
        if score.shape != (2 * rows,):
            raise ShapeError(
                f"RewardPairs: model.score gave {list(score.shape)}, expected {[2 * rows]} or a score a step"
            )
        chosen, rejected = score[:rows], score[rows:]
        gap = chosen - rejected
        logit = gap - self.margin if self.margin else gap
        own = batch.chosen.inputs.get("margin", None)
        if own is not None:
            logit = logit - own
        one = (lambda z: softplus(-z)) if self.loss == "bradley_terry" else (lambda z: (1 - z).relu())
        p = label_of(batch, self.label_smoothing, self.soft_labels)
        losses = one(logit) if p is None else p * one(logit) + (1 - p) * one(-logit)
        if self.centering:
            losses = losses + self.centering * (chosen + rejected).square()
        if self.l2:
            losses = losses + self.l2 * (chosen.square() + rejected.square())
        loss = losses.sum() / max(rows, 1)
        with torch.no_grad():
            table = torch.stack([(gap > 0).to(gap.dtype), gap, chosen, rejected]).sum(1) / max(rows, 1)
        names = ("accuracy", "margin", "score_chosen", "score_rejected")
        return loss, {"loss": loss.detach(), **dict(zip(names, table.unbind(), strict=True))}


@dataclass
class PairClassifier:
    """A model that reads two answers together and says which is better: cross-entropy of its logit.

    The model gives ``model.logit(a, b) [B]``, the log-odds that ``a`` is preferred to ``b`` (Jiang et al., 2023; Munos et
    al., 2024). Unlike a score it can express preferences that go round in a circle, and it can learn that the first
    answer is always better, which ``order`` prevents.

    Attributes:
        order: ``"random"``, half of the pairs are shown with the rejected answer first (which ones is decided by what
            the pair holds, so that any split of the batch shows the same); ``"both"``, the mean of the losses in
            either order; ``"antisymmetric"``, the loss of ``(logit(a, b) - logit(b, a)) / 2``; ``"given"``, the chosen first.
        salt: with ``"random"``, another number draws other pairs (the number of the pass, say).
        label_smoothing, soft_labels: as for `PairwiseObjective`.

    ``weight`` is the number of pairs. Metrics: ``loss``; ``accuracy``; ``margin``, the mean log-odds of the chosen answer;
    ``first_bias``, the mean log-odds of the answer shown first (zero for a model without position bias).
    """

    order: Literal["random", "both", "antisymmetric", "given"] = "random"
    salt: int = 0
    label_smoothing: float = 0.0
    soft_labels: bool = True

    def __post_init__(self) -> None:
        check_choices(self, order=("random", "both", "antisymmetric", "given"))
        check_smoothing(self, self.label_smoothing)

    def weight(self, batch: Preferences) -> Tensor:
        """The number of pairs."""
        return pairs_in(batch)

    def __call__(self, model: Any, batch: Preferences) -> tuple[Tensor, Metrics]:
        joined = both_sides(batch, outputs=True)
        rows = batch.chosen.mask.shape[0]
        place = torch.arange(rows, device=joined.mask.device)
        if self.order in ("both", "antisymmetric"):
            first, second = torch.cat([place, place + rows]), torch.cat([place + rows, place])
        else:
            flip = place < 0 if self.order == "given" else coins(batch, self.salt)
            first, second = torch.where(flip, place + rows, place), torch.where(flip, place, place + rows)
        raw = model.logit(joined[first], joined[second])
        if self.order in ("both", "antisymmetric"):
            logits = torch.stack([raw[:rows], -raw[rows:]])
            logit = logits.mean(0)
            logits = logits if self.order == "both" else logit[None]
        else:
            logit = torch.where(flip, -raw, raw)
            logits = logit[None]
        p = label_of(batch, self.label_smoothing, self.soft_labels)
        losses = softplus(-logits) if p is None else p * softplus(-logits) + (1 - p) * softplus(logits)
        loss = losses.mean(0).sum() / max(rows, 1)
        with torch.no_grad():
            metrics = {
                "loss": loss.detach(),
                "accuracy": (logit > 0).count_nonzero() / max(rows, 1),
                "margin": logit.sum() / max(rows, 1),
                "first_bias": raw.sum() / max(len(raw), 1),
            }
        return loss, metrics


def coins(batch: Preferences, salt: int = 0) -> Bool[Tensor, " batch"]:
    """``[B]``: a fair coin for each pair, a hash of the steps of both sides. The same for a pair wherever it stands in
    whatever batch, however padded; the two orders of a pair have coins of their own."""
    state = torch.full(
        (batch.chosen.mask.shape[0],), salt, dtype=torch.int64, device=batch.chosen.mask.device
    )
    for traj in (batch.chosen, batch.rejected):
        step = traj.inputs["step"]
        for name in sorted(step.keys()):
            value = step[name]
            if value.is_floating_point():
                value = value.float().view(torch.int32)
            value = value.long().reshape(*value.shape[:2], -1)
            t = torch.arange(1, value.shape[1] + 1, device=value.device)[:, None]
            k = torch.arange(1, value.shape[2] + 1, device=value.device)
            digits = torch.where(traj.mask[..., None], _scramble(_scramble(value + t * 0x9E3779B1) + k), 0)
            state = _scramble(state + digits.sum((1, 2)))
    return (state & 1).bool()


def _scramble(x: Tensor) -> Tensor:
    """A well-mixed integer from each integer (SplitMix64's finaliser on int64, which wraps around)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _signed(number: int) -> int:
    return number - (1 << 64)


@dataclass
class AttributeRegression:
    """A judge with several outputs from ratings: squared error, missing ratings left out.

    The batch is `Trajectories` with ``inputs["rating"] [B, k]``, NaN where an attribute was not rated (data sets rate
    different ones; Wang et al., 2024, directional preference alignment). The model gives ``model.scores(traj) [B, k]``.

    The loss is the mean over the ratings that are there, and ``weight`` their number. Metrics: ``loss``; ``error``, the
    mean absolute error.
    Raises `ShapeError` when ratings are missing altogether or do not fit the scores.
    """

    def weight(self, batch: Trajectories) -> Tensor:
        """The number of ratings."""
        return (~self._rating(batch).isnan()).count_nonzero()

    def __call__(self, model: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        rating = self._rating(batch)
        scores = model.scores(bare(batch, outputs=True))
        if scores.shape != rating.shape:
            raise ShapeError(
                f"AttributeRegression: model.scores gave {list(scores.shape)}, the ratings are {list(rating.shape)}"
            )
        known = ~rating.isnan()
        count = known.count_nonzero().clamp(min=1)
        error = torch.where(known, scores - torch.where(known, rating, 0.0), 0.0)
        loss = error.square().sum() / count
        return loss, {"loss": loss.detach(), "error": error.detach().abs().sum() / count}

    def _rating(self, batch: Trajectories) -> Tensor:
        rating = batch.inputs.get("rating", None)
        if rating is None:
            raise ShapeError(
                "AttributeRegression needs batch.inputs['rating'] [B, k], which is missing: give each answer its ratings, "
                "NaN where there is none"
            )
        return rating
