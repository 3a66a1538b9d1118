"""Tiny policies of every kind, and trajectories for them, that several test files share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.engine.local import LocalEngine
from guerdon.policies.base import Policy, masked
from guerdon.policies.consistency import ConsistencyPolicy
from guerdon.policies.denoiser import Denoiser, DenoiserConfig, TextEncoder, TextEncoderConfig, WordTokenizer
from guerdon.policies.denoising import DenoisingPolicy
from guerdon.policies.diffusion import DiffusionPolicy
from guerdon.policies.schedule import NoiseSchedule
from guerdon.roles import Role
from guerdon.run import Run

WORDS = ["red circle", "blue square", "green ring", "red square", "blue ring", "green circle"]


def image_policy(kind: str = "consistency", clip: float | None = 1.0, **options: Any) -> DenoisingPolicy:
    """An 8x8 image generator of some thousand weights."""
    torch.manual_seed(0)
    config = DenoiserConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        norm_num_groups=4,
        time_frequencies=16,
        time_embed_dim=16,
        time_cond_proj_dim=256 if kind == "consistency" else None,
    )
    denoiser = Denoiser(config)
    nn.init.normal_(denoiser.conv_out.weight, std=0.1)  # as if trained: it starts at zero
    if denoiser.cond_proj is not None:
        nn.init.normal_(denoiser.cond_proj.weight, std=0.3)
    tokenizer = WordTokenizer.from_words({w for p in WORDS for w in p.split()}, model_max_length=4)
    encoder = TextEncoder(TextEncoderConfig(len(tokenizer), max_length=4, hidden_size=8))
    policy_class = ConsistencyPolicy if kind == "consistency" else DiffusionPolicy
    return policy_class(denoiser, encoder, tokenizer, NoiseSchedule(clip_sample=clip), **options)


class MLPPolicy(Policy):
    """Logits over three actions from four numbers."""

    kind = "categorical"

    def __init__(self, seed: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 3))

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: object
    ) -> Trajectories:
        raise NotImplementedError

    def distribution(self, traj: Trajectories) -> TensorDict:
        logits = self.net(traj.inputs["step", "observation"])
        return TensorDict({"logits": logits}, batch_size=traj.mask.shape)

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        distribution = self.distribution(traj) if distribution is None else distribution
        log_p = distribution["logits"].float().log_softmax(-1)
        return masked(log_p.gather(-1, traj.inputs["step", "action"][..., None])[..., 0], traj.mask)

    def value(self, traj: Trajectories) -> Tensor:
        return masked(self.net(traj.inputs["step", "observation"]).sum(-1), traj.mask)


def episodes(lengths: Sequence[int], seed: int = 0, **changes: Any) -> Trajectories:
    """Trajectories that `MLPPolicy` reads, drawn by some other policy."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    mask = torch.arange(T)[None] < torch.tensor(lengths)[:, None]
    step = TensorDict(
        {
            "observation": torch.randn(B, T, 4, generator=generator),
            "action": torch.randint(3, (B, T), generator=generator),
        },
        batch_size=[B, T],
    )
    fields: dict[str, Any] = {
        "inputs": TensorDict({"step": step}, batch_size=[B]),
        "log_prob": (torch.randn(B, T, generator=generator) * 0.1 - 1.1) * mask,
        "mask": mask,
        "reward": torch.randn(B, T, generator=generator) * mask,
        "advantage": torch.randn(B, T, generator=generator) * mask,
        "target": torch.randn(B, T, generator=generator) * mask,
        "group": torch.arange(B) // 2,
    }
    return Trajectories(**(fields | changes))


class Watched(Role):
    """A role that keeps what it was asked to learn from: ``calls`` of (batch, objective, metrics)."""

    def update(self, batch: Any, objective: Any) -> Any:
        self.calls = getattr(self, "calls", [])
        self.calls.append([batch, objective, None])
        self.calls[-1][2] = metrics = super().update(batch, objective)
        return metrics


def train(
    method: Any, policy: Policy, experience: Any, feedback: Any, folder: Path, **changes: Any
) -> Watched:
    """Run ``method`` on these pieces; the actor with everything it learned from in ``calls``."""
    settings = replace(method.roles()["actor"], **changes)
    actor = Watched("actor", policy, settings)
    engine = LocalEngine("cpu", threads=1)
    with Run(folder / "run", engine=engine, progress=False, checkpoint_every=1e9) as run:
        method.train(run, actor=actor, experience=experience, feedback=feedback)
    engine.close()
    return actor
