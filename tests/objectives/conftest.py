"""Toy policies of different kinds and a batch that both can read."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories

Make = Callable[..., Trajectories]


class TokenPolicy(nn.Module):
    """Logits over A tokens from the previous token: a language model of one table."""

    event_reduction = "sum"
    markov = True

    def __init__(self, actions: int = 5) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(actions, actions))
        self.forwards = 0

    def distribution(self, traj: Trajectories) -> TensorDict:
        self.forwards += 1
        return TensorDict({"logits": self.table[traj.inputs["step", "state"]]}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        if distribution is None:
            distribution = self.distribution(traj)
        action = traj.inputs["step", "action"]
        chosen = distribution["logits"].log_softmax(-1).gather(-1, action[..., None])[..., 0]
        return torch.where(traj.mask, chosen, 0.0)


class DenoisingPolicy(nn.Module):
    """A Gaussian step on a two-pixel picture whose mean depends on the noisy picture."""

    event_reduction = "mean"
    markov = True

    def __init__(self, sigma: float = 0.05) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.sigma = sigma

    def distribution(self, traj: Trajectories) -> TensorDict:
        mean = self.net(traj.inputs["step", "picture"])
        std = torch.full((*traj.mask.shape, 1), self.sigma)
        return TensorDict({"mean": mean, "std": std}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        if distribution is None:
            distribution = self.distribution(traj)
        error = (traj.inputs["step", "next"] - distribution["mean"]) / self.sigma
        density = -0.5 * error.square() - math.log(self.sigma) - 0.5 * math.log(2 * math.pi)
        return torch.where(traj.mask, density.mean(-1), 0.0)


def make_batch(lengths: list[int], steps: int | None = None, seed: int = 0, **fields: Any) -> Trajectories:
    """Trajectories of these ``lengths`` that both policies read; ``log_prob`` is of some other policy."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(steps or 0, *lengths, 1)
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    step = TensorDict(
        {
            "state": torch.randint(5, (B, T), generator=generator),
            "action": torch.randint(5, (B, T), generator=generator),
            "picture": normal(B, T, 2),
            "next": normal(B, T, 2),
        },
        batch_size=[B, T],
    )
    values = {
        "log_prob": (normal(B, T) * 0.3 - 1.5) * mask,
        "advantage": normal(B, T) * mask,
        "target": normal(B, T) * mask,
        "value": normal(B, T) * mask,
        "reference_log_prob": (normal(B, T) * 0.3 - 1.5) * mask,
        "reward": normal(B, T) * mask,
        "group": torch.arange(B) // 2,
    } | fields
    return Trajectories(
        inputs=TensorDict({"step": step}, batch_size=[B]), mask=mask, batch_size=[B], **values
    )


@pytest.fixture
def batch() -> Make:
    return make_batch


@pytest.fixture
def token_policy() -> TokenPolicy:
    torch.manual_seed(1)
    return TokenPolicy()


@pytest.fixture
def denoising_policy() -> DenoisingPolicy:
    torch.manual_seed(2)
    return DenoisingPolicy()


@pytest.fixture
def same_log_probs() -> Callable[[TokenPolicy, DenoisingPolicy, Trajectories], Trajectories]:
    """Change what the denoiser drew so that its log-probabilities are those of the token policy."""

    def match(tokens: TokenPolicy, denoiser: DenoisingPolicy, traj: Trajectories) -> Trajectories:
        with torch.no_grad():
            wanted = tokens.log_prob(traj)
            room = -2 * (wanted + math.log(denoiser.sigma) + 0.5 * math.log(2 * math.pi))
            assert bool((room > 0).all())
            distance = denoiser.sigma * room.sqrt()
            step = traj.inputs["step"].clone()
            step["next"] = denoiser.distribution(traj)["mean"] + distance[..., None]
        matched = traj.with_(inputs=TensorDict({"step": step}, batch_size=traj.batch_size))
        assert torch.allclose(denoiser.log_prob(matched), wanted, atol=2e-5)
        return matched

    return match


@pytest.fixture
def gradient() -> Callable[..., list[Tensor]]:
    """The gradient of an objective, over parts of a batch weighted as `Role.update` weighs them."""

    def compute(objective: Any, model: nn.Module, whole: Any, parts: list[Any] | None = None) -> list[Tensor]:
        model.zero_grad()
        parts = [whole] if parts is None else parts
        total = objective.weight(whole)
        for part in parts:
            loss, _ = objective(model, part)
            (loss * (objective.weight(part) / total)).backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]

    return compute
