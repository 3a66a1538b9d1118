"""Credit against loops written from the definitions."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from guerdon.credit import (
    PromptStatistics,
    gae,
    group_relative,
    leave_one_out,
    normalise,
    returns_to_go,
    vtrace,
)
from guerdon.errors import ShapeError, UsageError

F64 = torch.float64


class Case:
    """Rows of several episodes with random ends, everything that `gae` can be told about them."""

    def __init__(self, seed: int, lengths: list[int], steps: int) -> None:
        g = torch.Generator().manual_seed(seed)
        shape = (len(lengths), steps)
        self.mask = torch.arange(steps)[None] < torch.tensor(lengths)[:, None]
        self.reward, self.value, self.next_value, self.old = (
            torch.randn(shape, generator=g, dtype=F64) for _ in range(4)
        )
        self.new = self.old + 0.5 * torch.randn(shape, generator=g, dtype=F64)
        end = torch.rand(shape, generator=g)
        self.terminated, self.truncated = (end < 0.2) & self.mask, (end > 0.8) & self.mask
        # inside an episode the next value is the next state's
        going = self.mask[:, :-1] & self.mask[:, 1:] & ~self.terminated[:, :-1] & ~self.truncated[:, :-1]
        self.next_value[:, :-1] = torch.where(going, self.value[:, 1:], self.next_value[:, :-1])
        self.lengths = lengths


cases = st.builds(
    Case, st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=1, max_size=5), st.just(7)
)


def gae_by_definition(case: Case, gamma: float, lam: float) -> Tensor:
    """``sum_l (gamma lam)^l delta_{t+l}`` up to the end of the episode, a double loop for each row."""
    advantage = torch.zeros_like(case.reward)
    for b, length in enumerate(case.lengths):
        for t in range(length):
            total, factor = 0.0, 1.0
            for k in range(t, length):
                after = 0.0 if case.terminated[b, k] else gamma * case.next_value[b, k].item()
                total += factor * (case.reward[b, k].item() + after - case.value[b, k].item())
                factor *= gamma * lam
                if case.terminated[b, k] or case.truncated[b, k]:
                    break
            advantage[b, t] = total
    return advantage


# --- generalised advantages -------------------------------------------------------------------------------


@given(case=cases, gamma=st.sampled_from([1.0, 0.9]), lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_is_the_double_loop(case: Case, gamma: float, lam: float) -> None:
    advantage, target = gae(
        case.reward,
        case.value,
        case.mask,
        case.terminated,
        case.truncated,
        next_value=case.next_value,
        gamma=gamma,
        lam=lam,
    )
    expected = gae_by_definition(case, gamma, lam)
    torch.testing.assert_close(advantage, expected)
    torch.testing.assert_close(target, (expected + case.value) * case.mask)


@given(case=cases)
def test_bootstrap_is_the_next_value_of_the_last_step(case: Case) -> None:
    last = [max(n - 1, 0) for n in case.lengths]
    bootstrap = case.next_value[torch.arange(len(last)), last]
    cut = torch.zeros_like(case.truncated)
    cut[torch.arange(len(last)), last] = case.truncated[torch.arange(len(last)), last]
    case.truncated = cut
    after = torch.cat([case.value[:, 1:], case.value[:, :1]], 1)
    for b, n in enumerate(last):
        after[b, n] = bootstrap[b]
    case.next_value = after
    one = gae(case.reward, case.value, case.mask, case.terminated, cut, bootstrap=bootstrap)
    two = gae(case.reward, case.value, case.mask, case.terminated, cut, next_value=after)
    torch.testing.assert_close(one[0], two[0])
    torch.testing.assert_close(one[0], gae_by_definition(case, 0.99, 0.95))


def test_truncation_bootstraps_and_termination_does_not() -> None:
    reward, value = torch.tensor([[1.0, 1.0]]), torch.tensor([[10.0, 20.0]])
    mask, yes, no = (
        torch.ones(1, 2, dtype=torch.bool),
        torch.tensor([[False, True]]),
        torch.zeros(1, 2, dtype=torch.bool),
    )
    settings: Any = {"bootstrap": torch.tensor([30.0]), "gamma": 0.5, "lam": 0.0}
    ended, _ = gae(reward, value, mask, yes, no, **settings)
    cut, _ = gae(reward, value, mask, no, yes, **settings)
    both, _ = gae(reward, value, mask, yes, yes, **settings)
    assert ended.tolist() == [[1 + 10 - 10, 1 - 20]]
    assert cut.tolist() == [[1 + 10 - 10, 1 + 15 - 20]]
    assert torch.equal(both, ended)  # for good counts more than cut


def test_an_episode_without_flags_is_complete() -> None:
    reward, value = torch.tensor([[0.0, 0.0, 5.0]]), torch.zeros(1, 3)
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantage, target = gae(reward, value, mask, gamma=1.0, lam=1.0)
    assert advantage.tolist() == [[5, 5, 5]]
    assert torch.equal(advantage, target)


@given(case=cases, extra=st.integers(1, 4))
def test_padding_changes_nothing_even_if_it_is_not_finite(case: Case, extra: int) -> None:
    grow = lambda x, filler: torch.cat([x, torch.full((len(x), extra), filler, dtype=x.dtype)], 1)
    plain = gae(
        case.reward, case.value, case.mask, case.terminated, case.truncated, next_value=case.next_value
    )
    wide = gae(
        grow(case.reward, float("nan")),
        grow(case.value, float("inf")),
        grow(case.mask, False),
        grow(case.terminated, False),
        grow(case.truncated, False),
        next_value=grow(case.next_value, float("nan")),
    )
    for a, b in zip(plain, wide, strict=True):
        torch.testing.assert_close(b, grow(a, 0.0))


def test_lambda_one_is_return_minus_value_and_zero_is_one_step() -> None:
    case = Case(3, [5, 7, 2], 7)
    one, target = gae(case.reward, case.value, case.mask, gamma=0.9, lam=1.0)
    returns = returns_to_go(case.reward, case.mask, 0.9)
    torch.testing.assert_close(target, returns)
    torch.testing.assert_close(one, returns - case.value * case.mask)
    _, target = gae(case.reward, case.value, case.mask, gamma=0.9, lam=0.0)
    torch.testing.assert_close(target[1, :-1], case.reward[1, :-1] + 0.9 * case.value[1, 1:])


def test_float64_inside_keeps_the_digits() -> None:
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 2000, generator=g) + 1000, torch.randn(2, 2000, generator=g)
    mask = torch.ones(2, 2000, dtype=torch.bool)
    exact, _ = gae(reward.double(), value.double(), mask, gamma=0.999, lam=1.0)
    wide, _ = gae(reward, value, mask, gamma=0.999, lam=1.0, dtype=F64)
    narrow, _ = gae(reward, value, mask, gamma=0.999, lam=1.0)
    assert wide.dtype == torch.float32
    assert torch.equal(wide, exact.float())
    assert (narrow - exact).abs().max() > (wide - exact).abs().max()


@pytest.mark.parametrize("steps", [1, 2, 63, 64, 65, 257])
def test_long_rows_are_accumulated_as_a_loop_would(steps: int) -> None:
    case = Case(steps, [steps, steps // 2], steps)
    advantage, _ = gae(
        case.reward,
        case.value,
        case.mask,
        case.terminated,
        case.truncated,
        next_value=case.next_value,
        lam=1.0,
    )
    torch.testing.assert_close(advantage, gae_by_definition(case, 0.99, 1.0))
    returns = returns_to_go(case.reward, case.mask)
    expected = (case.reward * case.mask).flip(1).cumsum(1).flip(1) * case.mask
    torch.testing.assert_close(returns, expected)


def test_credit_carries_no_gradient() -> None:
    value = torch.zeros(1, 3, requires_grad=True)
    for part in gae(torch.ones(1, 3), value, torch.ones(1, 3, dtype=torch.bool)):
        assert not part.requires_grad


def test_what_is_missing_is_said() -> None:
    reward, value, mask = torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    no = torch.zeros_like(mask)
    inside, last, ended = no.clone(), no.clone(), no.clone()
    inside[1, 0] = True
    last[1, 2] = True
    ended[:, 2] = True
    with pytest.raises(ShapeError, match="step 0 of row 1 is truncated inside its row: pass next_value"):
        gae(reward, value, mask, ended, inside, bootstrap=torch.zeros(2))
    with pytest.raises(ShapeError, match="step 2 of row 0 is the last of its row and not terminated"):
        gae(reward, value, mask, no)
    with pytest.raises(ShapeError, match="step 2 of row 1 is the last of its row and not terminated"):
        gae(reward, value, mask, truncated=last)
    with pytest.raises(ShapeError, match="not both"):
        gae(reward, value, mask, bootstrap=torch.zeros(2), next_value=value)
    gae(reward, value, mask, ended)
    gae(reward, value, torch.zeros_like(mask), no)  # rows without steps end nowhere


# --- V-trace and returns ----------------------------------------------------------------------------------


@given(
    case=cases,
    lam=st.sampled_from([1.0, 0.8]),
    clips=st.sampled_from([(1.0, 1.0), (2.0, 0.5), (100.0, 100.0)]),
)
def test_vtrace_is_the_definition(case: Case, lam: float, clips: tuple[float, float]) -> None:
    gamma = 0.9
    advantage, target = vtrace(
        case.new,
        case.old,
        case.reward,
        case.value,
        case.mask,
        case.terminated,
        case.truncated,
        next_value=case.next_value,
        gamma=gamma,
        lam=lam,
        rho_clip=clips[0],
        c_clip=clips[1],
    )
    ratio = (case.new - case.old).exp()
    v, expected = torch.zeros_like(case.value), torch.zeros_like(case.value)
    for b, length in enumerate(case.lengths):
        for t in range(length):
            total, factor = case.value[b, t].item(), 1.0
            for k in range(t, length):
                after = 0.0 if case.terminated[b, k] else gamma * case.next_value[b, k].item()
                rho = min(ratio[b, k].item(), clips[0])
                total += factor * rho * (case.reward[b, k].item() + after - case.value[b, k].item())
                factor *= gamma * lam * min(ratio[b, k].item(), clips[1])
                if case.terminated[b, k] or case.truncated[b, k]:
                    break
            v[b, t] = total
    for b, length in enumerate(case.lengths):
        for t in range(length):
            goes_on = t + 1 < length and not case.terminated[b, t] and not case.truncated[b, t]
            after = (
                v[b, t + 1].item()
                if goes_on
                else (0.0 if case.terminated[b, t] else case.next_value[b, t].item())
            )
            rho = min(ratio[b, t].item(), clips[0])
            expected[b, t] = rho * (case.reward[b, t].item() + gamma * after - case.value[b, t].item())
    torch.testing.assert_close(target, v)
    torch.testing.assert_close(advantage, expected)


def test_vtrace_on_policy_is_gae_with_lambda_one() -> None:
    case = Case(1, [7, 4], 7)
    _, target = vtrace(case.old, case.old, case.reward, case.value, case.mask, bootstrap=case.value[:, 0])
    _, expected = gae(case.reward, case.value, case.mask, bootstrap=case.value[:, 0], lam=1.0)
    torch.testing.assert_close(target, expected)


@given(case=cases, gamma=st.sampled_from([1.0, 0.8]))
def test_returns_to_go(case: Case, gamma: float) -> None:
    ended = case.terminated | case.truncated
    bootstrap = case.value[:, 0]
    expected = torch.zeros_like(case.reward)
    for b, length in enumerate(case.lengths):
        for t in range(length):
            total, factor = 0.0, 1.0
            for k in range(t, length):
                total += factor * case.reward[b, k].item()
                factor *= gamma
                if ended[b, k]:
                    break
            else:
                total += factor * bootstrap[b].item()
            expected[b, t] = total
    torch.testing.assert_close(
        returns_to_go(case.reward, case.mask, gamma, ended=ended, bootstrap=bootstrap), expected
    )


# --- groups -----------------------------------------------------------------------------------------------

groups = st.lists(st.integers(-2, 3), min_size=1, max_size=12)


def scores(group: list[int], seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(len(group), generator=g), torch.tensor(group, dtype=torch.int64)


@given(group=groups, seed=st.integers(0, 99), std=st.booleans(), correction=st.sampled_from([0, 1]))
def test_group_relative(group: list[int], seed: int, std: bool, correction: int) -> None:
    score, labels = scores(group, seed)
    advantage = group_relative(score, labels, std, correction=correction)
    for g in set(group):
        own = score[labels == g].double()
        expected = own - own.mean()
        if std and len(own) > 1:
            expected = expected / (own.std(correction=correction) + 1e-6)
        torch.testing.assert_close(advantage[labels == g].double(), expected, rtol=1e-4, atol=1e-6)
        if len(own) == 1:
            assert advantage[labels == g].item() == 0
    shift = torch.tensor([100.0 * g for g in group])
    torch.testing.assert_close(
        group_relative((score.double() + shift), labels, std).float(),
        group_relative(score.double(), labels, std).float(),
        rtol=1e-4,
        atol=1e-5,
    )
    order = torch.randperm(len(group), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        group_relative(score[order], labels[order], std, correction=correction), advantage[order]
    )


@given(group=groups, seed=st.integers(0, 99))
def test_leave_one_out(group: list[int], seed: int) -> None:
    group = group + group  # nobody alone
    score, labels = scores(group, seed)
    advantage = leave_one_out(score, labels)
    for i in range(len(group)):
        others = [score[j].item() for j in range(len(group)) if j != i and group[j] == group[i]]
        assert advantage[i].item() == pytest.approx(score[i].item() - sum(others) / len(others), abs=1e-5)


def test_equal_scores_earn_exactly_nothing() -> None:
    score, group = torch.full((9,), 0.1), torch.arange(9) // 3
    assert not group_relative(score, group).any()
    assert not leave_one_out(score, group).any()
    assert not PromptStatistics(8, 2).update(group, score).any()


def test_leave_one_out_of_one_is_refused() -> None:
    with pytest.raises(ShapeError, match="group 7 has a single row"):
        leave_one_out(torch.zeros(3), torch.tensor([1, 7, 1]))


def test_normalise() -> None:
    g = torch.Generator().manual_seed(0)
    advantage = 5 + 3 * torch.randn(4, 6, generator=g)
    mask = torch.arange(6)[None] < torch.tensor([6, 3, 0, 1])[:, None]
    result = normalise(advantage, mask)
    real = result[mask]
    assert abs(real.mean().item()) < 1e-6
    assert real.std().item() == pytest.approx(1, abs=1e-5)
    assert not result[~mask].any()
    torch.testing.assert_close(
        real, (advantage[mask] - advantage[mask].mean()) / (advantage[mask].std() + 1e-8)
    )
    wide = normalise(
        torch.nn.functional.pad(advantage, (0, 3), value=float("nan")), torch.nn.functional.pad(mask, (0, 3))
    )
    torch.testing.assert_close(wide[:, :6], result)
    torch.testing.assert_close(normalise(advantage + 100, mask), result, rtol=1e-3, atol=1e-4)
    assert normalise(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool)).item() == 0
    assert not normalise(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool)).any()


@pytest.mark.parametrize("rows", [1, 2, 7, 64, 256])
@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, -12.34, 1e6])
def test_normalise_gives_equal_advantages_exactly_zero(rows: int, value: float) -> None:
    """Their rounding errors must not be blown up to the size of a real advantage."""
    assert not normalise(torch.full((rows, 3), value), torch.ones(rows, 3, dtype=torch.bool)).any()


# --- running statistics of each prompt --------------------------------------------------------------------


class Published:
    """The published semantics in numpy: put in first, then compare with the prompt or the whole batch."""

    def __init__(self, size: int, least: int) -> None:
        self.size, self.least, self.kept = size, least, {}

    def update(self, group: list[int], score: np.ndarray) -> np.ndarray:
        result = np.empty_like(score)
        for prompt in set(group):
            rows = np.array([g == prompt for g in group])
            self.kept[prompt] = (self.kept.get(prompt, []) + list(score[rows]))[-self.size :]
            numbers = score if len(self.kept[prompt]) < self.least else np.array(self.kept[prompt])
            result[rows] = (score[rows] - numbers.mean()) / (numbers.std() + 1e-6)
        return result


@given(
    stream=st.lists(groups, min_size=1, max_size=6),
    seed=st.integers(0, 99),
    sizes=st.sampled_from([(1, 1), (4, 2), (3, 3), (32, 16)]),
)
def test_prompt_statistics_are_the_published_ones(
    stream: list[list[int]], seed: int, sizes: tuple[int, int]
) -> None:
    mine, theirs = PromptStatistics(*sizes), Published(*sizes)
    for number, group in enumerate(stream):
        score, labels = scores(group, seed + number)
        expected = theirs.update(group, score.double().numpy())
        np.testing.assert_allclose(
            mine.update(labels, score.double()).numpy(), expected, rtol=1e-6, atol=1e-6
        )


def test_the_whole_batch_stands_in_until_a_prompt_has_enough() -> None:
    statistics = PromptStatistics(buffer_size=4, min_count=3)
    group = torch.tensor([0, 0, 1])
    score = torch.tensor([1.0, 2.0, 6.0])
    first = statistics.update(group, score)
    torch.testing.assert_close(first, (score - 3) / (score.std(correction=0) + 1e-6))
    second = statistics.update(group, torch.tensor([3.0, 4.0, 8.0]))
    own = torch.tensor([1.0, 2.0, 3.0, 4.0])  # prompt 0 now has four, prompt 1 only two
    torch.testing.assert_close(second[:2], (torch.tensor([3.0, 4.0]) - 2.5) / own.std(correction=0))
    batch = torch.tensor([3.0, 4.0, 8.0])
    torch.testing.assert_close(second[2], (8 - batch.mean()) / batch.std(correction=0))
    third = statistics.update(torch.tensor([0, 0]), torch.tensor([9.0, 9.0]))  # 1 and 2 are forgotten
    own = torch.tensor([3.0, 4.0, 9.0, 9.0])
    torch.testing.assert_close(third, (torch.tensor([9.0, 9.0]) - own.mean()) / own.std(correction=0))


@given(stream=st.lists(groups, min_size=1, max_size=4), seed=st.integers(0, 99))
def test_a_constant_added_to_a_prompts_scores_changes_nothing(stream: list[list[int]], seed: int) -> None:
    plain, shifted = PromptStatistics(8, 1), PromptStatistics(8, 1)
    for number, group in enumerate(stream):
        score, labels = scores(group, seed + number)
        score = score.double()
        a = plain.update(labels, score)
        b = shifted.update(labels, score + 50.0 * labels)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_state_survives_a_file_and_continues_identically() -> None:
    statistics = PromptStatistics(4, 2)
    for seed in range(5):
        score, labels = scores([0, 3, 3, -1, 0], seed)
        statistics.update(labels, score)
    file = io.BytesIO()
    torch.save(statistics.state_dict(), file)
    file.seek(0)
    again = PromptStatistics(4, 2)
    again.load_state_dict(torch.load(file, weights_only=True))
    shorter = PromptStatistics(2, 2)
    shorter.load_state_dict(statistics.state_dict())
    assert shorter.state_dict()["counts"].tolist() == [2, 2, 2]
    for seed in range(5, 9):
        score, labels = scores([3, 0, 5], seed)
        assert torch.equal(statistics.update(labels, score), again.update(labels, score))
    empty = PromptStatistics()
    empty.load_state_dict(PromptStatistics().state_dict())
    assert empty.state_dict()["prompts"].tolist() == []


def test_a_bad_score_is_named_and_nothing_is_kept() -> None:
    statistics = PromptStatistics(4, 2)
    with pytest.raises(ShapeError, match="score of row 1 is nan"):
        statistics.update(torch.tensor([0, 0]), torch.tensor([1.0, float("nan")]))
    assert len(statistics.state_dict()["scores"]) == 0
    with pytest.raises(UsageError, match="min_count is 9"):
        PromptStatistics(8, 9)
