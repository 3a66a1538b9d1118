"""The value of a prompt: read from the prompt alone, whatever it is padded with, and fitted by squared error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from guerdon.critics.prompt_value import PromptValue, advantages, fit_prompt_value, prompt_states
from guerdon.errors import DataError, UsageError
from guerdon.experience.datasets import InMemory
from guerdon.policies.language import LanguagePolicy
from guerdon.tasks.tokens import tiny_llama, tokenizer

HEADS = ["attention", "mlp"]


@pytest.fixture(scope="module")
def policy() -> LanguagePolicy:
    return LanguagePolicy(tiny_llama(width=16, layers=2), tokenizer())


def moved(head: str, max_value: float = 1.0) -> PromptValue:
    """A head whose output layer is not zero."""
    torch.manual_seed(0)
    value = PromptValue(16, head, max_value)  # type: ignore[arg-type]
    torch.nn.init.normal_(value.output.weight)
    return value.eval()


@pytest.mark.parametrize("head", HEADS)
def test_a_value_does_not_depend_on_padding_or_on_the_rest_of_the_batch(
    policy: LanguagePolicy, head: str
) -> None:
    value, prompts = moved(head), ["a", "b c d e f", "d d"]
    together = value(*prompt_states(policy, policy.encode(prompts, ["a"] * 3)))
    alone = torch.cat([value(*prompt_states(policy, policy.encode([p], ["a"]))) for p in prompts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    assert together.std() > 1e-4


@pytest.mark.parametrize("head", HEADS)
def test_nothing_is_read_where_the_mask_is_false(head: str) -> None:
    value, states = moved(head), torch.randn(2, 5, 16)
    mask = torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    before = value(states, mask)
    states[0, 3:] = 1e3
    torch.testing.assert_close(value(states, mask), before)
    states[0, 2] += 1.0
    assert value(states, mask)[0] != before[0]


def test_the_states_are_those_of_the_prompt_and_not_of_the_answer(policy: LanguagePolicy) -> None:
    prompts = ["a b c", "d"]
    states, mask = prompt_states(policy, policy.encode(prompts, ["a", "b"]))
    others, _ = prompt_states(policy, policy.encode(prompts, ["h h h", "g"]))
    assert states.shape == (2, 3, 16)
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    torch.testing.assert_close(states, others)
    ids = torch.tensor([policy.tokens("a b c")])
    expected = policy.model.base_model(input_ids=ids).last_hidden_state  # type: ignore[operator]
    torch.testing.assert_close(states[:1], expected)


@pytest.mark.parametrize("head", HEADS)
def test_values_lie_between_zero_and_the_known_maximum_and_begin_in_the_middle(head: str) -> None:
    mask = torch.ones(4, 3, dtype=torch.bool)
    fresh = PromptValue(16, head, max_value=5.0)  # type: ignore[arg-type]
    torch.testing.assert_close(fresh(torch.randn(4, 3, 16), mask), torch.full((4,), 2.5))
    far, states = moved(head, 5.0), torch.randn(4, 3, 16)
    with torch.no_grad():
        far.output.weight.mul_(1e4)
    high = far(states, mask)
    with torch.no_grad():
        far.output.weight.mul_(-1)
    low = far(states, mask)
    torch.testing.assert_close(high + low, torch.full((4,), 5.0))  # as the bias is zero
    for values in (high, low):
        assert ((values >= 0) & (values <= 5)).all()
        assert ((values < 0.1) | (values > 4.9)).all()


def test_the_attention_head_is_the_formula() -> None:
    torch.manual_seed(0)
    value = PromptValue(6, "attention", heads=8, dropout=0.0)  # 6 does not divide by 8, 7: six heads of one
    assert value.attention.num_heads == 6
    torch.nn.init.normal_(value.output.weight)
    states, mask = torch.randn(2, 4, 6), torch.ones(2, 4, dtype=torch.bool)
    mask[0, 2:] = False
    w, b = value.attention.in_proj_weight.chunk(3), value.attention.in_proj_bias.chunk(3)
    q = (value.query @ w[0].T + b[0]).view(1, 6)
    k, v = states @ w[1].T + b[1], states @ w[2].T + b[2]
    logits = (q[:, None] * k).masked_fill(~mask[..., None], -torch.inf)  # a head is one column
    pooled = (logits.softmax(1) * v).sum(1) @ value.attention.out_proj.weight.T
    expected = torch.sigmoid(value.output(pooled + value.attention.out_proj.bias))[:, 0]
    torch.testing.assert_close(value(states, mask), expected)


# --- fitting ----------------------------------------------------------------------------------------------


def drawn(rows: int = 96) -> tuple[Tensor, Tensor, Tensor]:
    """States whose first number decides the reward, and lengths."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(rows, 4, 16, generator=generator)
    states[:, :, 0] = states[:, :1, 0]
    mask = torch.arange(4) < torch.randint(1, 5, (rows, 1), generator=generator)
    return states, mask, 2 * torch.sigmoid(2 * states[:, 0, 0])


