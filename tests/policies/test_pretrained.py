"""Image policies from files and back: guerdon's own format, diffusers pipelines, LoRA."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from guerdon.errors import UsageError
from guerdon.policies import lora
from guerdon.policies.consistency import ConsistencyPolicy
from guerdon.policies.denoiser import Denoiser, DenoiserConfig, TextEncoder, TextEncoderConfig, WordTokenizer
from guerdon.policies.denoising import DenoisingPolicy
from guerdon.policies.diffusion import DiffusionPolicy
from guerdon.policies.lora import LoRA
from guerdon.policies.pretrained import load_policy, read_schedule
from guerdon.policies.saving import make_scheduler
from guerdon.policies.schedule import NoiseSchedule
from guerdon.randomness import normal, row_seeds

PROMPTS = ["red circle", "blue ring"]
SEEDS = row_seeds(0, 0, 2)
KINDS = {"consistency": ConsistencyPolicy, "diffusion": DiffusionPolicy}


def pipeline_folder(folder: Path, kind: str, unet_options: dict[str, Any] | None = None) -> Path:
    """A diffusers pipeline small enough for a test, with random weights."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = folder / "words"
    words.mkdir(parents=True)
    letters = sorted({c for p in PROMPTS for c in p if c != " "})
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (words / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(vocabulary)}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=12)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=len(vocabulary) - 2,
            eos_token_id=len(vocabulary) - 1,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
        time_cond_proj_dim=256 if kind == "consistency" else None,
        **(unet_options or {}),
    )
    if kind == "consistency":
        nn.init.normal_(unet.time_embedding.cond_proj.weight, std=0.1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
    )
    common = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
    }
    parts = {
        "vae": vae,
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "unet": unet,
        "safety_checker": None,
    }
    parts |= {"feature_extractor": None, "requires_safety_checker": False}
    if kind == "consistency":
        pipeline = LatentConsistencyModelPipeline(
            scheduler=LCMScheduler(**common, original_inference_steps=50), **parts
        )
    else:
        scheduler = DDIMScheduler(**common, steps_offset=1, set_alpha_to_one=False)
        pipeline = StableDiffusionPipeline(scheduler=scheduler, **parts)
    pipeline.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module", params=["consistency", "diffusion"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, pipeline_folder(tmp_path_factory.mktemp(request.param), request.param)


def own(kind: str) -> DenoisingPolicy:
    torch.manual_seed(0)
    config = DenoiserConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        norm_num_groups=4,
        time_cond_proj_dim=256 if kind == "consistency" else None,
    )
    denoiser = Denoiser(config)
    nn.init.normal_(denoiser.conv_out.weight, std=0.1)
    tokenizer = WordTokenizer.from_words(["red", "blue", "circle", "ring"], model_max_length=4)
    encoder = TextEncoder(TextEncoderConfig(len(tokenizer), max_length=4, hidden_size=8))
    schedule = NoiseSchedule(clip_sample=1.0, origin_steps=25)
    return KINDS[kind](denoiser, encoder, tokenizer, schedule, guidance=2.0, steps=3, event_reduction="sum")


def stir(policy: DenoisingPolicy) -> None:
    torch.manual_seed(7)
    for parameter in lora.parameters(policy.core):
        nn.init.normal_(parameter, std=0.3)


def chain(policy: DenoisingPolicy) -> torch.Tensor:
    return policy.sample(PROMPTS, SEEDS).inputs["step"]["next"]


