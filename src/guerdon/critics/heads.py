"""The last layer of a critic: scalar values, or histograms of values trained as a classification.

Any critic (state values, per-action values, ``Q(s, a)`` twins, a transformer's) ends in a `ValueHead` and
changes its loss by one option, ``kind``; torso, targets and read-out stay as they are:

    raw = head(torso(observation))                       # scalars or logits
    value = head.mean(raw)                               # what acting, targets and penalties (CQL) use
    loss = head.loss(head.select(raw, action), target)   # per element, against a scalar target
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guerdon.errors import ShapeError, UsageError, nearest
from guerdon.objectives import histogram

HeadKind = Literal["mse", "hl_gauss", "two_hot", "one_hot", "c51", "mse_softmax"]


class ValueHead(nn.Module):
    """Hidden features to values, and the loss that fits them to targets (Farebrother et al., 2024).

    ============== ======================================================================================
    ``mse``         a scalar; squared error, without a factor of one half
    ``hl_gauss``    logits of bins; cross-entropy with the target smoothed by a normal distribution
    ``two_hot``     logits of atoms; cross-entropy with the target shared between its two neighbours
    ``one_hot``     logits of bins; cross-entropy with the target's bin
    ``c51``         logits of atoms; cross-entropy with a *distribution* that `project` made (for a scalar
                    target, that of a point mass, which is two-hot)
    ``mse_softmax`` logits of bins, squared error of their mean: the read-out without the classification
    ============== ======================================================================================

    Args:
        features: width of the hidden features.
        outputs: values per element: 1 for a state value, the number of actions for a per-action value.
        kind: see above.
        low: lower end of the support. high: its upper end. Targets outside are clipped to it: see `border_share`.
        bins: how many bins or atoms. Bins tile the support and are read out at their middles; atoms
            (``two_hot``, ``c51``) lie from ``low`` to ``high`` inclusive.
        sigma_ratio: HL-Gauss's standard deviation in bin widths.
        members: heads side by side, with weights of their own. More than one puts an axis of that length in
            front of ``hidden`` and of all that follows.
        scale: of the initial weights, relative to `torch.nn.Linear`'s. Small, so that the first values are
            near 0, or near the middle of the support.

    Raises `UsageError` on an unknown kind or a support that is empty or has fewer than two bins.
    """

    def __init__(
        self,
        features: int,
        outputs: int = 1,
        kind: HeadKind = "mse",
        low: float = -10.0,
        high: float = 10.0,
        bins: int = 51,
        sigma_ratio: float = 0.75,
        members: int = 1,
        scale: float = 0.01,
    ) -> None:
        super().__init__()
        if kind not in get_args(HeadKind):
            raise UsageError(f"ValueHead: unknown kind '{kind}'; {nearest(kind, get_args(HeadKind))}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high) or bins < 2 or sigma_ratio <= 0:
            raise UsageError(
                f"ValueHead: {bins} bins on [{low}, {high}] with sigma_ratio {sigma_ratio}; it needs at least 2 "
                "bins, low below high and a positive ratio"
            )
        self.kind, self.outputs, self.members, self.sigma_ratio = kind, outputs, members, sigma_ratio
        self.low, self.high = low, high
        self.categorical = kind != "mse"
        self.bins = bins if self.categorical else 1
        edges = histogram.edges(low, high, bins)
        grid = histogram.atoms(low, high, bins) if kind in ("two_hot", "c51") else histogram.centres(edges)
        self.edges: Tensor
        self.centres: Tensor
        self.register_buffer("edges", edges, persistent=False)  # made from the options, not learned
        self.register_buffer("centres", grid, persistent=False)
        bound, width = scale / math.sqrt(features), outputs * self.bins
        self.weight = nn.Parameter(torch.empty(members, features, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(members, 1, width).uniform_(-bound, bound))

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        support = f", {self.bins} bins on [{self.low:g}, {self.high:g}]" if self.categorical else ""
        return f"{self.weight.shape[1]} -> {self.outputs}, {self.kind}{support}, members={self.members}"

    def forward(self, hidden: Tensor) -> Tensor:
        """Raw outputs of ``hidden [..., features]``: scalars ``[..., outputs]`` for ``mse``, else logits
        ``[..., outputs, bins]``. With several members, ``hidden`` is ``[members, ..., features]``."""
        if self.members == 1:
            raw = F.linear(hidden, self.weight[0].T, self.bias[0, 0])
        else:
            if hidden.ndim < 2 or hidden.shape[0] != self.members:
                raise ShapeError(
                    f"ValueHead: hidden features {list(hidden.shape)} for {self.members} members; the first axis "
                    "must be the members (hidden.expand(members, *hidden.shape) shares one torso)"
                )
            raw = torch.baddbmm(
                self.bias, hidden.flatten(1, -2) if hidden.ndim > 2 else hidden[:, None], self.weight
            )
            raw = raw.reshape(*hidden.shape[:-1], -1)
        return raw.unflatten(-1, (self.outputs, self.bins)) if self.categorical else raw

    def select(self, raw: Tensor, index: Tensor | int) -> Tensor:
        """One output of each element, without the axis of outputs: ``[...]`` or ``[..., bins]``.

        ``index`` is a number (0 for a state value) or int64 ``[...]`` (the action taken); it may lack leading
        axes such as the members'."""
        axis = -2 if self.categorical else -1
        if isinstance(index, int):
            return raw.select(axis, index)
        lead = raw.shape[:axis]
        at = index.expand(lead).unsqueeze(-1)
        if self.categorical:
            at = at.unsqueeze(-1).expand(*lead, 1, self.bins)
        return raw.gather(axis, at).squeeze(axis)

    def mean(self, raw: Tensor) -> Tensor:
        """The values: raw scalars themselves, or the means of the histograms (``[..., bins]`` to ``[...]``)."""
        return histogram.mean(raw, self.centres) if self.categorical else raw

    def probabilities(self, raw: Tensor) -> Tensor:
        """The histograms ``[..., bins]``. Raises `UsageError` for ``mse``, which has none."""
        self._needs(self.categorical, "probabilities")
        return raw.float().softmax(-1)

    def encode(self, target: Tensor) -> Tensor:
        """The histogram ``[..., bins]`` that a scalar target ``[...]`` stands for. Raises `UsageError` for the
        kinds that regress."""
        self._needs(self.kind not in ("mse", "mse_softmax"), "encode")
        if self.kind == "hl_gauss":
            return histogram.hl_gauss(target, self.edges, self.sigma_ratio)
        if self.kind == "one_hot":
            return histogram.one_hot(target, self.edges)
        return histogram.two_hot(target, self.centres)

    def loss(self, raw: Tensor, target: Tensor) -> Tensor:
        """Loss of each element against a scalar target, through which no gradient flows.

        Args:
            raw: ``[...]`` scalars or ``[..., bins]`` logits.
            target: ``[...]``; leading axes (members) may be missing.

        Raises `ShapeError` where the two do not match: broadcasting ``[N, 1]`` with ``[N]`` would compare every
        value with every target.
        """
        shape = raw.shape[:-1] if self.categorical else raw.shape
        if target.shape != shape[len(shape) - target.ndim :]:
            raise ShapeError(
                f"ValueHead.loss: values {list(shape)} against targets {list(target.shape)}; give one target a "
                "value (leading axes such as the members' may be missing)"
            )
        target = target.detach()
        if self.kind in ("mse", "mse_softmax"):
            return (self.mean(raw) - target).square()
        return histogram.cross_entropy(raw, self.encode(target))

    def distribution_loss(self, raw: Tensor, probabilities: Tensor) -> Tensor:
        """Cross-entropy ``[...]`` of logits ``[..., bins]`` with a target histogram, through which no gradient
        flows."""
        self._needs(self.categorical, "distribution_loss")
        return histogram.cross_entropy(raw, probabilities)

    def project(self, reward: Tensor, discount: Tensor, probabilities: Tensor) -> Tensor:
        """C51's target: the distribution of ``reward + discount * Z`` on the atoms.

        Args:
            reward: ``[...]``.
            discount: ``[...]``, zero where the episode ended.
            probabilities: ``[..., bins]``, the target network's at the next state and the greedy action.

        Raises `UsageError` for any other kind: their targets are scalars.
        """
        self._needs(self.kind == "c51", "project")
        values = reward[..., None] + discount[..., None] * self.centres
        return histogram.project(values, probabilities, self.centres)

    def border_share(self, target: Tensor) -> Tensor:
        """The share of targets that are clipped to a border of the support, as a 0-d tensor (0 for ``mse``)."""
        if not self.categorical:
            return torch.zeros((), device=target.device)
        return histogram.border_share(target, self.low, self.high)

    def _needs(self, holds: bool, verb: str) -> None:
        if not holds:
            raise UsageError(f"ValueHead.{verb} has no meaning for kind '{self.kind}'")
