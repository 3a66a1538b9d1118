"""Random network distillation: what the bonus sees, pays, forgets and keeps."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from guerdon.batch import Trajectories
from guerdon.errors import ShapeError, UsageError
from guerdon.feedback.intrinsic import Distil, RandomNetwork, RNDBonus, Sights, next_observation
from guerdon.optim import Adam
from guerdon.roles import Role, RoleSettings


def predictor(size: int = 2, lr: float = 1e-3, seed: int = 0, compile: Any = False, **options: Any) -> Role:
    torch.manual_seed(seed)
    model = RandomNetwork(size, **{"hidden": (32, 32), "embedding": 16, **options})
    return Role("predictor", model, RoleSettings(Adam(lr), max_grad_norm=None, compile=compile))


def region(low: float, high: float, n: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(n, 2, generator=generator)


# --- the networks -----------------------------------------------------------------------------------------


def test_the_novelty_is_the_squared_distance_of_two_networks_on_normalised_observations() -> None:
    torch.manual_seed(0)
    model = RandomNetwork(3, (8, 8), 4)
    seen = torch.randn(50, 3) * torch.tensor([1.0, 100.0, 0.01]) + 0.5
    model.features.scaler.update(seen)
    clipped = ((seen - seen.mean(0)) / (seen.var(0, correction=0) + 1e-8).sqrt()).clamp(-5, 5)

    def perceptron(x: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
        for i, (weight, bias) in enumerate(layers):
            x = x @ weight.T + bias
            x = torch.where(x > 0, x, 0.01 * x) if i + 1 < len(layers) else x
        return x

    buffers, weights = dict(model.named_buffers()), dict(model.named_parameters())
    target = [(buffers[f"target_weight{i}"], buffers[f"target_bias{i}"]) for i in range(3)]
    linears = [f"features.layers.{i}" for i in (0, 2, 4)] + ["head"]  # one layer deeper than the target
    learner = [(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in linears]
    expected = (perceptron(clipped, learner) - perceptron(clipped, target)).square().sum(-1)
    torch.testing.assert_close(model(seen), expected, rtol=1e-3, atol=1e-4)


def test_both_networks_begin_orthogonal_with_gain_root_two() -> None:
    model = RandomNetwork(6, (8, 8), 4)
    for weight in (model.target_weight1, model.features.layers[2].weight):
        torch.testing.assert_close(weight @ weight.T, 2 * torch.eye(8), rtol=1e-4, atol=1e-5)


def test_the_target_is_frozen_out_of_every_optimiser_and_saved() -> None:
    role = predictor()
    before = copy.deepcopy(role.model.state_dict())
    bonus = RNDBonus(role, 1)
    for seed in range(5):
        bonus.learn(region(-1, 1, 64, seed))
    after = role.model.state_dict()
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name, _ in role.model.named_parameters()}
    assert not any("target" in name for name, _ in role.model.named_parameters())
    saved = role.state_dict()["weights"]
    assert {n for n in saved if n.startswith("target_")} == {n for n in after if n.startswith("target_")}
    other = predictor(seed=1)
    other.load_state_dict(role.state_dict())
    at = region(-1, 1, 9)
    torch.testing.assert_close(RNDBonus(other, 1).novelty(at), bonus.novelty(at), rtol=0, atol=0)


# --- statistics of observations ---------------------------------------------------------------------------


def test_observations_have_statistics_of_their_own_and_are_cut_at_five_deviations() -> None:
    role = predictor(lr=1e-3)
    bonus = RNDBonus(role, 1)
    seen = torch.randn(4000, 2) * torch.tensor([1.0, 1000.0])
    bonus.observe(seen)
    scaler = role.model.features.scaler
    torch.testing.assert_close(scaler.mean, seen.double().mean(0))
    torch.testing.assert_close(scaler.variance, seen.double().var(0, correction=0))
    six, sixty = torch.tensor([[6.0, 6000.0]]), torch.tensor([[60.0, 60_000.0]])
    torch.testing.assert_close(bonus.novelty(six), bonus.novelty(sixty), rtol=0, atol=0)
    assert not torch.equal(bonus.novelty(six / 3), bonus.novelty(sixty))


def test_only_the_chosen_columns_are_judged() -> None:
    bonus = RNDBonus(predictor(), 3, columns=(1, 3))
    seen = torch.randn(3, 4, 5)
    other = seen.clone()
    other[..., [0, 3, 4]] = torch.randn(3, 4, 3)
    assert torch.equal(bonus.novelty(seen), bonus.novelty(other))
    other[..., 2] += 1
    assert not torch.equal(bonus.novelty(seen), bonus.novelty(other))


# --- the reward -------------------------------------------------------------------------------------------


def test_rewards_are_divided_by_the_deviation_of_a_discounted_sum_that_runs_on() -> None:
    bonus = RNDBonus(predictor(), 3, gamma=0.9)
    sums: list[np.ndarray] = []
    trace = np.zeros(3)
    for seed in range(4):
        following = region(-1, 1, 3 * 7, seed).reshape(3, 7, 2)
        raw = bonus.novelty(following)
        rewards = bonus.reward(following)
        for t in range(7):  # a naive trace, never reset
            trace = 0.9 * trace + raw[:, t].double().numpy()
            sums.append(trace)
        expected = raw / math.sqrt(np.var(np.concatenate(sums), ddof=1) + 1e-8)
        torch.testing.assert_close(rewards, expected.float(), rtol=1e-5, atol=0)
        torch.testing.assert_close(bonus.at(following), rewards, rtol=0, atol=0)
        assert (rewards > 0).all()  # divided, not centred


def test_rewards_are_fixed_at_collection_and_carry_no_gradient() -> None:
    bonus = RNDBonus(predictor(), 2)
    following = region(-1, 1, 20).reshape(2, 10, 2)
    rewards = bonus.reward(following)
    kept = rewards.clone()
    assert not rewards.requires_grad
    bonus.learn(following, epochs=20)
    assert torch.equal(rewards, kept)
    assert (bonus.at(following) < kept).all()  # judged again, they would have been other ones


def test_the_scale_goes_on_from_a_saved_state() -> None:
    role = predictor()
    one = RNDBonus(role, 2)
    one.reward(region(-1, 1, 20).reshape(2, 10, 2))
    two = RNDBonus(role, 2)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    following = region(-1, 1, 20, seed=1).reshape(2, 10, 2)
    assert torch.equal(one.reward(following), two.reward(following))
    with pytest.raises(ShapeError):
        RNDBonus(role, 3).load_state_dict(one.state_dict())


# --- learning ---------------------------------------------------------------------------------------------


def test_the_bonus_decays_where_the_predictor_has_been_and_stays_high_elsewhere() -> None:
    bonus = RNDBonus(predictor(), 1)
    everywhere = torch.cat([region(-1.0, 0.0, 1000), region(0.5, 1.5, 1000)])
    bonus.observe(everywhere)
    here, there = region(-1.0, 0.0, 500, seed=1), region(0.5, 1.5, 500, seed=2)
    start = bonus.novelty(here).mean()
    for update in range(2000):
        bonus.learn(region(-1.0, 0.0, 64, seed=10 + update))
    assert bonus.novelty(here).mean() < 0.05 * start
    assert bonus.novelty(here).mean() <= 0.2 * bonus.novelty(there).mean()


def test_the_bonus_rises_when_something_new_comes_up() -> None:
    bonus = RNDBonus(predictor(), 4)
    bonus.observe(torch.cat([region(-1, 0, 500), region(0.5, 1.5, 500)]))
    rewards = []
    for round_ in range(30):
        following = region(-1, 0, 400, round_).reshape(4, 100, 2)
        rewards.append(float(bonus.reward(following).mean()))
        bonus.learn(following, epochs=4, minibatch=50)
    assert rewards[-1] < 0.2 * rewards[0]
    assert float(bonus.reward(region(0.5, 1.5, 400).reshape(4, 100, 2)).mean()) > 3 * rewards[-1]


def test_only_the_kept_observations_teach_the_predictor() -> None:
    model = predictor().model
    seen = region(-1, 1, 6)
    kept = torch.tensor([True, False, True, False, False, True])
    loss, _ = Distil()(model, Sights(observation=seen, kept=kept, batch_size=[6]))
    torch.testing.assert_close(loss, model(seen)[kept].mean())
    nothing, _ = Distil()(model, Sights(observation=seen, kept=torch.zeros(6, dtype=bool), batch_size=[6]))
    assert nothing == 0.0


@pytest.mark.parametrize("proportion", [0.25, 1.0])
def test_each_observation_is_kept_with_the_given_probability(
    proportion: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = predictor()
    shares: list[float] = []
    monkeypatch.setattr(
        role, "fit", lambda sights, *_: shares.append(sights.kept.float().mean().item()) or {}
    )
    RNDBonus(role, 1).learn(region(-1, 1, 20_000), proportion, generator=torch.Generator().manual_seed(0))
    assert shares[0] == pytest.approx(proportion, abs=0.02)


def test_a_smaller_proportion_keeps_the_bonus_longer() -> None:
    left = {}
    for proportion in (0.05, 1.0):
        bonus = RNDBonus(predictor(), 1)
        for round_ in range(10):
            generator = torch.Generator().manual_seed(round_)
            bonus.learn(region(-1, 1, 256, round_), proportion, 1, 16, generator)
        left[proportion] = float(bonus.novelty(region(-1, 1, 500, seed=99)).mean())
    assert left[0.05] > left[1.0]


def test_the_update_can_be_traced_as_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the C++ compiler, which would take its time."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def traced(function: Any, examples: Any) -> Any:
        graph = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
        return lambda inputs: graph(*inputs)

    monkeypatch.setattr("guerdon.compiled.compile_function", traced)
    plain, whole = predictor(), predictor(compile="update")
    seen = region(-1, 1, 64)
    for role in (plain, whole):
        bonus = RNDBonus(role, 1)
        bonus.observe(seen)
        for update in range(3):
            bonus.learn(seen, 0.5, 1, 32, torch.Generator().manual_seed(update))
    at = region(-1, 1, 20, seed=1)
    torch.testing.assert_close(
        RNDBonus(whole, 1).novelty(at), RNDBonus(plain, 1).novelty(at), rtol=1e-4, atol=1e-5
    )


# --- controls ---------------------------------------------------------------------------------------------


def test_a_shuffled_bonus_pays_the_same_rewards_to_other_steps() -> None:
    role, following = predictor(), region(-1, 1, 80).reshape(4, 20, 2)
    real = role.evaluate(lambda model, seen: model(seen), following)
    bonus = RNDBonus(role, 4, control="shuffled", generator=torch.Generator().manual_seed(0))
    dealt = bonus.reward(following) * bonus.scale.statistics.std
    torch.testing.assert_close(dealt.flatten().sort().values, real.flatten().sort().values)
    assert (dealt != real).float().mean() > 0.9


def test_a_noise_bonus_knows_nothing_of_the_observations() -> None:
    one, two = (
        RNDBonus(predictor(), 4, control="noise", generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    rewards = one.reward(region(-1, 1, 80).reshape(4, 20, 2))
    assert torch.equal(rewards, two.reward(region(5, 9, 80).reshape(4, 20, 2)))
    assert (rewards >= 0).all()


# --- what followed ----------------------------------------------------------------------------------------


def test_the_next_observation_is_the_next_column_the_cut_one_or_the_present_one() -> None:
    observation = torch.arange(8.0).reshape(2, 4, 1)
    step = TensorDict({"observation": observation}, batch_size=[2, 4])
    final = TensorDict(
        {
            "step": torch.tensor([[1, 3], [-1, -1]]),
            "observation": torch.tensor([[[91.0], [93.0]], [[-7.0], [-7.0]]]),
        },
        batch_size=[2],
    )
    traj = Trajectories(
        inputs=TensorDict({"step": step, "final": final}, batch_size=[2]),
        log_prob=torch.zeros(2, 4),
        mask=torch.ones(2, 4, dtype=torch.bool),
    )
    following = next_observation(traj, torch.tensor([[100.0], [200.0]]))
    assert following[..., 0].tolist() == [[1.0, 91.0, 3.0, 93.0], [5.0, 6.0, 7.0, 200.0]]
    assert torch.equal(observation, torch.arange(8.0).reshape(2, 4, 1))


# --- what is wrong is said --------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UsageError, match="shuffled"):
        RNDBonus(predictor(), 1, control="shufled")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="3 entries"):
        RNDBonus(predictor(), 1, columns=(0, 3))
    with pytest.raises(ShapeError, match="4 environments"):
        RNDBonus(predictor(), 4).reward(torch.zeros(3, 5, 2))
