"""Handwritten digits: prompts, pictures, their reader, and the shipped models."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest
import torch

from guerdon.errors import UsageError
from guerdon.policies.denoiser import load_text_to_image
from guerdon.policies.schedule import NoiseSchedule
from guerdon.tasks.digits import oracles, world
from guerdon.tasks.digits.train import FIXTURES, tokenizer
from guerdon.tasks.fixtures import in_batches, sample_consistency, sample_diffusion
from guerdon.tasks.shapes.clip import TinyCLIP


def test_prompts() -> None:
    assert world.all_prompts()[7] == "a handwritten seven"
    assert [world.parse(text) for text in world.all_prompts()] == list(range(10))
    assert world.parse("Please, a 3!") == 3
    assert world.parse("a handwritten digit") is None
    ids = tokenizer()(world.all_prompts(), return_tensors="pt").input_ids
    assert ids.shape == (10, 8)
    assert not (ids == 1).any()


def test_enlarging_is_bilinear() -> None:
    small = np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    peer = torch.nn.functional.interpolate(torch.from_numpy(small)[None], scale_factor=2, mode="bilinear")[0]
    assert np.allclose(world.enlarge(small), peer.numpy(), atol=1e-6)


def test_drawn_pictures_follow_prompt_and_seed() -> None:
    pytest.importorskip("sklearn")
    prompts = world.all_prompts() * 10
    first, again, other = (world.draw(prompts, rng=seed) for seed in (1, 1, 2))
    assert first.shape == (100, 3, 16, 16)
    assert first.dtype == np.float32
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert oracles.accuracy(first, prompts)["all"] > 0.95
    assert len(world.load("test")[0]) == 360
    assert len(world.load("train")[0]) == 1437
    with pytest.raises(ValueError, match="split"):
        world.load("validation")


def test_the_shipped_reader_reads_pictures_it_never_saw() -> None:
    pytest.importorskip("sklearn")
    pictures, digits = world.load("test")
    assert (oracles.read(pictures) == digits).mean() > 0.97
    shown = ((pictures + 1) * 127.5).round().astype(np.uint8).transpose(0, 2, 3, 1)
    assert (oracles.read(shown) == digits).mean() > 0.97
    assert np.allclose(oracles.probabilities(pictures[:3]).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_the_shipped_consistency_model_writes_what_it_is_told(steps: int) -> None:
    denoiser, encoder, words, config = load_text_to_image(FIXTURES / "consistency")
    schedule, prompts = NoiseSchedule(**config["schedule"]), world.all_prompts() * 10
    pictures = sample_consistency(denoiser, encoder, words, prompts, schedule, steps=steps)
    assert oracles.accuracy(pictures, prompts)["all"] >= 0.93


def test_the_shipped_diffusion_model_writes_what_it_is_told() -> None:
    denoiser, encoder, words, config = load_text_to_image(FIXTURES / "diffusion")
    schedule, prompts = NoiseSchedule(**config["schedule"]), world.all_prompts() * 6
    sample = lambda p, seed: sample_diffusion(denoiser, encoder, words, p, schedule, seed=seed)
    assert oracles.accuracy(in_batches(sample, prompts, seed=0), prompts)["all"] >= 0.95


def test_the_shipped_clip_knows_the_prompts() -> None:
    pytest.importorskip("sklearn")
    clip = TinyCLIP.load(FIXTURES / "clip")
    pictures, digits = world.load("test")
    nearest = (clip.encode_image(pictures) @ clip.encode_text(world.all_prompts()).T).argmax(dim=1)
    assert (nearest.numpy() == digits).mean() > 0.95


def test_without_scikit_learn_models_work_and_drawing_says_what_is_missing(monkeypatch) -> None:
    imported = builtins.__import__

    def without(name, *rest):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    for name in [name for name in sys.modules if name.startswith("sklearn")]:
        monkeypatch.delitem(sys.modules, name)
    world._data.cache_clear()
    with pytest.raises(UsageError, match="scikit-learn"):
        world.draw(["a handwritten one"])
    assert oracles.read(np.zeros((2, 3, 16, 16), np.float32)).shape == (2,)
