"""Sampling and training of tiny image models, beside plain diffusers.

Three comparisons, each of the same work on the same machine in turns:

* *same network*: guerdon's policy and the loop that diffusers' documentation shows (scheduler, network,
  ``scheduler.step``), both around the same denoiser;
* *same pipeline*: a small Stable-Diffusion-shaped pipeline (UNet2DConditionModel, VAE, CLIP text encoder) saved
  to a folder, sampled by diffusers' own pipeline class and by the policy that guerdon loads from that folder;
* *shipped model*: the model that the ``shapes`` task ships and the diffusers UNet of the same size, for the same
  pictures.

A training step is one RLCM update of 16 pictures and 3 transitions: log-probabilities of stored steps, clipped
surrogate, backward, clipping, Adam.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guerdon.benchmarks import row, take_turns
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.optim import Adam
from guerdon.policies.consistency import ConsistencyPolicy
from guerdon.policies.diffusion import DiffusionPolicy
from guerdon.policies.pretrained import load_policy
from guerdon.policies.schedule import guidance_embedding
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.shapes.task import Shapes

SAMPLING, TRAINING = 1.3, 1.0
_ROWS, _STEPS, _GUIDANCE = 64, 4, 3.0


def _prompts() -> list[str]:
    prompts = Shapes().training_prompts()
    return [prompts[i % len(prompts)] for i in range(_ROWS)]


def _lcm_scheduler() -> Any:
    from diffusers import LCMScheduler

    return LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def _encode(policy: Any, prompts: list[str]) -> Tensor:
    tokens = policy.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    return policy.text_encoder(tokens.input_ids)[0]


def _uint8(pixels: Tensor) -> Tensor:
    return ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


def _plain_consistency(
    policy: ConsistencyPolicy, network: nn.Module, prompts: list[str]
) -> Callable[[], Any]:
    """The loop of diffusers' latent consistency pipeline, pictures as latents."""
    scheduler = _lcm_scheduler()

    @torch.no_grad()
    def sample() -> Tensor:
        condition = _encode(policy, prompts)
        w = guidance_embedding(torch.full((len(prompts),), _GUIDANCE - 1), 256)
        scheduler.set_timesteps(_STEPS, original_inference_steps=50)
        x = torch.randn(len(prompts), 3, 16, 16) * scheduler.init_noise_sigma
        clean = x
        for t in scheduler.timesteps:
            output = network(x, t, encoder_hidden_states=condition, timestep_cond=w, return_dict=False)[0]
            x, clean = scheduler.step(output, t, x, return_dict=False)
        return _uint8(clean)

    return sample


def _plain_diffusion(
    policy: DiffusionPolicy, network: nn.Module, prompts: list[str], steps: int
) -> Callable[[], Any]:
    """The loop of diffusers' Stable Diffusion pipeline with classifier-free guidance, pictures as latents."""
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

    @torch.no_grad()
    def sample() -> Tensor:
        condition = torch.cat([_encode(policy, [""] * len(prompts)), _encode(policy, prompts)])
        scheduler.set_timesteps(steps)
        x = torch.randn(len(prompts), 3, 16, 16) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            both = scheduler.scale_model_input(torch.cat([x] * 2), t)
            output = network(both, t, encoder_hidden_states=condition, return_dict=False)[0]
            empty, text = output.chunk(2)
            x = scheduler.step(empty + _GUIDANCE * (text - empty), t, x, eta=1.0, return_dict=False)[0]
        return _uint8(x)

    return sample


