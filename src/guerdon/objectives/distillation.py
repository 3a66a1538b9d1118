"""Losses with which a student learns from a teacher: consistency distillation.

A consistency model maps every noisy point of one denoising path to that path's clean end. The teacher gives
the path (one solver step from a noisy point to a less noisy one); the student's answers at both points should
agree, the one at the less noisy point being held still (Song et al., 2023, "Consistency Models", eq. 8;
Luo et al., 2023, "Latent Consistency Models", eq. 17).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def pseudo_huber(difference: Float[Tensor, "*any"], c: float = 0.001) -> Float[Tensor, "*any"]:
    """``sqrt(d^2 + c^2) - c``, element by element: quadratic near zero, absolute value beyond ``c``.

    Written as ``d^2 / (sqrt(d^2 + c^2) + c)``, which is the same and keeps its digits for ``|d| << c``.
    Source: Charbonnier et al. (1994); for consistency models Song & Dhariwal (2024), section 3.3;
    ``c = 0.001`` is the value of the published latent-consistency training script.
    """
    square = difference**2
    return square / (torch.sqrt(square + c**2) + c)


def guided(
    conditional: Float[Tensor, "batch *pixels"],
    unconditional: Float[Tensor, "batch *pixels"],
    scale: Float[Tensor, " batch"] | float,
) -> Float[Tensor, "batch *pixels"]:
    """Classifier-free guidance ``u + scale (c - u)`` (Ho & Salimans, 2022) with a scale for each example.

    A guidance *scale* of 1 is the conditional answer itself; papers on consistency models write ``w`` for
    ``scale - 1``.
    """
    scale = torch.as_tensor(scale, dtype=conditional.dtype, device=conditional.device)
    scale = scale.reshape(scale.shape + (1,) * (conditional.ndim - scale.ndim)) if scale.ndim else scale
    return unconditional + scale * (conditional - unconditional)


def consistency_loss(
    online: Float[Tensor, "batch *pixels"],
    target: Float[Tensor, "batch *pixels"],
    c: float = 0.001,
    weight: Float[Tensor, " batch"] | None = None,
) -> Float[Tensor, ""]:
    """Mean `pseudo_huber` distance between two answers of a consistency model.

    Args: ``online``: the student's clean sample at the noisier point; ``target``: the target network's at the
    less noisy point of the same path (no gradient flows into it); ``c`` of `pseudo_huber`; ``weight [B]``:
    optional weight of each example.
    Raises ``ValueError`` if the shapes differ.
    """
    if online.shape != target.shape:
        raise ValueError(
            f"online and target must have one shape, not {tuple(online.shape)}, {tuple(target.shape)}"
        )
    distance = pseudo_huber(online - target.detach(), c).flatten(1).mean(dim=1)
    return distance.mean() if weight is None else (weight * distance).mean()
