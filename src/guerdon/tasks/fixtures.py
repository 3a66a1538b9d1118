"""Training of the small generators that tasks ship: a diffusion model, and a consistency model from it.

The loops know nothing of what is drawn: a task gives a `World` (pictures with captions, and a judge).
Settings that were tuned once are constants beside the loop that uses them. Run through a task's own
``train`` module, for example ``python -m guerdon.tasks.shapes.train all``.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from guerdon.objectives.distillation import consistency_loss, guided
from guerdon.policies.denoiser import (
    Denoiser,
    DenoiserConfig,
    TextEncoder,
    TextEncoderConfig,
    WordTokenizer,
    load_text_to_image,
    save_text_to_image,
)
from guerdon.policies.schedule import (
    NoiseSchedule,
    add_noise,
    consistency,
    ddim_step,
    guidance_embedding,
    predict,
)


@dataclass
class World:
    """What a generator is trained on.

    ``draw(count, rng)`` gives pictures ``[count, C, H, W]`` float32 in [-1, 1] and their prompts;
    ``show(prompts, rng)`` gives pictures of given prompts; ``judge(pictures, prompts)`` gives shares of right
    answers, of which ``"all"`` is the headline;
    ``prompts`` names lists of prompts on which quality is reported.
    """

    draw: Callable[[int, np.random.Generator], tuple[np.ndarray, list[str]]]
    show: Callable[[Sequence[str], np.random.Generator], np.ndarray]
    judge: Callable[[Tensor, Sequence[str]], dict[str, float]]
    prompts: dict[str, list[str]]
    tokenizer: WordTokenizer
    channels: int = 3
    size: int = 16


class TrainingLog:
    """Lines with the elapsed time, to the screen and to ``train.log`` of a folder."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "train.log"
        self.path.write_text("")
        self.start = time.monotonic()

    def __call__(self, text: str) -> None:
        line = f"[{time.monotonic() - self.start:6.1f} s] {text}"
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")


def write_quality(directory: Path, figures: dict) -> None:
    """``quality.json`` of a fixture folder."""
    (directory / "quality.json").write_text(json.dumps(figures, indent=2) + "\n")


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move ``average`` towards ``model`` by ``1 - decay`` (exponential moving average)."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


class _Pair(nn.Module):
    """A denoiser and its text encoder, so that both are copied and averaged together."""

    def __init__(self, denoiser: Denoiser, encoder: TextEncoder) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.encoder = encoder


def encode(encoder: TextEncoder, tokenizer: WordTokenizer, prompts: Sequence[str]) -> Tensor:
    """Hidden states ``[B, L, D]`` of prompts."""
    return encoder(tokenizer(list(prompts), return_tensors="pt").input_ids)[0]


@torch.no_grad()
def sample_diffusion(
    denoiser: Denoiser,
    encoder: TextEncoder,
    tokenizer: WordTokenizer,
    prompts: Sequence[str],
    schedule: NoiseSchedule,
    steps: int = 20,
    guidance: float = 3.0,
    seed: int = 0,
) -> Tensor:
    """Deterministic DDIM samples ``[B, C, H, W]``, clamped to [-1, 1]."""
    config = denoiser.config
    context = encode(encoder, tokenizer, [*prompts, *[""] * len(prompts)])
    shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    levels = torch.cat([schedule.alpha_bar()[schedule.ddim_grid(steps)], torch.ones(1)])
    for index, t in enumerate(schedule.ddim_grid(steps)):
        answer, empty = denoiser(torch.cat([x, x]), t, context).sample.chunk(2)
        level, after = levels[index].expand(len(x)), levels[index + 1].expand(len(x))
        clean, noise = predict(guided(answer, empty, guidance), x, level, schedule)
        x, _ = ddim_step(clean, noise, level, after)
    return x.clamp(-1, 1)


@torch.no_grad()
def sample_consistency(
    denoiser: Denoiser,
    encoder: TextEncoder,
    tokenizer: WordTokenizer,
    prompts: Sequence[str],
    schedule: NoiseSchedule,
    steps: int = 4,
    w: float = 2.0,
    seed: int = 0,
) -> Tensor:
    """Multistep consistency samples ``[B, C, H, W]``, clamped to [-1, 1]: the clean answer of each step is
    noised again to the next level (Song et al., 2023, algorithm 1); the last answer is the picture."""
    config = denoiser.config
    context = encode(encoder, tokenizer, prompts)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
    x = torch.randn(shape, generator=generator)
    if config.time_cond_proj_dim is None:
        raise ValueError("a consistency model must have a place for its guidance: time_cond_proj_dim is None")
    told = guidance_embedding(torch.full((len(prompts),), w), config.time_cond_proj_dim)
    grid, levels = schedule.consistency_grid(steps), schedule.alpha_bar()
    for index, t in enumerate(grid):
        times = t.expand(len(x))
        clean, _ = predict(denoiser(x, times, context, told).sample, x, levels[times], schedule)
        clean = consistency(x, clean, times, schedule)
        if index + 1 < len(grid):
            x = add_noise(
                clean, torch.randn(shape, generator=generator), levels[grid[index + 1]].expand(len(x))
            )
    return clean.clamp(-1, 1)


