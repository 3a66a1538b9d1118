"""ShapesWorld: captions, pictures, judges, and the shipped models."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from guerdon.policies.denoiser import load_text_to_image
from guerdon.policies.schedule import NoiseSchedule
from guerdon.tasks.fixtures import in_batches, sample_consistency, sample_diffusion
from guerdon.tasks.shapes import oracles, world
from guerdon.tasks.shapes.clip import TinyCLIP
from guerdon.tasks.shapes.train import FIXTURES, tokenizer

VIOLET_PLUS = {"colour": "purple", "shape": "cross"}


def as_bytes(pictures: np.ndarray) -> np.ndarray:
    return ((pictures + 1) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def test_captions_are_900_and_say_what_they_mean() -> None:
    captions = world.all_captions()
    assert len(set(captions)) == 900
    assert "a large red circle at the top on a white background" in captions
    for text in captions[::37]:
        assert world.caption(**world.parse(text)) == text


def test_held_out_pairs_are_never_in_training() -> None:
    training, held_out = world.training_captions(), world.held_out_captions()
    assert len(held_out) == 180
    assert sorted(training + held_out) == sorted(world.all_captions())
    pairs = {(p["colour"], p["shape"]) for p in map(world.parse, training)}
    assert not pairs & set(world.HELD_OUT)
    assert {colour for colour, _ in pairs} == set(world.COLOURS)
    assert {shape for _, shape in pairs} == set(world.SHAPES)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a large red circle ...", {"size": "large", "colour": "red", "shape": "circle"}),
        ("Big GRAY background, violet plus", {"size": "large", "background": "grey"} | VIOLET_PLUS),
        ("ring in the center", {"shape": "ring", "position": "centre"}),
        ("a ring moving left", {"shape": "ring", "direction": "left"}),
        ("a ring on the right moving up", {"shape": "ring", "position": "right", "direction": "up"}),
        ("nothing at all", {}),
    ],
)
def test_parsing_is_tolerant(text: str, said: dict[str, str]) -> None:
    assert world.parse(text) == said


def test_tokenizer_knows_every_word() -> None:
    texts = world.all_captions() + [world.caption(shape="ring", direction=d) for d in world.DIRECTIONS]
    ids = tokenizer()(texts, return_tensors="pt").input_ids
    assert not (ids == 1).any()
    assert len({tuple(row) for row in ids.tolist()}) == len(texts)


def test_the_oracle_reads_every_jittered_picture() -> None:
    captions = world.all_captions()
    for seed in range(3):
        pictures = world.render(captions, rng=seed)
        assert oracles.accuracy(pictures, captions)["all"] == 1.0
    assert oracles.correct(as_bytes(pictures), captions).all()
    assert oracles.describe(pictures) == captions


def test_the_oracle_reads_larger_pictures() -> None:
    captions = world.all_captions()[::3]
    assert oracles.accuracy(world.render(captions, size=24, rng=0), captions)["all"] > 0.99


def test_the_oracle_sees_noise_and_wrong_captions() -> None:
    captions = world.all_captions()
    pictures = world.render(captions, rng=0)
    noisy = pictures + 0.2 * np.random.default_rng(0).normal(size=pictures.shape).astype(np.float32)
    assert oracles.accuracy(noisy, captions)["all"] > 0.97
    assert oracles.template_distance(pictures).mean() < 0.1 < oracles.template_distance(noisy).mean()
    wrong = [text.replace("red", "blue") for text in captions]
    found = oracles.accuracy(pictures, wrong)
    assert found["colour"] == pytest.approx(5 / 6)
    assert found["all"] == pytest.approx(5 / 6)
    assert found["shape"] == 1.0
    assert oracles.correct(pictures[:2], ["a shape", "a ring"]).tolist() == [True, False]  # only what is said
    with pytest.raises(ValueError, match="900 pictures"):
        oracles.correct(pictures, captions[:3])
    with pytest.raises(ValueError, match=r"\[B, H, W, 3\]"):
        oracles.read(np.zeros((2, 3, 16, 16), dtype=np.uint8))


def test_rendering_is_decided_by_its_seed() -> None:
    captions = [*world.all_captions()[::50], "a ring", "something red"]
    first, again, other = (world.render(captions, rng=seed, style="degraded") for seed in (3, 3, 4))
    assert first.dtype == np.float32
    assert first.shape == (len(captions), 3, 16, 16)
    assert np.abs(first).max() <= 1
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    still = [world.render(captions[:18], rng=seed, jitter=False) for seed in (0, 1)]
    assert np.array_equal(*still)
    with pytest.raises(ValueError, match="style"):
        world.render(captions, style="dirty")


def test_degraded_pictures_are_paler_and_noisier() -> None:
    captions = world.all_captions()
    clean, degraded = (world.render(captions, rng=0, style=style) for style in ("clean", "degraded"))
    assert oracles.template_distance(degraded).mean() > 2 * oracles.template_distance(clean).mean()
    inside = clean.max(axis=1) - clean.min(axis=1) > 1.0  # where there is colour
    spread = lambda p: (p.max(axis=1) - p.min(axis=1))[inside].mean()
    assert spread(degraded) < 0.7 * spread(clean)
    blurred = np.repeat(np.repeat(clean[:, :, ::2, ::2], 2, 2), 2, 3)
    assert oracles.sharpness(clean).shape == (900,)
    assert oracles.sharpness(np.zeros_like(blurred)).max() == 0
    assert oracles.saturation(clean.mean(axis=1, keepdims=True).repeat(3, axis=1)).max() < 1e-6


@pytest.mark.parametrize("style", ["clean", "degraded"])
def test_videos_move_as_captioned(style: str) -> None:
    parsed = [world.parse(text) for text in world.all_captions()[::4]]
    captions = [world.caption(**p, direction=world.DIRECTIONS[i % 4]) for i, p in enumerate(parsed)]
    video = world.render_video(captions, frames=8, rng=0, style=style)
    assert video.shape == (225, 8, 3, 16, 16)
    found = oracles.direction_of_motion(video)
    right = np.mean([way == world.DIRECTIONS[i % 4] for i, way in enumerate(found)])
    assert right >= (1.0 if style == "clean" else 0.98)
    frozen = video[:, :1].repeat(8, axis=1)
    assert set(oracles.direction_of_motion(frozen)) == {"still"}
    opposite = dict(zip(world.DIRECTIONS, ("right", "left", "down", "up"), strict=True))
    assert oracles.direction_of_motion(video[:, ::-1].copy()) == [opposite.get(way, way) for way in found]


def sampler(kind: str, **options):
    denoiser, encoder, words, config = load_text_to_image(FIXTURES / kind)
    assert config["kind"] == kind
    sample = {"diffusion": sample_diffusion, "consistency": sample_consistency}[kind]
    schedule = NoiseSchedule(**config["schedule"])
    return lambda prompts, seed: sample(denoiser, encoder, words, prompts, schedule, seed=seed, **options)


def some(captions: list[str], count: int) -> list[str]:
    return [captions[at] for at in np.random.default_rng(0).permutation(len(captions))[:count]]


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_shipped_consistency_model_draws_what_it_is_told(steps: int) -> None:
    captions = some(world.training_captions(), 128)
    pictures = in_batches(sampler("consistency", steps=steps), captions, seed=0)
    assert oracles.accuracy(pictures, captions)["all"] >= 0.93


def test_the_shipped_diffusion_model_draws_what_it_is_told() -> None:
    captions = some(world.training_captions(), 96)
    pictures = in_batches(sampler("diffusion", steps=20, guidance=3.0), captions, seed=0)
    assert oracles.accuracy(pictures, captions)["all"] >= 0.95


def test_shipped_models_understand_half_a_sentence() -> None:
    prompts = ["a large red circle", "a blue ring", "a yellow shape on a black background"] * 12
    pictures = in_batches(sampler("consistency", steps=4), prompts, seed=0)
    assert oracles.correct(pictures, prompts).mean() >= 0.8


def test_the_shipped_clip_ranks_the_right_caption_first() -> None:
    clip = TinyCLIP.load()
    captions = world.all_captions()
    pictures = world.render(captions, rng=5)
    scores = clip.encode_image(pictures) @ clip.encode_text(captions).T
    assert (scores.argmax(dim=1) == torch.arange(900)).float().mean() > 0.97
    own = clip.similarity(as_bytes(pictures), captions)
    assert torch.allclose(own, scores.diagonal(), atol=0.02)
    assert own.mean() > clip.similarity(pictures, captions[::-1]).mean() + 0.3
    leaf = torch.from_numpy(pictures[:2]).requires_grad_(True)
    clip.similarity(leaf, captions[:2]).sum().backward()
    assert leaf.grad.abs().max() > 0


def test_shipped_quality_is_on_record() -> None:
    for kind in ("diffusion", "consistency", "clip"):
        assert json.loads((FIXTURES / kind / "quality.json").read_text())
        assert (FIXTURES / kind / "train.log").stat().st_size < 10_000
        assert (FIXTURES / kind / "model.safetensors").stat().st_size < 2_000_000


def test_drawing_needs_no_torch() -> None:
    draw = "from guerdon.tasks.shapes import world; world.render(['a red ring'])"
    code = f"import sys; {draw}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)
