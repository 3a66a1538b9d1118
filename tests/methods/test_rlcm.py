"""RLCM (Oertell et al., 2024): what a faithful implementation has, one test an item."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from guerdon.batch import Preferences, Trajectories
from guerdon.experience.denoisings import Denoisings
from guerdon.feedback.functions import FunctionReward, compressibility, redness
from guerdon.methods.online.rlcm import RLCM
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.objectives.reward_difference import RewardDifference
from guerdon.optim import SGD
from guerdon.policies.schedule import guidance_embedding
from guerdon.randomness import normal, row_seeds
from guerdon.roles import Role, RoleSettings
from tiny import WORDS, Watched, image_policy, train


def run(
    folder: Path, policy: Any = None, feedback: Any = None, prompts: list[str] | None = None, **options: Any
) -> Watched:
    """RLCM on a tiny consistency model; the actor with what it learned from in ``calls``."""
    changes = {name: options.pop(name) for name in ("micro_batch", "micro_steps") if name in options}
    settings: dict[str, Any] = {
        "rounds": 1,
        "samples": 8,
        "steps": 4,
        "guidance": 3.0,
        "update_batch": 8,
        "lr": 1e-3,
    }
    method = RLCM(**(settings | options))
    experience = Denoisings(prompts or WORDS, seed=3)
    return train(
        method, policy or image_policy(), experience, feedback or FunctionReward(redness), folder, **changes
    )


def by_hand(policy: Any, state: Tensor, timestep: Tensor, condition: Tensor, guidance: float) -> Tensor:
    """The consistency function ``f(x, t, c, w)`` in the paper's words, for one time of all rows."""
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[timestep]
    embedded = guidance_embedding(torch.full((len(state),), guidance - 1), 256)
    noise = policy.denoiser(
        state,
        timestep.expand(len(state)),
        encoder_hidden_states=condition,
        timestep_cond=embedded,
        return_dict=False,
    )[0]
    clean = ((state - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()).clamp(-1, 1)
    scaled = 10.0 * timestep
    return 0.25 / (scaled**2 + 0.25) * state + scaled / (scaled**2 + 0.25).sqrt() * clean


# --- the policy -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 4])
def test_log_prob_is_averaged_over_pixels_and_the_ratio_is_1_before_the_first_update(
    rank: int, tmp_path: Path
) -> None:
    policy = image_policy()
    actor = run(tmp_path, policy, lora_rank=rank, rounds=3, lr=0.0 if rank == 0 else 1e-2)
    batch = actor.calls[0][0]
    step = batch.inputs["step"]
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    fresh = image_policy()  # the weights that sampled the first round
    for slot in range(3):
        for row in range(8):
            time, after = step["timestep"][row, slot], step["next_timestep"][row, slot]
            with torch.no_grad():
                clean = by_hand(
                    fresh, step["state"][row, slot][None], time, batch.inputs["condition"][row][None], 3.0
                )[0]
            level = alpha_bar[after]
            square = (step["next"][row, slot] - level.sqrt() * clean) ** 2
            log_density = -square / (2 * (1 - level)) - 0.5 * (1 - level).log() - 0.5 * math.log(2 * math.pi)
            assert float(log_density.mean()) == pytest.approx(float(batch.log_prob[row, slot]), abs=1e-5)
    for _, _, metrics in actor.calls:  # one update a round: each is the first on its samples
        assert float(metrics["ratio_deviation_max"]) < 1e-5


def test_the_ratio_of_the_shipped_model_is_1_before_the_first_update(tmp_path: Path) -> None:
    from guerdon.tasks.shapes.task import Shapes

    task = Shapes()
    experience = task.experience(0)
    method = RLCM(rounds=2, samples=6, steps=4, guidance=3.0, update_batch=6, lr=1e-2, lora_rank=8)
    actor = train(method, task.policy("consistency"), experience, task.feedback(), tmp_path)
    assert [float(m["ratio_deviation_max"]) < 1e-5 for _, _, m in actor.calls] == [True, True]


def test_states_are_stored_before_noise_and_log_prob_never_draws(tmp_path: Path) -> None:
    policy = image_policy()
    seeds = row_seeds(1, 0, 5)
    traj = policy.sample(WORDS[:5], seeds, steps=4, guidance=3.0)
    step = traj.inputs["step"]
    noise = normal(seeds, (5, 3, 8, 8))
    assert torch.equal(step["state"][:, 0], noise[:, 0])
    assert torch.equal(step["state"][:, 1:], step["next"][:, :-1])
    mean = policy.distribution(traj)["mean"].detach()
    std = policy.distribution(traj)["std"].detach()
    torch.testing.assert_close(step["next"], mean + std * noise[:, 1:4], atol=1e-5, rtol=1e-5)
    state = torch.random.get_rng_state()
    assert torch.equal(policy.log_prob(traj), policy.log_prob(traj))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_guidance_is_embedded_once_and_the_same_in_sampling_and_learning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = image_policy()
    seen: list[Tensor] = []
    rows: list[int] = []
    forward = policy.denoiser.forward

    def watched(sample: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(options["timestep_cond"])
        rows.append(len(sample))
        return forward(sample, *args, **options)

    monkeypatch.setattr(policy.denoiser, "forward", watched)
    run(tmp_path, policy, guidance=5.0, lora_rank=0)
    wanted = guidance_embedding(torch.tensor([4.0]), 256)  # w = guidance - 1
    assert all(torch.equal(cond, wanted.expand_as(cond)) for cond in seen)
    assert rows == [8] * 4 + [8 * 3]  # no second, unconditional pass; all steps of an update in one call


# --- the objective ----------------------------------------------------------------------------------------


def test_a_clip_range_as_small_as_1e_4_is_honoured(tmp_path: Path) -> None:
    assert RLCM().clip == 1e-4
    (_, objective, _), *_ = run(tmp_path).calls
    assert isinstance(objective, ClippedSurrogate)
    assert (objective.clip, objective.kl, objective.reduction) == (1e-4, 0.0, "step")
    actor = Role("actor", image_policy(), RoleSettings(SGD(1e-3), max_grad_norm=None))
    traj = actor.sample(WORDS, row_seeds(0, 0, 6), steps=4)
    # ratios of 1 + 2e-4, 1 + 0.5e-4, 1 - 0.5e-4 and 1 - 2e-4 are told apart in float32
    deviation = torch.tensor([2e-4, 0.5e-4, -0.5e-4, -2e-4, 2e-4, -2e-4])
    traj.log_prob = actor.log_prob(traj) - deviation[:, None]
    traj.advantage = traj.per_step(torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, -1.0]))
    log_prob = actor.model.log_prob(traj)
    log_prob.retain_grad()

    class Fixed:
        event_reduction = "mean"

        def log_prob(self, batch: Trajectories) -> Tensor:
            return log_prob

    loss, metrics = objective(Fixed(), traj)
    loss.backward()
    learns = torch.tensor([False, True, True, True, True, False])  # clipped where it would go further out
    assert torch.equal(log_prob.grad != 0, learns[:, None].expand(6, 3))
    assert float(metrics["clip_fraction"]) == pytest.approx(4 / 6)
    assert float(metrics["ratio_deviation_max"]) == pytest.approx(2e-4, rel=1e-2)


