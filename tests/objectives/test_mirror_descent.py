"""Mirror descent: its identities with policy gradient, TRPO and SAC, and its values against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence

from guerdon.batch import Trajectories, Transitions
from guerdon.critics.action import ActionCritic
from guerdon.critics.state import StateCritic
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives.action_value import SoftImprovement
from guerdon.objectives.mirror_descent import (
    MirrorDescent,
    SoftMirrorDescent,
    SoftValue,
    ValueBellman,
    log_q,
    mirror_descent,
)
from guerdon.objectives.policy_gradient import Reinforce
from guerdon.policies import control
from guerdon.policies.features import Entry, Features

SIZE, ACTIONS = 3, 2


def features(hidden: tuple[int, ...] = (16,)) -> Features:
    return Features({"": Entry((SIZE,))}, hidden, "tanh")


def controller(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    if kind == "categorical":
        model: Any = control.Categorical(features(), 4, init="default")
    elif kind == "gaussian":
        model = control.Gaussian(
            features(), [-1.0] * ACTIONS, [1.0] * ACTIONS, log_std=-0.4 - 0.2 * seed, init="default"
        )
    else:
        model = control.SquashedGaussian(features(), [-1.0] * ACTIONS, [1.0] * ACTIONS)
    return model.requires_grad_(True)


def on_policy(model: Any, old: Any, rows: int = 6, steps: int = 3) -> Trajectories:
    """Steps that ``old`` took, with advantages, and ``old``'s distributions as reference."""
    generator = torch.Generator().manual_seed(5)
    observation = torch.randn(rows, steps, SIZE, generator=generator)
    with torch.no_grad():
        noise = torch.randn(rows * steps, old.noise[1], generator=generator)
        out = old.act(observation.reshape(-1, SIZE), noise)
    step = {"observation": observation} | {n: v.reshape(rows, steps, *v.shape[1:]) for n, v in out.items()}
    traj = Trajectories(
        inputs=TensorDict({"step": TensorDict(step, batch_size=[rows, steps])}, batch_size=[rows]),
        log_prob=torch.zeros(rows, steps),
        mask=torch.ones(rows, steps, dtype=torch.bool),
        advantage=torch.randn(rows, steps, generator=generator),
    )
    with torch.no_grad():
        traj.log_prob, traj.reference = old.log_prob(traj), old.distribution(traj)
    return traj


def transitions(rows: int = 64, seed: int = 0) -> Transitions:
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    return Transitions(
        observation=normal(rows, SIZE),
        action=normal(rows, ACTIONS).tanh(),
        reward=normal(rows),
        next_observation=normal(rows, SIZE),
        terminated=torch.arange(rows) % 4 == 0,
        truncated=torch.arange(rows) % 4 == 1,
        discount=torch.full((rows,), 0.9),
        noise=normal(rows, 2, ACTIONS),
        batch_size=[rows],
    )


def critic(members: int = 2, seed: int = 7) -> ActionCritic:
    torch.manual_seed(seed)
    return ActionCritic(features(()), ACTIONS, hidden=(16,), activation="tanh", members=members)


def gradient(loss: Tensor, model: nn.Module) -> Tensor:
    parts = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for p, g in zip(model.parameters(), parts, strict=True)
        ]
    )


# --- on policy --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_kl_is_exact_from_the_new_policy_to_the_old_one_or_reversed(kind: str, reverse: bool) -> None:
    new, old = controller(kind, 1), controller(kind, 2)
    traj = on_policy(new, old)

    def plain(model: Any) -> Any:
        p = model.distribution(traj)
        return Categorical(logits=p["logits"]) if kind == "categorical" else Normal(p["mean"], p["std"])

    pair = (plain(old), plain(new)) if reverse else (plain(new), plain(old))
    expected = kl_divergence(*pair)
    expected = expected if kind == "categorical" else expected.sum(-1)
    _, metrics = MirrorDescent(reverse=reverse)(new, traj)
    assert float(metrics["kl"]) == pytest.approx(float(expected.mean()), rel=1e-4)
    assert float(MirrorDescent(reverse=reverse).divergence(new, traj)) == pytest.approx(
        float(expected.mean()), rel=1e-4
    )
    other = MirrorDescent(reverse=not reverse)(new, traj)[1]["kl"]
    assert abs(float(other) - float(metrics["kl"])) > 1e-4  # the two directions can be told apart


