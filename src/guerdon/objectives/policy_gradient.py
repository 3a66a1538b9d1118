"""Policy gradients on ``[B, T]`` log-probabilities: the clipped surrogate, REINFORCE, and what they add; the
contrastive policy gradient, which learns from anybody's answers; the gradient of a KL from its own samples.

The pure functions give per-step losses; the dataclasses are `Objective`s that ask a policy for its
log-probabilities, add entropy and KL terms, and reduce. None of them knows what a step is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.batch import Preferences, Trajectories
from guerdon.errors import ShapeError, UsageError, nearest
from guerdon.objectives import divergence
from guerdon.objectives.base import Metrics
from guerdon.objectives.preference import both_sides
from guerdon.objectives.reduction import Reduction, reduce, reduction_weight

Importance = Literal["none", "step", "trajectory"]
Baseline = Literal["contrast", "none", "reward", "regularised"]


# --- per-step losses --------------------------------------------------------------------------------------


def clipped_surrogate(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    advantage: Float[Tensor, "batch step"],
    clip: float | Tensor,
    *,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Tensor, "batch step"]:
    """``max(-A rho, -A clip(rho, 1 - clip, 1 + clip))`` with ``rho = exp(log_prob - old_log_prob)``, the
    clipped surrogate of PPO (Schulman et al., 2017, eq. 7) as a per-step loss ``[B, T]``.

    Args:
        log_prob: under the policy that learns; old_log_prob: under the one that acted.
        clip: how far the ratio may fall below 1 and, without ``clip_high``, rise above it.
        clip_high: how far it may rise ("clip higher", DAPO, Yu et al., 2025).
        dual_clip: for negative advantages the loss is at most ``-A * dual_clip``, with ``dual_clip > 1``
            (Ye et al., 2020): a step that became many times likelier cannot dominate.
    """
    # The maximum over two branches as one clamp: where A > 0 only the upper bound can bind, else only the
    # lower (and the dual clip, an upper one). Fewer nodes in the graph, and equal to the last bit.
    gains = advantage > 0
    upper = torch.where(
        gains, 1.0 + (clip if clip_high is None else clip_high), math.inf if dual_clip is None else dual_clip
    )
    lower = torch.where(gains, 0.0, 1.0 - clip)
    return -advantage * (log_prob - old_log_prob).exp().clamp(lower, upper)


def importance_weight(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    level: Importance = "step",
    cap: float | None = None,
) -> Float[Tensor, "batch step"]:
    """Weights ``[B, T]`` without gradient that correct for data which another policy drew.

    Args:
        level: ``"none"``, ones; ``"step"``, the ratio of each step; ``"trajectory"``, the product of the
            ratios over a trajectory, at each of its steps.
        cap: the weight is at most this (truncated importance sampling, Ionides, 2008).

    Raises `UsageError` if ``level`` is none of these.
    """
    log_ratio = torch.where(mask, log_prob.detach() - old_log_prob, 0.0)
    if level == "none":
        return torch.ones_like(log_ratio)
    if level == "trajectory":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    elif level != "step":
        raise UsageError(f"there is no importance level '{level}': {nearest(level, get_args(Importance))}")
    weight = log_ratio.exp()
    return weight if cap is None else weight.clamp(max=cap)


def reinforce(
    log_prob: Float[Tensor, "batch step"],
    advantage: Float[Tensor, "batch step"],
    weight: Float[Tensor, "batch step"] | None = None,
) -> Float[Tensor, "batch step"]:
    """``-A log pi`` (Williams, 1992) as a per-step loss ``[B, T]``, times an `importance_weight` if given."""
    gain = advantage if weight is None else advantage * weight
    return -gain * log_prob


def drift(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    clip: tuple[float | Tensor, float | Tensor] | None = None,
) -> Metrics:
    """How far the policy has moved from the one that acted; both log-probabilities are zero where masked.

    ``ratio_deviation_max``, the largest ``|rho - 1|`` (zero, up to rounding, before the first update);
    ``approx_kl``, the mean over steps of the `k3` estimate of KL(old || new); ``clip_fraction``, the share
    of steps whose ratio left ``[1 - clip[0], 1 + clip[1]]``, if ``clip`` is given.
    """
    steps = mask.count_nonzero().clamp(min=1)
    log_ratio = log_prob.detach() - old_log_prob
    deviation = log_ratio.expm1()  # rho - 1 to full precision, also for a clip range of 1e-4
    metrics = {
        "ratio_deviation_max": torch.linalg.vector_norm(deviation, float("inf")),
        "approx_kl": (deviation - log_ratio).sum() / steps,
    }
    if clip is not None:
        kept = deviation.clamp(-clip[0], clip[1])  # type: ignore[arg-type]
        metrics["clip_fraction"] = (kept != deviation).count_nonzero() / steps
    return metrics


# --- losses of groups -------------------------------------------------------------------------------------


def contrast(
    value: Float[Tensor, " batch"], index: Int[Tensor, " batch"], counts: Int[Tensor, " group"]
) -> Float[Tensor, " batch"]:
    """``value_i`` minus the mean value of the other rows of its group; differentiable.

    Args:
        index: ``[B]``, the number of each row's group, from 0; counts: how many rows each group has, 2 or more.
    """
    n = counts.to(value.dtype)
    mean = _group_sum(value, index, counts) / n
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
    centred = value - (_group_sum(value, index, counts) / n)[index]
    return _group_sum(centred.square(), index, counts) * n / (2 * beta * (n - 1))


def _group_sum(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """``[G]`` (or ``[G, T]``): the sum of each group's rows."""
    return values.new_zeros(len(counts), *values.shape[1:]).index_add(0, index, values)