def _unet(channels: int, time_cond: int | None) -> nn.Module:
    """The diffusers UNet nearest in size to the shipped denoiser."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(24, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=2,
        norm_num_groups=8,
        time_cond_proj_dim=time_cond,
    ).eval()


def _small_pipeline(folder: Path) -> Any:
    """A latent consistency pipeline of diffusers with random weights, saved to ``folder``."""
    import json

    from diffusers import AutoencoderKL, LatentConsistencyModelPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    words = sorted({w for prompt in Shapes().training_prompts() for w in prompt.split()})
    letters = sorted({c for w in words for c in w})
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(c + "</w>" for c in letters)]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(vocabulary)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
    )
    pipeline = LatentConsistencyModelPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=_unet(4, 256),
        scheduler=_lcm_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder / "pipeline")
    return pipeline


def _training(
    policy: ConsistencyPolicy, plain: nn.Module, prompts: list[str]
) -> tuple[Callable[[], Any], ...]:
    """One RLCM update of 16 pictures by a role, and by the plain loop that RLCM's own code has in spirit:
    network, scheduler arithmetic, ratio, clipping, Adam."""
    traj = policy.sample(prompts[:16], row_seeds(0, 0, 16), steps=_STEPS, guidance=_GUIDANCE)
    advantage = torch.randn(16)
    traj.advantage = traj.per_step(advantage)
    role = Role("actor", policy, RoleSettings(Adam(1e-4), 5.0))
    objective = ClippedSurrogate(clip=1e-4)
    parameters = [p.requires_grad_(True) for p in plain.parameters()]
    optimiser = torch.optim.Adam(parameters, 1e-4)
    levels = _lcm_scheduler().alphas_cumprod
    step = traj.inputs["step"]
    state, following = step["state"].flatten(0, 1), step["next"].flatten(0, 1)
    times, later = step["timestep"].flatten(), step["next_timestep"].flatten()
    condition = traj.inputs["condition"].repeat_interleave(traj.steps, 0)
    w = guidance_embedding(torch.full((len(state),), _GUIDANCE - 1), 256)
    old, gain = traj.log_prob.flatten(), advantage.repeat_interleave(traj.steps)

    def bare() -> None:
        output = plain(state, times, encoder_hidden_states=condition, timestep_cond=w, return_dict=False)[0]
        level, after = levels[times].view(-1, 1, 1, 1), levels[later].view(-1, 1, 1, 1)
        clean = (state - (1 - level).sqrt() * output) / level.sqrt()
        scaled = times.view(-1, 1, 1, 1) * 10.0
        clean = 0.25 / (scaled**2 + 0.25) * state + scaled / (scaled**2 + 0.25).sqrt() * clean
        variance = 1 - after
        log_prob = (
            -((following - after.sqrt() * clean) ** 2) / (2 * variance) - variance.sqrt().log() - 0.9189385
        )
        ratio = (log_prob.mean((1, 2, 3)) - old).exp()
        loss = torch.maximum(-gain * ratio, -gain * ratio.clamp(1 - 1e-4, 1 + 1e-4)).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()

    return lambda: role.update(traj, objective), bare


def run() -> list[dict[str, Any]]:
    """The rows of ``guerdon bench images``."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    rows = []
    prompts, seeds = _prompts(), row_seeds(0, 0, _ROWS)
    fixtures = Shapes.fixtures

    policy = load_policy(fixtures / "consistency")
    other = load_policy(fixtures / "consistency")
    assert isinstance(policy, ConsistencyPolicy)
    assert isinstance(other, ConsistencyPolicy)

    def ours() -> Any:
        return policy.sample(prompts, seeds, steps=_STEPS, guidance=_GUIDANCE)

    a, b = take_turns((ours, _plain_consistency(other, other.denoiser, prompts)), rounds=15)
    rows.append(row("consistency, 64 pictures, 4 steps, same network", a, "diffusers' loop", b, None))
    a, b = take_turns((ours, _plain_consistency(other, _unet(3, 256), prompts)), rounds=15)
    rows.append(
        row("consistency, 64 pictures, 4 steps, shipped model", a, "diffusers' UNet of its size", b, SAMPLING)
    )

    diffusion = load_policy(fixtures / "diffusion")
    assert isinstance(diffusion, DiffusionPolicy)

    def denoise() -> Any:
        return diffusion.sample(prompts, seeds, steps=20, eta=1.0, guidance=_GUIDANCE)

    a, b = take_turns(
        (denoise, _plain_diffusion(diffusion, diffusion.denoiser, prompts, 20)), rounds=4, warm_up=1
    )
    rows.append(row("diffusion, 64 pictures, 20 guided steps, same network", a, "diffusers' loop", b, None))
    a, b = take_turns(
        (denoise, _plain_diffusion(diffusion, _unet(3, None), prompts, 20)), rounds=4, warm_up=1
    )
    rows.append(
        row(
            "diffusion, 64 pictures, 20 guided steps, shipped model",
            a,
            "diffusers' UNet of its size",
            b,
            SAMPLING,
        )
    )

    with tempfile.TemporaryDirectory() as folder:
        pipeline = _small_pipeline(Path(folder))
        loaded = load_policy(Path(folder) / "pipeline")

        def piped() -> Any:
            return pipeline(prompts, num_inference_steps=_STEPS, guidance_scale=_GUIDANCE, output_type="np")

        def through() -> Any:
            return loaded.sample(prompts, seeds, steps=_STEPS, guidance=_GUIDANCE)

        a, b = take_turns((through, piped), rounds=10)
        rows.append(
            row("small latent consistency pipeline, 64 pictures, 4 steps", a, "diffusers' pipeline", b, None)
        )

    a, b = take_turns(_training(policy, other.denoiser, prompts), rounds=15)
    rows.append(row("RLCM update, 16 pictures x 3 steps, same network", a, "plain loop", b, TRAINING))
    return rows