def test_the_ratio_is_not_clipped() -> None:
    log_prob, old = torch.tensor([[0.0, -1.0, -3.0]]), torch.tensor([[-3.0, -1.0, 0.0]])
    advantage, kl = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[0.1, 0.2, 0.3]])
    losses = mirror_descent(log_prob, old, advantage, kl, 4.0)
    ratio = [math.exp(3), 1.0, math.exp(-3)]
    expected = [-r * a + 4 * k for r, a, k in zip(ratio, [2.0, -1.0, 0.5], [0.1, 0.2, 0.3], strict=True)]
    assert torch.allclose(losses, torch.tensor([expected]))


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_first_step_is_policy_gradient(kind: str, reverse: bool) -> None:
    model = controller(kind)
    traj = on_policy(model, model)
    expected = gradient(Reinforce()(model, traj)[0], model)
    assert float(expected.norm()) > 0.01
    for weight in (0.0, 1.0, torch.tensor(100.0)):
        got = gradient(MirrorDescent(weight, reverse)(model, traj)[0], model)
        assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("reverse", [False, True])
def test_at_the_old_policy_the_kl_has_no_gradient(kind: str, reverse: bool) -> None:
    model = controller(kind)
    traj = on_policy(model, model)
    assert float(gradient(MirrorDescent(reverse=reverse).divergence(model, traj), model).norm()) < 1e-6


def test_away_from_the_old_policy_the_weight_pulls_back(batch: Any, token_policy: Any) -> None:
    traj = batch([3, 1, 2])
    with torch.no_grad():
        traj.reference = token_policy.distribution(traj)
        token_policy.table += 0.5 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    traj.advantage = torch.zeros_like(traj.advantage)
    loss, metrics = MirrorDescent(kl=torch.tensor(3.0))(token_policy, traj)
    assert float(loss) == pytest.approx(3 * float(metrics["kl"]), rel=1e-6)
    loss.backward()
    with torch.no_grad():
        token_policy.table -= 0.1 * token_policy.table.grad
    assert float(MirrorDescent()(token_policy, traj)[1]["kl"]) < float(metrics["kl"])


@pytest.mark.parametrize("reduction", ["step", "trajectory", "sum", "constant"])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(
    batch: Any, token_policy: Any, gradient: Callable[..., list[Tensor]], reduction: Any
) -> None:
    traj = batch([3, 1, 2, 2])
    traj.reference = TensorDict({"logits": torch.randn(4, 3, 5)}, batch_size=[4, 3])
    objective = MirrorDescent(0.7, reduction=reduction)
    whole = gradient(objective, token_policy, traj)
    parts = gradient(objective, token_policy, traj, [traj[:1], traj[1:]])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(whole, parts, strict=True))


def test_what_is_missing_is_said(batch: Any, token_policy: Any, unchecked: None) -> None:
    with pytest.raises(ShapeError, match=r"batch\.reference"):
        MirrorDescent()(token_policy, batch([2, 1]))
    with pytest.raises(ShapeError, match=r"batch\.advantage"):
        MirrorDescent()(token_policy, batch([2, 1]).with_(advantage=None))
    with pytest.raises(UsageError, match="reduction is 'steps'"):
        MirrorDescent(reduction="steps")  # type: ignore[arg-type]


# --- from replay ------------------------------------------------------------------------------------------


def test_both_log_densities_are_of_the_same_action_by_its_value_before_tanh() -> None:
    actor, old, q, batch = controller("squashed", 1), controller("squashed", 2), critic(), transitions()
    loss, _ = SoftMirrorDescent(0.5, 0.2, regulariser=0.0)(actor, batch, q, old)
    action, raw, log_p = actor.draw_raw(batch.observation, batch.noise[:, 0])
    log_old = old.log_prob_raw(batch.observation, raw)
    expected = (0.5 * log_p + (0.2 - 0.5) * log_old - q.q(batch.observation, action)[0]).mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)
    assert torch.allclose(gradient(loss, actor), gradient(expected, actor), atol=1e-5)
    with torch.no_grad():  # tanh saturates: the action is 1 to the last bit, and its inverse infinite
        actor.mean.bias.fill_(30.0)
    loss, _ = SoftMirrorDescent()(actor, batch, q, old)
    assert bool((actor.draw_raw(batch.observation, batch.noise[:, 0])[0] == 1).any())
    assert math.isfinite(float(loss))
    assert bool(gradient(loss, actor).isfinite().all())