@pytest.mark.parametrize("head", HEADS)
def test_fitting_finds_what_decides_the_reward(head: str) -> None:
    states, mask, reward = drawn()
    value, errors = fit_prompt_value(
        lambda rows: (states[rows], mask[rows]),
        reward,
        head,  # type: ignore[arg-type]
        max_value=2.0,
        epochs=40,
        lr=3e-3,
    )
    assert not value.training
    assert not any(p.requires_grad for p in value.parameters())
    error = (value(states, mask) - reward).square().mean()
    assert error < 0.1 * reward.var() < errors[0]


def test_the_weights_of_the_epoch_with_the_lowest_error_are_kept() -> None:
    states, mask, reward = drawn(32)

    def fit(epochs: int, lr: float) -> tuple[PromptValue, list[float]]:
        return fit_prompt_value(
            lambda rows: (states[rows], mask[rows]), reward, max_value=2.0, epochs=epochs, lr=lr
        )

    long, errors = fit(12, 0.3)  # far too large: the error goes up and down
    best = errors.index(min(errors))
    assert best < 11
    short, first = fit(best + 1, 0.3)
    assert first == errors[: best + 1]
    for name, weight in short.state_dict().items():
        torch.testing.assert_close(long.state_dict()[name], weight, rtol=0, atol=0)


def test_fitting_repeats_itself_and_leaves_the_random_state_alone() -> None:
    states, mask, reward = drawn(32)
    torch.manual_seed(1)
    fits = []
    for _ in range(2):
        before = torch.get_rng_state()
        fits.append(
            fit_prompt_value(
                lambda rows: (states[rows], mask[rows]), reward, max_value=2.0, epochs=2, lr=1e-3
            )
        )
        assert torch.equal(before, torch.get_rng_state())
        torch.rand(3)
    assert fits[0][1] == fits[1][1]


def test_advantages_are_rewards_minus_values_in_the_order_of_the_rows(policy: LanguagePolicy) -> None:
    traj = policy.encode(["a b c", "d", "a b", "e"], ["a", "b b", "c", "d"])
    traj = traj.judged(torch.tensor([0.1, 0.9, 0.5, 0.7]))
    value = moved("attention")
    data = InMemory(traj, lengths=torch.tensor([4, 3, 3, 2]))
    found = advantages(value, data, lambda batch: prompt_states(policy, batch))
    expected = traj.score() - value(*prompt_states(policy, traj))
    torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=0)
    assert not found.requires_grad


# --- mistakes ---------------------------------------------------------------------------------------------


def test_rewards_that_no_value_can_reach_are_refused(policy: LanguagePolicy) -> None:
    states, mask, reward = drawn(8)
    with pytest.raises(DataError, match="between 0 and 1"):
        fit_prompt_value(lambda rows: (states[rows], mask[rows]), reward - 1.5)
    traj = policy.encode(["a"], ["b"]).judged(torch.tensor([3.0]))
    with pytest.raises(DataError, match="recorded answers"):
        advantages(moved("mlp"), InMemory(traj), lambda batch: prompt_states(policy, batch))
    with pytest.raises(DataError, match="no rewards"):
        advantages(moved("mlp"), InMemory(traj.with_(reward=None)), lambda b: prompt_states(policy, b))


def test_unknown_heads_and_maxima_are_refused() -> None:
    with pytest.raises(UsageError, match="attention"):
        PromptValue(8, "atention")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="above 0"):
        PromptValue(8, max_value=0.0)