def in_batches(sample: Callable[..., Tensor], prompts: Sequence[str], seed: int, batch: int = 128) -> Tensor:
    """``sample(prompts, seed=...)`` in pieces."""
    starts = range(0, len(prompts), batch)
    return torch.cat([sample(prompts[at : at + batch], seed=seed + at) for at in starts])


def measure(
    world: World, sample: Callable[..., Tensor], samples: int = 512, seed: int = 1234
) -> dict[str, dict[str, float]]:
    """The judge's figures on ``samples`` pictures for each of the world's lists of prompts."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, prompts in world.prompts.items():
        if not prompts:
            continue
        # every prompt equally often, as far as it goes
        order = np.concatenate([rng.permutation(len(prompts)) for _ in range(-(-samples // len(prompts)))])
        chosen = [prompts[at] for at in order[:samples]]
        judged = world.judge(in_batches(sample, chosen, seed), chosen)
        result[name] = {key: round(value, 4) for key, value in judged.items()}
    return result


def _rate(
    progress: float, step: int, peak: float, flat: float = 0.5, floor: float = 0.02, warm: int = 50
) -> float:
    """Learning rate: linear warm-up, constant for the share ``flat``, then linear to ``floor``."""
    fall = 1 - (1 - floor) * max(0.0, progress - flat) / (1 - flat)
    return peak * min(1.0, (step + 1) / warm) * fall


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def train_diffusion(
    world: World, directory: Path, steps: int, minutes: float | None, seed: int, check_every: int = 500
) -> None:
    """Train a text-conditional diffusion model (noise prediction, Stable Diffusion's noise levels) and write
    it with its log and its measured quality. ``minutes`` ends training early, the learning rate with it.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    log = TrainingLog(directory)
    batch, peak, averaging, dropout = 64, 2e-3, 0.998, 0.1
    schedule = NoiseSchedule(clip_sample=1.0)  # strong guidance leaves the range of pictures otherwise
    levels = schedule.alpha_bar()
    tokenizer = world.tokenizer
    model = _Pair(
        Denoiser(DenoiserConfig(in_channels=world.channels, sample_size=world.size)),
        TextEncoder(TextEncoderConfig(len(tokenizer), tokenizer.model_max_length)),
    )
    average = copy.deepcopy(model).requires_grad_(False)
    optimiser = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    count = sum(weight.numel() for weight in model.parameters())
    log(f"diffusion: {count / 1e6:.2f} M parameters, batch {batch}, at most {steps} steps, seed {seed}")

    def sample(prompts: Sequence[str], seed: int) -> Tensor:
        return sample_diffusion(average.denoiser, average.encoder, tokenizer, prompts, schedule, seed=seed)

    start, running, done = time.monotonic(), 1.0, 0
    for step in range(steps):
        progress = step / steps
        if minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            break
        _set_rate(optimiser, _rate(progress, step, peak))
        pictures, prompts = world.draw(batch, rng)
        prompts = [
            "" if drop else text for text, drop in zip(prompts, rng.random(batch) < dropout, strict=True)
        ]
        clean = torch.from_numpy(pictures)
        # stratified over the batch: the loss of one step then hardly depends on which times it drew
        times = ((torch.arange(batch) + torch.rand(batch)) / batch * schedule.train_steps).long()
        noise = torch.randn_like(clean)
        noisy = add_noise(clean, noise, levels[times])
        answer = model.denoiser(noisy, times, encode(model.encoder, tokenizer, prompts)).sample
        loss = (answer - noise).square().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        follow(average, model, min(averaging, (step + 1) / (step + 10)))
        done = step + 1
        running += 0.02 * (loss.item() - running)
        if done % 100 == 0:
            log(f"step {done:5d}  loss {running:.4f}")
        if done % check_every == 0 and done < steps:
            log(f"step {done:5d}  right: {_headline(measure(world, sample, 128))}")

    wall = time.monotonic() - start
    save_text_to_image(
        directory, "diffusion", average.denoiser, average.encoder, tokenizer, schedule.to_dict()
    )
    # what is shipped is measured, not what was trained: weights are rounded to half precision on the way
    denoiser, encoder, _, _ = load_text_to_image(directory)
    figures = {}
    for guidance in (3.0, 1.0):
        name = f"20 steps, guidance {guidance:g}"
        figures[name] = measure(
            world,
            lambda p, seed, g=guidance: sample_diffusion(
                denoiser, encoder, tokenizer, p, schedule, 20, g, seed
            ),
        )
        log(f"shipped weights, {name}: {_headline(figures[name])}")
    write_quality(
        directory, {"samples": 512, "steps": done, "seconds": round(wall), "seed": seed, "right": figures}
    )


def distil_consistency(
    world: World,
    teacher_directory: Path,
    directory: Path,
    steps: int,
    minutes: float | None,
    seed: int,
    check_every: int = 300,
) -> None:
    """Distil the diffusion model of ``teacher_directory`` into a consistency model that is told its guidance,
    and write it with its log and its measured quality (Luo et al., 2023, algorithm 1, in pixel space)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed + 1)
    log = TrainingLog(directory)
    batch, peak, target_decay, averaging = 64, 5e-4, 0.95, 0.995
    widest = 5.0  # w ~ U[0, 5], which is a guidance scale of 1 to 6
    teacher, encoder, tokenizer, config = load_text_to_image(teacher_directory)
    teacher_schedule = NoiseSchedule(**config["schedule"])
    schedule = replace(teacher_schedule, clip_sample=None)  # the student's answers need their gradient
    levels, grid = schedule.alpha_bar(), schedule.origin_grid()
    student = Denoiser(DenoiserConfig.from_dict(config["denoiser"] | {"time_cond_proj_dim": 256}))
    student.load_state_dict(teacher.state_dict(), strict=False)
    target = copy.deepcopy(student).requires_grad_(False)
    average = copy.deepcopy(student).requires_grad_(False)
    optimiser = torch.optim.AdamW(student.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    log(f"consistency: batch {batch}, at most {steps} steps, {len(grid)}-point grid, seed {seed}")

    def answers(model: Denoiser, x: Tensor, times: Tensor, context: Tensor, told: Tensor) -> Tensor:
        clean, _ = predict(model(x, times, context, told).sample, x, levels[times], schedule)
        return consistency(x, clean, times, schedule)

    def sampler(model: Denoiser, number: int) -> Callable[..., Tensor]:
        return lambda p, seed: sample_consistency(model, encoder, tokenizer, p, schedule, number, seed=seed)

    start, running, done = time.monotonic(), 0.0, 0
    with torch.no_grad():
        empty = encode(encoder, tokenizer, [""] * batch)
    for step in range(steps):
        progress = step / steps
        if minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            break
        _set_rate(optimiser, _rate(progress, step, peak))
        pictures, prompts = world.draw(batch, rng)
        clean = torch.from_numpy(pictures)
        index = (
            ((torch.arange(batch) + torch.rand(batch)) / batch * len(grid)).long().clamp(max=len(grid) - 1)
        )
        times = grid[index]
        after = torch.where(index > 0, grid[index - 1], torch.zeros_like(times))
        w = torch.rand(batch) * widest
        with torch.no_grad():
            context = encode(encoder, tokenizer, prompts)
            told = guidance_embedding(w)
            noisy = add_noise(clean, torch.randn_like(clean), levels[times])
            # one guided teacher step down the path
            answer, blank = teacher(
                torch.cat([noisy, noisy]), times.repeat(2), torch.cat([context, empty])
            ).sample.chunk(2)
            predicted, noise = predict(guided(answer, blank, 1 + w), noisy, levels[times], teacher_schedule)
            less_noisy, _ = ddim_step(predicted, noise, levels[times], levels[after])
            held = answers(target, less_noisy, after, context, told)
        loss = consistency_loss(answers(student, noisy, times, context, told), held)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimiser.step()
        follow(target, student, target_decay)
        follow(average, student, min(averaging, (step + 1) / (step + 10)))
        done = step + 1
        running += max(0.02, 1 / done) * (loss.item() - running)
        if done % 100 == 0:
            log(f"step {done:5d}  loss {running:.4f}")
        if done % check_every == 0 and done < steps:
            found = {
                number: _headline(measure(world, sampler(average, number), 128)) for number in (1, 2, 4, 8)
            }
            log(f"step {done:5d}  right: " + "; ".join(f"{n} steps {text}" for n, text in found.items()))

    wall = time.monotonic() - start
    save_text_to_image(directory, "consistency", average, encoder, tokenizer, schedule.to_dict())
    shipped, encoder, _, _ = load_text_to_image(directory)
    figures = {}
    for number in (1, 2, 4, 8):
        figures[f"{number} steps, w 2"] = measure(world, sampler(shipped, number))
        log(f"shipped weights, {number} steps, w 2: {_headline(figures[f'{number} steps, w 2'])}")
    write_quality(
        directory, {"samples": 512, "steps": done, "seconds": round(wall), "seed": seed, "right": figures}
    )


def _headline(figures: dict[str, dict[str, float]]) -> str:
    return ", ".join(f"{name} {100 * values['all']:.1f} %" for name, values in figures.items())