def test_the_gradient_flows_through_the_action_into_the_old_density_but_not_into_its_weights() -> None:
    actor, old, q, batch = controller("squashed", 1), controller("squashed", 2), critic(), transitions()
    old.requires_grad_(False)
    objective = SoftMirrorDescent(0.9, 0.2)
    got = gradient(objective(actor, batch, q, old)[0], actor)
    # finite differences of the loss, in which the action moves with the weights
    weight, slope = actor.mean.bias, []
    for i in range(ACTIONS):
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[i] += sign * 1e-2
                values.append(float(objective(actor, batch, q, old)[0]))
                weight[i] -= sign * 1e-2
        slope.append((values[0] - values[1]) / 2e-2)
    names = [n for n, p in actor.named_parameters() for _ in range(p.numel())]
    at = [i for i, n in enumerate(names) if n == "mean.bias"]
    assert torch.allclose(got[at], torch.tensor(slope), atol=1e-3)
    # and the old density has a share in it
    _, raw, _ = actor.draw_raw(batch.observation, batch.noise[:, 0])
    share = gradient(old.log_prob_raw(batch.observation, raw).mean(), actor)
    assert float(share[at].norm()) > 0.05
    assert all(p.grad is None for p in old.parameters())


def test_with_c_equal_to_lambda_it_is_sac() -> None:
    actor, old, q, batch = controller("squashed", 1), controller("squashed", 2), critic(1), transitions()
    mine = gradient(SoftMirrorDescent(0.3, 0.3, regulariser=0.0)(actor, batch, q, old)[0], actor)
    sac = gradient(SoftImprovement(alpha=0.3)(actor, batch, q)[0], actor)
    assert float(torch.cosine_similarity(mine, sac, 0)) > 0.9999
    assert torch.allclose(mine, sac, atol=1e-5)
    other = gradient(SoftMirrorDescent(0.8, 0.3, regulariser=0.0)(actor, batch, q, old)[0], actor)
    assert float(torch.cosine_similarity(other, sac, 0)) < 0.999


def test_hard_mdpo_is_q_and_the_kl_alone() -> None:
    actor, old, q, batch = controller("squashed", 1), controller("squashed", 2), critic(), transitions()
    loss, metrics = SoftMirrorDescent(0.7, 0.0, regulariser=0.0)(actor, batch, q, old)
    action, _, _ = actor.draw_raw(batch.observation, batch.noise[:, 0])
    expected = 0.7 * metrics["kl"] - q.q(batch.observation, action)[0].mean()
    assert float(loss) == pytest.approx(float(expected), abs=1e-5)


def test_the_policy_climbs_the_first_critic_and_the_value_fits_the_least() -> None:
    actor, batch, q = controller("squashed"), transitions(), critic()
    action, _, log_p = actor.draw_raw(batch.observation, batch.noise[:, 0])
    first, least = q.q(batch.observation, action)[0], q.q(batch.observation, action).amin(0)
    assert bool((first > least).any())
    loss, _ = SoftMirrorDescent(0.2, 0.2, regulariser=0.0)(actor, batch, q, actor)
    assert float(loss) == pytest.approx(float((0.2 * log_p - first).mean()), abs=1e-5)
    value = StateCritic(features(), init="default", scale=1.0)
    loss, _ = SoftValue(0.2)(value, batch, actor, q)
    expected = 0.5 * (value.values(batch.observation) - (least - 0.2 * log_p)).square().mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    loss.backward()
    assert all(p.grad is None for model in (actor, q) for p in model.parameters())


def test_action_values_bootstrap_from_the_target_value_where_an_episode_was_only_cut() -> None:
    batch, q = transitions(), critic()
    target = StateCritic(features(), init="default", scale=1.0)
    loss, _ = ValueBellman()(q, batch, target)
    following = target.values(batch.next_observation)
    y = torch.stack(
        [
            r if end else r + 0.9 * v
            for r, end, v in zip(batch.reward, batch.terminated, following, strict=True)
        ]
    )
    expected = sum(0.5 * (member - y).square().mean() for member in q.q(batch.observation, batch.action))
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    changed = batch.clone()
    changed.truncated = ~changed.truncated & ~changed.terminated  # a time limit is not an end
    assert float(ValueBellman()(q, changed, target)[0]) == float(loss)
    loss.backward()
    assert all(p.grad is None for p in target.parameters())