def test_advantages_are_per_prompt_statistics_with_a_fallback_and_a_clamp(tmp_path: Path) -> None:
    """The numbers of the published tracker, replayed by hand over rounds."""
    generator = np.random.default_rng(0)
    rounds: list[tuple[list[int], np.ndarray]] = []

    def score(traj: Trajectories) -> Any:
        spread = generator.normal(size=traj.batch_size[0]) * 3 + 5 * traj.group.numpy()
        rounds.append((traj.group.tolist(), spread.astype(np.float32)))
        return spread

    options: dict[str, Any] = {"buffer_size": 5, "min_count": 4, "advantage_clamp": 1.2}
    actor = run(tmp_path, feedback=FunctionReward(score), prompts=WORDS[:5], rounds=5, **options)
    buffers: dict[int, deque[float]] = {}
    compared, cut = set(), 0
    for (batch, _, _), (groups, rewards) in zip(actor.calls, rounds, strict=True):
        for group, reward in zip(groups, rewards.tolist(), strict=True):
            buffers.setdefault(group, deque(maxlen=5)).append(reward)
        wanted = {}
        for group, reward in zip(groups, rewards.tolist(), strict=True):
            own = len(buffers[group]) >= 4
            basis = np.array(buffers[group]) if own else rewards.astype(np.float64)
            advantage = (reward - basis.mean()) / (basis.std() + 1e-6)
            compared.add(own)
            cut += abs(advantage) > 1.2
            wanted[reward] = float(np.clip(advantage, -1.2, 1.2))
        for reward, advantages in zip(batch.score().tolist(), batch.advantage.tolist(), strict=True):
            assert advantages == pytest.approx([wanted[reward]] * 3, abs=1e-5)  # the same for every step
    assert compared == {True, False}  # both the prompt's own and the whole round's statistics were used
    assert cut > 3
    assert (RLCM().advantage_clamp, RLCM().buffer_size, RLCM().min_count) == (10.0, 16, 16)


