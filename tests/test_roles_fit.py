"""Passes of minibatches, answers without gradient, statistics: the verbs of roles that control adds."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from control_for_tests import HIGH, LOW, acted, controller, features, transitions
from guerdon.batch import Trajectories
from guerdon.critics.action import ActionCritic
from guerdon.critics.state import StateCritic
from guerdon.errors import NonFiniteError, UsageError
from guerdon.objectives.action_value import QLearning, SoftBellman, SoftImprovement
from guerdon.objectives.policy_gradient import ClippedSurrogate
from guerdon.objectives.value import ValueRegression
from guerdon.optim import SGD, Adam
from guerdon.policies.control import Controller, Gaussian
from guerdon.roles import Role, RoleSettings


def role(model: Any = None, optimiser: Any = None, **settings: Any) -> Role:
    model = controller("gaussian") if model is None else model
    return Role("actor", model, RoleSettings(optimiser or Adam(1e-2), **settings))


def rows() -> Trajectories:
    return acted(controller("gaussian", seed=1), 2, 5).as_rows()


def weights(*roles: Role) -> list[Tensor]:
    return [p.detach().clone() for r in roles for p in r.model.parameters()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("shuffled", [False, True])
def test_a_fit_is_its_updates_one_after_the_other(shuffled: bool) -> None:
    fitted, by_hand, data = role(), role(), rows()
    one, other = (torch.Generator().manual_seed(3) if shuffled else None for _ in range(2))
    objective = ClippedSurrogate(0.2)
    metrics = fitted.fit(data, objective, epochs=3, minibatch=4, generator=one)
    found: list[dict[str, Tensor]] = []
    for _ in range(3):
        order = torch.arange(10) if other is None else torch.randperm(10, generator=other)
        found += [by_hand.update(data[part], objective) for part in order.split(4)]
    assert equal(weights(fitted), weights(by_hand))
    assert fitted.updates == by_hand.updates == len(found) == 9  # the last minibatch of a pass is smaller
    assert metrics.keys() == found[0].keys()
    for name, value in metrics.items():
        each = torch.stack([m[name] for m in found])
        torch.testing.assert_close(value, each.max() if name.endswith("_max") else each.mean())


def test_all_rows_at_once_need_no_order() -> None:
    fitted, by_hand, data = role(), role(), rows()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    fitted.fit(data, ClippedSurrogate(0.2), epochs=2, minibatch=64, generator=generator)
    for _ in range(2):
        by_hand.update(data, ClippedSurrogate(0.2))
    assert equal(weights(fitted), weights(by_hand))
    assert torch.equal(generator.get_state(), state)


def test_a_fit_stops_after_the_pass_that_went_too_far() -> None:
    actor, seen = role(optimiser=SGD(0.5)), []

    def far(metrics: dict[str, Tensor]) -> bool:
        seen.append(float(metrics["approx_kl"]))
        return len(seen) == 2

    total = actor.fit(rows(), ClippedSurrogate(0.2), epochs=9, minibatch=5, stop=far)
    assert actor.updates == 4
    assert len(seen) == 2
    # `stop` sees the means of its pass, the caller those of all
    assert float(total["approx_kl"]) == pytest.approx(sum(seen) / 2, rel=1e-5)


def test_others_are_read_and_not_trained() -> None:
    torch.manual_seed(0)
    critic = Role(
        "critic",
        ActionCritic(features(hidden=()), action=2, hidden=(8,)),
        RoleSettings(Adam(1e-2), max_grad_norm=None),
    )
    actor = role(controller("squashed"), max_grad_norm=None)
    target = critic.copy(frozen=True)
    batch = transitions()
    before = weights(target, actor), weights(critic)
    critic.update(batch, SoftBellman(), target=target, actor=actor)
    assert equal(weights(target, actor), before[0])
    assert not equal(weights(critic), before[1])
    held = weights(critic)
    actor.update(batch, SoftImprovement(), critic=critic)
    assert equal(weights(critic), held)
    assert not equal(weights(actor), before[0][len(weights(target)) :])
    # the gradient that the actor's loss left in the critic is not taken along into the critic's next step
    twin = Role("critic", copy.deepcopy(critic.model), RoleSettings(Adam(1e-2), max_grad_norm=None))
    twin.load_state_dict(copy.deepcopy(critic.state_dict()))
    for c in (critic, twin):
        c.update(batch, SoftBellman(), target=target, actor=actor)
    assert equal(weights(critic), weights(twin))


def test_figures_are_computed_without_gradient() -> None:
    net = role(controller("greedy"))
    batch = transitions(actions=4)
    errors = net.evaluate(QLearning().errors, batch, target=net.copy())
    assert not errors.requires_grad
    torch.testing.assert_close(errors, QLearning().errors(net.model, batch, net.model).detach())


def test_observations_reach_the_statistics_of_actor_and_critic() -> None:
    policy = controller("gaussian", normalise=True)
    critic = StateCritic(features(scaler=policy.features.scaler))
    actor, judge = role(policy), role(critic)
    frozen = actor.copy(frozen=True)
    seen = torch.full((40, 3), 7.0)
    before = float(policy.features.scaler.count)
    actor.observe(seen)
    assert float(critic.features.scaler.count) == before + 40
    assert frozen.model.features.scaler is policy.features.scaler  # a reference sees what the actor sees
    judge.observe(seen)
    assert float(policy.features.scaler.count) == before + 80
    frozen.follow(actor, tau=1.0)
    assert torch.equal(frozen.model.features.scaler.mean, policy.features.scaler.mean)
    again = role(controller("gaussian", seed=5, normalise=True))
    again.load_state_dict(actor.state_dict())
    assert torch.equal(again.model.features.scaler.mean, policy.features.scaler.mean)


def test_a_model_without_statistics_is_left_alone() -> None:
    actor = role()
    before = weights(actor)
    actor.observe(torch.ones(4, 3))
    assert equal(before, weights(actor))


def test_whole_episodes_have_nothing_after_them() -> None:
    data = acted(controller("gaussian"))
    data.truncated = None
    assert role(StateCritic(features())).next_value(data) is None


def test_acting_through_a_role() -> None:
    actor = role()
    model: Controller = actor.model  # type: ignore[assignment]
    observation = torch.randn(4, 3)
    torch.testing.assert_close(
        torch.from_numpy(actor.acting()(observation.numpy(), None)["action"]),
        model.mode(observation).detach(),
    )


@dataclass
class Poisoned:
    """Regression of means on a target; NaN in the batch makes the loss NaN."""

    def __call__(self, model: Any, batch: Trajectories) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (model.mode(batch.inputs["step", "observation"]).sum(-1) - batch.target).square().mean()
        return loss, {"loss": loss.detach()}

    def weight(self, batch: Trajectories) -> Tensor:
        return torch.tensor(1.0)


def test_a_fit_ends_before_the_minibatch_that_is_not_finite() -> None:
    actor, reference, data = role(), role(), rows()
    data.target[6] = math.nan
    for part in (data[0:2], data[2:4], data[4:6]):
        reference.update(part, Poisoned())
    with pytest.raises(NonFiniteError, match="loss of 'actor' is not finite at update 3"):
        actor.fit(data, Poisoned(), epochs=2, minibatch=2)
    assert equal(weights(actor), weights(reference))
    assert actor.updates == 3


@pytest.mark.parametrize(
    "changes", [{"micro_batch": 4}, {"micro_steps": 1}, {"precision": "bfloat16"}, {"dropout": True}]
)
def test_what_cannot_be_compiled_whole_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="compile='update'"):
        RoleSettings(Adam(), compile="update", **changes)


class HeadOnly(Gaussian):
    """Only its head learns."""

    @property
    def core(self) -> nn.Module:
        return self.head


def test_a_compiled_role_trains_all_of_its_weights() -> None:
    with pytest.raises(UsageError, match="all of whose weights train"):
        role(HeadOnly(features(), LOW, HIGH), compile="update")


def test_value_regression_of_a_categorical_head_through_a_fit() -> None:
    torch.manual_seed(0)
    critic = role(StateCritic(features(), "hl_gauss", low=-3.0, high=3.0, bins=21), Adam(3e-2))
    data = acted(controller("categorical"), 4, 16).as_rows()
    data.target = data.inputs["step", "observation"][..., 0].clamp(-2, 2)
    before = float(critic.evaluate(lambda m, b: (m.value(b) - b.target).square().mean(), data))
    metrics = critic.fit(
        data, ValueRegression(), epochs=60, minibatch=32, generator=torch.Generator().manual_seed(0)
    )
    after = float(critic.evaluate(lambda m, b: (m.value(b) - b.target).square().mean(), data))
    assert after < 0.1 * before
    assert float(metrics["border_share"]) == 0.0
