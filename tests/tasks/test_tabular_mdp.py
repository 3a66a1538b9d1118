"""Exact values of a finite decision process, and mirror descent held against its closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guerdon.errors import ShapeError
from guerdon.objectives.mirror_descent import MirrorDescent
from guerdon.optim import Adam
from guerdon.roles import Role, RoleSettings
from guerdon.tasks.tabular_mdp import TabularMDP, mirror_step


def some_policy(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, 4, generator=generator, dtype=torch.float64).softmax(-1)


def probabilities(actor: Role) -> Tensor:
    return actor.model.logits.detach().double().softmax(-1)  # type: ignore[union-attr,operator]


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [0.0, 0.3])
def test_the_value_is_what_iteration_converges_to(entropy: float) -> None:
    mdp, policy = TabularMDP.random(), some_policy()
    value = torch.zeros(5, dtype=torch.float64)
    for _ in range(500):
        new = torch.zeros(5, dtype=torch.float64)
        for s in range(5):
            for a in range(4):
                ahead = sum(mdp.transition[s, a, n] * value[n] for n in range(5))
                new[s] += policy[s, a] * (mdp.reward[s, a] - entropy * policy[s, a].log() + mdp.gamma * ahead)
        if (new - value).abs().max() < 1e-11:
            break
        value = new
    assert torch.allclose(mdp.value(policy, entropy), value, atol=1e-9)
    soft = (policy * (mdp.q(policy, entropy) - entropy * policy.log())).sum(-1)
    assert torch.allclose(soft, value, atol=1e-9)


def test_the_difference_of_two_returns_is_the_advantage_where_the_new_policy_goes() -> None:
    # Kakade and Langford, 2002: ties value, advantage and occupancy together
    mdp, old, new = TabularMDP.random(seed=3), some_policy(1), some_policy(2)
    gained = (mdp.occupancy(new)[:, None] * new * mdp.advantage(old)).sum() / (1 - mdp.gamma)
    assert float(gained) == pytest.approx(mdp.performance(new) - mdp.performance(old), abs=1e-10)
    assert float(mdp.occupancy(new).sum()) == pytest.approx(1.0)
    assert torch.allclose((old * mdp.advantage(old)).sum(-1), torch.zeros(5, dtype=torch.float64), atol=1e-12)


def test_shapes_and_probabilities_that_do_not_fit_are_refused() -> None:
    mdp = TabularMDP.random()
    with pytest.raises(ShapeError, match="do not fit"):
        TabularMDP(mdp.transition, mdp.reward[:3], mdp.start)
    with pytest.raises(ShapeError, match="sum to one"):
        TabularMDP(2 * mdp.transition, mdp.reward, mdp.start)


# --- mirror descent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("entropy", [0.0, 0.2])
def test_the_closed_form_maximises_the_regularised_gain(entropy: float) -> None:
    mdp, policy, t = TabularMDP.random(), some_policy(), 0.7
    gain = mdp.q(policy, entropy)

    def objective(new: Tensor) -> Tensor:
        linear = (new * (gain - entropy * policy.log())).sum(-1)
        return linear - (new * (new / policy).log()).sum(-1) / t

    best = mirror_step(policy, gain, t, entropy)
    for seed in range(20):
        other = (
            best.log() + 0.05 * torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        ).softmax(-1)
        assert bool((objective(other) < objective(best)).all())


def test_soft_steps_converge_to_the_soft_optimal_policy() -> None:
    mdp, policy, entropy = TabularMDP.random(), some_policy(), 0.2
    for _ in range(400):
        policy = mirror_step(policy, mdp.q(policy, entropy), 1.0, entropy)
    assert torch.allclose(policy, (mdp.q(policy, entropy) / entropy).softmax(-1), atol=1e-6)


def test_the_mean_over_the_batch_is_the_exact_expectation() -> None:
    mdp, old, new = TabularMDP.random(), some_policy(1), some_policy(2)
    actor = Role("actor", mdp.policy())
    with torch.no_grad():
        actor.model.logits.copy_(new.log())  # type: ignore[union-attr,operator]
    loss, metrics = actor.evaluate(MirrorDescent(kl=2.0), mdp.batch(old))
    kl = (new * (new / old).log()).sum(-1).mean()
    gain = (new * mdp.advantage(old)).sum(-1).mean()
    assert float(metrics["kl"]) == pytest.approx(float(kl), abs=1e-5)
    assert float(loss) == pytest.approx(float(2 * kl - gain), abs=1e-5)


def test_many_gradient_steps_reach_the_closed_form_and_the_return_only_grows() -> None:
    mdp, t = TabularMDP.random(), 1.0
    actor = Role("actor", mdp.policy(), RoleSettings(Adam(0.05), max_grad_norm=None))
    returns = [mdp.performance(probabilities(actor))]
    for _ in range(3):
        policy = probabilities(actor)
        actor.fit(mdp.batch(policy), MirrorDescent(kl=1 / t), epochs=500)
        exact = mirror_step(policy, mdp.advantage(policy), t)
        assert float((probabilities(actor) - exact).abs().max()) < 1e-2
        assert float((exact - policy).abs().max()) > 0.05  # there was a way to go
        returns.append(mdp.performance(probabilities(actor)))
    assert returns == sorted(returns)
