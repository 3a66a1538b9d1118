"""The one-step model, and the planner on problems whose best actions are known."""

import torch

from guerdon.dynamics.one_step import OneStepModel, Shooting
from guerdon.policies.action_sequence import SequenceGaussian
from guerdon.policies.features import Entry, Features


class Line:
    """``s' = s + a`` on a line, reward ``-(s + a)^2``, values of a policy known in closed form.

    With the policy that stays (a = 0): ``Q(s, a) = -(s + a)^2 / (1 - gamma)``.
    """

    gamma = 0.5

    def q(self, state, action):
        value = -(state + action).square().squeeze(-1) / (1 - self.gamma)
        return torch.stack([value, value + 1.0])  # the least of the two counts

    def model(self, state, action):
        return state + action


def still(seed=0):
    """A policy whose mean is always 0."""
    torch.manual_seed(seed)
    policy = SequenceGaussian(Features({"": Entry((1,))}, (4,), "relu"), [-1.0], [1.0])
    for weight in policy.mean.parameters():
        torch.nn.init.zeros_(weight)
    return policy.requires_grad_(False)


def test_the_model_predicts_the_next_state_itself():
    torch.manual_seed(0)
    model = OneStepModel(3, 2, (8, 6))
    assert [layer.out_features for layer in model.layers if hasattr(layer, "out_features")] == [8, 6, 3]
    for weight in model.parameters():
        torch.nn.init.zeros_(weight)
    assert torch.equal(model(torch.ones(4, 3), torch.ones(4, 2)), torch.zeros(4, 3))


def test_the_worth_of_a_sequence_is_its_reward_and_the_value_of_its_end_up_to_a_constant():
    line = Line()
    planner = Shooting(still(), line, line.model, gamma=line.gamma)
    state, actions = torch.randn(3, 1), torch.rand(3, 7, 4, 1) * 2 - 1
    worth = planner.worth(state, torch.zeros(3, 1), actions)
    place = state[:, None] + actions.squeeze(-1).cumsum(-1)
    discounts = line.gamma ** torch.arange(4.0)
    end = -(line.gamma**4) * place[..., -1].square() / (1 - line.gamma)
    returns = -(discounts * place.square()).sum(-1) + end
    start = -state.square() / (1 - line.gamma)
    torch.testing.assert_close(worth, returns - start, atol=1e-4, rtol=1e-4)


def test_the_planner_finds_the_best_sequence():
    line = Line()
    planner = Shooting(still(), line, line.model, gamma=line.gamma, samples=200, elites=20, rounds=12)
    state = torch.tensor([[0.5], [-0.3], [1.7]])
    actions = planner.plan(state, torch.zeros(3, 1), 3)
    assert actions.shape == (3, 3, 1)
    expected = torch.tensor([[-0.5, 0, 0], [0.3, 0, 0], [-1.0, -0.7, 0]])
    torch.testing.assert_close(actions.squeeze(-1), expected, atol=0.05, rtol=0)


def test_the_planner_carries_its_sequences_out_open_loop():
    line = Line()
    act = Shooting(still(), line, line.model, gamma=line.gamma, samples=100, elites=10).actor(3)
    seen = torch.tensor([[0.5]]).numpy()
    first = act(seen)["action"]
    assert abs(first[0, 0] + 0.5) < 0.15
    act(seen), act(seen)
    assert act.decisions == 1
    act(seen)
    assert act.decisions == 2
