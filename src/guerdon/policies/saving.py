"""Image policies into files (`guerdon.policies.pretrained` reads them back).

* guerdon's own denoiser: ``config.json`` and ``model.safetensors``. An adapter is folded into these weights,
  so that whoever loads them needs no peft, and also lies beside them in peft's own format
  (``adapter_config.json``, ``adapter_model.safetensors``).
* diffusers' parts: a whole pipeline, as ``DiffusionPipeline.from_pretrained`` reads it.
* a LoRA on diffusers' parts that were loaded from somewhere: only ``pytorch_lora_weights.safetensors``, as
  ``pipe.load_lora_weights(folder)`` reads it, and ``guerdon.json``, which names the base. Where the base has
  no name (its weights were trained before, or made here) the base pipeline is written as well.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from guerdon.errors import UsageError
from guerdon.policies import lora
from guerdon.policies.denoiser import Denoiser, save_text_to_image
from guerdon.policies.schedule import NoiseSchedule

if TYPE_CHECKING:
    from guerdon.policies.denoising import DenoisingPolicy

SETTINGS = "guerdon.json"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    beside.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no file. Raises `UsageError` when it is not JSON."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"no model at {path.parent}: {path.name} is not JSON ({error})") from error
    return values if isinstance(values, dict) else {}


def make_scheduler(schedule: NoiseSchedule, kind: str) -> Any:
    """diffusers' scheduler for a ``schedule``: ``LCMScheduler`` or ``DDIMScheduler``."""
    from diffusers import DDIMScheduler, LCMScheduler

    common: dict[str, Any] = {
        "num_train_timesteps": schedule.train_steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": schedule.beta_schedule,
        "prediction_type": schedule.prediction,
        "clip_sample": schedule.clip_sample is not None,
        "clip_sample_range": schedule.clip_sample or 1.0,
    }
    if kind == "consistency":
        return LCMScheduler(
            **common, original_inference_steps=schedule.origin_steps, timestep_scaling=schedule.time_scale
        )
    return DDIMScheduler(**common, steps_offset=1, set_alpha_to_one=False)


def save_policy(policy: DenoisingPolicy, folder: str | Path) -> None:
    """Write ``policy`` to ``folder`` in the format that fits it; see the module."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy.denoiser, Denoiser):
        _save_own(policy, folder)
    else:
        _save_pipeline(policy, folder)


def _unadapted(module: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A module of the same shape without adapter layers, holding ``weights``."""
    make = type(module) if isinstance(module, Denoiser) else type(module).from_config
    plain: nn.Module = make(module.config)
    plain.load_state_dict(weights)
    return plain.to(next(iter(weights.values())).dtype)


def _save_own(policy: DenoisingPolicy, folder: Path) -> None:
    if policy.vae is not None:
        raise UsageError("guerdon's own model format has no place for a VAE")
    denoiser: Any = policy.denoiser
    adapted = lora.has_lora(denoiser)
    plain: Any = _unadapted(denoiser, lora.merged_state_dict(denoiser)) if adapted else denoiser
    save_text_to_image(
        folder,
        policy.kind,
        plain,
        policy.text_encoder,  # type: ignore[arg-type]
        policy.tokenizer,
        policy.schedule.to_dict(),
        dtype=torch.float32,
    )
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", config | policy.settings())
    if adapted:
        _save_adapter(denoiser, folder)
    else:
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink(missing_ok=True)


def _save_adapter(module: nn.Module, folder: Path) -> None:
    """The adapter alone, as ``PeftModel.save_pretrained`` writes it."""
    from safetensors.torch import save_file

    weights = {
        f"base_model.model.{k}": v.detach().cpu().contiguous()
        for k, v in lora.adapter_state_dict(module).items()
    }
    save_file(weights, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    write_json(folder / "adapter_config.json", lora.settings(module))


def _save_pipeline(policy: DenoisingPolicy, folder: Path) -> None:
    from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers

    unet: Any = policy.denoiser
    settings = policy.settings()
    adapted = lora.has_lora(unet)
    embedded = unet.config.time_cond_proj_dim is not None
    pipeline_class: Any = LatentConsistencyModelPipeline if embedded else StableDiffusionPipeline
    if not adapted or policy.source is None:
        base = _unadapted(unet, lora.base_state_dict(unet)) if adapted else unet
        arguments = {
            "vae": policy.vae,
            "text_encoder": policy.text_encoder,
            "tokenizer": policy.tokenizer,
            "unet": base,
            "scheduler": make_scheduler(policy.schedule, policy.kind),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        known = inspect.signature(pipeline_class.__init__).parameters
        pipeline = pipeline_class(**{key: value for key, value in arguments.items() if key in known})
        pipeline.save_pretrained(folder)
        settings["base"] = None
        (folder / LORA_WEIGHTS).unlink(missing_ok=True)  # an older one must not go on top of these weights
    else:
        settings["base"] = policy.source
    if adapted:
        pipeline_class.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(lora.adapter_state_dict(unet)),
            unet_lora_adapter_metadata=lora.settings(unet),
        )
    write_json(folder / SETTINGS, settings)
