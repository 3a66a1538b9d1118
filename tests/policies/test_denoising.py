"""Diffusion and consistency policies: sampling, log-probabilities, images."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from guerdon.batch import Trajectories, concatenate, pad_steps
from guerdon.errors import ShapeError, UsageError
from guerdon.policies import lora
from guerdon.policies.consistency import ConsistencyPolicy
from guerdon.policies.denoising import DenoisingPolicy, gaussian_log_prob
from guerdon.randomness import normal, row_seeds
from tiny import image_policy as build

PROMPTS = ["red circle", "blue square", "green ring", "red square", "blue ring"]
SEEDS = row_seeds(3, 0, len(PROMPTS))


@pytest.fixture(params=["consistency", "diffusion"])
def policy(request: pytest.FixtureRequest) -> DenoisingPolicy:
    return build(request.param)


def sample(policy: DenoisingPolicy, rows: slice = slice(None), **options: object) -> Trajectories:
    options = {"steps": 4} | options
    return policy.sample(PROMPTS[rows], SEEDS[rows], torch.arange(5)[rows], **options)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


# --- the layout -------------------------------------------------------------------------------------------


def test_layout(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    transitions = 3 if policy.kind == "consistency" else 4
    assert traj.steps == transitions
    assert traj.mask.all()
    assert traj.images.shape == (5, 8, 8, 3)
    assert traj.images.dtype == torch.uint8
    assert traj.prompts == PROMPTS
    assert traj.group.tolist() == [0, 1, 2, 3, 4]
    step = traj.inputs["step"]
    assert step["state"].shape == step["next"].shape == (5, transitions, 3, 8, 8)
    assert step["time_index"].tolist() == [list(range(transitions))] * 5
    for name in ("timestep", "next_timestep", "time_index"):
        assert step[name].dtype == torch.int64
    assert (step["next_timestep"] < step["timestep"]).all()
    assert traj.inputs["condition"].shape == (5, 4, 8)
    assert traj.inputs["guidance"].tolist() == [3.0] * 5


def test_states_are_stored_before_the_noise_and_next_states_after(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    step = traj.inputs["step"]
    noise = normal(SEEDS, (5, 3, 8, 8))
    close(step["state"][:, 0], noise[:, 0], 0)
    close(step["state"][:, 1:], step["next"][:, :-1], 0)
    with torch.no_grad():
        distribution = policy.distribution(traj)
    for j in range(traj.steps):
        drawn = (step["next"][:, j] - distribution["mean"][:, j]) / distribution["std"][:, j]
        close(drawn, noise[:, j + 1], 2e-3)


def test_consistency_times_are_the_published_grid() -> None:
    step = sample(build("consistency"), steps=8).inputs["step"]
    assert step["timestep"][0].tolist() == [999, 879, 759, 639, 519, 399, 279]
    assert step["next_timestep"][0].tolist() == [879, 759, 639, 519, 399, 279, 159]


def test_reward_sees_the_last_clean_estimate_not_the_last_noisy_sample() -> None:
    policy = build("consistency")
    plain, ghost = sample(policy), sample(policy, ghost=True)
    assert torch.equal(plain.images, ghost.images)
    assert not torch.equal(policy.decode(ghost.inputs["step"]["next"][:, -1]), ghost.images)
    with torch.no_grad():
        mean = policy.distribution(ghost)["mean"][:, -1]
    level = policy.levels(ghost.inputs["step"]["timestep"][0, -1])
    assert (policy.decode(mean / level.sqrt()).int() - plain.images.int()).abs().max() <= 1


def test_ghost_transition_leads_back_to_its_own_time() -> None:
    traj = sample(build("consistency"), ghost=True)
    assert traj.steps == 4
    assert traj.mask.all()
    last = traj.inputs["step"][:, -1]
    assert torch.equal(last["timestep"], last["next_timestep"])
    close(traj.log_prob[:, :3], sample(build("consistency")).log_prob)


def test_one_step_sampling_is_well_formed() -> None:
    policy = build("consistency")
    traj = sample(policy, steps=1)
    assert traj.steps == 1
    assert not traj.mask.any()
    assert traj.images.shape == (5, 8, 8, 3)
    assert policy.log_prob(traj).tolist() == [[0.0]] * 5
    judged = traj.judged(torch.ones(5))
    assert judged.reward.shape == (5, 1)
    assert sample(policy, steps=1, ghost=True).mask.all()


def test_deterministic_steps_are_masked() -> None:
    policy = build("diffusion")
    traj = sample(policy, eta=0.0)
    assert not traj.mask.any()
    assert policy.log_prob(traj).abs().sum() == 0
    assert torch.isfinite(policy.distribution(traj)["std"]).all()
    assert sample(policy, eta=0.5).mask.all()  # alpha_bar at step 0 is below 1: the last step has noise too


# --- log-probabilities ------------------------------------------------------------------------------------


def test_ratio_is_one_before_an_update(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    ratio = (policy.log_prob(traj) - traj.log_prob).exp()
    close(ratio, torch.ones_like(ratio))


def test_ratio_is_one_with_an_adapter(policy: DenoisingPolicy) -> None:
    lora.add(policy.core, lora.LoRA(rank=2))
    for parameter in lora.parameters(policy.core):
        nn.init.normal_(parameter, std=0.3)
    traj = sample(policy)
    ratio = (policy.log_prob(traj) - traj.log_prob).exp()
    close(ratio, torch.ones_like(ratio))
    with lora.disabled(policy.core):
        assert (policy.log_prob(traj) - traj.log_prob).abs().max() > 1e-3


def test_log_prob_is_the_gaussian_density_averaged_over_pixels(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    distribution = policy.distribution(traj)
    normal_ = torch.distributions.Normal(distribution["mean"], distribution["std"])
    density = normal_.log_prob(traj.inputs["step"]["next"])
    close(policy.log_prob(traj), density.mean((2, 3, 4)))
    close(policy.log_prob(traj, distribution), density.mean((2, 3, 4)))
    policy.event_reduction = "sum"
    close(policy.log_prob(traj), density.sum((2, 3, 4)), 1e-4)


def test_ratio_is_one_with_an_adapter_under_autocast(policy: DenoisingPolicy) -> None:
    lora.add(policy.core, lora.LoRA(rank=2))
    for parameter in lora.parameters(policy.core):
        nn.init.normal_(parameter, std=0.3)
    with torch.autocast("cpu", torch.bfloat16):
        traj = sample(policy)
        ratio = (policy.log_prob(traj) - traj.log_prob).exp()
    close(ratio, torch.ones_like(ratio))


@pytest.mark.parametrize("kind", ["consistency", "diffusion"])
def test_the_reduction_is_the_same_at_sampling_and_training(kind: str) -> None:
    policy = build(kind, event_reduction="sum")
    traj = sample(policy)
    torch.testing.assert_close(policy.log_prob(traj), traj.log_prob, atol=1e-3, rtol=1e-5)
    close(traj.log_prob / (3 * 8 * 8), sample(build(kind)).log_prob, 1e-4)


def test_published_consistency_formulas() -> None:
    """Mean, standard deviation and log-probability written out as in the paper, for one step."""
    policy = build("consistency", clip=None)
    traj = sample(policy, guidance=8.0)
    j, state, action = 1, traj.inputs["step"]["state"][:, 1], traj.inputs["step"]["next"][:, 1]
    t, there = int(traj.inputs["step"]["timestep"][0, j]), int(traj.inputs["step"]["next_timestep"][0, j])
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    ab = torch.cumprod(1 - betas, 0)
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 127)
    angles = 1000 * (8.0 - 1.0) * frequencies
    w = torch.cat([angles.sin(), angles.cos()])[None].expand(5, -1)
    with torch.no_grad():
        eps = policy.denoiser(state, t, policy.encode(PROMPTS), timestep_cond=w).sample.double()
    clean = (state - (1 - ab[t]).sqrt() * eps) / ab[t].sqrt()
    s = 10.0 * t
    f = 0.25 / (s**2 + 0.25) * state + s / math.sqrt(s**2 + 0.25) * clean
    mean, variance = ab[there].sqrt() * f, 1 - ab[there]
    expected = -((action - mean) ** 2) / (2 * variance) - 0.5 * variance.log() - 0.5 * math.log(2 * math.pi)
    close(traj.log_prob[:, j].double(), expected.mean((1, 2, 3)), 1e-4)


def test_log_prob_does_not_depend_on_micro_batches_or_padding(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    whole = policy.log_prob(traj)
    parts = torch.cat([policy.log_prob(part) for part in traj.minibatches(2)])
    close(whole, parts)
    padded = pad_steps(traj, traj.steps + 2)
    assert torch.isfinite(policy.distribution(padded)["mean"]).all()
    with_padding = policy.log_prob(padded)
    close(with_padding[:, : traj.steps], whole)
    assert with_padding[:, traj.steps :].abs().sum() == 0
    split = torch.cat([policy.log_prob(traj.select_steps(j, j + 1)) for j in range(traj.steps)], dim=1)
    close(whole, split)


def test_padded_rows_get_the_same_gradient(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    gradients = []
    for batch in (traj, pad_steps(traj, traj.steps + 1)):
        policy.zero_grad()
        policy.log_prob(batch).sum().backward()
        gradients.append(policy.denoiser.conv_in.weight.grad.clone())
    close(gradients[0], gradients[1], 1e-4)
    assert gradients[0].abs().max() > 0


def test_shuffled_time_gives_the_permuted_log_probs(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    shuffled = traj.shuffle_steps(torch.Generator().manual_seed(1))
    order = shuffled.inputs["step"]["time_index"]
    assert (order != order[:1]).any()  # independent for each trajectory
    close(policy.log_prob(shuffled), shuffled.log_prob)
    close(policy.log_prob(shuffled), policy.log_prob(traj).gather(1, order))


def test_log_ratio_is_exact(policy: DenoisingPolicy) -> None:
    other = copy.deepcopy(policy)
    with torch.no_grad():
        other.denoiser.conv_out.weight.mul_(1.05)
    for reduction in ("mean", "sum"):
        policy.event_reduction = other.event_reduction = reduction
        traj = sample(policy)
        mine, theirs = policy.distribution(traj), other.distribution(traj)
        assert policy.log_ratio(traj, mine, mine).abs().max() == 0
        expected = policy.log_prob(traj, mine) - other.log_prob(traj, theirs)
        torch.testing.assert_close(policy.log_ratio(traj, mine, theirs), expected, atol=2e-4, rtol=1e-3)


def test_log_probs_stay_float32_under_autocast(policy: DenoisingPolicy) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        traj = sample(policy)
        again = policy.log_prob(traj)
    assert traj.log_prob.dtype == again.dtype == torch.float32
    assert traj.inputs["condition"].dtype == torch.float32
    assert policy.distribution(traj)["mean"].dtype == torch.float32
    close(again, traj.log_prob)


def test_half_precision_weights_keep_float32_latents(policy: DenoisingPolicy) -> None:
    policy = policy.to(torch.bfloat16)
    traj = sample(policy)
    assert traj.inputs["step"]["state"].dtype == traj.log_prob.dtype == torch.float32
    assert (policy.log_prob(traj) - traj.log_prob).abs().max() < 1e-2
    assert policy.levels(torch.tensor(0)).dtype == torch.float32


def test_many_rows_go_through_the_cpu_in_pieces(
    policy: DenoisingPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    traj = sample(policy)
    whole, gradients = policy.log_prob(traj), []
    for rows in (32, 3):
        monkeypatch.setattr("guerdon.policies.denoising._CPU_ROWS", rows)
        policy.zero_grad()
        found = policy.log_prob(traj)
        found.sum().backward()
        close(found, whole)
        gradients.append(policy.denoiser.conv_in.weight.grad.clone())
    close(gradients[0], gradients[1], 1e-4)
    close(sample(policy).log_prob, traj.log_prob)


# --- what sampling depends on -----------------------------------------------------------------------------


def test_sampling_depends_on_seeds_alone(policy: DenoisingPolicy) -> None:
    whole = sample(policy)
    torch.manual_seed(99)  # the global state plays no part
    alone = concatenate([sample(policy, slice(i, i + 1)) for i in range(5)])
    close(whole.inputs["step"]["next"], alone.inputs["step"]["next"], 1e-4)
    close(whole.log_prob, alone.log_prob)
    assert (whole.images.int() - alone.images.int()).abs().max() <= 1
    again = sample(policy)
    assert torch.equal(whole.inputs["step"]["next"], again.inputs["step"]["next"])
    other = policy.sample(PROMPTS, SEEDS + 1, steps=4)
    assert not torch.equal(whole.images, other.images)


def test_initial_seeds_share_the_first_latent_only(policy: DenoisingPolicy) -> None:
    traj = sample(policy, initial_seeds=SEEDS[:1].expand(5))
    plain = sample(policy)
    state = traj.inputs["step"]["state"]
    assert torch.equal(state[:, 0], plain.inputs["step"]["state"][:1, 0].expand(5, 3, 8, 8))
    assert torch.equal(state[0], plain.inputs["step"]["state"][0])
    assert not torch.equal(state[0, 1], state[1, 1])


def test_sampling_leaves_no_graph_and_trains_afterwards(policy: DenoisingPolicy) -> None:
    traj = sample(policy)
    assert not traj.log_prob.requires_grad
    policy.log_prob(traj).sum().backward()
    assert policy.denoiser.conv_in.weight.grad is not None
    assert policy.text_encoder.words.weight.grad is None


def test_guidance_is_part_of_the_policy(policy: DenoisingPolicy) -> None:
    weak, strong = sample(policy, guidance=1.0), sample(policy, guidance=8.0)
    assert not torch.equal(weak.inputs["step"]["next"], strong.inputs["step"]["next"])
    close(policy.log_prob(strong), strong.log_prob)
    close(policy.log_prob(weak), weak.log_prob)
    mixed = concatenate([weak[:2], strong[2:]])
    close(policy.log_prob(mixed), mixed.log_prob)
    mixed.inputs["guidance"] = torch.full((5,), 4.0)
    assert (policy.log_prob(mixed) - mixed.log_prob).abs().max() > 1e-5


def test_classifier_free_guidance_mixes_two_passes() -> None:
    policy = build("diffusion", clip=None)
    traj = sample(policy, guidance=5.0, eta=1.0)
    state, t = traj.inputs["step"]["state"][:, 2], traj.inputs["step"]["timestep"][:, 2]
    with torch.no_grad():
        empty = policy.encode([""]).expand(5, -1, -1)
        eps = [policy.denoiser(state, t, c).sample for c in (empty, policy.encode(PROMPTS))]
        mean = policy.distribution(traj)["mean"][:, 2]
    guided = eps[0] + 5.0 * (eps[1] - eps[0])
    ab, there = policy.levels(t[0]), policy.levels(traj.inputs["step"]["next_timestep"][0, 2])
    variance = (1 - there) / (1 - ab) * (1 - ab / there)
    clean = (state - (1 - ab).sqrt() * guided) / ab.sqrt()
    close(mean, there.sqrt() * clean + (1 - there - variance).sqrt() * guided, 1e-4)


def test_dropout_is_off_and_text_encoder_frozen(policy: DenoisingPolicy) -> None:
    policy.train()
    assert not any(module.training for module in policy.modules())
    assert not any(p.requires_grad for p in policy.text_encoder.parameters())
    assert policy.core is policy.denoiser


def test_a_denoiser_without_guidance_input_takes_no_guidance() -> None:
    donor = build("diffusion")
    policy = ConsistencyPolicy(donor.denoiser, donor.text_encoder, donor.tokenizer, donor.schedule)
    traj = sample(policy)
    assert traj.inputs["guidance"].tolist() == [1.0] * 5
    with pytest.raises(UsageError, match="no guidance input"):
        sample(policy, guidance=3.0)


def test_wrong_arguments_are_refused_in_one_sentence(policy: DenoisingPolicy) -> None:
    with pytest.raises(UsageError, match="steps, not 0"):
        sample(policy, steps=0)
    with pytest.raises(UsageError, match="takes 1 to"):
        sample(policy, steps=2000)
    with pytest.raises(ShapeError, match="5 prompts but 4 seeds"):
        policy.sample(PROMPTS, SEEDS[:4])


# --- conditions and images --------------------------------------------------------------------------------


def test_conditions_are_remembered_and_bounded(
    policy: DenoisingPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    encoder = policy.text_encoder
    forward = encoder.forward
    monkeypatch.setattr(encoder, "forward", lambda ids: calls.append(len(ids)) or forward(ids))
    first = policy.encode(["red ring", "blue ring", "red ring", ""])
    assert calls == [3]
    assert torch.equal(policy.encode(["red ring", "blue ring", "red ring", ""]), first)
    assert calls == [3]
    assert not first.requires_grad
    monkeypatch.setattr("guerdon.policies.denoising._CACHE_BYTES", 2 * first[0].nbytes)
    policy.encode(["green ring"])
    assert list(policy._conditions) == ["", "green ring"]
    assert len(copy.deepcopy(policy)._conditions) == 0


def test_decoding_is_diffusers(policy: DenoisingPolicy) -> None:
    from diffusers.image_processor import VaeImageProcessor

    latents = torch.randn(4, 3, 8, 8)
    images = VaeImageProcessor().postprocess(latents, output_type="pil")
    assert np.array_equal(np.stack([np.asarray(i) for i in images]), policy.decode(latents).numpy())


def test_gaussian_log_prob_against_a_loop() -> None:
    torch.manual_seed(1)
    action, mean = torch.randn(2, 3, 2, 2, 2), torch.randn(2, 3, 2, 2, 2)
    std = torch.rand(2, 3) + 0.1
    for b in range(2):
        for t in range(3):
            terms = [
                -((a - m) ** 2) / (2 * std[b, t] ** 2) - std[b, t].log() - 0.5 * math.log(2 * math.pi)
                for a, m in zip(action[b, t].flatten(), mean[b, t].flatten(), strict=True)
            ]
            found = gaussian_log_prob(action, mean, std, "sum")[b, t]
            close(found, torch.stack(terms).sum(), 1e-4)
            close(gaussian_log_prob(action, mean, std[..., None, None, None], "mean")[b, t], found / 8, 1e-5)


# --- against diffusers' schedulers ------------------------------------------------------------------------


def test_consistency_step_is_lcm_schedulers() -> None:
    from diffusers import LCMScheduler

    for clip in (None, 1.0):
        policy = build("consistency", clip=clip)
        traj = sample(policy, ghost=True)
        scheduler = LCMScheduler(clip_sample=clip is not None)
        times = policy.schedule.consistency_grid(4)
        scheduler.set_timesteps(timesteps=times.tolist())
        condition, options = policy._prepare(policy.encode(PROMPTS), torch.full((5,), 3.0))
        with torch.no_grad():
            means = policy.distribution(traj)["mean"]
        for j, t in enumerate(times.tolist()):
            state = traj.inputs["step"]["state"][:, j]
            with torch.no_grad():
                output = policy.denoiser(state, t, condition, **options).sample
            _, denoised = scheduler.step(output, t, state, return_dict=False)
            level = policy.levels(traj.inputs["step"]["next_timestep"][0, j])
            close(means[:, j] / level.sqrt(), denoised, 2e-4)


@pytest.mark.parametrize("eta", [1.0, 0.3, 0.0])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_diffusion_step_is_ddim_schedulers(eta: float, clip: float | None) -> None:
    from diffusers import DDIMScheduler

    policy = build("diffusion", clip=clip)
    traj = sample(policy, steps=7, eta=eta, guidance=1.0)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=clip is not None,
    )
    scheduler.set_timesteps(7)
    assert scheduler.timesteps.tolist() == traj.inputs["step"]["timestep"][0].tolist()
    noise = normal(SEEDS, (8, 3, 8, 8))
    state = noise[:, 0]
    for j, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = policy.denoiser(state, t, policy.encode(PROMPTS)).sample
        # a clamped clean sample brings its noise along, which diffusers does on request
        options = {"use_clipped_model_output": True, "variance_noise": noise[:, j + 1]}
        state = scheduler.step(output, t, state, eta=eta, **options).prev_sample
        close(traj.inputs["step"]["next"][:, j], state, 1e-3)
    assert (policy.decode(state).int() - traj.images.int()).abs().max() <= 1
