"""The targets and losses of DQN, SAC and TD3 against row-by-row loops, and closed forms at the ends of episodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from control_for_tests import HIGH, LOW, controller, features, transitions
from guerdon.critics.action import ActionCritic
from guerdon.critics.greedy import Greedy
from guerdon.objectives.action_value import (
    DeterministicImprovement,
    QLearning,
    SoftBellman,
    SoftImprovement,
    TwinBellman,
)

CATEGORICAL = {"low": -4.0, "high": 4.0, "bins": 9}
GAMMA = 0.9


def q_net(head: str = "mse", seed: int = 0) -> Greedy:
    torch.manual_seed(seed)
    net = Greedy(features(), 4, head, {} if head == "mse" else CATEGORICAL)
    with torch.no_grad():
        net.head.weight.normal_()
    return net


def twins(actions: int = 0, head: str = "mse", seed: int = 0, members: int = 2) -> ActionCritic:
    torch.manual_seed(seed)
    sizes = {"actions": actions} if actions else {"action": 2}
    options = {} if head == "mse" else CATEGORICAL
    net = ActionCritic(features(hidden=()), hidden=(8,), members=members, head=head, **sizes, **options)
    with torch.no_grad():
        net.head.weight.normal_()
    return net


def constant(net: Any, value: float) -> Any:
    """The same net, with one value everywhere."""
    with torch.no_grad():
        net.head.weight.zero_()
        net.head.bias.fill_(value)
    return net


# --- DQN --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("huber", [False, True])
def test_q_learning_row_by_row(double: bool, huber: bool) -> None:
    net, target, batch = q_net(), q_net(seed=1), transitions(actions=4)
    batch.reward *= 3.0  # errors on both sides of 1
    batch.weight = torch.rand(16)
    losses = []
    for i in range(16):
        following = batch.next_observation[i : i + 1]
        q = target.q(following)[0]
        best = (net.q(following)[0] if double else q).argmax()
        y = batch.reward[i] + (0.0 if batch.terminated[i] else 0.9) * q[best].detach()
        error = net.q(batch.observation[i : i + 1])[0, batch.action[i]] - y
        near = 0.5 * error**2 if error.abs() < 1 else error.abs() - 0.5
        loss = near if huber else error**2
        losses.append(batch.weight[i] * loss)
    loss, metrics = QLearning(double, huber)(net, batch, target)
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    torch.testing.assert_close(metrics["loss"], loss.detach())
    found = torch.autograd.grad(loss, net.head.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(torch.stack(losses).mean(), net.head.weight)[0])


def test_nothing_flows_into_the_target() -> None:
    net, target = q_net(), q_net(seed=1)
    QLearning()(net, transitions(actions=4), target)[0].backward()
    assert net.head.weight.grad is not None
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("head", ["hl_gauss", "two_hot", "c51", "mse_softmax"])
def test_q_learning_with_a_categorical_head(head: str) -> None:
    net, target, batch = q_net(head), q_net(head, seed=1), transitions(actions=4)
    loss, metrics = QLearning()(net, batch, target)
    following, raw = batch.next_observation, net.q_raw(batch.observation)
    best = net.q(following).argmax(1)
    follows = torch.where(batch.terminated, 0.0, 0.9)
    rows = torch.arange(16)
    taken = raw[rows, batch.action]
    y = batch.reward + follows * target.q(following)[rows, best]
    if head == "mse_softmax":
        expected = (net.q(batch.observation)[rows, batch.action] - y.detach()).square()
    elif head == "c51":
        p = target.q_raw(following)[rows, best].softmax(-1)
        atoms, width = net.head.centres, 1.0  # nine atoms from -4 to 4
        share = torch.zeros(16, 9)
        for i in range(16):
            for j in range(9):
                place = (float(batch.reward[i] + follows[i] * atoms[j]) + 4.0) / width
                place = min(max(place, 0.0), 8.0)
                low = min(math.floor(place), 7)
                share[i, low] += p[i, j].item() * (1 - (place - low))
                share[i, low + 1] += p[i, j].item() * (place - low)
        expected = -(share * taken.log_softmax(-1)).sum(-1)
    else:
        expected = -(net.head.encode(y.detach()) * taken.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss, expected.mean())
    assert 0.0 <= float(metrics["border_share"]) <= 1.0


def test_errors_are_those_of_the_values() -> None:
    net, target, batch = q_net(), q_net(seed=1), transitions(actions=4)
    y, _ = QLearning().targets(net, batch, target)
    expected = y - net.q(batch.observation).gather(1, batch.action[:, None])[:, 0]
    torch.testing.assert_close(QLearning().errors(net, batch, target), expected)


# --- SAC --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_soft_bellman_row_by_row(own: bool) -> None:
    critic, target, actor, batch = twins(), twins(seed=1), controller("squashed"), transitions()
    if own:
        actor.learn_temperature(0.5)
    alpha = 0.5 if own else 0.2
    losses = torch.zeros(2)
    for i in range(16):
        row = slice(i, i + 1)
        action, log_prob = actor.draw(batch.next_observation[row], batch.noise[row, 1])
        soft = target.q(batch.next_observation[row], action).min() - alpha * log_prob[0]
        y = batch.reward[i] + (0.0 if batch.terminated[i] else 0.9) * soft
        losses = (
            losses + (critic.q(batch.observation[row], batch.action[row])[:, 0] - y.detach()).square() / 16
        )
    loss, metrics = SoftBellman(alpha=0.2)(critic, batch, target, actor)
    torch.testing.assert_close(loss, losses.sum())
    torch.testing.assert_close(metrics["q"], critic.q(batch.observation, batch.action).mean())
    loss.backward()
    assert all(p.grad is None for p in [*target.parameters(), *actor.parameters()])


def test_soft_bellman_with_discrete_actions_is_an_exact_mean() -> None:
    critic, target, actor, batch = (
        twins(4),
        twins(4, seed=1),
        controller("categorical"),
        transitions(actions=4),
    )
    p = actor.logits(batch.next_observation).softmax(-1)
    q = target.q(batch.next_observation).amin(0)
    soft = sum(p[:, a] * (q[:, a] - 0.2 * p[:, a].log()) for a in range(4))
    y = batch.reward + torch.where(batch.terminated, 0.0, 0.9) * soft
    taken = critic.q(batch.observation)[:, torch.arange(16), batch.action]
    loss, _ = SoftBellman(alpha=0.2)(critic, batch, target, actor)
    torch.testing.assert_close(loss, (taken - y.detach()).square().mean(1).sum())


def _gradients(loss: Tensor, module: Any) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(module.parameters()), allow_unused=True))


@pytest.mark.parametrize("kind", ["squashed", "categorical"])
def test_soft_improvement_and_its_temperature(kind: str) -> None:
    discrete = kind == "categorical"
    critic, actor = twins(4 if discrete else 0), controller(kind).requires_grad_(True)
    batch = transitions(actions=4 if discrete else None)
    actor.learn_temperature(0.5)
    loss, metrics = SoftImprovement(target_entropy=-1.0)(actor, batch, critic)
    if discrete:
        log_p = actor.logits(batch.observation).log_softmax(-1)
        q = critic.q(batch.observation).amin(0)
        expected = (log_p.exp() * (0.5 * log_p - q)).sum(-1).mean()
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
    else:
        action, log_prob = actor.draw(batch.observation, batch.noise[:, 0])
        expected = (0.5 * log_prob - critic.q(batch.observation, action).amin(0)).mean()
        entropy = -log_prob.mean()
    torch.testing.assert_close(metrics["loss"], expected.detach())
    torch.testing.assert_close(metrics["entropy"], entropy.detach())
    assert float(metrics["alpha"]) == pytest.approx(0.5)
    names = [n for n, _ in actor.named_parameters()]
    found = dict(zip(names, _gradients(loss, actor), strict=True))
    wanted = dict(zip(names, _gradients(expected, actor), strict=True))
    # too much entropy: the temperature falls, in proportion to the excess; and nothing else feels it
    torch.testing.assert_close(found.pop("log_temperature"), (entropy + 1.0).detach())
    wanted.pop("log_temperature")
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)


def test_a_learned_temperature_meets_its_target() -> None:
    """With values that are all alike, the entropy that a categorical actor keeps is decided by nothing but alpha."""
    actor, critic = controller("categorical").requires_grad_(True), constant(twins(4), 0.0)
    actor.learn_temperature(0.3)
    batch = transitions(actions=4)
    for target, direction in ((0.0, -1.0), (10.0, 1.0)):
        loss, _ = SoftImprovement(target_entropy=target)(actor, batch, critic)
        gradient = torch.autograd.grad(loss, actor.log_temperature)[0]
        assert math.copysign(1.0, -float(gradient)) == direction


# --- TD3 --------------------------------------------------------------------------------------------------


def test_twin_bellman_row_by_row() -> None:
    critic, target, actor, batch = twins(), twins(seed=1), controller("deterministic"), transitions()
    batch.noise[0, 1] = torch.tensor([9.0, -9.0])  # cut to 0.5 of half the range
    scale, low, high = torch.tensor([2.0, 0.5]), torch.tensor(LOW), torch.tensor(HIGH)
    y = []
    for i in range(16):
        following = batch.next_observation[i : i + 1]
        noise = (0.2 * batch.noise[i, 1]).clamp(-0.5, 0.5) * scale
        action = (actor.mode(following)[0] + noise).clamp(low, high)
        q = target.q(following, action[None]).min()
        y.append(batch.reward[i] + (0.0 if batch.terminated[i] else 0.9) * q)
    expected = (critic.q(batch.observation, batch.action) - torch.stack(y).detach()).square().mean(1).sum()
    loss, _ = TwinBellman()(critic, batch, target, actor)
    torch.testing.assert_close(loss, expected)


def test_the_deterministic_actor_climbs_the_first_critic() -> None:
    critic, actor, batch = twins(), controller("deterministic").requires_grad_(True), transitions()
    loss, metrics = DeterministicImprovement()(actor, batch, critic)
    q = critic.q(batch.observation, actor.mode(batch.observation))
    torch.testing.assert_close(loss, -q[0].mean())
    torch.testing.assert_close(metrics["loss"], loss.detach())
    assert not torch.equal(q[0], q[1])


# --- ends of episodes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dqn", "c51", "sac", "sac discrete", "td3"])
def test_only_what_terminated_is_worth_nothing_afterwards(method: str) -> None:
    """A reward of 1 for ever is worth 1 / (1 - gamma); after a cut too, and after an end for good it is worth 1."""
    value = 1 / (1 - GAMMA)
    batch = transitions(actions=4 if method in ("dqn", "c51", "sac discrete") else None)
    batch.reward.fill_(1.0)
    fits = torch.where(batch.terminated, 1.0, value)
    if method in ("dqn", "c51"):
        if method == "c51":
            torch.manual_seed(0)
            target = Greedy(features(), 4, "c51", {"low": 0.0, "high": 10.0, "bins": 11})
            with torch.no_grad():
                target.head.weight.zero_()
                target.head.bias.view(4, 11)[:] = torch.tensor([-1e3] * 10 + [0.0])  # all mass on 10
        else:
            target = constant(q_net(), value)
        y, distribution = QLearning().targets(q_net(), batch, target)
        if distribution is not None:
            torch.testing.assert_close(distribution @ target.head.centres, fits)
    else:
        discrete = method == "sac discrete"
        target = constant(twins(4 if discrete else 0), value)
        critic = constant(twins(4 if discrete else 0), 0.0)
        if method == "td3":
            loss, _ = TwinBellman()(critic, batch, target, controller("deterministic"))
        else:
            actor = controller("categorical" if discrete else "squashed")
            loss, _ = SoftBellman(alpha=0.0)(critic, batch, target, actor)
        torch.testing.assert_close(loss, 2 * fits.square().mean())  # two members, each off by its target
        return
    torch.testing.assert_close(y, fits)


@pytest.mark.parametrize("objective", [QLearning(), SoftBellman(), TwinBellman()])
def test_losses_count_rows(objective: Any) -> None:
    assert float(objective.weight(transitions(7))) == 7.0
