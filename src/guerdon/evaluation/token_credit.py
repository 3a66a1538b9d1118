"""A preference-tuned language model read token by token (Rafailov et al., 2024, "From r to Q*", arXiv 2404.12358).

In the decision process whose steps are tokens, the logits of a policy that solves it are soft action values up to a
term of the state, and ``beta log(pi / pi_ref)`` of a token is its optimal advantage. So a model that was trained on
whole answers says which tokens earned the preference.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import ShapeError


@torch.no_grad()
def token_rewards(
    policy: Any, reference: Any, traj: Trajectories, beta: float = 0.1
) -> Float[Tensor, "batch step"]:
    """The implicit reward of each token, ``beta (log pi - log pi_ref)``, zero where masked. They sum to the implicit
    reward of the answer.

    Args:
        policy, reference: roles or policies.
        traj: answers of whatever origin.
    """
    return beta * (policy.log_prob(traj) - reference.log_prob(traj))


@torch.no_grad()
def soft_values(
    logits: Float[Tensor, "batch step action"], token: Int[Tensor, "batch step"], beta: float
) -> tuple[Float[Tensor, "batch step"], Float[Tensor, "batch step"], Float[Tensor, "batch step"]]:
    """Logits read as a soft action-value function: ``(Q, V, advantage)`` of each token taken.

    ``Q = beta * logit``, ``V = beta logsumexp(logits)`` and ``Q - V = beta log pi``. Q and V are defined up to a term of
    the state (the reward's shaping); the advantage is not.
    """
    q = beta * logits.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    v = beta * logits.logsumexp(-1)
    return q, v, q - v


def localisation(
    reward: Float[Tensor, "batch step"], mask: Bool[Tensor, "batch step"], planted: Int[Tensor, " batch"]
) -> dict[str, float]:
    """How well low token rewards point at a planted error.

    Args:
        reward: of each token.
        planted: ``[B]``, the place of the wrong token.

    Returns ``lowest``, the share of answers whose lowest reward is the wrong token's; ``rank``, its mean place from
    below (1 is lowest); ``auroc``, the probability that it is lower than another token of its answer (ties count half);
    ``chance``, what ``lowest`` would be for random rewards. Raises `ShapeError` where a place is outside its answer.
    """
    rows = torch.arange(len(planted), device=planted.device)
    if not bool(mask[rows, planted].all()):
        row = int((~mask[rows, planted]).nonzero()[0])
        raise ShapeError(
            f"localisation: the planted token {int(planted[row])} of row {row} is not in its answer"
        )
    wrong = reward[rows, planted][:, None]
    others = mask.clone()
    others[rows, planted] = False
    below = ((reward < wrong) & others).sum(1)
    ties = ((reward == wrong) & others).sum(1)
    count = others.sum(1)
    above = count - below - ties
    return {
        "lowest": float((below + ties == 0).double().mean()),
        "rank": float((1 + below + 0.5 * ties).double().mean()),
        "auroc": float(((above + 0.5 * ties) / count).double().mean()),
        "chance": float((1 / (count + 1)).double().mean()),
    }


def heat_map(
    tokens: Sequence[Sequence[str]],
    rewards: Sequence[Sequence[float]],
    path: str | Path,
    titles: Sequence[str] = (),
) -> None:
    """A picture of answers whose tokens are coloured by their reward (red is low, blue is high), one a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = max((abs(r) for row in rewards for r in row), default=1.0) or 1.0
    widest = max(sum(len(t) + 1.2 for t in row) for row in tokens)
    figure, axis = plt.subplots(figsize=(0.11 * widest + 0.4, 0.62 * len(tokens) + 0.4), layout="constrained")
    colours = plt.get_cmap("RdBu")
    for i, (row, values) in enumerate(zip(tokens, rewards, strict=True)):
        place = 0.0
        for token, value in zip(row, values, strict=True):
            width = len(token) + 1.2
            colour = colours(0.5 + 0.45 * value / largest)
            axis.add_patch(plt.Rectangle((place, -i - 0.3), width, 0.55, color=colour, linewidth=0))
            dark = abs(value) > 0.6 * largest
            axis.text(
                place + width / 2,
                -i - 0.03,
                token,
                ha="center",
                va="center",
                family="monospace",
                fontsize=8,
                color="white" if dark else "black",
            )
            place += width
        if i < len(titles):
            axis.text(0, -i + 0.36, titles[i], fontsize=7, va="bottom", color="#555555")
    axis.set(xlim=(0, widest), ylim=(-len(tokens) + 0.5, 0.8))
    axis.axis("off")
    figure.savefig(path, dpi=150)
    plt.close(figure)
