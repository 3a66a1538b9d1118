"""Natural-gradient steps inside a trust region (TRPO, Schulman et al., 2015), on a model's weights as one flat vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guerdon.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from guerdon.compiled import FlatWeights


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], vector: Tensor, iterations: int = 10, tolerance: float = 1e-10
) -> Tensor:
    """``x [P]`` with ``H x = vector``, approximately (Hestenes and Stiefel, 1952).

    Args:
        product: ``H v`` for a vector ``v [P]``, with H symmetric and positive definite.
        iterations: at most so many products; P of them are exact.
        tolerance: stop when the squared norm of the residual is below this share of that of ``vector``.
    """
    solution = torch.zeros_like(vector)
    residual, direction = vector.clone(), vector.clone()
    squared = residual @ residual
    enough = tolerance * float(squared)
    for _ in range(iterations):
        if float(squared) <= enough:
            break
        image = product(direction)
        step = squared / (direction @ image)
        solution += step * direction
        residual -= step * image
        new = residual @ residual
        direction = residual + (new / squared) * direction
        squared = new
    return solution


def natural_step(
    weights: FlatWeights,
    batch: Any,
    objective: Any,
    *,
    max_kl: float = 0.01,
    iterations: int = 10,
    damping: float = 0.1,
    backtracks: int = 10,
    shrink: float = 0.8,
) -> dict[str, Tensor]:
    """Move ``weights`` along the natural gradient of a loss, as far as a divergence allows.

    The direction solves ``(H + damping) x = -g`` by `conjugate_gradient`, with g the gradient of the loss and H the
    Hessian of the divergence, which is the Fisher matrix where model and old policy are the same. Its length is such that
    the quadratic model of the divergence is ``max_kl``; a line search then shortens it until the loss is truly less and
    the divergence truly within ``max_kl``. If no length is, the weights stay (Schulman et al., 2015, appendix C).

    Args:
        weights: of the model that moves, all of them.
        batch: what the objective reads; the whole of it at once.
        objective: ``objective(model, batch) -> (loss, metrics)``, with a method ``divergence(model, batch)`` that gives the
            divergence from the old policy as a 0-d tensor whose second derivatives exist (`MirrorDescent`).
        max_kl: the radius.
        iterations, damping: of the conjugate gradient.
        backtracks: lengths tried, each ``shrink`` times the one before; 0 takes the full step unseen.

    Returns metrics, 0-d: ``loss`` before the step, ``improvement`` (by how much the loss fell), ``kl`` after it, and
    ``step_share``, the length taken (1: the full step; 0: none).
    Raises `NonFiniteError` when the loss, its gradient or the step is not finite, `UsageError` on options that make
    no sense; the weights are then as before.
    """
    if max_kl <= 0 or damping < 0 or iterations < 1 or backtracks < 0 or not 0 < shrink < 1:
        raise UsageError(
            f"natural_step: max_kl {max_kl}, damping {damping}, iterations {iterations}, backtracks {backtracks}, "
            f"shrink {shrink}; use positive ones, and a shrink below 1"
        )
    buffers = weights.buffers()

    def figures(theta: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), weights.replaced(theta, buffers) as model:
            return objective(model, batch)[0], objective.divergence(model, batch)

    theta = weights.flat.detach().clone().requires_grad_()
    with torch.enable_grad(), weights.replaced(theta, buffers) as model:
        loss, _ = objective(model, batch)
        (gradient,) = torch.autograd.grad(loss, theta)
        slope, *_ = torch.autograd.grad(objective.divergence(model, batch), theta, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        (image,) = torch.autograd.grad(slope @ vector, theta, retain_graph=True)
        return image + damping * vector

    loss, start = loss.detach(), theta.detach()
    direction = conjugate_gradient(product, -gradient, iterations)
    curvature = direction @ product(direction)
    if not math.isfinite(loss) or not math.isfinite(curvature):
        error = NonFiniteError("the natural gradient is not finite; the weights are unchanged")
        error.batch = batch  # type: ignore[attr-defined]
        raise error
    nothing = torch.zeros_like(loss)
    stays = {"loss": loss, "improvement": nothing, "kl": nothing, "step_share": nothing}
    if curvature <= 0:  # the gradient is zero
        return stays
    full = (2.0 * max_kl / curvature).sqrt() * direction
    for attempt in range(max(backtracks, 1)):
        share = shrink**attempt
        new_loss, moved = figures(start + share * full)
        if backtracks == 0 or (new_loss < loss and moved <= max_kl):
            weights.flat.copy_(start + share * full)
            taken = torch.full_like(loss, share)
            return {"loss": loss, "improvement": loss - new_loss, "kl": moved, "step_share": taken}
    return stays