def test_the_regulariser_is_of_mean_and_log_deviation() -> None:
    actor, q, batch = controller("squashed"), critic(), transitions()
    without = SoftMirrorDescent(regulariser=0.0)(actor, batch, q, actor)[0]
    with_it = SoftMirrorDescent(regulariser=0.1)(actor, batch, q, actor)[0]
    hidden = actor.features(batch.observation)
    mean, log_std = actor.mean(hidden), actor.log_std(hidden).clamp(-20, 2)
    expected = 0.1 * (mean.square().mean() + log_std.square().mean())
    assert float(with_it - without) == pytest.approx(float(expected), rel=1e-3)


# --- Tsallis ----------------------------------------------------------------------------------------------


def test_log_q_is_the_published_power_of_the_density() -> None:
    x = torch.tensor([1e-5, 0.1, 1.0, 3.0, 50.0], dtype=torch.float64)
    for q in (1.2, 1.5, 2.0):
        p = 2 - q  # the published code's parameter of (x^(1-p) - 1) / (1 - p)
        assert torch.allclose(log_q(x.log(), q), (x.pow(1 - p) - 1) / (1 - p), rtol=1e-10)
    assert torch.equal(log_q(x.log(), 1.0), x.log())
    assert torch.allclose(log_q(x.log(), 2.0), x - 1)


def test_log_q_is_continuous_at_one() -> None:
    x = torch.linspace(-13, 8, 50)
    for near in (1 + 1e-6, 1 - 1e-6):
        assert torch.allclose(log_q(x, near), x, atol=1e-3, rtol=1e-4)
    gap = [float((log_q(x, 1 + 10.0**-k) - x).abs().max()) for k in (2, 3, 4)]
    assert gap[0] > 5 * gap[1] > 25 * gap[2]


def test_small_densities_are_floored_and_narrow_gaussians_stay_finite() -> None:
    least = log_q(torch.tensor([math.log(1e-6)]), 1.5)
    assert torch.equal(log_q(torch.tensor([-50.0]), 1.5), least)
    assert torch.equal(log_q(torch.tensor([-50.0]), 1.0), torch.tensor([-50.0]))
    assert bool(log_q(torch.tensor([500.0]), 2.0).isfinite())


def test_the_loss_is_continuous_in_q_at_one_and_in_its_gradient() -> None:
    actor, old, q, batch = controller("squashed", 1), controller("squashed", 1), critic(), transitions()
    with torch.no_grad():
        old.mean.bias += 0.3  # near enough for no density to fall to the floor
    loss = {
        order: SoftMirrorDescent(0.6, 0.2, q=order)(actor, batch, q, old)[0]
        for order in (1 - 1e-4, 1.0, 1 + 1e-4, 1.5)
    }
    for near in (1 - 1e-4, 1 + 1e-4):
        assert float(loss[near]) == pytest.approx(float(loss[1.0]), abs=1e-3)
        assert torch.allclose(gradient(loss[near], actor), gradient(loss[1.0], actor), atol=1e-3)
    assert abs(float(loss[1.5]) - float(loss[1.0])) > 0.01
    value = StateCritic(features())
    values = [float(SoftValue(0.2, q=order)(value, batch, actor, q)[0]) for order in (1.0, 1 + 1e-4)]
    assert values[1] == pytest.approx(values[0], abs=1e-3)


def test_tsallis_is_of_the_density_of_each_dimension() -> None:
    actor, old, q, batch = controller("squashed", 1), controller("squashed", 2), critic(), transitions()
    c, entropy, order = 0.6, 0.2, 1.7
    loss, _ = SoftMirrorDescent(c, entropy, order, regulariser=0.0)(actor, batch, q, old)
    action, raw, _ = actor.draw_raw(batch.observation, batch.noise[:, 0])

    def per_dimension(model: Any) -> Tensor:
        hidden = model.features(batch.observation)
        density = Normal(model.mean(hidden), model.log_std(hidden).exp()).log_prob(raw).exp()
        return density / (1 - raw.tanh().square())

    power = lambda x: (x.clamp(min=1e-6).pow(order - 1) - 1) / (order - 1)
    separate = [power(per_dimension(model)).sum(-1) for model in (actor, old)]
    joint = [power(per_dimension(model).prod(-1)) for model in (actor, old)]
    value = q.q(batch.observation, action)[0]
    expected, other = (
        float((c * new + order * (entropy - c) * last - value).mean()) for new, last in (separate, joint)
    )
    assert float(loss) == pytest.approx(expected, abs=1e-4)
    assert abs(other - expected) > 1e-2
