"""Low-rank adapters on any module: transformers, diffusers or guerdon's own (Hu et al., 2022).

peft does the work. The base weights stay where they are and frozen, so that the reference of an adapted
actor is the actor with its adapter off (`disabled`): no second copy of a large model is held.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn

from guerdon.errors import UsageError

ADAPTER = "default"  # the name that peft and diffusers give an only adapter
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")  # the attention projections of a diffusers UNet


@dataclass(frozen=True)
class LoRA:
    """What to adapt, and how strongly.

    The defaults are those of RLCM's aesthetic task (Oertell et al., 2024): rank 8, the down-projection drawn from a
    Gaussian, the up-projection zero. What is adapted depends on the policy where nothing is said: all attention
    projections of a diffusers UNet, all linear layers of a language model.
    """

    rank: int = 8
    alpha: float = 8.0  # the update is scaled by alpha / rank
    targets: tuple[str, ...] | None = None  # endings of module names; None leaves it to the policy
    init: Literal["gaussian", "kaiming"] = "gaussian"  # of the down-projection

    def config(self) -> Any:
        """The same as a ``peft.LoraConfig``."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=cast(int, self.alpha),
            target_modules=list(self.targets or ATTENTION),
            init_lora_weights="gaussian" if self.init == "gaussian" else True,
            lora_dropout=0.0,  # dropout would make log-probabilities noisy
        )


def add(module: nn.Module, lora: LoRA, seed: int = 0) -> nn.Module:
    """Put an adapter into ``module``, in place. Its output does not change yet (the update starts at zero).

    Everything but the adapter is frozen; the adapter is float32 whatever the base, so that small steps do
    not vanish. Its initial weights depend on ``seed`` alone; the global random state is left as it was.

    Raises `UsageError` when there is an adapter already or no module has a name in ``lora.targets``.
    """
    from peft import inject_adapter_in_model

    if has_lora(module):
        raise UsageError("this model has a LoRA already; fold it into the weights before adding another")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(lora.config(), module, ADAPTER)
        except ValueError as error:  # peft: no target module was found
            names = ", ".join(lora.targets or ATTENTION)
            raise UsageError(
                f"no layer of {type(module).__name__} is called {names}: nothing to adapt"
            ) from error
    adopt(module)
    return module


def adopt(module: nn.Module) -> None:
    """Make a freshly injected or loaded adapter the only thing that learns, in float32."""
    module.requires_grad_(False)
    for parameter in parameters(module):
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = cast(Any, True)  # so that diffusers' own adapter methods see it


def has_lora(module: nn.Module) -> bool:
    """Whether an adapter is in ``module`` (switched on or off)."""
    return any(True for _ in _layers(module))


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The weights of the adapter."""
    return [
        p for layer in _layers(module) for name, p in layer.named_parameters() if name.startswith("lora_")
    ]


def _layers(module: nn.Module) -> Iterator[Any]:
    for child in module.modules():
        if hasattr(child, "lora_A") and hasattr(child, "base_layer"):
            yield child


# --- on, off, merged --------------------------------------------------------------------------------------

_merged: WeakSet[nn.Module] = WeakSet()


@contextmanager
def disabled(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, ``module`` is what it was before its adapter (the reference). Which weights are trainable
    is left alone, and nested or exceptional exits restore the former state."""
    if module in _merged:
        raise RuntimeError("an adapter cannot be switched off while it is merged")
    # peft's own switch also toggles requires_grad, which would break a graph under construction
    before = [(layer, layer._disable_adapters) for layer in _layers(module)]
    for layer, _ in before:
        layer._disable_adapters = True
    try:
        yield module
    finally:
        for layer, off in before:
            layer._disable_adapters = off


def without(policy: nn.Module) -> nn.Module:
    """A view of ``policy`` whose core always answers with its adapter off, however the policy itself stands."""
    view = copy.copy(policy)
    view._modules = dict(policy._modules)
    core = getattr(policy, "core", policy)
    for name, child in policy._modules.items():
        if child is core and child is not None:
            view._modules[name] = _Without(child)
    return view


class _Without(nn.Module):
    """A module that runs another one with its adapter off."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with disabled(self.inner):
            return self.inner(*args, **kwargs)


@contextmanager
def merged(module: nn.Module) -> Iterator[nn.Module]:
    """Inside, the adapter is added into the weights, so that sampling pays nothing for it; no gradients.

    Leaving puts the original tensors back, bit for bit (they are set aside, not recomputed). Does nothing
    where the adapter is off, or where the matrix work is not float32 (half-precision weights, autocast): a
    rounded sum is another policy than the sum of rounded parts, and the ratio of a fresh sample must be 1.
    """
    layers = [layer for layer in _layers(module) if not layer._disable_adapters]
    weights = [layer.get_base_layer().weight for layer in layers]
    exact = all(w.dtype == torch.float32 and not torch.is_autocast_enabled(w.device.type) for w in weights)
    if not layers or not exact:
        yield module
        return
    aside: list[tuple[Any, Tensor]] = []
    try:
        with torch.no_grad():
            for layer in layers:
                weight = layer.get_base_layer().weight
                aside.append((layer, weight.data))
                weight.data = weight.data + layer.get_delta_weight(ADAPTER)
                layer._disable_adapters = True
        _merged.add(module)
        yield module
    finally:
        _merged.discard(module)
        for layer, original in aside:
            layer.get_base_layer().weight.data = original
            layer._disable_adapters = False


def fold(module: nn.Module) -> nn.Module:
    """Add the adapter into the weights for good and take its layers out again, in place."""
    state = merged_state_dict(module)
    for name, layer in list(module.named_modules()):
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, layer.base_layer)
    module.load_state_dict(state)
    if hasattr(module, "peft_config"):
        del module.peft_config
    if hasattr(module, "_hf_peft_config_loaded"):
        module._hf_peft_config_loaded = cast(Any, False)
    return module


# --- weights in and out -----------------------------------------------------------------------------------


def adapter_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights under peft's names (``....lora_A.weight``)."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(module, adapter_name=ADAPTER)


def load_adapter_state_dict(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Inverse of `adapter_state_dict`. Raises `UsageError` when the weights belong to another adapter."""
    from peft import set_peft_model_state_dict

    expected = adapter_state_dict(module)
    if expected.keys() != weights.keys() or any(expected[k].shape != weights[k].shape for k in expected):
        raise UsageError("these LoRA weights do not fit: rank or adapted layers differ")
    set_peft_model_state_dict(module, dict(weights), adapter_name=ADAPTER)


def base_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The weights without the adapter, under the names they have in an unadapted module."""
    return {
        key.replace(".base_layer.", "."): value
        for key, value in module.state_dict().items()
        if not any(part.startswith("lora_") for part in key.split("."))
    }


def merged_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The weights with the adapter added in, under the names they have in an unadapted module."""
    state = base_state_dict(module)
    for name, layer in module.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            weight = state[f"{name}.weight"]
            total = weight.float() + layer.get_delta_weight(ADAPTER).detach().float()
            state[f"{name}.weight"] = total.to(weight.dtype)
    return state


def settings(module: nn.Module) -> dict[str, Any]:
    """The adapter's ``peft.LoraConfig`` as plain JSON values."""
    values = cast(Any, module).peft_config[ADAPTER].to_dict()
    return {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
