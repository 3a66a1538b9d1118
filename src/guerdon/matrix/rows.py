"""The rows of the matrix: objectives, each with what it needs done to judged answers first.

Every row sees the same: groups of answers to one prompt (episodes from one starting state) with one score each, drawn by
the policy of this round, ``pi_k``. Scores are standardised over the round, so that no setting below knows their units.
Where an objective is held to a reference, that is ``pi_k``: its log-probabilities are in the batch, and each round is one
step of policy iteration. Settings are the same for all kinds of policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guerdon.batch import Batch, Trajectories
from guerdon.credit import group_relative
from guerdon.objectives.base import Objective
from guerdon.objectives.contrastive import ContrastivePolicyGradient
from guerdon.objectives.likelihood import WeightedLikelihood
from guerdon.objectives.mirror_descent import MirrorDescent
from guerdon.objectives.policy_gradient import ClippedSurrogate, Reinforce
from guerdon.objectives.preference import PairwiseObjective
from guerdon.objectives.reward_difference import RewardDifference
from guerdon.sampling import best_of_n, first_round

if TYPE_CHECKING:
    from guerdon.matrix.columns import Column

Prepare = Callable[[Any, Trajectories], Batch]


def standardised(traj: Trajectories) -> Trajectories:
    """The same answers with scores of mean 0 and deviation 1 over the batch, and ``pi_k`` as reference."""
    score = traj.score()
    score = (score - score.mean()) / (score.std() + 1e-6)
    traj = traj.judged(score)
    return traj.with_(reference_log_prob=traj.log_prob)


def group(traj: Trajectories) -> Tensor:
    """Which prompt each row answers."""
    assert traj.group is not None  # experience in groups says so
    return traj.group


def with_advantage(actor: Any, traj: Trajectories) -> Trajectories:
    """Each step's advantage is that of its answer within the group (Shao et al., 2024)."""
    traj.advantage = traj.per_step(group_relative(traj.score(), group(traj)))
    return traj


def with_last_policy(actor: Any, traj: Trajectories) -> Trajectories:
    """Advantages, and the distributions of ``pi_k`` for an exact KL divergence."""
    traj = with_advantage(actor, traj)
    traj.reference = actor.distribution(traj)
    return traj


def with_weight(actor: Any, traj: Trajectories) -> Trajectories:
    """In place of the advantage ``exp(A / 0.5)``, the weight of advantage-weighted regression (Peng et al., 2019)."""
    traj.advantage = traj.per_step((group_relative(traj.score(), group(traj)) / 0.5).exp())
    return traj


def as_they_are(actor: Any, traj: Trajectories) -> Trajectories:
    """Nothing: the objective compares the answers of a group itself."""
    return traj


def the_best(actor: Any, traj: Trajectories) -> Trajectories:
    """The best answer of each group; the rest is rejected."""
    return traj[best_of_n(traj.score(), group(traj))]


def ranked_pairs(actor: Any, traj: Trajectories) -> Batch:
    """Random disjoint pairs within groups, the better one chosen; pairs of equals are left out."""
    score = traj.score()
    generator = torch.Generator().manual_seed(int(actor.updates))
    pairs = first_round(group(traj), lambda a, b: (score[a] - score[b]).sign() / 2 + 0.5, generator)
    return pairs.where(pairs.strength > 0.5).of(traj)


@dataclass(frozen=True)
class Row:
    """One objective.

    Args:
        name, title: for files, and for people.
        objective: what is minimised.
        prepare: ``(actor, traj) -> batch``: what the objective reads, of the standardised answers of one round.
        epochs: passes over each round's batch.
        senseless: why the row has no meaning in a column, in one line; "" where it has one.
    """

    name: str
    title: str
    objective: Objective
    prepare: Prepare
    epochs: int = 2
    senseless: Callable[[Column], str] = lambda column: ""


def _one_step(column: Column) -> str:
    return "an answer is one step: there is nothing to discount" if column.one_step else ""


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row("reinforce", "REINFORCE", Reinforce(reduction="sum"), with_advantage, epochs=1),
        Row("clip", "clipped policy gradient", ClippedSurrogate(clip=0.2, reduction="sum"), with_advantage),
        Row("mirror_descent", "mirror descent", MirrorDescent(kl=0.1, reduction="sum"), with_last_policy),
        Row("copg", "contrastive policy gradient", ContrastivePolicyGradient(beta=0.5), as_they_are),
        Row("rebel", "reward-difference regression", RewardDifference(eta=0.5), as_they_are),
        Row(
            "weighted",
            "advantage-weighted likelihood",
            WeightedLikelihood("sum", by="advantage"),
            with_weight,
        ),
        Row("rejection", "rejection-sampling likelihood", WeightedLikelihood("sum"), the_best),
        Row("dpo", "DPO", PairwiseObjective("sigmoid", beta=1.0), ranked_pairs),
        Row("ipo", "IPO", PairwiseObjective("ipo", beta=0.25), ranked_pairs),
        Row("hinge", "hinge", PairwiseObjective("hinge", beta=1.0), ranked_pairs),
        Row(
            "cpl",
            "CPL, biased",
            PairwiseObjective("cpl", beta=1.0, bias=0.5, reference_free=False),
            ranked_pairs,
        ),
        Row(
            "cpl_discounted",
            "CPL, biased and discounted",
            PairwiseObjective("cpl", beta=1.0, bias=0.5, discount=0.99, reference_free=False),
            ranked_pairs,
            senseless=_one_step,
        ),
    )
}
