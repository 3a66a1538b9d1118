"""Image policies from files and from the hub, and back into files.

Three formats are read:

* guerdon's own folder (``config.json`` with a ``kind``, ``model.safetensors``);
* a diffusers pipeline, as a folder or a hub name (``model_index.json``): Stable Diffusion 1.x and 2.x and
  latent consistency models, that is one CLIP text encoder and a ``UNet2DConditionModel``;
* a folder with a LoRA (``pytorch_lora_weights.safetensors``) beside ``guerdon.json``, which names its base,
  or beside a whole pipeline.

Only safetensors are read: nothing is unpickled, and no code comes along with a model.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from guerdon.errors import UsageError, nearest
from guerdon.policies import lora
from guerdon.policies.consistency import ConsistencyPolicy
from guerdon.policies.denoiser import Denoiser, load_text_to_image, save_text_to_image
from guerdon.policies.denoising import DenoisingPolicy, write_json
from guerdon.policies.diffusion import DiffusionPolicy
from guerdon.policies.schedule import NoiseSchedule

Kind = Literal["diffusion", "consistency"]
KINDS: dict[str, type[DenoisingPolicy]] = {"diffusion": DiffusionPolicy, "consistency": ConsistencyPolicy}
SETTINGS = "guerdon.json"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


# --- noise schedules --------------------------------------------------------------------------------------


def read_schedule(config: dict[str, Any]) -> NoiseSchedule:
    """The `NoiseSchedule` of a diffusers scheduler's ``config``.

    What a checkpoint was trained with is taken over (betas, prediction type, clipping, the consistency
    grid); how a scheduler walks through time is guerdon's own (see `NoiseSchedule.ddim_grid`).
    Raises `UsageError` for noise levels that guerdon cannot express.
    """
    for name in ("trained_betas", "rescale_betas_zero_snr", "thresholding"):
        if config.get(name):
            raise UsageError(f"this model's scheduler sets {name}, which guerdon does not support")
    beta_schedule = config.get("beta_schedule", "scaled_linear")
    if beta_schedule not in ("scaled_linear", "linear"):
        raise UsageError(
            f"this model's scheduler has beta_schedule '{beta_schedule}'; known: scaled_linear, linear"
        )
    return NoiseSchedule(
        train_steps=config.get("num_train_timesteps", 1000),
        beta_start=config.get("beta_start", 0.00085),
        beta_end=config.get("beta_end", 0.012),
        beta_schedule=beta_schedule,
        prediction=config.get("prediction_type", "epsilon"),
        time_scale=config.get("timestep_scaling", 10.0),
        origin_steps=config.get("original_inference_steps", 50),
        clip_sample=config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None,
    )


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


# --- reading ----------------------------------------------------------------------------------------------


def load_policy(
    name_or_path: str | Path,
    kind: Kind | None = None,
    *,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
    keep_lora: bool = False,
) -> DenoisingPolicy:
    """The image policy that lies at a path or under a hub name.

    Args:
        name_or_path: a folder, or a name such as "SimianLuo/LCM_Dreamshaper_v7".
        kind: "diffusion" or "consistency"; None reads it from the files (an ``LCMScheduler``, or a denoiser
            with a guidance input, means consistency).
        size: edge of the images in pixels; None takes what was saved, or what the model was trained at.
        dtype: of the weights.
        keep_lora: leave an adapter apart instead of folding it into the weights. Folded is what training
            wants: the loaded model is then the reference, and a new adapter can go on top.

    Raises `UsageError` when there is no such model or guerdon cannot run it.
    """
    name = str(name_or_path)
    if kind is not None and kind not in KINDS:
        raise UsageError(f"unknown kind of image policy '{kind}'; {nearest(kind, KINDS)}")
    folder = Path(name)
    if folder.is_dir():
        if (folder / LORA_WEIGHTS).is_file():
            return _load_lora(folder, kind, size, dtype, keep_lora)
        if (folder / "model_index.json").is_file():
            return _load_pipeline(name, kind, size, dtype, _read_json(folder / SETTINGS))
        if (folder / "config.json").is_file():
            return _load_own(folder, kind, size, dtype)
        raise UsageError(
            f"no model at {name}: the folder has none of config.json, model_index.json and {LORA_WEIGHTS}"
        )
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"no model at {name}: there is no such folder")
    return _load_pipeline(name, kind, size, dtype, {})


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"no model at {path.parent}: {path.name} is not JSON ({error})") from error
    return values if isinstance(values, dict) else {}


def _build(
    kind: str, parts: dict[str, Any], settings: dict[str, Any], size: int | None, source: str
) -> DenoisingPolicy:
    known = {key: settings[key] for key in ("guidance", "steps", "event_reduction") if key in settings}
    return KINDS[kind](**parts, size=size or settings.get("size"), source=source, **known)


def _load_own(folder: Path, kind: Kind | None, size: int | None, dtype: torch.dtype) -> DenoisingPolicy:
    from safetensors import SafetensorError

    saved = _read_json(folder / "config.json")
    if saved.get("kind") not in KINDS or "denoiser" not in saved:
        raise UsageError(f"no model at {folder}: config.json does not describe an image policy of guerdon")
    if kind is not None and kind != saved["kind"]:
        raise UsageError(f"the model at {folder} is a {saved['kind']} model, not a {kind} model")
    try:
        denoiser, text_encoder, tokenizer, config = load_text_to_image(folder)
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"no model at {folder}: {_first_line(error)}") from error
    parts = {
        "denoiser": denoiser.to(dtype),
        "text_encoder": text_encoder.to(dtype),
        "tokenizer": tokenizer,
        "schedule": NoiseSchedule(**config["schedule"]),
    }
    return _build(saved["kind"], parts, saved, size, str(folder))


def _load_pipeline(
    name: str, kind: Kind | None, size: int | None, dtype: torch.dtype, settings: dict[str, Any]
) -> DenoisingPolicy:
    from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    options: dict[str, Any] = {"use_safetensors": True, "torch_dtype": dtype}
    try:
        index = DiffusionPipeline.load_config(name)
        has = {part for part, owner in index.items() if isinstance(owner, list) and owner[-1] is not None}
        unet_class = (index.get("unet") or [None, None])[-1]
        if unet_class != "UNet2DConditionModel" or "text_encoder_2" in has or "text_encoder" not in has:
            raise UsageError(
                f"the model {name} is a {index.get('_class_name')}: guerdon runs pipelines of one CLIP text "
                "encoder and one UNet2DConditionModel (Stable Diffusion 1.x and 2.x, latent consistency models)"
            )
        config = DDIMScheduler.load_config(name, subfolder="scheduler")  # whichever it is: only its values
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", **options)
        parts = {
            "denoiser": unet,
            "vae": AutoencoderKL.from_pretrained(name, subfolder="vae", **options) if "vae" in has else None,
            "text_encoder": CLIPTextModel.from_pretrained(
                name, subfolder="text_encoder", use_safetensors=True, dtype=dtype
            ),
            "tokenizer": CLIPTokenizer.from_pretrained(name, subfolder="tokenizer"),
            "schedule": read_schedule(config),
        }
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"no model at {name}: {_first_line(error)}") from error
    embedded = unet.config.time_cond_proj_dim is not None
    found = "consistency" if embedded or config.get("_class_name") == "LCMScheduler" else "diffusion"
    return _build(kind or found, parts, settings, size, name)


def _load_lora(
    folder: Path, kind: Kind | None, size: int | None, dtype: torch.dtype, keep_lora: bool
) -> DenoisingPolicy:
    settings = _read_json(folder / SETTINGS)
    base = settings.get("base")
    if (folder / "model_index.json").is_file():
        policy = _load_pipeline(str(folder), kind, size, dtype, settings)
    elif base is not None:
        policy = load_policy(
            base, kind or settings.get("kind"), size=size or settings.get("size"), dtype=dtype
        )
        policy.guidance = settings.get("guidance", policy.guidance)
        policy.steps = settings.get("steps", policy.steps)
        policy.event_reduction = settings.get("event_reduction", policy.event_reduction)
    else:
        raise UsageError(
            f"no model at {folder}: it holds a LoRA, but no {SETTINGS} that names its base model"
        )
    denoiser: Any = policy.denoiser
    try:
        denoiser.load_lora_adapter(
            str(folder), prefix="unet", adapter_name=lora.ADAPTER, weight_name=LORA_WEIGHTS
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(f"the LoRA in {folder} does not fit its base model: {_first_line(error)}") from error
    if not lora.has_lora(denoiser):
        raise UsageError(f"the LoRA in {folder} does not fit its base model: no layer of it was found")
    lora.adopt(denoiser)
    if not keep_lora:
        lora.fold(denoiser)
        policy.source = None  # the weights are no longer those that the base's name stands for
    return policy


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- writing ----------------------------------------------------------------------------------------------


def save_policy(policy: DenoisingPolicy, folder: str | Path) -> None:
    """Write ``policy`` to ``folder`` so that `load_policy` reads it back; see the module and
    `DenoisingPolicy.save_pretrained`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(policy.denoiser, Denoiser):
        _save_own(policy, folder)
    else:
        _save_pipeline(policy, folder)


def _unadapted(module: Any, weights: dict[str, torch.Tensor]) -> nn.Module:
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
    config = _read_json(folder / "config.json")
    write_json(folder / "config.json", config | policy.settings())
    if adapted:
        _save_adapter(denoiser, folder)


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
    pipeline_class: Any = (
        LatentConsistencyModelPipeline if policy.kind == "consistency" else StableDiffusionPipeline
    )
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
        pipeline_class(**{key: value for key, value in arguments.items() if key in known}).save_pretrained(
            folder
        )
    if adapted:
        settings["base"] = policy.source
        pipeline_class.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(lora.adapter_state_dict(unet)),
            unet_lora_adapter_metadata=lora.settings(unet),
        )
    write_json(folder / SETTINGS, settings)
