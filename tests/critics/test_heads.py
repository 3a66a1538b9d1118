"""Value heads: one option changes the loss of any critic."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from guerdon.critics.heads import HeadKind, ValueHead
from guerdon.errors import ShapeError, UsageError
from guerdon.objectives import histogram

KINDS = get_args(HeadKind)
CATEGORICAL = [kind for kind in KINDS if kind != "mse"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_shapes(kind: HeadKind, lead: tuple[int, ...]) -> None:
    head = ValueHead(8, 4, kind, bins=11)
    raw = head(torch.randn(*lead, 8))
    assert raw.shape == ((*lead, 4) if kind == "mse" else (*lead, 4, 11))
    assert head.mean(raw).shape == (*lead, 4)
    assert head.loss(raw, torch.zeros(*lead, 4)).shape == (*lead, 4)
    taken = head.select(raw, torch.zeros(lead, dtype=torch.int64))
    assert head.mean(taken).shape == head.loss(taken, torch.zeros(lead)).shape == lead
    torch.testing.assert_close(taken, head.select(raw, 0))


@pytest.mark.parametrize("kind", KINDS)
def test_first_values_are_near_the_middle_of_the_support(kind: HeadKind) -> None:
    hidden, head = torch.randn(100, 64), ValueHead(64, 3, kind)
    assert head.mean(head(hidden)).abs().max() < 0.1
    if kind != "mse":
        head = ValueHead(64, 3, kind, low=0.0, high=1.0, bins=128)
        torch.testing.assert_close(head.mean(head(hidden)), torch.full((100, 3), 0.5), atol=0.01, rtol=0)


def test_scale_one_is_torchs_linear_layer() -> None:
    torch.manual_seed(1)
    weight = ValueHead(64, 100, scale=1.0).weight
    assert weight.abs().max().item() == pytest.approx(1 / 8, rel=0.01)
    assert weight.std().item() == pytest.approx(nn.Linear(64, 100).weight.std().item(), rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_actions_are_gathered(kind: HeadKind) -> None:
    head = ValueHead(8, 4, kind, bins=11, scale=1.0)
    raw, action = head(torch.randn(6, 8)), torch.tensor([0, 3, 1, 1, 2, 0])
    for i, a in enumerate(action):
        torch.testing.assert_close(head.select(raw, action)[i], raw[i, a])


@pytest.mark.parametrize("kind", KINDS)
def test_members_are_heads_side_by_side(kind: HeadKind) -> None:
    head = ValueHead(8, 4, kind, bins=11, members=3, scale=1.0)
    hidden, action, target = torch.randn(3, 6, 8), torch.randint(4, (6,)), torch.randn(6)
    raw = head(hidden)
    taken = head.select(raw, action)
    losses = head.loss(taken, target)
    assert head.mean(taken).shape == losses.shape == (3, 6)
    for i in range(3):
        one = ValueHead(8, 4, kind, bins=11)
        one.load_state_dict({"weight": head.weight[i : i + 1], "bias": head.bias[i : i + 1]})
        torch.testing.assert_close(one(hidden[i]), raw[i])
        torch.testing.assert_close(one.loss(one.select(one(hidden[i]), action), target), losses[i])
    more = hidden[:, :, None].expand(3, 6, 2, 8)
    torch.testing.assert_close(head(more)[:, :, 1], raw)
    with pytest.raises(ShapeError, match="members"):
        head(hidden[0])


def test_losses_are_the_ones_named() -> None:
    raw, y = torch.randn(5, 11), torch.tensor([-3.0, 0.1, 2.0, 9.9, 14.0])
    torch.testing.assert_close(ValueHead(8).loss(y, torch.zeros(5)), y**2)
    edges, atoms = histogram.edges(-10.0, 10.0, 11), histogram.atoms(-10.0, 10.0, 11)
    expected = {
        "hl_gauss": histogram.hl_gauss(y, edges, 0.5),
        "one_hot": histogram.one_hot(y, edges),
        "two_hot": histogram.two_hot(y, atoms),
        "c51": histogram.two_hot(y, atoms),
    }
    for kind, p in expected.items():
        head = ValueHead(8, 1, kind, bins=11, sigma_ratio=0.5)
        torch.testing.assert_close(head.loss(raw, y), F.cross_entropy(raw, p, reduction="none"))
        torch.testing.assert_close(head.distribution_loss(raw, p), head.loss(raw, y))
    ablation = ValueHead(8, 1, "mse_softmax", bins=11)
    mean = (raw.softmax(-1) * histogram.centres(edges)).sum(-1)
    torch.testing.assert_close(ablation.loss(raw, y), (mean - y) ** 2)
    torch.testing.assert_close(ablation.mean(raw), mean)


@pytest.mark.parametrize("kind", KINDS)
def test_targets_stop_gradients(kind: HeadKind) -> None:
    head, other = ValueHead(8, 2, kind, bins=11, scale=1.0), ValueHead(8, 2, kind, bins=11, scale=1.0)
    hidden = torch.randn(5, 8)
    head.loss(head(hidden), other.mean(other(hidden))).sum().backward()
    assert head.weight.grad is not None
    assert other.weight.grad is None


def test_wrong_pairings_are_refused() -> None:
    for kind in ("mse", "hl_gauss"):
        head = ValueHead(8, 1, kind, bins=11)
        with pytest.raises(ShapeError, match="one target a value"):
            head.loss(head(torch.randn(5, 8)), torch.zeros(5))  # [5, 1] against [5]
    with pytest.raises(UsageError, match="hl_gauss"):
        ValueHead(8, kind="hl_gaus")  # type: ignore[arg-type]
    for options in ({"bins": 1}, {"low": 2.0, "high": 2.0}, {"sigma_ratio": 0.0}, {"high": float("inf")}):
        with pytest.raises(UsageError, match="bins"):
            ValueHead(8, 1, "hl_gauss", **options)
    with pytest.raises(UsageError, match="mse"):
        ValueHead(8).probabilities(torch.zeros(3))
    with pytest.raises(UsageError, match="project"):  # HL-Gauss's target is a scalar, never a distribution
        ValueHead(8, kind="hl_gauss").project(torch.zeros(3), torch.zeros(3), torch.ones(3, 51) / 51)


def test_c51_target_is_the_distribution_of_the_greedy_action() -> None:
    head = ValueHead(8, 3, "c51", bins=21, scale=3.0)
    raw = head(torch.randn(4, 8))
    greedy = head.mean(raw).argmax(-1)
    p = head.probabilities(head.select(raw, greedy))
    reward, discount = torch.tensor([0.0, 1.0, -1.0, 2.5]), torch.tensor([0.99, 0.99, 0.99, 0.0])
    target = head.project(reward, discount, p)
    # away from the borders the mean is the scalar Bellman target
    inside = reward + discount * head.mean(raw).max(-1).values
    torch.testing.assert_close((target * head.centres).sum(-1), inside, atol=0.15, rtol=0)
    assert ((target > 0).sum(-1)[:3] >= 20).all()  # a distribution, not a scalar's two-hot
    torch.testing.assert_close(target[3], histogram.two_hot(reward[3], head.centres))


def test_share_of_targets_at_the_border() -> None:
    target = torch.tensor([-20.0, -10.0, 0.0, 3.0])
    assert ValueHead(8, 1, "hl_gauss").border_share(target).item() == 0.5
    assert ValueHead(8, 1, "mse").border_share(target).item() == 0.0


@pytest.mark.parametrize("kind", CATEGORICAL)
def test_histograms_stay_float32_under_autocast(kind: HeadKind) -> None:
    head, hidden = ValueHead(8, 2, kind, bins=11), torch.randn(5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        raw = head(hidden)
        assert raw.dtype == torch.bfloat16
        value, loss = head.mean(raw), head.loss(raw, torch.zeros(5, 2))
    assert value.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(value, head.mean(raw))  # the grid was not rounded


def test_grids_are_not_learned_nor_saved() -> None:
    head = ValueHead(8, 2, "hl_gauss")
    assert set(head.state_dict()) == set(dict(head.named_parameters())) == {"weight", "bias"}
    assert "51 bins on [-10, 10]" in repr(head)


# -- in every kind of critic -------------------------------------------------------------------------------


def train(modules: nn.Module, loss: object, steps: int = 150) -> None:
    optimiser = torch.optim.Adam(modules.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        loss().backward()  # type: ignore[operator]
        optimiser.step()


@pytest.mark.parametrize("kind", KINDS)
def test_state_value_is_fitted(kind: HeadKind) -> None:
    torso, head = nn.Sequential(nn.Linear(2, 32), nn.Tanh()), ValueHead(32, 1, kind)
    x = torch.randn(128, 2)
    y = 3 * x[:, 0] - 2 * x[:, 1]
    value = lambda: head.select(head(torso(x)), 0)
    before = (head.mean(value()) - y).square().mean()
    train(nn.ModuleList([torso, head]), lambda: head.loss(value(), y).mean())
    assert (head.mean(value()) - y).square().mean() < 0.05 * before


@pytest.mark.parametrize("kind", KINDS)
def test_q_learning_on_a_chain_finds_the_discounted_values(kind: HeadKind) -> None:
    """Four states in a row, one step right or stay; reward 1 at the end: Q* is known."""
    states, gamma = torch.eye(4), 0.9
    observation = states.repeat_interleave(2, 0)
    action = torch.tensor([0, 1] * 4)
    after = (torch.arange(4).repeat_interleave(2) + action).clamp(max=3)
    ended = torch.tensor([False] * 7 + [True])  # right from the last state
    reward = ended.float()
    exact = torch.zeros(4, 2)
    for _ in range(100):
        exact = (reward + gamma * ~ended * exact.max(-1).values[after]).view(4, 2)
    head = ValueHead(4, 2, kind, low=-2.0, high=2.0, bins=41)
    target_net = copy.deepcopy(head)

    def loss() -> Tensor:
        with torch.no_grad():
            raw = target_net(states)[after]
            best = target_net.mean(raw).argmax(-1)  # greedy by means
            discount = gamma * (~ended).float()
            if kind == "c51":
                p = target_net.probabilities(target_net.select(raw, best))
                target = target_net.project(reward, discount, p)
            else:
                target = reward + discount * target_net.mean(target_net.select(raw, best))
        taken = head.select(head(observation), action)
        return (head.distribution_loss if kind == "c51" else head.loss)(taken, target).mean()

    optimiser = torch.optim.Adam(head.parameters(), 0.1)
    for step in range(400):
        if step % 20 == 0:
            target_net.load_state_dict(head.state_dict())
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    atol = 0.2 if kind == "one_hot" else 0.06  # four times half a bin: one-hot rounds at every step
    torch.testing.assert_close(head.mean(head(states)), exact, atol=atol, rtol=0)


def test_conservative_penalty_acts_on_means() -> None:
    """``logsumexp_a Q - Q(s, a)``: its gradient pushes the mean of the taken action up, all others down."""
    head = ValueHead(8, 3, "hl_gauss", scale=1.0)
    raw = head(torch.randn(1, 8)).detach().requires_grad_()
    q = head.mean(raw)
    (q.logsumexp(-1) - head.mean(head.select(raw, 1))).sum().backward()
    moved = head.mean(raw.detach() - 0.1 * raw.grad) - q.detach()
    assert moved[0, 1] > 0
    assert (moved[0, [0, 2]] < 0).all()


def test_transformer_critic_and_twins() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    head = ValueHead(16, 1, "hl_gauss", members=2)
    hidden = layer(torch.randn(3, 7, 16))
    value = head.mean(head.select(head(hidden.expand(2, *hidden.shape)), 0))
    assert value.shape == (2, 3, 7)
    assert not torch.equal(value[0], value[1])  # twins on one torso start apart
    value.min(0).values.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_update_can_be_traced(kind: HeadKind) -> None:
    head = ValueHead(8, 3, kind, bins=11, members=2)

    def loss(parameters: dict[str, Tensor], hidden: Tensor, action: Tensor, target: Tensor) -> Tensor:
        raw = torch.func.functional_call(head, parameters, (hidden,))
        if kind == "c51":
            p = head.probabilities(head.select(raw, 0))[0]
            return head.distribution_loss(
                head.select(raw, action), head.project(target, target * 0, p)
            ).mean()
        return head.loss(head.select(raw, action), target).mean() + head.border_share(target)

    def arguments(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(seed)
        return torch.randn(2, 5, 8), torch.randint(3, (5,)), 8 * torch.randn(5)

    parameters = {name: p.detach() for name, p in head.named_parameters()}
    traced = make_fx(torch.func.grad(loss))(parameters, *arguments(1))
    torch.testing.assert_close(
        traced(parameters, *arguments(2)), torch.func.grad(loss)(parameters, *arguments(2))
    )
