"""Values as histograms: scalar targets and distributions to bin probabilities, and the cross-entropy on them.

Two grids must not be confused. ``m`` *bins* have ``m + 1`` `edges` and are read out at their ``m`` `centres`
(HL-Gauss, one-hot); ``m`` *atoms* lie on a grid of their own (two-hot, C51), usually from border to border
(`atoms`). All grids are evenly spaced. Targets are clipped to their grid, and everything is computed in at
least float32: lower precisions lose the small probabilities.

Sources: Farebrother et al., "Stop Regressing" (2024); Imani and White, "Improving Regression Performance with
Distributional Losses" (2018) for HL-Gauss; Bellemare et al. (2017) for C51.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor


def edges(low: float, high: float, bins: int) -> Float[Tensor, "edges"]:
    """``[bins + 1]`` borders of ``bins`` equal bins on ``[low, high]``."""
    return torch.linspace(low, high, bins + 1)


def centres(edges: Float[Tensor, "edges"]) -> Float[Tensor, "bins"]:
    """``[m]`` middles of the bins between ``edges [m + 1]``."""
    return (edges[1:] + edges[:-1]) / 2


def atoms(low: float, high: float, bins: int) -> Float[Tensor, "bins"]:
    """``[bins]`` locations from ``low`` to ``high``, both included."""
    return torch.linspace(low, high, bins)


def hl_gauss(
    target: Float[Tensor, "*shape"], edges: Float[Tensor, "edges"], sigma_ratio: float = 0.75
) -> Float[Tensor, "*shape bins"]:
    """Mass that a normal distribution around ``target``, cut off at the support, puts into each bin.

    ``p_i = [Phi((e_i - y)/s) - Phi((e_(i-1) - y)/s)] / [Phi((e_m - y)/s) - Phi((e_0 - y)/s)]`` with
    ``s = sigma_ratio * bin width`` (Farebrother et al., 2024, section 3.1; 0.75 spreads the mass over about
    six bins). ``y`` is clipped to the support first, so that the divisor is never below about a half. The
    mean over the bins' centres is ``y`` to within 0.02 widths, but for the three bins next to a border.

    Args:
        target: ``y``, any shape.
        edges: ``[m + 1]``.
        sigma_ratio: standard deviation in bin widths.
    """
    target, edges = _precise(target), _precise(edges)
    sigma = sigma_ratio * (edges[-1] - edges[0]) / (len(edges) - 1)
    y = torch.minimum(torch.maximum(target, edges[0]), edges[-1])
    cumulative = torch.erf((edges - y[..., None]) / (math.sqrt(2) * sigma))
    return cumulative.diff(dim=-1) / (cumulative[..., -1:] - cumulative[..., :1])


def one_hot(target: Float[Tensor, "*shape"], edges: Float[Tensor, "edges"]) -> Float[Tensor, "*shape bins"]:
    """All mass on the bin that ``target`` falls into (a bin owns its lower edge; the last one both)."""
    target, edges = _precise(target), _precise(edges)
    # counting inner edges, not dividing by the width: a target that equals an edge is never rounded across it
    index = (target[..., None] >= edges[1:-1]).sum(-1, keepdim=True)
    return (index == torch.arange(len(edges) - 1, device=target.device)).to(target.dtype)


def two_hot(target: Float[Tensor, "*shape"], atoms: Float[Tensor, "bins"]) -> Float[Tensor, "*shape bins"]:
    """Mass on the two atoms around ``target``, so that their mean is exactly ``target``; on one atom where
    ``target`` equals it or lies outside. ``atoms`` may be bins' centres: then the outer half bins are clipped.
    """
    target, atoms = _precise(target), _precise(atoms)
    place = torch.arange(len(atoms), device=target.device)
    return (1.0 - (_position(target, atoms)[..., None] - place).abs()).clamp(min=0.0)


def project(
    values: Float[Tensor, "*shape bins"],
    probabilities: Float[Tensor, "*shape bins"],
    atoms: Float[Tensor, "bins"],
) -> Float[Tensor, "*shape bins"]:
    """C51's projection (Bellemare et al., 2017, eq. 7): mass ``probabilities`` at ``values`` is shared between
    the two atoms around each value. Mass exactly on an atom stays there whole; mass outside goes to the border.

    Args:
        values: where the mass lies, for a Bellman target ``r + discount * atoms``.
        probabilities: how much lies there; each row sums to 1.
        atoms: ``[m]``.
    """
    values, probabilities, atoms = _precise(values), _precise(probabilities), _precise(atoms)
    position = _position(values, atoms)
    lower = position.floor()
    share = position - lower  # 0 on an atom, the last one included: nothing goes to the one above
    index = lower.long()
    above = (index + 1).clamp(max=len(atoms) - 1)
    projected = torch.zeros_like(probabilities).scatter_add(-1, index, probabilities * (1.0 - share))
    return projected.scatter_add(-1, above, probabilities * share)


def cross_entropy(
    logits: Float[Tensor, "*shape bins"], probabilities: Float[Tensor, "*#shape bins"]
) -> Float[Tensor, "*shape"]:
    """``-sum_i p_i log softmax(logits)_i`` for each element; no gradient flows into ``probabilities``."""
    return -(probabilities.detach() * _precise(logits).log_softmax(-1)).sum(-1)


def mean(logits: Float[Tensor, "*shape bins"], centres: Float[Tensor, "bins"]) -> Float[Tensor, "*shape"]:
    """The histogram's mean, ``sum_i softmax(logits)_i z_i``."""
    # a product and a sum: autocast would run a matrix product in low precision
    return (_precise(logits).softmax(-1) * _precise(centres)).sum(-1)


def border_share(
    target: Float[Tensor, "*shape"], low: Float[Tensor, ""] | float, high: Float[Tensor, ""] | float
) -> Float[Tensor, ""]:
    """The share of targets at or beyond a border of the support: worth logging, because such targets are
    clipped silently and the values saturate."""
    return ((target <= low) | (target >= high)).float().mean()


def _position(values: Tensor, atoms: Tensor) -> Tensor:
    """Where ``values`` lie on the grid, in steps from the first atom, clipped to ``[0, m - 1]``."""
    last = len(atoms) - 1
    return ((values - atoms[0]) * (last / (atoms[-1] - atoms[0]))).clamp(0.0, float(last))


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
