"""A soft mixture of experts, in place of the dense layer between a convolutional torso and a `ValueHead`."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.errors import ShapeError, UsageError


class SoftMoE(nn.Module):
    """Tokens ``[B, M, d]`` to tokens ``[B, M, d]`` through ``n`` small networks (Puigcerver et al., 2024; in
    value networks Obando-Ceron et al., 2024).

    Every expert works on ``p = ceil(M / n)`` slots. A slot's input is a mean over *tokens* (dispatch: softmax
    over the M tokens), a token's output a mean over all *slots* (combine: softmax over the n p slots), both from
    the same scores ``x . phi``. Each expert is two dense layers with a ReLU between, ``d -> hidden -> d``.

    Args:
        features: ``d``; for a convolutional map ``[B, C, H, W]`` the channels, one token a position:
            ``x.flatten(2).transpose(1, 2)``.
        tokens: ``M``, how many there will be.
        experts: ``n``.
        hidden: width of each expert.
    """

    def __init__(self, features: int, tokens: int, experts: int = 4, hidden: int = 512) -> None:
        super().__init__()
        if min(features, tokens, experts, hidden) < 1:
            raise UsageError(
                f"SoftMoE: {features} features, {tokens} tokens, {experts} experts of width {hidden}; each must be "
                "at least 1"
            )
        self.tokens, self.slots = tokens, math.ceil(tokens / experts)
        self.phi = nn.Parameter(torch.randn(features, experts, self.slots) / math.sqrt(features))
        bound = math.sqrt(6 / (features + hidden))  # Glorot and Bengio (2010)
        self.weight_in = nn.Parameter(torch.empty(experts, features, hidden).uniform_(-bound, bound))
        self.weight_out = nn.Parameter(torch.empty(experts, hidden, features).uniform_(-bound, bound))
        self.bias_in = nn.Parameter(torch.zeros(experts, 1, hidden))
        self.bias_out = nn.Parameter(torch.zeros(experts, 1, features))

    def weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """How tokens are mixed into slots and back: dispatch and combine, both ``[B, M, n, p]``. Dispatch sums
        to 1 over the tokens of each slot, combine over the slots of each token."""
        scores = torch.einsum("bmd,dnp->bmnp", x, self.phi)
        return scores.softmax(1), scores.flatten(2).softmax(-1).view_as(scores)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, M, d]`` to ``[B, M, d]``. Raises `ShapeError` on another number of tokens or features."""
        if x.ndim != 3 or x.shape[1:] != (self.tokens, len(self.phi)):
            raise ShapeError(
                f"SoftMoE: tokens {list(x.shape)}; it was made for [B, {self.tokens}, {len(self.phi)}]"
            )
        dispatch, combine = self.weights(x)
        rows, experts = len(x), len(self.weight_in)
        slots = torch.einsum("bmd,bmnp->nbpd", x, dispatch).reshape(experts, rows * self.slots, -1)
        hidden = F.relu(torch.baddbmm(self.bias_in, slots, self.weight_in))
        out = torch.baddbmm(self.bias_out, hidden, self.weight_out).view(experts, rows, self.slots, -1)
        return torch.einsum("nbpd,bmnp->bmd", out, combine)
