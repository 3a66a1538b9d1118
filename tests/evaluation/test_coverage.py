"""Coverage: cells of a grid that were visited."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from guerdon.errors import CheckpointError, UsageError
from guerdon.evaluation.coverage import Coverage
from guerdon.tasks.warehouse import Warehouse


def test_cells_are_counted_once() -> None:
    coverage = Coverage([0.0, -1.0], [1.0, 1.0], columns=(0, 2), cells=4)
    coverage.add([[0.1, 99.0, -0.9], [0.2, 99.0, -0.6], [0.3, 99.0, -0.9]])
    assert coverage.count == 2
    coverage.add(np.full((2, 3, 3), 0.1))
    assert coverage.count == 3
    coverage.add([[7.0, 0.0, 7.0]])  # outside: the last cell
    assert coverage.visited[3, 3]


def test_it_agrees_with_what_the_warehouse_counts_itself() -> None:
    environment = Warehouse(8, "room")
    coverage = Coverage.of(environment.single_observation_space)
    assert coverage is not None
    observation, _ = environment.reset(seed=0)
    coverage.add(observation)
    random = np.random.default_rng(0)
    for _ in range(400):
        actions = random.uniform([0, -1], [1.5, 1], (8, 2))
        observation, _, _, _, infos = environment.step(actions)
        coverage.add(observation)
        if "final_obs" in infos:
            coverage.add(infos["final_obs"])
    assert environment.coverage() > 100
    assert coverage.count == pytest.approx(environment.coverage(), abs=1)  # float32 at the edge of a cell


def test_spaces_without_two_bounded_entries_have_none() -> None:
    assert Coverage.of(spaces.Discrete(4)) is None
    assert Coverage.of(spaces.Box(-1, 1, (1,))) is None
    assert Coverage.of(spaces.Box(-np.inf, np.inf, (3,))) is None
    assert Coverage.of(spaces.Box(-1, 1, (3,))) is not None


def test_it_is_saved_and_refuses_what_does_not_fit() -> None:
    one, two = (Coverage([0, 0], [1, 1]) for _ in range(2))
    one.add([[0.5, 0.5]])
    two.load_state_dict(one.state_dict())
    assert two.count == 1
    with pytest.raises(CheckpointError, match="40 x 40"):
        Coverage([0, 0], [1, 1], cells=10).load_state_dict(one.state_dict())
    with pytest.raises(UsageError, match="finite"):
        Coverage([0, 0], [1, np.inf])
