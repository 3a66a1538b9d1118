"""What the frame costs: `Role.update` with its batch, mask and metrics, beside a bare PyTorch step of the
same computation (clipped surrogate, gradient clipping, fused Adam)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from guerdon.batch import Trajectories
from guerdon.benchmarks import row, take_turns
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.optim import Adam
from guerdon.policies.base import Policy, masked
from guerdon.policies.language import LanguagePolicy
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tokens import tiny_llama, tokenizer

TARGET = 1.15
_CLIP, _NORM, _RATE = 0.2, 0.5, 3e-4


class _Mlp(Policy):
    """A categorical controller of two hidden layers of 64, as control libraries use."""

    kind: ClassVar[str] = "categorical"

    def __init__(self, observations: int = 17, actions: int = 6) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(observations, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, actions)
        )

    def sample(
        self, prompts: Sequence[str], seeds: Tensor, group: Tensor | None = None, **options: Any
    ) -> Trajectories:
        raise NotImplementedError

    def distribution(self, traj: Trajectories) -> TensorDict:
        return TensorDict(
            {"logits": self.net(traj.inputs["step", "observation"])}, batch_size=traj.mask.shape
        )

    def log_prob(self, traj: Trajectories, distribution: TensorDict | None = None) -> Tensor:
        step = traj.inputs["step"]
        logits = self.net(step["observation"])
        chosen = logits.log_softmax(-1).gather(-1, step["action"].unsqueeze(-1)).squeeze(-1)
        return masked(chosen, traj.mask)


def _bare(parameters: list[nn.Parameter], loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimiser = torch.optim.Adam(parameters, _RATE, fused=True)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, _NORM)
        optimiser.step()

    return step


def _surrogate(log_prob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    ratio = (log_prob - old).exp()
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - _CLIP, 1 + _CLIP)).mean()


def _mlp() -> tuple[Callable[[], Any], Callable[[], Any]]:
    torch.manual_seed(0)
    rows = 64
    observation, action = torch.randn(rows, 1, 17), torch.randint(0, 6, (rows, 1))
    advantage, old = torch.randn(rows, 1), torch.full((rows, 1), -1.8)
    traj = Trajectories(
        inputs=TensorDict(
            {"step": TensorDict({"observation": observation, "action": action}, batch_size=[rows, 1])},
            batch_size=[rows],
        ),
        log_prob=old,
        mask=torch.ones(rows, 1, dtype=torch.bool),
        advantage=advantage,
    )
    role = Role("actor", _Mlp(), RoleSettings(Adam(_RATE), _NORM))
    objective = ClippedSurrogate(clip=_CLIP)
    other = _Mlp()

    def loss() -> Tensor:
        log_prob = other.net(observation).log_softmax(-1).gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return _surrogate(log_prob, old, advantage)

    return lambda: role.update(traj, objective), _bare(list(other.parameters()), loss)


def _language() -> tuple[Callable[[], Any], Callable[[], Any]]:
    torch.manual_seed(0)
    rows, prompt, answer, vocabulary = 16, 16, 32, 512
    policy = LanguagePolicy(tiny_llama(vocabulary, width=128), tokenizer())
    tokens = torch.randint(2, vocabulary, (rows, prompt + answer))
    advantage, old = torch.randn(rows, answer), torch.full((rows, answer), -6.2)
    inputs = {
        "prompt_token": tokens[:, :prompt],
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.bool),
        "temperature": torch.ones(rows),
        "step": TensorDict({"token": tokens[:, prompt:]}, batch_size=[rows, answer]),
    }
    traj = Trajectories(
        inputs=TensorDict(inputs, batch_size=[rows]),
        log_prob=old,
        mask=torch.ones(rows, answer, dtype=torch.bool),
        advantage=advantage,
    )
    role = Role("actor", policy, RoleSettings(Adam(_RATE), _NORM))
    objective = ClippedSurrogate(clip=_CLIP)
    other = tiny_llama(vocabulary, width=128)
    attention = torch.ones(rows, prompt + answer, dtype=torch.int64)

    def loss() -> Tensor:
        logits = (
            other(input_ids=tokens, attention_mask=attention, use_cache=False)
            .logits[:, prompt - 1 : -1]
            .float()
        )
        chosen = logits.gather(-1, tokens[:, prompt:, None]).squeeze(-1) - logits.logsumexp(-1)
        return _surrogate(chosen, old, advantage)

    return lambda: role.update(traj, objective), _bare(list(other.parameters()), loss)


def run() -> list[dict[str, Any]]:
    """The rows of ``guerdon bench roles``."""
    found = torch.get_num_threads()
    rows = []
    try:
        torch.set_num_threads(1)
        ours, bare = take_turns(_mlp(), inner=200, rounds=15)
        rows.append(row("Role.update, 64-64 MLP, batch 64", ours, "bare PyTorch step", bare, TARGET, "<="))
        torch.set_num_threads(found)
        ours, bare = take_turns(_language(), inner=5, rounds=15)
        rows.append(
            row(
                "Role.update, 2-layer 128-wide LM, 16 x 48 tokens",
                ours,
                "bare PyTorch step",
                bare,
                TARGET,
                "<=",
            )
        )
    finally:
        torch.set_num_threads(found)
    return rows
