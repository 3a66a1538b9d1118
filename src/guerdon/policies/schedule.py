"""The arithmetic of denoising: noise levels, time grids, one DDIM step, the consistency function.

Pure functions of tensors, shared by `diffusion`, `consistency` and the distillation objectives.
Timesteps are integers 0..999 as in Stable Diffusion; ``alpha_bar`` is the cumulative product of
``1 - beta``. Functions take per-example timesteps of shape ``[N]`` (or any shape that broadcasts once
`expand` has added the pixel axes).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Append axes of length one to ``values`` until it broadcasts against ``like``."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels of a trained denoiser.

    The defaults are Stable Diffusion's: 1000 steps, ``beta`` linear in its square root from 0.00085 to
    0.012 ("scaled_linear"), and the latent consistency model's boundary (Luo et al., 2023):
    ``sigma_data`` 0.5 and time scaled by 10.
    """

    train_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    prediction: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    sigma_data: float = 0.5
    time_scale: float = 10.0
    origin_steps: int = 50
    clip_sample: float | None = None  # clamp the predicted clean sample to [-c, c], and its noise to match

    def to_dict(self) -> dict:
        """The fields as plain values (for config.json)."""
        return asdict(self)

    def alpha_bar(self) -> Tensor:
        """``[train_steps]`` float32: the share of signal power left after each step."""
        # computed in float32 as diffusers does, so that real checkpoints see the levels they were trained at
        if self.beta_schedule == "scaled_linear":
            betas = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.train_steps) ** 2
        else:
            betas = torch.linspace(self.beta_start, self.beta_end, self.train_steps)
        return torch.cumprod(1.0 - betas, dim=0)

    def ddim_grid(self, steps: int) -> Tensor:
        """``[steps]`` decreasing timesteps, evenly spaced, ending at 1 ("leading" spacing, offset 1), as
        Stable Diffusion's DDIM scheduler has them."""
        stride = self.train_steps // steps
        return (torch.arange(steps) * stride).flip(0) + 1

    def consistency_grid(self, steps: int) -> Tensor:
        """``[steps]`` decreasing timesteps: every (origin_steps // steps)-th point of the grid on which the
        model was distilled, from its noisiest end (8 steps of 50: 999, 879, ..., 159)."""
        if not 1 <= steps <= self.origin_steps:
            raise ValueError(f"a consistency sampler takes 1 to {self.origin_steps} steps, not {steps}")
        origin = self.origin_grid()
        return origin.flip(0)[:: self.origin_steps // steps][:steps]

    def origin_grid(self) -> Tensor:
        """``[origin_steps]`` increasing timesteps on which the consistency model was distilled (19, 39, ... 999)."""
        stride = self.train_steps // self.origin_steps
        return torch.arange(1, self.origin_steps + 1) * stride - 1


def predict(
    output: Tensor, sample: Tensor, alpha_bar: Tensor, schedule: NoiseSchedule
) -> tuple[Tensor, Tensor]:
    """The clean sample and the noise that a denoiser's ``output`` stands for.

    Args: ``output``, ``sample`` ``[N, ...]``; ``alpha_bar`` ``[N]``, the level of ``sample``.
    Returns ``(clean, noise)``, both ``[N, ...]``.
    """
    signal, sigma = expand(alpha_bar.sqrt(), sample), expand((1 - alpha_bar).sqrt(), sample)
    if schedule.prediction == "epsilon":
        clean, noise = (sample - sigma * output) / signal, output
    elif schedule.prediction == "sample":
        clean, noise = output, (sample - signal * output) / sigma
    else:
        clean, noise = signal * sample - sigma * output, signal * output + sigma * sample
    if schedule.clip_sample is not None:
        # the noise that goes with the clamped sample; keeping the old one lets strong guidance run away
        clean = clean.clamp(-schedule.clip_sample, schedule.clip_sample)
        noise = (sample - signal * clean) / sigma
    return clean, noise


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """``clean`` brought to the level ``alpha_bar`` ``[N]`` with the given ``noise``."""
    return expand(alpha_bar.sqrt(), clean) * clean + expand((1 - alpha_bar).sqrt(), clean) * noise


def ddim_step(
    clean: Tensor, noise: Tensor, alpha_bar: Tensor, alpha_bar_next: Tensor, eta: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of one DDIM step (Song et al., 2021, eq. 12 and 16).

    Args: ``clean``, ``noise`` ``[N, ...]`` as `predict` returns; ``alpha_bar`` ``[N]`` of the current and
    ``alpha_bar_next`` ``[N]`` of the next, cleaner level; ``eta`` (a number or ``[N]``) 0 is deterministic, 1 is DDPM-like.
    Returns ``mean [N, ...]`` and ``std [N]`` (zero where the step is deterministic).
    """
    std = (
        eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).clamp(min=0).sqrt()
    )
    direction = (1 - alpha_bar_next - std**2).clamp(min=0).sqrt()
    mean = expand(alpha_bar_next.sqrt(), clean) * clean + expand(direction, noise) * noise
    return mean, std


def boundary(timestep: Tensor, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
    """``c_skip`` and ``c_out`` ``[N]`` of the consistency function (Luo et al., 2023):
    with ``s = time_scale * t``: ``c_skip = sd^2 / (s^2 + sd^2)``, ``c_out = s / sqrt(s^2 + sd^2)``."""
    scaled = timestep.to(torch.float32) * schedule.time_scale
    total = scaled**2 + schedule.sigma_data**2
    return schedule.sigma_data**2 / total, scaled / total.sqrt()


def consistency(sample: Tensor, clean: Tensor, timestep: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The consistency function ``f(x, t) = c_skip x + c_out x0`` for a predicted ``clean`` sample."""
    skip, out = boundary(timestep, schedule)
    return expand(skip, sample) * sample + expand(out, clean) * clean


def guidance_embedding(w: Tensor, width: int = 256) -> Tensor:
    """``[N, width]`` sinusoids of ``1000 w``: how a consistency model is told its guidance
    (``timestep_cond`` of diffusers' UNets). ``w`` ``[N]`` is the guidance scale minus one."""
    half = width // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=w.device)
        * -(torch.log(torch.tensor(10000.0, device=w.device)) / (half - 1))
    )
    angles = (w.to(torch.float32) * 1000.0)[:, None] * frequencies[None, :]
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, width - embedding.shape[1]))