def _groups(batch: Trajectories, owner: str) -> tuple[Tensor, Tensor]:
    """Each row's group, numbered from 0, and the size of each, which must be at least 2."""
    if batch.group is None:
        raise ShapeError(f"{owner} compares the answers to a prompt, but this batch carries no group [B]")
    _, index, counts = batch.group.unique(return_inverse=True, return_counts=True)
    if bool((counts < 2).any()):
        row = int((counts < 2)[index].nonzero()[0])
        raise ShapeError(
            f"{owner}: row {row} is the only one of group {int(batch.group[row])} in this batch; give each prompt "
            "two answers or more, and keep them together when the batch is split"
        )
    return index, counts


# --- objectives -------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Regularised:
    """What the objectives below share: one reduction, an entropy bonus and a KL cost.

    Attributes:
        reduction: see `reduction.reduce`; all terms use the same.
        entropy: what a nat of entropy is worth; needs the policy's ``distribution``.
        kl: what a nat of KL(policy || reference) costs.
        kl_estimator: ``"exact"`` reads ``batch.reference``; ``"k1"``, ``"k2"`` and ``"k3"`` read
            ``batch.reference_log_prob`` and suppose fresh samples (see `divergence` for their gradients: of
            the three only ``"k2"`` has that of this KL; ``"k3"`` is GRPO's).
    """

    reduction: Reduction = "step"
    entropy: float = 0.0
    kl: float = 0.0
    kl_estimator: Literal["exact", "k1", "k2", "k3"] = "exact"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("reduction", self.reduction, get_args(Reduction)),
            ("kl_estimator", self.kl_estimator, ("exact", *get_args(divergence.Estimator))),
        ):
            if value not in known:
                raise UsageError(f"{type(self).__name__}: {name} is '{value}'; {nearest(value, known)}")

    def weight(self, batch: Trajectories) -> Tensor:
        """How much the loss counted (see `reduction.reduction_weight`)."""
        return reduction_weight(batch.mask, self.reduction)

    def _advantage(self, batch: Trajectories) -> Tensor:
        advantage = batch.advantage
        if advantage is None:
            raise ShapeError(
                f"{type(self).__name__} needs batch.advantage, which is missing: "
                "compute it with guerdon.credit before the update"
            )
        return advantage

    def _evaluate(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Any]:
        """``log_prob [B, T]`` and, if a term needs it, the distribution it came from (one forward pass)."""
        if self.entropy or (self.kl and self.kl_estimator == "exact"):
            distribution = policy.distribution(batch)
            return policy.log_prob(batch, distribution), distribution
        return policy.log_prob(batch), None

    def _finish(
        self,
        losses: Tensor,
        log_prob: Tensor,
        distribution: Any,
        policy: Any,
        batch: Trajectories,
        metrics: Metrics,
    ) -> tuple[Tensor, Metrics]:
        """Add the regularisers to the per-step ``losses``, reduce once, complete the metrics."""
        mask = batch.mask
        event: divergence.Event = getattr(policy, "event_reduction", "sum")
        if self.kl:
            if self.kl_estimator == "exact":
                if batch.reference is None:
                    raise ShapeError(
                        f"{type(self).__name__} with an exact KL needs batch.reference, which is missing: "
                        "store reference.distribution(batch) there, or choose kl_estimator 'k2' or 'k3'"
                    )
                kl = divergence.kl(distribution, batch.reference, event, mask)
            else:
                if batch.reference_log_prob is None:
                    raise ShapeError(
                        f"{type(self).__name__} with kl_estimator '{self.kl_estimator}' needs "
                        "batch.reference_log_prob, which is missing: store reference.log_prob(batch) there"
                    )
                kl = divergence.estimate_kl(log_prob, batch.reference_log_prob, self.kl_estimator)
            losses = torch.add(losses, kl, alpha=self.kl)
            metrics["kl"] = reduce(kl.detach(), mask)
        if self.entropy:
            entropy = divergence.entropy(distribution, event)
            losses = torch.add(losses, entropy, alpha=-self.entropy)
            metrics["entropy"] = reduce(entropy.detach(), mask)
        loss = reduce(losses, mask, self.reduction)
        metrics["loss"] = loss.detach()
        return loss, metrics


