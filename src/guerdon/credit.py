"""Credit: from rewards to advantages and targets. Pure functions of ``[B, T]`` and ``[B]`` tensors.

None of them is differentiated, and masked steps get zero whatever they hold. Statistics are computed in
float64 where the device has it, since rewards of one prompt often differ in their last digits only.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import ShapeError, UsageError

# --- per-step credit --------------------------------------------------------------------------------------


@torch.no_grad()
def gae(
    reward: Float[Tensor, "batch step"],
    value: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    terminated: Bool[Tensor, "batch step"] | None = None,
    truncated: Bool[Tensor, "batch step"] | None = None,
    *,
    bootstrap: Float[Tensor, " batch"] | None = None,
    next_value: Float[Tensor, "batch step"] | None = None,
    gamma: float = 0.99,
    lam: float = 0.95,
    dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "batch step"], Float[Tensor, "batch step"]]:
    """Generalised advantage estimation (Schulman et al., 2016, eq. 16): ``(advantage, target)``, ``[B, T]``.

    Args:
        reward, value: of each step and of the state it was taken in.
        mask: true on real steps.
        terminated: the episode ended for good at this step: nothing follows.
        truncated: the episode was cut at this step: the value of the state that would have followed counts,
            the advantages of whatever comes next in the row do not.
        bootstrap: ``[B]``, the value of the state after a row's last real step.
        next_value: ``[B, T]``, the value of the state after each step (before any reset), instead of
            ``bootstrap``; needed when a row holds several episodes and one but the last was truncated.
        gamma: discount; lam: 0 is one-step, 1 is Monte Carlo.
        dtype: computed in (for example ``torch.float64``); the results have ``value``'s.

    Without ``terminated`` and ``truncated`` a row is one episode: complete, or followed by ``bootstrap``.
    ``target`` is ``advantage + value``, what a critic regresses on.

    Raises `ShapeError` if a step is not terminated and nothing tells the value of what follows it, or if both
    ``bootstrap`` and ``next_value`` are given.
    """
    following, goes_on = _following(value, mask, terminated, truncated, bootstrap, next_value, dtype)
    value_, reward_ = _real(value, mask, dtype), _real(reward, mask, dtype)
    delta = reward_ + gamma * following - value_
    advantage = _accumulate(delta, (gamma * lam) * goes_on)
    return advantage.to(value.dtype), (advantage + value_).to(value.dtype)


def advantages(
    traj: Trajectories, next_value: Tensor | None, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """`gae` of judged trajectories that carry their values: ``(advantage, target)``, ``[B, T]``.

    Args:
        next_value: ``[B, T]``, as `Role.next_value` gives it (None for complete episodes); gamma, lam: as for `gae`.

    Raises `ShapeError` when the trajectories have no rewards or no values yet.
    """
    if traj.reward is None or traj.value is None:
        raise ShapeError(
            "advantages need trajectories that were judged and valued: set reward and value first"
        )
    return gae(
        traj.reward,
        traj.value,
        traj.mask,
        traj.terminated,
        traj.truncated,
        next_value=next_value,
        gamma=gamma,
        lam=lam,
    )


@torch.no_grad()
def vtrace(
    log_prob: Float[Tensor, "batch step"],
    old_log_prob: Float[Tensor, "batch step"],
    reward: Float[Tensor, "batch step"],
    value: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    terminated: Bool[Tensor, "batch step"] | None = None,
    truncated: Bool[Tensor, "batch step"] | None = None,
    *,
    bootstrap: Float[Tensor, " batch"] | None = None,
    next_value: Float[Tensor, "batch step"] | None = None,
    gamma: float = 0.99,
    lam: float = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
) -> tuple[Float[Tensor, "batch step"], Float[Tensor, "batch step"]]:
    """V-trace (Espeholt et al., 2018, eq. 1): ``(advantage, target)`` for data that another policy drew.

    Args:
        log_prob: of the policy that learns; old_log_prob: of the one that acted.
        lam: multiplies the trace coefficients (their remark 2).
        rho_clip, c_clip: where the ratios of the temporal differences and of the traces are cut.
        The others: as for `gae`.

    ``target`` is ``v_s``; ``advantage`` is ``rho_s (r_s + gamma v_{s+1} - V(x_s))``, with the ratio inside.
    On policy, with ``lam=1``, target is the n-step return. Raises `ShapeError` as `gae` does.
    """
    following, goes_on = _following(value, mask, terminated, truncated, bootstrap, next_value, None)
    value_, reward_ = _real(value, mask, None), _real(reward, mask, None)
    ratio = torch.where(mask, log_prob - old_log_prob, 0.0).exp()
    rho, trace = ratio.clamp(max=rho_clip), lam * ratio.clamp(max=c_clip)
    delta = rho * (reward_ + gamma * following - value_)
    excess = _accumulate(delta * mask, gamma * trace * goes_on)  # v_s - V(x_s)
    later = torch.zeros_like(excess)
    later[:, :-1] = excess[:, 1:]
    advantage = rho * (reward_ + gamma * (following + goes_on * later) - value_)
    return torch.where(mask, advantage, 0.0).to(value.dtype), (excess + value_).to(value.dtype)


@torch.no_grad()
def returns_to_go(
    reward: Float[Tensor, "batch step"],
    mask: Bool[Tensor, "batch step"],
    gamma: float = 1.0,
    *,
    ended: Bool[Tensor, "batch step"] | None = None,
    bootstrap: Float[Tensor, " batch"] | None = None,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch step"]:
    """``[B, T]``: the discounted sum of rewards from each step to the end of its episode.

    Args:
        ended: true where an episode ends inside a row, for good or not.
        bootstrap: ``[B]``, what follows a row's last real step, unless that step ``ended``.
        dtype: computed in; the result has ``reward``'s.
    """
    total = _real(reward, mask, dtype)
    goes_on = mask if ended is None else mask & ~ended
    if bootstrap is not None:
        last = _last(mask) & goes_on
        total = total + gamma * torch.where(last, bootstrap[:, None], 0.0).to(total.dtype)
    return _accumulate(total, gamma * goes_on.to(total.dtype)).to(reward.dtype)


# --- credit among answers to one prompt -------------------------------------------------------------------


@torch.no_grad()
def group_relative(
    score: Float[Tensor, " batch"],
    group: Int[Tensor, " batch"],
    std: bool = True,
    epsilon: float = 1e-6,
    correction: int = 1,
) -> Float[Tensor, " batch"]:
    """``(s - mean_g) / (std_g + epsilon)``: how much better a row scored than its group (Shao et al., 2024).

    Args:
        group: ``[B]``, which prompt each row answers; any order, any sizes.
        std: divide by the group's standard deviation (False: Dr. GRPO).
        correction: 1 divides the variance by n - 1, 0 by n. The paper does not say; 1 is the usage.

    A row alone in its group gets zero.
    """
    s = _precise(score)
    index, sums, counts = _group_sums(s, group)
    centred = s - (sums / counts)[index]
    if std:
        _, squares, _ = _group_sums(centred.square(), group)
        deviation = (squares / (counts - correction).clamp(min=1)).sqrt()
        centred = centred / (deviation[index] + epsilon)
    return centred.to(score.dtype)


@torch.no_grad()
def leave_one_out(score: Float[Tensor, " batch"], group: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """``s_i`` minus the mean score of the other rows of its group (RLOO, Kool et al., 2019).

    Raises `ShapeError` for a group of one, which has no others.
    """
    s = _precise(score)
    index, sums, counts = _group_sums(s, group)
    if bool((counts < 2).any()):
        alone = int(group[(counts < 2)[index]][0])
        raise ShapeError(
            f"leave_one_out: group {alone} has a single row; it takes at least two answers a prompt"
        )
    n = counts[index]
    # s - (sum - s)/(n - 1), from the centred score: equal scores then give exactly zero
    return ((s - (sums / counts)[index]) * n / (n - 1)).to(score.dtype)


@torch.no_grad()
def normalise(
    advantage: Float[Tensor, "batch step"], mask: Bool[Tensor, "batch step"], epsilon: float = 1e-8
) -> Float[Tensor, "batch step"]:
    """Mean 0 and standard deviation 1 (variance divided by n - 1) over the real steps; masked ones get 0."""
    count = mask.count_nonzero()
    real = torch.where(mask, _precise(advantage), 0.0)  # equal advantages must give zero, not their rounding
    centred = torch.where(mask, real - real.sum() / count.clamp(min=1), 0.0)
    deviation = (centred.square().sum() / (count - 1).clamp(min=1)).sqrt()
    return (centred / (deviation + epsilon)).to(advantage.dtype)


class PromptStatistics:
    """Running mean and deviation of each prompt's scores: the advantages of DDPO (Black et al., 2024) and
    RLCM (Oertell et al., 2024).

    Each prompt keeps its last ``buffer_size`` scores. `update` first puts the new ones in; a prompt that then
    holds fewer than ``min_count`` is compared with the whole new batch instead.

    Args:
        buffer_size: scores kept for each prompt.
        min_count: how many a prompt needs to be compared with itself. More than ``buffer_size`` can never be
            reached (raises `UsageError`): for batch statistics always, use `group_relative` with one group.
    """

    EPSILON = 1e-6  # as published

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        if not 1 <= min_count <= buffer_size:
            raise UsageError(
                f"PromptStatistics: min_count is {min_count}; it must be from 1 to buffer_size, {buffer_size}"
            )
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._scores: dict[int, deque[float]] = {}

    def __repr__(self) -> str:
        return f"PromptStatistics({len(self._scores)} prompts, buffer_size={self.buffer_size})"

    def update(self, group: Int[Tensor, " batch"], score: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Take in the scores of a batch and return their advantages ``(s - mean) / (std + 1e-6)``, ``[B]``.

        Args:
            group: ``[B]``, which prompt each row answers: the same number for the same prompt in every call.
            score: ``[B]``.

        The standard deviations divide by n. Raises `ShapeError` on a non-finite score; nothing is kept then.
        """
        if not bool(torch.isfinite(score).all()):
            row = int((~torch.isfinite(score)).nonzero()[0])
            raise ShapeError(
                f"PromptStatistics: the score of row {row} is {score[row].item()}; it must be finite"
            )
        s = score.detach().cpu().double()
        for key, number in zip(group.tolist(), s.tolist(), strict=True):
            self._scores.setdefault(key, deque(maxlen=self.buffer_size)).append(number)
        prompts, index = group.cpu().unique(return_inverse=True)
        whole = _moments(s)
        kept = [self._scores[prompt] for prompt in prompts.tolist()]
        rows = [_moments(torch.tensor(k, dtype=s.dtype)) if len(k) >= self.min_count else whole for k in kept]
        mean, deviation = torch.tensor(rows, dtype=s.dtype).reshape(-1, 2)[index].unbind(1)
        return ((s - mean) / (deviation + self.EPSILON)).to(score.device, score.dtype)

    def state_dict(self) -> dict[str, Any]:
        """``prompts [P]``, ``counts [P]`` and all their ``scores`` in order: tensors only."""
        return {
            "prompts": torch.tensor(list(self._scores), dtype=torch.int64),
            "counts": torch.tensor([len(kept) for kept in self._scores.values()], dtype=torch.int64),
            "scores": torch.tensor([s for kept in self._scores.values() for s in kept], dtype=torch.float64),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave; of longer buffers the last ``buffer_size`` scores."""
        parts = state["scores"].split(state["counts"].tolist())
        self._scores = {
            prompt: deque(part.tolist(), maxlen=self.buffer_size)
            for prompt, part in zip(state["prompts"].tolist(), parts, strict=True)
        }


# --- inside -----------------------------------------------------------------------------------------------


def _precise(values: Tensor) -> Tensor:
    return values if values.device.type == "mps" else values.double()  # Apple's GPUs have no float64


def _moments(values: Tensor) -> tuple[float, float]:
    """Mean and standard deviation (divided by n) of ``[N]`` values; equal ones deviate by exactly zero."""
    if len(values) == 0:
        return 0.0, 0.0
    shift = values[0]  # what all have in common leaves no rounding behind
    mean = shift + (values - shift).mean()
    return mean.item(), (values - mean).square().mean().sqrt().item()


def _real(values: Tensor, mask: Tensor, dtype: torch.dtype | None) -> Tensor:
    return torch.where(mask, values if dtype is None else values.to(dtype), 0.0)


def _last(mask: Tensor) -> Tensor:
    """True on each row's last real step."""
    after = torch.zeros_like(mask)
    after[:, :-1] = mask[:, 1:]
    return mask & ~after


def _following(
    value: Tensor,
    mask: Tensor,
    terminated: Tensor | None,
    truncated: Tensor | None,
    bootstrap: Tensor | None,
    next_value: Tensor | None,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """The value of the state after each step (0 where nothing follows), and 1 where the episode goes on."""
    if bootstrap is not None and next_value is not None:
        raise ShapeError("give bootstrap [B] or next_value [B, T], not both")
    if next_value is None:
        last = _last(mask)
        if truncated is not None:
            cut = truncated & mask & ~last
            if terminated is not None:
                cut &= ~terminated
            _refuse(
                cut,
                "is truncated inside its row: pass next_value [B, T], values of the states before any reset",
            )
        if bootstrap is None and (terminated is not None or truncated is not None):
            # with either flag the caller knows how rows end, so a missing value is an oversight, not a zero
            unended = last if terminated is None else last & ~terminated
            if terminated is None and truncated is not None:
                unended = unended & truncated
            _refuse(
                unended, "is the last of its row and not terminated: pass bootstrap [B] or next_value [B, T]"
            )
        following = torch.zeros_like(value)
        following[:, :-1] = value[:, 1:]
        following = torch.where(
            last, 0.0 if bootstrap is None else bootstrap[:, None].to(value.dtype), following
        )
    else:
        following = next_value
    real = mask if terminated is None else mask & ~terminated
    goes_on = real if truncated is None else real & ~truncated
    following = _real(following, real, dtype)
    return following, goes_on.to(following.dtype)


def _refuse(bad: Tensor, sentence: str) -> None:
    if bool(bad.any()):
        row, step = bad.nonzero()[0].tolist()
        raise ShapeError(f"step {step} of row {row} {sentence}")


def _accumulate(delta: Tensor, decay: Tensor) -> Tensor:
    """``x_t = delta_t + decay_t x_{t+1}`` along the steps, from the last to the first; ``[B, T]``.

    By doubling: after k rounds each step holds the sum over the 2^k steps from it on, and the factor for what
    comes behind them. log2(T) operations on the whole array instead of T on its columns.
    """
    delta, decay = delta.clone(), decay.clone()
    reach, steps = 1, delta.shape[1]
    while reach < steps:
        # the products are new tensors: writing while reading the same memory would mix rounds
        delta[:, :-reach] += decay[:, :-reach] * delta[:, reach:]
        decay[:, :-reach] = decay[:, :-reach] * decay[:, reach:]
        reach *= 2
    return delta


def _group_sums(values: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The number of each row's group, and sum and size of each group."""
    prompts, index, counts = group.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(len(prompts), dtype=values.dtype, device=values.device).index_add_(0, index, values)
    return index, sums, counts
