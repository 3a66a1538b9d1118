"""Image policies from files and from the hub (`guerdon.policies.saving` is the way back).

Three formats are read:

* guerdon's own folder (``config.json`` with a ``kind``, ``model.safetensors``);
* a diffusers pipeline, as a folder or a hub name (``model_index.json``): Stable Diffusion 1.x and 2.x and
  latent consistency models, that is one CLIP text encoder and a ``UNet2DConditionModel``;
* a folder with a LoRA (``pytorch_lora_weights.safetensors``) beside ``guerdon.json``, which names its base,
  or beside a whole pipeline.

Only safetensors are read: nothing is unpickled, and no code comes along with a model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from guerdon.errors import UsageError, nearest
from guerdon.policies import lora
from guerdon.policies.consistency import ConsistencyPolicy
from guerdon.policies.denoiser import load_text_to_image
from guerdon.policies.denoising import DenoisingPolicy
from guerdon.policies.diffusion import DiffusionPolicy
from guerdon.policies.saving import LORA_WEIGHTS, SETTINGS, read_json
from guerdon.policies.schedule import NoiseSchedule

Kind = Literal["diffusion", "consistency"]
KINDS: dict[str, type[DenoisingPolicy]] = {"diffusion": DiffusionPolicy, "consistency": ConsistencyPolicy}


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
            return _load_pipeline(name, kind, size, dtype, read_json(folder / SETTINGS))
        if (folder / "config.json").is_file():
            return _load_own(folder, kind, size, dtype)
        raise UsageError(
            f"no model at {name}: the folder has none of config.json, model_index.json and {LORA_WEIGHTS}"
        )
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UsageError(f"no model at {name}: there is no such folder")
    return _load_pipeline(name, kind, size, dtype, {})


def _build(
    kind: str, parts: dict[str, Any], settings: dict[str, Any], size: int | None, source: str
) -> DenoisingPolicy:
    known = {key: settings[key] for key in ("guidance", "steps", "event_reduction") if key in settings}
    if Path(source).is_dir():
        source = str(Path(source).resolve())  # a LoRA that names it may be read from another directory
    return KINDS[kind](**parts, size=size or settings.get("size"), source=source, **known)


def _load_own(folder: Path, kind: Kind | None, size: int | None, dtype: torch.dtype) -> DenoisingPolicy:
    from safetensors import SafetensorError

    saved = read_json(folder / "config.json")
    if saved.get("kind") not in KINDS or "denoiser" not in saved:
        raise UsageError(f"no model at {folder}: config.json does not describe an image policy of guerdon")
    if kind is not None and kind != saved["kind"]:
        raise UsageError(f"the model at {folder} is a {saved['kind']} model, not a {kind} model")
    try:
        denoiser, text_encoder, tokenizer, config = load_text_to_image(folder)
        schedule = NoiseSchedule(**config["schedule"])
    except (OSError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        raise UsageError(f"no model at {folder}: {_first_line(error)}") from error
    parts = {
        "denoiser": denoiser.to(dtype),
        "text_encoder": text_encoder.to(dtype),
        "tokenizer": tokenizer,
        "schedule": schedule,
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
                "encoder and one UNet2DConditionModel (Stable Diffusion 1.x and 2.x, latent consistency "
                "models)"
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
    settings = read_json(folder / SETTINGS)
    base = settings.get("base")
    beside = (folder / "model_index.json").is_file()
    if beside and (base is None or Path(base).resolve() == folder.resolve()):
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
