"""Replay against lists: what is drawn, n-step sums, priorities, windows, files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guerdon.errors import UsageError
from guerdon.experience.replay import Replay
from guerdon.run import checkpoint

GAMMA = 0.9


class Listed:
    """The same memory as lists of dictionaries, one for each stream."""

    def __init__(self, length: int, streams: int) -> None:
        self.length, self.rows = length, [[] for _ in range(streams)]

    def add(self, step: dict[str, Any]) -> None:
        for stream, rows in enumerate(self.rows):
            rows.append({name: value[stream] for name, value in step.items()})

    def at(self, index: int) -> tuple[list[dict[str, Any]], int]:
        """The stream that holds row ``index`` (only what is still remembered), and its place there."""
        slot, stream = divmod(index, len(self.rows))
        rows = self.rows[stream]
        kept = rows[-self.length :]
        newest = (len(rows) - 1) % self.length
        return kept, len(kept) - 1 - (newest - slot) % self.length

    def n_steps(self, index: int, n: int) -> dict[str, Any]:
        rows, place = self.at(index)
        total, count = 0.0, 0
        for row in rows[place : place + n]:
            total += GAMMA**count * row["reward"]
            count += 1
            if row["terminated"] or row["truncated"]:
                break
        last = rows[place + count - 1]
        return {
            **rows[place],
            "reward": total,
            "discount": GAMMA**count,
            **{name: last[name] for name in ("next_observation", "terminated", "truncated")},
        }

    def previous_action(self, index: int) -> Any:
        rows, place = self.at(index)
        before = rows[place - 1] if place else None
        fresh = before is None or before["terminated"] or before["truncated"]
        return np.zeros_like(rows[place]["action"]) if fresh else before["action"]


def steps(
    count: int, streams: int, seed: int, discrete: bool = False, ends: float = 0.3
) -> list[dict[str, Any]]:
    """Random steps; each observation is a number of its own, so that none can be taken for another."""
    random = np.random.default_rng(seed)
    made = []
    for t in range(count):
        number = np.arange(streams, dtype=np.float32) + 100 * t
        end = random.random(streams)
        action = (
            random.integers(0, 4, streams) if discrete else random.standard_normal((streams, 2), np.float32)
        )
        made.append(
            {
                "observation": np.stack([number, -number], 1),
                "action": action,
                "reward": random.standard_normal(streams).astype(np.float32),
                "next_observation": np.stack([number + 0.5, -number], 1),
                "terminated": end < ends / 2,
                "truncated": (end >= ends / 2) & (end < ends),
            }
        )
    return made


def filled(replay: Replay, history: list[dict[str, Any]]) -> Listed:
    listed = Listed(replay.length, replay.environments)
    for step in history:
        replay.add(**step)
        listed.add(step)
    return listed


@settings(max_examples=40)
@given(
    count=st.integers(1, 25),
    streams=st.integers(1, 3),
    length=st.integers(4, 9),
    n_step=st.integers(1, 4),
    prioritised=st.booleans(),
    discrete=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_row_is_what_a_list_would_give(
    count: int, streams: int, length: int, n_step: int, prioritised: bool, discrete: bool, seed: int
) -> None:
    replay = Replay(length * streams, streams, GAMMA, n_step, prioritised, seed=seed)
    listed = filled(replay, steps(count, streams, seed, discrete))
    assert len(replay) == min(count, length) * streams
    batch = replay.sample(40, previous_action=True)
    batch.check()
    assert int(batch.index.max()) < len(replay)
    for i, index in enumerate(batch.index.tolist()):
        expected = listed.n_steps(index, n_step)
        for name, value in expected.items():
            np.testing.assert_allclose(
                getattr(batch, name)[i].numpy(), value, rtol=1e-5, atol=1e-6, err_msg=name
            )
        np.testing.assert_array_equal(batch.previous_action[i].numpy(), listed.previous_action(index))


def test_rows_are_drawn_uniformly_and_again_by_the_seed() -> None:
    def drawn(seed: int) -> torch.Tensor:
        replay = Replay(12, 2, seed=seed)
        filled(replay, steps(9, 2, 0))
        return replay.sample(24_000).index

    index = drawn(3)
    assert torch.equal(index, drawn(3))
    assert not torch.equal(index, drawn(4))
    np.testing.assert_allclose(np.bincount(index) / 2000, np.ones(12), atol=0.1)


def test_noise_comes_with_continuous_actions_only() -> None:
    replay = Replay(8, 2)
    filled(replay, steps(4, 2, 0))
    noise = replay.sample(5000).noise
    assert noise.shape == (5000, 2, 2)
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.03
    assert replay.sample(3, draws=4).noise.shape == (3, 4, 2)
    discrete = Replay(8, 2)
    filled(discrete, steps(4, 2, 0, discrete=True))
    assert discrete.sample(3).noise is None


def test_observations_may_be_pixels_or_dictionaries() -> None:
    replay = Replay(6, 2, n_step=2)
    for t in range(4):
        seen = {"camera": np.full((2, 3, 3), t, np.uint8), "gear": np.array([t, t + 10])}
        after = {"camera": np.full((2, 3, 3), t + 1, np.uint8), "gear": np.array([t + 1, t + 11])}
        no = np.zeros(2, bool)
        replay.add(seen, np.zeros(2, np.int64), np.ones(2, np.float32), after, no, no)
    batch = replay.sample(20)
    assert batch.observation["camera"].dtype == torch.uint8
    assert batch.observation["camera"].shape == (20, 3, 3)
    ahead = batch.next_observation["gear"] - batch.observation["gear"]
    slot = batch.index // 2  # slots 0 to 2 hold steps 3, 1, 2: after step 3 nothing is known
    assert torch.equal(ahead, torch.where(slot == 0, 1, 2))
    state = replay.state_dict()
    again = Replay(6, 2, n_step=2)
    again.load_state_dict(state)
    assert torch.equal(again.sample(9).observation["gear"], replay.sample(9).observation["gear"])


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_reward_of_one_for_ever_is_worth_the_same_from_everywhere(n_step: int) -> None:
    """With V = 1 / (1 - gamma), reward + discount * V = V unless the episode terminated within the n steps: cuts, and
    the end of what is known, are bootstrapped."""
    replay = Replay(60, 3, GAMMA, n_step)
    history = steps(33, 3, 5)
    for step in history:
        step["reward"] = np.ones(3, np.float32)
    listed = filled(replay, history)
    batch, value = replay.sample(300), 1 / (1 - GAMMA)
    target = batch.reward + torch.where(batch.terminated, 0.0, batch.discount) * value
    for i, index in enumerate(batch.index.tolist()):
        rows, place = listed.at(index)
        expected = value
        for k, row in enumerate(rows[place : place + n_step]):
            if row["terminated"]:
                expected = (1 - GAMMA ** (k + 1)) / (1 - GAMMA)
            if row["terminated"] or row["truncated"]:
                break
        assert float(target[i]) == pytest.approx(expected, rel=1e-5)
    assert batch.terminated.any()
    assert batch.truncated.any()


# --- priorities -------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(st.integers(2, 13), st.integers(0, 1000))
def test_rows_are_drawn_by_their_priority_and_corrected_for_it(size: int, seed: int) -> None:
    replay = Replay(size, 1, prioritised=True, alpha=0.7, beta=0.5, seed=seed)
    filled(replay, steps(size + 3, 1, seed))
    error = torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 4 - 2
    replay.prioritise(torch.arange(size), error)
    priority = (error.abs().double() + 1e-6) ** 0.7
    share = (priority / priority.sum()).numpy()
    batch = replay.sample(4000)
    # drawn from equal shares of the total, so the counts hardly vary
    np.testing.assert_allclose(np.bincount(batch.index, minlength=size) / 4000, share, atol=2 / 4000 + 1e-9)
    weight = (size * share) ** -0.5
    expected = weight[batch.index] / weight[batch.index].max()
    np.testing.assert_allclose(batch.weight.numpy(), expected, rtol=1e-4)


def test_new_rows_have_the_largest_priority_so_far() -> None:
    replay = Replay(4, 1, prioritised=True, alpha=1.0)
    filled(replay, steps(3, 1, 0))
    replay.prioritise(torch.arange(3), torch.tensor([5.0, 1e-3, 1e-3]))
    replay.add(**steps(1, 1, 1)[0])
    counts = np.bincount(replay.sample(1000).index, minlength=4)
    assert counts[0] == pytest.approx(500, abs=2)
    assert counts[3] == pytest.approx(500, abs=2)
    replay.add(**steps(1, 1, 2)[0])  # in place of the first
    counts = np.bincount(replay.sample(1000).index, minlength=4)
    assert counts[0] == pytest.approx(500, abs=2)


def test_rows_that_hold_nothing_are_never_drawn() -> None:
    replay = Replay(100, 3, prioritised=True)
    filled(replay, steps(2, 3, 0))
    replay.prioritise(torch.arange(5), torch.zeros(5))  # next to nothing is left but the last row
    assert int(replay.sample(500).index.max()) < 6


def test_a_uniform_replay_has_no_priorities() -> None:
    replay = Replay(4, 1)
    filled(replay, steps(4, 1, 0))
    replay.prioritise(torch.arange(4), torch.tensor([9.0, 0.0, 0.0, 0.0]))
    batch = replay.sample(4000)
    assert batch.weight is None
    np.testing.assert_allclose(np.bincount(batch.index) / 1000, np.ones(4), atol=0.1)


# --- windows ----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(st.integers(1, 25), st.integers(1, 3), st.integers(1, 5), st.integers(0, 1000))
def test_windows_are_runs_of_one_episode(count: int, streams: int, run: int, seed: int) -> None:
    replay = Replay(8 * streams, streams, GAMMA, n_step=2, seed=seed)
    listed = filled(replay, steps(count, streams, seed))
    batch = replay.windows(6, run)
    observation, weight = batch.observation.view(6, run, 2), batch.weight.view(6, run)
    for i, first in enumerate(batch.index.view(6, run)[:, 0].tolist()):
        rows, place = listed.at(first)
        real = []
        for row in rows[place : place + run]:
            real.append(row)
            if row["terminated"] or row["truncated"]:
                break
        assert weight[i].tolist() == [1.0] * len(real) + [0.0] * (run - len(real))
        for j in range(run):
            row = real[min(j, len(real) - 1)]
            np.testing.assert_array_equal(observation[i, j].numpy(), row["observation"])
            assert float(batch.reward.view(6, run)[i, j]) == row["reward"]
    assert torch.equal(batch.discount, torch.full((6 * run,), GAMMA))


# --- files and refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prioritised", [False, True])
@pytest.mark.parametrize("count", [3, 20])
def test_a_restored_replay_goes_on_bit_for_bit(prioritised: bool, count: int, tmp_path: Any) -> None:
    def make() -> Replay:
        return Replay(16, 2, GAMMA, 3, prioritised, seed=1)

    replay, history = make(), steps(count + 5, 2, 0)
    filled(replay, history[:count])
    replay.sample(3)
    if prioritised:
        replay.prioritise(torch.arange(4), torch.randn(4))
    checkpoint.save(tmp_path, 1, {"replay": replay.state_dict()})
    again = make()
    again.load_state_dict(checkpoint.load_newest(tmp_path)[1]["replay"])
    for step in history[count:]:
        for one in (replay, again):
            one.add(**step)
        a, b = replay.sample(10, previous_action=True), again.sample(10, previous_action=True)
        for name in ("index", "observation", "action", "reward", "next_observation", "discount", "noise"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        if prioritised:
            assert torch.equal(a.weight, b.weight)


def test_a_checkpoint_holds_the_filled_part_only(tmp_path: Any) -> None:
    replay = Replay(200_000, 1)
    filled(replay, steps(10, 1, 0))
    folder = checkpoint.save(tmp_path, 1, replay.state_dict())
    assert (folder / "state.pt").stat().st_size < 50_000


@pytest.mark.parametrize("other", [(12, 2), (20, 2), (16, 4), (16, 1)])
@pytest.mark.parametrize("count", [3, 20])
def test_a_replay_of_another_size_is_refused(other: tuple[int, int], count: int) -> None:
    replay, smaller = Replay(16, 2), Replay(*other)
    filled(replay, steps(count, 2, 0))
    fits = count == 3 and other in ((12, 2), (20, 2))  # not full yet: nothing depends on the capacity
    if fits:
        smaller.load_state_dict(replay.state_dict())
        assert len(smaller) == 6
        return
    with pytest.raises(UsageError, match="another size"):
        smaller.load_state_dict(replay.state_dict())
    assert len(smaller) == 0


@pytest.mark.parametrize("draw", [lambda r: r.sample(2), lambda r: r.windows(2, 2)])
def test_an_empty_replay_is_refused(draw: Callable[[Replay], Any]) -> None:
    with pytest.raises(UsageError, match="the replay is empty"):
        draw(Replay(8, 2))


def test_a_replay_that_is_too_small_is_refused() -> None:
    with pytest.raises(UsageError, match="too small for 4 environments and 3-step"):
        Replay(10, 4, n_step=3)