def plain_diffusers(folder: Path, kind: str, base: Path | None = None) -> torch.Tensor:
    """Pictures of a saved folder by diffusers alone, as its users would make them: ``uint8 [B, H, W, 3]``.
    ``folder`` is a pipeline, or a LoRA for the pipeline in ``base``."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(base or folder, safety_checker=None)
    if base is not None:
        pipeline.load_lora_weights(folder)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "eta": 0.0}
    if kind == "consistency":  # more steps would draw noise of diffusers' own
        options = {"timesteps": [999], "num_inference_steps": None}
    images = pipeline(
        PROMPTS, guidance_scale=3.0, latents=normal(SEEDS, (4, 8, 8)), output_type="pt", **options
    ).images
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def our_pictures(policy: DenoisingPolicy) -> torch.Tensor:
    options = {"steps": 1} if policy.kind == "consistency" else {"steps": 4, "eta": 0.0}
    return policy.sample(PROMPTS, SEEDS, guidance=3.0, **options).images


# --- diffusers pipelines ----------------------------------------------------------------------------------


def test_a_pipeline_folder_gives_the_right_policy(saved: tuple[str, Path]) -> None:
    kind, folder = saved
    policy = load_policy(folder)
    assert type(policy) is KINDS[kind]
    assert policy.size == 16
    assert policy.latent_shape == (4, 8, 8)
    assert policy.schedule == NoiseSchedule()
    assert policy.encode(PROMPTS).shape == (2, 12, 16)
    traj = policy.sample(PROMPTS, SEEDS)
    assert traj.images.shape == (2, 16, 16, 3)
    torch.testing.assert_close(policy.log_prob(traj), traj.log_prob, atol=1e-5, rtol=1e-5)
    assert load_policy(folder, size=32).sample(PROMPTS, SEEDS, steps=1).images.shape == (2, 32, 32, 3)
    assert load_policy(folder, dtype=torch.bfloat16).denoiser.dtype == torch.bfloat16


def test_a_pipeline_gives_diffusers_pictures(saved: tuple[str, Path]) -> None:
    kind, folder = saved
    theirs = plain_diffusers(folder, kind)
    assert (our_pictures(load_policy(folder)).int() - theirs.int()).abs().max() <= 1


def test_full_weights_come_back_through_plain_diffusers(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = saved
    policy = load_policy(folder)
    with torch.no_grad():
        for parameter in policy.core.parameters():
            parameter.mul_(1.1)
    policy.core_changed()
    policy.save_pretrained(tmp_path / "tuned")
    theirs = plain_diffusers(tmp_path / "tuned", kind)
    assert (our_pictures(policy).int() - theirs.int()).abs().max() <= 1
    assert (our_pictures(load_policy(folder)).int() - theirs.int()).abs().max() > 1
    again = load_policy(tmp_path / "tuned")
    assert type(again) is type(policy)
    torch.testing.assert_close(chain(again), chain(policy), atol=1e-5, rtol=1e-5)


def test_lora_comes_back_through_plain_diffusers(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = saved
    policy = load_policy(folder)
    lora.add(policy.core, LoRA(rank=2, alpha=6))
    stir(policy)
    policy.core_changed()
    policy.save_pretrained(tmp_path / "tuned")
    written = {path.name for path in (tmp_path / "tuned").iterdir()}
    assert written == {"pytorch_lora_weights.safetensors", "guerdon.json"}
    theirs = plain_diffusers(tmp_path / "tuned", kind, base=folder)
    assert (our_pictures(policy).int() - theirs.int()).abs().max() <= 1
    assert (our_pictures(load_policy(folder)).int() - theirs.int()).abs().max() > 1

    folded = load_policy(tmp_path / "tuned")
    assert not lora.has_lora(folded.core)
    torch.testing.assert_close(chain(folded), chain(policy), atol=1e-4, rtol=1e-4)
    apart = load_policy(tmp_path / "tuned", keep_lora=True)
    assert lora.has_lora(apart.core)
    assert {n for n, p in apart.core.named_parameters() if p.requires_grad} == {
        n for n, p in policy.core.named_parameters() if p.requires_grad
    }
    torch.testing.assert_close(chain(apart), chain(policy), atol=1e-5, rtol=1e-5)
    with lora.disabled(apart.core):
        torch.testing.assert_close(chain(apart), chain(load_policy(folder)), atol=1e-5, rtol=1e-5)


def test_lora_on_weights_without_a_name_takes_its_base_along(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = saved
    policy = load_policy(folder)
    with torch.no_grad():
        policy.denoiser.conv_out.weight.mul_(1.5)
    policy.core_changed()
    lora.add(policy.core, LoRA(rank=2, alpha=6))
    stir(policy)
    policy.save_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(chain(load_policy(tmp_path / "tuned")), chain(policy), atol=1e-4, rtol=1e-4)
    theirs = plain_diffusers(tmp_path / "tuned", kind, base=tmp_path / "tuned")
    assert (our_pictures(policy).int() - theirs.int()).abs().max() <= 1


def test_a_later_save_replaces_an_earlier_one(saved: tuple[str, Path], tmp_path: Path) -> None:
    policy = load_policy(saved[1])
    plain = chain(policy)
    lora.add(policy.core, LoRA(rank=2))
    stir(policy)
    policy.save_pretrained(tmp_path / "model")
    load_policy(saved[1]).save_pretrained(tmp_path / "model")
    torch.testing.assert_close(chain(load_policy(tmp_path / "model")), plain, atol=1e-5, rtol=1e-5)
    policy.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(chain(load_policy(tmp_path / "model")), chain(policy), atol=1e-4, rtol=1e-4)


def test_a_pipeline_without_vae_works_on_pixels(saved: tuple[str, Path], tmp_path: Path) -> None:
    kind, folder = saved
    full = load_policy(folder)
    torch.manual_seed(1)
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(
        {**full.denoiser.config, "in_channels": 3, "out_channels": 3}
    ).eval()
    policy = KINDS[kind](unet, full.text_encoder, full.tokenizer, full.schedule)
    policy.save_pretrained(tmp_path / "pixels")
    again = load_policy(tmp_path / "pixels")
    assert again.vae is None
    assert again.sample(PROMPTS, SEEDS, steps=2).images.shape == (2, 8, 8, 3)
    torch.testing.assert_close(chain(again), chain(policy), atol=1e-5, rtol=1e-5)


def test_schedules_survive_the_round_trip() -> None:
    schedule = NoiseSchedule(
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction="v_prediction",
        time_scale=5.0,
        origin_steps=25,
        clip_sample=2.0,
    )
    assert read_schedule(dict(make_scheduler(schedule, "consistency").config)) == schedule
    diffusion = read_schedule(dict(make_scheduler(schedule, "diffusion").config))
    assert diffusion == NoiseSchedule(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction="v_prediction", clip_sample=2.0
    )
    for kind in KINDS:
        theirs = make_scheduler(schedule, kind).alphas_cumprod
        assert torch.equal(theirs, schedule.alpha_bar())
    for unsupported in ({"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}):
        with pytest.raises(UsageError):
            read_schedule(unsupported)


# --- guerdon's own format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_own_format_round_trip(kind: str, tmp_path: Path) -> None:
    policy = own(kind)
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    assert type(again) is type(policy)
    assert again.settings() == policy.settings()
    assert again.schedule == policy.schedule
    assert torch.equal(chain(again), chain(policy))
    assert load_policy(str(tmp_path), kind).kind == kind


@pytest.mark.parametrize("kind", list(KINDS))
def test_own_format_folds_an_adapter_and_keeps_it_apart_too(kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    policy = own(kind)
    base = own(kind)
    lora.add(policy.core, LoRA(rank=2, alpha=6))
    stir(policy)
    policy.save_pretrained(tmp_path)
    again = load_policy(tmp_path)
    assert not lora.has_lora(again.core)
    torch.testing.assert_close(chain(again), chain(policy), atol=1e-4, rtol=1e-4)
    assert lora.has_lora(policy.core)  # saving leaves the policy as it was
    wrapped = PeftModel.from_pretrained(base.denoiser, str(tmp_path))  # plain peft reads the adapter
    x, condition = normal(SEEDS, (3, 8, 8)), policy.encode(PROMPTS)
    torch.testing.assert_close(wrapped(x, 500, condition).sample, policy.denoiser(x, 500, condition).sample)


@pytest.mark.parametrize(("kind", "steps"), [("consistency", 4), ("diffusion", 10)])
def test_the_shapes_models_draw_what_their_captions_say(kind: str, steps: int) -> None:
    from guerdon.tasks import shapes
    from guerdon.tasks.shapes import oracles, world

    policy = load_policy(Path(shapes.__file__).parent / "fixtures" / kind)
    captions = world.held_out_captions()[::3][:48]
    traj = policy.sample(captions, row_seeds(1, 0, len(captions)), steps=steps, guidance=3.0)
    assert oracles.accuracy(traj.images, captions)["all"] >= 0.9
    assert oracles.accuracy(traj.images, captions[::-1])["all"] < 0.1
    with torch.no_grad():
        torch.testing.assert_close(policy.log_prob(traj), traj.log_prob, atol=1e-5, rtol=1e-5)


# --- what can go wrong ------------------------------------------------------------------------------------


def test_missing_models_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no model at \./nowhere: there is no such folder"):
        load_policy("./nowhere")
    with pytest.raises(UsageError, match=f"no model at {re.escape(str(tmp_path))}: the folder has none of"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "teapot"}')
    with pytest.raises(UsageError, match="does not describe an image policy"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="not JSON"):
        load_policy(tmp_path)
    with pytest.raises(UsageError, match="unknown kind of image policy 'difusion'; did you mean 'diffusion'"):
        load_policy(tmp_path, "difusion")  # type: ignore[arg-type]
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="no model at nobody/nothing-at-all: "):
        load_policy("nobody/nothing-at-all")


def test_damaged_own_model_is_named(tmp_path: Path) -> None:
    own("diffusion").save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a diffusion model, not a consistency model"):
        load_policy(tmp_path, "consistency")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no model at"):
        load_policy(tmp_path)


def test_foreign_pipelines_are_refused(saved: tuple[str, Path], tmp_path: Path) -> None:
    index = json.loads((saved[1] / "model_index.json").read_text())
    index |= {"_class_name": "StableDiffusionXLPipeline", "text_encoder_2": ["transformers", "CLIPTextModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        UsageError, match="is a StableDiffusionXLPipeline: guerdon runs pipelines of one CLIP"
    ):
        load_policy(tmp_path)


def test_a_lora_without_a_base_is_named(saved: tuple[str, Path], tmp_path: Path) -> None:
    policy = load_policy(saved[1])
    lora.add(policy.core, LoRA(rank=2))
    policy.save_pretrained(tmp_path)
    (tmp_path / "guerdon.json").unlink()
    with pytest.raises(UsageError, match="names its base model"):
        load_policy(tmp_path)
