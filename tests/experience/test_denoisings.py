"""Experience of image generators: groups, shared noise, files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from guerdon.errors import DataError
from guerdon.experience import denoisings
from guerdon.experience.denoisings import Denoisings
from guerdon.policies.consistency import ConsistencyPolicy
from guerdon.policies.denoiser import Denoiser, DenoiserConfig, TextEncoder, TextEncoderConfig, WordTokenizer
from guerdon.policies.denoising import DenoisingPolicy
from guerdon.policies.diffusion import DiffusionPolicy
from guerdon.randomness import row_seeds
from guerdon.roles import Role, RoleSettings

TEXTS = ["red circle", "blue ring", "red ring"]


@pytest.fixture(params=["consistency", "diffusion"])
def policy(request: pytest.FixtureRequest) -> DenoisingPolicy:
    torch.manual_seed(0)
    config = DenoiserConfig(
        sample_size=8,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        norm_num_groups=4,
        time_cond_proj_dim=256 if request.param == "consistency" else None,
    )
    denoiser = Denoiser(config)
    nn.init.normal_(denoiser.conv_out.weight, std=0.1)
    tokenizer = WordTokenizer.from_words(["red", "blue", "circle", "ring"], model_max_length=4)
    encoder = TextEncoder(TextEncoderConfig(len(tokenizer), max_length=4, hidden_size=8))
    return {"consistency": ConsistencyPolicy, "diffusion": DiffusionPolicy}[request.param](
        denoiser, encoder, tokenizer
    )


def test_collects_what_the_policy_would_sample(policy: DenoisingPolicy) -> None:
    experience = Denoisings(TEXTS, seed=5)
    traj = experience.collect(policy, 6, steps=3)
    expected = policy.sample(traj.prompts, row_seeds(5, 0, 6), traj.group, steps=3)
    assert torch.equal(traj.images, expected.images)
    assert torch.equal(traj.log_prob, expected.log_prob)


def test_shared_noise_shares_the_initial_latent_inside_groups_only(policy: DenoisingPolicy) -> None:
    traj = Denoisings(TEXTS, group_size=3, shared_noise=True, seed=5).collect(policy, 6, steps=3)
    states = traj.inputs["step"]["state"].unflatten(0, (2, 3))
    assert torch.equal(states[:, :1, 0].expand_as(states[:, :, 0]), states[:, :, 0])
    assert not torch.equal(states[0, 0, 0], states[1, 0, 0])
    for a, b in ((0, 1), (1, 2), (0, 2)):  # separate noise of the steps
        assert not torch.equal(states[:, a, 1], states[:, b, 1])
    plain = Denoisings(TEXTS, group_size=3, seed=5).collect(policy, 6, steps=3)
    first = plain.inputs["step"]["state"][::3]
    assert torch.equal(first, states[:, 0])


def test_shared_noise_survives_the_micro_batches_of_a_role(policy: DenoisingPolicy) -> None:
    role = Role("actor", policy, RoleSettings(sample_batch=2))
    whole = Denoisings(TEXTS, group_size=3, shared_noise=True).collect(policy, 6, steps=3)
    parts = Denoisings(TEXTS, group_size=3, shared_noise=True).collect(role, 6, steps=3)
    torch.testing.assert_close(
        parts.inputs["step"]["next"], whole.inputs["step"]["next"], atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("rows", [1, 6])
def test_stored_trajectories_reload_to_the_same_log_probs(
    policy: DenoisingPolicy, tmp_path: Path, rows: int
) -> None:
    traj = Denoisings(TEXTS).collect(policy, rows, steps=3)
    denoisings.save(traj, tmp_path / "round")
    again = denoisings.load(tmp_path / "round")
    assert torch.equal(again.log_prob, traj.log_prob)
    torch.testing.assert_close(policy.log_prob(again), policy.log_prob(traj), atol=1e-6, rtol=1e-6)
    assert again.prompts == traj.prompts
    index = [json.loads(line) for line in (tmp_path / "round" / "images.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in index] == traj.prompts
    assert [row["group"] for row in index] == traj.group.tolist()
    pixels = np.asarray(Image.open(tmp_path / "round" / index[-1]["image"]))
    assert np.array_equal(pixels, traj.images[-1].numpy())


def test_nothing_saved_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder of saved trajectories"):
        denoisings.load(tmp_path)