def test_the_reward_is_of_the_last_denoised_output(tmp_path: Path) -> None:
    policy = image_policy()
    shown: list[np.ndarray] = []

    def look(images: np.ndarray, prompts: list[str]) -> Any:
        shown.append(images.copy())
        return redness(images, prompts)

    actor = run(tmp_path, policy, FunctionReward(look), lora_rank=0, lr=0.0, ghost=True)
    batch = actor.calls[0][0]
    unshuffled = batch.permute_steps(batch.inputs["step", "time_index"].argsort(1))
    last = unshuffled.inputs["step"][:, -1]  # the ghost's state is what the last denoising starts from
    clean = torch.cat(
        [
            by_hand(
                policy, last["state"][i][None], last["timestep"][i], batch.inputs["condition"][i][None], 3.0
            )
            for i in range(8)
        ]
    )
    pixels = ((clean.detach() / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (batch.images.float() - pixels).abs().max() <= 1
    noisy = ((last["next"] / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1)
    assert (batch.images.float() - noisy).abs().mean() > 5  # and not the noisy latent behind it
    assert len(shown) == 1
    rewards = redness(shown[0], [""] * 8)
    assert sorted(batch.score().tolist()) == pytest.approx(sorted(rewards.tolist()), abs=1e-6)


# --- the loop ---------------------------------------------------------------------------------------------


def test_time_is_shuffled_for_each_trajectory_and_consistently(tmp_path: Path) -> None:
    policy = image_policy()
    actor = run(tmp_path, policy, samples=12, update_batch=12, steps=8, lr=0.0, lora_rank=0)
    ((batch, _, _),) = actor.calls
    step, index = batch.inputs["step"], batch.inputs["step", "time_index"]
    assert torch.equal(index.sort(1).values, torch.arange(7).expand(12, 7))
    assert len({tuple(row) for row in index.tolist()}) > 6  # orders of their own
    grid = torch.tensor([999, 879, 759, 639, 519, 399, 279, 159])  # the paper's grid for H = 8
    assert torch.equal(step["timestep"], grid[index])
    assert torch.equal(step["next_timestep"], grid[index + 1])  # whose level is the variance
    again = actor.log_prob(batch)  # states, actions and stored log-probabilities still belong together
    torch.testing.assert_close(again, batch.log_prob, atol=1e-5, rtol=1e-5)
    ordered = batch.permute_steps(index.argsort(1)).inputs["step"]
    assert torch.equal(ordered["state"][:, 1:], ordered["next"][:, :-1])


def test_one_optimiser_step_covers_all_steps_of_its_trajectories(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rounds": 2, "samples": 8, "update_batch": 3, "lora_rank": 0, "lr": 1e-3}
    actor = run(tmp_path / "whole", **options)
    assert actor.updates == 2 * 3
    assert [batch.log_prob.shape for batch, _, _ in actor.calls] == [(3, 3), (3, 3), (2, 3)] * 2
    for batch, _, _ in actor.calls:
        assert torch.equal(
            batch.inputs["step", "time_index"].sort(1).values, torch.arange(3).expand(len(batch), 3)
        )
    for number in (0, 3):  # one inner epoch: each trajectory once
        prompts = [p for batch, _, _ in actor.calls[number : number + 3] for p in batch.prompts]
        assert len(prompts) == 8
    # less memory, the same step: gradients accumulate over rows and over time
    for parts in ({"micro_batch": 1}, {"micro_batch": 2, "micro_steps": 1}):
        split = run(tmp_path / str(parts), **options, **parts)
        assert split.updates == 6
        first, other = actor.calls[0][2], split.calls[0][2]
        torch.testing.assert_close(other["grad_norm"], first["grad_norm"], atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(other["loss"], first["loss"], atol=1e-6, rtol=1e-4)


def test_the_ghost_step_is_off_by_default_and_has_a_switch(tmp_path: Path) -> None:
    assert not RLCM().ghost
    plain, ghost = (
        run(tmp_path / str(on), lora_rank=0, ghost=on, lr=0.0).calls[0][0] for on in (False, True)
    )
    assert (plain.steps, ghost.steps) == (3, 4)
    last = ghost.permute_steps(ghost.inputs["step", "time_index"].argsort(1)).inputs["step"][:, -1]
    assert torch.equal(last["timestep"], last["next_timestep"])  # as released: it leads back to its own time
    assert sorted(plain.score().tolist()) == sorted(ghost.score().tolist())  # and no reward sees it


def test_rebel_is_an_objective_on_the_same_trajectories(tmp_path: Path) -> None:
    clip = run(tmp_path / "clip", lora_rank=0, lr=0.0).calls[0][0]
    actor = run(
        tmp_path / "rebel",
        prompts=WORDS[:2],
        lora_rank=0,
        objective="rebel",
        eta=3.0,
        update_batch=4,
        rounds=2,
    )
    assert [batch.batch_size[0] for batch, _, _ in actor.calls] == [2, 2] * 2  # 8 images are 4 pairs
    for batch, objective, _ in actor.calls:
        assert isinstance(batch, Preferences)
        assert isinstance(objective, RewardDifference)
        assert batch.chosen.inputs["step"].keys() == clip.inputs["step"].keys()
        assert batch.chosen.prompts == batch.rejected.prompts
        assert not torch.equal(batch.chosen.images, batch.rejected.images)
        assert batch.chosen.steps == 3
    batch, objective, _ = actor.calls[1]
    loss, _ = objective(actor.model, batch)  # under the trained weights, against those that acted
    wanted = []
    for i in range(2):  # each pair by itself: sums over time only
        ratios = [
            (actor.log_prob(side[i : i + 1]) - side.log_prob[i]).sum()
            for side in (batch.chosen, batch.rejected)
        ]
        gap = batch.chosen.advantage[i, 0] - batch.rejected.advantage[i, 0]
        wanted.append(float((3.0 * (ratios[0] - ratios[1]) - gap) ** 2))
    assert float(loss.detach()) == pytest.approx(sum(wanted) / 2, rel=1e-4)
    first = actor.calls[0]
    gap = first[0].chosen.advantage[:, 0] - first[0].rejected.advantage[:, 0]
    assert float(first[2]["loss"]) == pytest.approx(float(gap.square().mean()), rel=1e-4)  # ratios of 1


def test_the_learning_rate_falls_to_two_thirds(tmp_path: Path) -> None:
    method = RLCM(rounds=10, samples=8, update_batch=3)
    optimiser = method.roles()["actor"].optimiser
    updates = 10 * 3
    rates = [optimiser.lr * optimiser.factor(i) for i in range(updates)]
    assert rates[0] == 1e-4
    assert rates[-1] == pytest.approx(1e-4 * 2 / 3, rel=0.02)
    assert RLCM().roles()["actor"].max_grad_norm == 5.0


def test_a_kl_weight_reaches_the_objective_and_its_reference_is_the_untrained_model(tmp_path: Path) -> None:
    actor = run(tmp_path, lora_rank=4, kl=0.5, rounds=3, lr=1e-2)
    untrained = Role("untrained", image_policy())
    for number, (batch, objective, metrics) in enumerate(actor.calls):
        assert objective.kl == 0.5
        torch.testing.assert_close(
            batch.reference["mean"], untrained.distribution(batch)["mean"], atol=1e-5, rtol=0
        )
        assert (float(metrics["kl"]) > 1e-7) == (number > 0)


def test_published_defaults() -> None:
    """Compressibility on one GPU's share: the paper's table."""
    method = RLCM()
    assert (method.steps, method.guidance, method.lr, method.lora_rank, method.lora_alpha) == (
        8,
        8.0,
        1e-4,
        16,
        32.0,
    )
    lora = method.roles()["actor"].lora
    assert lora.targets is None  # the policy's own, of a UNet all attention projections
    assert lora.init == "gaussian"


# --- the controls -----------------------------------------------------------------------------------------


def test_shuffled_rewards_are_an_arm_of_the_reproduction(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The negative control: the same rewards, but given to the wrong pictures."""
    from guerdon.reproductions import rlcm

    (arm,) = [name for name in rlcm.ARMS if name.startswith("shuffled")]
    (threshold,) = [value for name, value in rlcm.THRESHOLDS.items() if name.startswith("shuffled")]
    assert 0 < threshold <= 0.3
    given: dict[str, Any] = {}
    monkeypatch.setattr(rlcm, "_train", lambda *args, **options: given.update(options) or {})
    rlcm.ARMS[arm](0, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 3)).astype(np.uint8)
    true, shuffled = compressibility(images, [""] * 32), given["reward"](images, [""] * 32)
    assert sorted(shuffled) == sorted(true)
    assert (shuffled != true).mean() > 0.5


def test_the_baseline_and_the_sweep_over_steps_are_arms_of_the_reproduction() -> None:
    from guerdon.reproductions import rlcm

    assert any(name.startswith("ddpo") for name in rlcm.ARMS)
    assert any(name.startswith("rebel") for name in rlcm.ARMS)
    assert any("2 steps" in name and "8 steps" in name for name in rlcm.THRESHOLDS)


def test_shuffled_rewards_teach_nothing_and_true_ones_do(tmp_path: Path) -> None:
    def shuffled(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)

        def score(images: Any, prompts: list[str]) -> Any:
            return redness(images, prompts)[torch.randperm(len(prompts), generator=generator).numpy()]

        return score

    def gain(feedback: Any, name: str) -> float:
        """In standard deviations of the untrained model's reward."""
        options: dict[str, Any] = {"rounds": 8, "samples": 32, "steps": 3, "lr": 3e-3, "lora_rank": 0}
        actor = run(tmp_path / name, feedback=FunctionReward(feedback), **options)
        scores = []
        for role in (actor, Role("untrained", image_policy())):
            traj = role.sample(WORDS * 16, row_seeds(99, 0, 96), steps=3, guidance=3.0)
            scores.append(torch.from_numpy(redness(traj.images.numpy(), traj.prompts)))
        return float((scores[0].mean() - scores[1].mean()) / scores[1].std())

    learned = gain(redness, "true")
    drifted = sum(gain(shuffled(seed), f"shuffled {seed}") for seed in range(4)) / 4
    assert learned > 2.0
    assert abs(drifted) < learned / 3  # such a small model drifts, but nowhere in particular