@dataclass
class ClippedSurrogate(_Regularised):
    """PPO's objective (Schulman et al., 2017) on any policy's steps: `clipped_surrogate`, reduced.

    Reads ``log_prob`` and ``advantage`` of the batch, and the reference if ``kl`` is not zero.

    Attributes:
        clip, clip_high, dual_clip: see `clipped_surrogate`. A ``clip`` that changes between updates is a 0-d tensor.

    Metrics (means over real steps whatever the reduction): ``loss``, ``ratio_deviation_max``,
    ``clip_fraction``, ``approx_kl``; ``kl`` and ``entropy`` where they have a coefficient.
    Raises `UsageError` on a clip range that makes no sense, `ShapeError` on a batch that lacks a field.
    """

    clip: float | Tensor = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "clip_high"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UsageError(f"ClippedSurrogate: {name} is {value}; it must not be negative")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UsageError(f"ClippedSurrogate: dual_clip is {self.dual_clip}; it must be larger than 1")

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        advantage = self._advantage(batch)
        log_prob, distribution = self._evaluate(policy, batch)
        old = batch.log_prob
        losses = clipped_surrogate(
            log_prob, old, advantage, self.clip, clip_high=self.clip_high, dual_clip=self.dual_clip
        )
        high = self.clip if self.clip_high is None else self.clip_high
        metrics = drift(log_prob, old, batch.mask, (self.clip, high))
        return self._finish(losses, log_prob, distribution, policy, batch, metrics)


