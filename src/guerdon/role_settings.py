"""How a role holds and trains its model (`guerdon.roles.Role`), and what that makes of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from guerdon.errors import UsageError, nearest
from guerdon.optim import Optimiser
from guerdon.policies import lora
from guerdon.policies.lora import LoRA

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class RoleSettings:
    """How a role holds and trains its model.

    Args:
        optimiser: what moves the weights; None for a role that only answers.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        lora: train low-rank adapters instead of the weights.
        micro_batch: rows of a batch per forward and backward pass; None takes all at once. The update is
            the same either way (the parts are weighted by what they count).
        micro_steps: steps per pass, for policies whose steps are independent.
        sample_batch: rows per call of the sampler.
        precision: of the matrix work under autocast; log-probabilities stay float32.
        compile: True runs the core through ``torch.compile`` (worth it only for long runs). ``"update"`` is
            for small networks on the CPU: the whole update, optimiser included, becomes one compiled function
            of flat tensors (`guerdon.compiled`), many times faster than the sum of its operations.
        checkpoint_activations: recompute activations in the backward pass, where the core knows how
            (``gradient_checkpointing_enable``).
        dropout: leave dropout on during updates. Off by default: with it, the ratio of a fresh sample is
            not 1.
    """

    optimiser: Optimiser | None = None
    max_grad_norm: float | None = 1.0
    lora: LoRA | None = None
    micro_batch: int | None = None
    micro_steps: int | None = None
    sample_batch: int | None = None
    precision: Precision = "float32"
    compile: bool | Literal["update"] = False
    checkpoint_activations: bool = False
    dropout: bool = False

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            hint = nearest(self.precision, get_args(Precision))
            raise UsageError(f"unknown precision '{self.precision}'; {hint}")
        for name in ("micro_batch", "micro_steps", "sample_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; it must be at least 1")
        if self.compile == "update":
            for name in ("lora", "micro_batch", "micro_steps"):
                if getattr(self, name) is not None:
                    raise UsageError(
                        f"compile='update' takes whole batches of whole weights; leave out {name}"
                    )
            if self.precision != "float32" or self.dropout:
                raise UsageError("compile='update' works in float32 without dropout")


def equip(role: str, model: nn.Module, settings: RoleSettings) -> None:
    """Give ``model``, which does not train yet, its adapter or have its weights train; checkpoint its activations and
    compile it as the ``settings`` say. Raises `UsageError` where its core cannot do that."""
    core = getattr(model, "core", model)
    if settings.lora is not None:
        wanted = settings.lora
        if wanted.targets is None and hasattr(model, "lora_targets"):
            wanted = replace(wanted, targets=model.lora_targets)  # type: ignore[arg-type]
        lora.add(core, wanted)
    else:
        core.requires_grad_(True)
    if settings.checkpoint_activations:
        for verb in ("gradient_checkpointing_enable", "enable_gradient_checkpointing"):
            if hasattr(core, verb):
                getattr(core, verb)()
                recompute(core)
                break
        else:
            raise UsageError(f"{role}: {type(core).__name__} cannot checkpoint activations")
    if settings.compile is True:
        core.compile()


def recompute(core: nn.Module) -> None:
    """transformers' layers recompute only while they are training, which a role's models are not (their dropout stays
    off): tell those layers alone, not what is in them."""
    for module in core.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.training = True