@dataclass
class Reinforce(_Regularised):
    """The score-function gradient (Williams, 1992) on any policy's steps: `reinforce`, reduced.

    Reads ``advantage`` and ``log_prob`` of the batch (the latter for the importance weight and to tell how
    stale the data are), and the reference if ``kl`` is not zero.

    Attributes:
        importance, importance_cap: see `importance_weight`.

    Metrics (means over real steps whatever the reduction): ``loss``, ``ratio_deviation_max``, ``approx_kl``;
    ``kl`` and ``entropy`` where they have a coefficient.
    Raises `UsageError` on an unknown option, `ShapeError` on a batch that lacks a field.
    """

    importance: Importance = "none"
    importance_cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in get_args(Importance):
            known = nearest(self.importance, get_args(Importance))
            raise UsageError(f"Reinforce: importance is '{self.importance}'; {known}")

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        advantage = self._advantage(batch)
        log_prob, distribution = self._evaluate(policy, batch)
        old, mask = batch.log_prob, batch.mask
        weight = None
        if self.importance != "none":
            weight = importance_weight(log_prob, old, mask, self.importance, self.importance_cap)
        losses = reinforce(log_prob, advantage, weight)
        metrics = drift(log_prob, old, mask)
        return self._finish(losses, log_prob, distribution, policy, batch, metrics)


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
        for name, value, known in (
            ("form", self.form, ("squared", "detached")),
            ("baseline", self.baseline, get_args(Baseline)),
        ):
            if value not in known:
                raise UsageError(f"ContrastivePolicyGradient: {name} is '{value}'; {nearest(value, known)}")
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
        index, counts = _groups(batch, type(self).__name__)
        return torch.full((), len(counts), device=index.device)

    def __call__(self, policy: Any, batch: Preferences | Trajectories) -> tuple[Tensor, Metrics]:
        if isinstance(batch, Preferences):
            traj, sides = both_sides(batch), [batch.chosen, batch.rejected]
            index = torch.arange(len(traj.mask) // 2, device=traj.mask.device).repeat(2)
            counts = torch.full_like(index[: len(traj.mask) // 2], 2)
        else:
            traj, sides = batch, [batch]
            index, counts = _groups(batch, type(self).__name__)
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
            losses = -_group_sum(self._advantage(value, score, index, counts) * likelihood, index, counts)
        loss = losses.sum() / max(len(counts), 1)
        with torch.no_grad():
            mean = lambda values: (_group_sum(values, index, counts) / counts).sum() / max(len(counts), 1)
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
        if traj.reference_log_prob is None:
            raise ShapeError(
                "ContrastivePolicyGradient needs batch.reference_log_prob, which is missing: store "
                "reference.log_prob(batch) there"
            )
        return torch.where(traj.mask, traj.reference_log_prob, 0.0).sum(1)


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
        if self.credit not in ("trajectory", "step"):
            known = nearest(self.credit, ("trajectory", "step"))
            raise UsageError(f"ReverseKL: credit is '{self.credit}'; {known}")

    def weight(self, batch: Trajectories) -> Tensor:
        """The number of groups, or of trajectories where these are not compared."""
        return torch.full((), len(self._groups(batch)[1]), device=batch.mask.device)

    def __call__(self, policy: Any, batch: Trajectories) -> tuple[Tensor, Metrics]:
        if batch.reference_log_prob is None:
            raise ShapeError(
                "ReverseKL needs batch.reference_log_prob, which is missing: store reference.log_prob(batch) there"
            )
        index, counts = self._groups(batch)
        log_prob = policy.log_prob(batch)
        cost = torch.where(batch.mask, log_prob.detach() - batch.reference_log_prob, 0.0)
        total = cost.sum(1)
        charge = total[:, None].expand_as(cost) if self.credit == "trajectory" else _to_go(cost)
        if self.leave_one_out:
            n = counts.to(charge.dtype)[:, None]
            mean = _group_sum(charge, index, counts) / n
            charge = (charge - mean[index]) * (n / (n - 1))[index]
        rows = torch.where(batch.mask, charge * log_prob, 0.0).sum(1)
        groups = max(len(counts), 1)
        loss = (_group_sum(rows, index, counts) / counts).sum() / groups
        kl = (_group_sum(total, index, counts) / counts).sum() / groups
        metrics = drift(log_prob, batch.log_prob, batch.mask)
        return loss, {"loss": kl, "kl": kl, "ratio_deviation_max": metrics["ratio_deviation_max"]}

    def _groups(self, batch: Trajectories) -> tuple[Tensor, Tensor]:
        if self.leave_one_out:
            return _groups(batch, type(self).__name__)
        index = torch.arange(len(batch.mask), device=batch.mask.device)
        return index, torch.ones_like(index)


def _to_go(values: Tensor) -> Tensor:
    """``[B, T]``: the sum of each row from a step to the end."""
    return values.flip(1).cumsum(1).flip(1)
