"""Every objective on every kind of policy: the grid, and that a row or a column costs ten lines."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from guerdon import matrix
from guerdon.cli import main as guerdon
from guerdon.experience.prompts import Prompted
from guerdon.feedback.functions import FunctionReward
from guerdon.matrix import COLUMNS, ROWS, Column, Row, columns, grid, report, rows, run_cell
from guerdon.policies.tabular import CategoricalTable

QUICK = {"table": {}, "categorical": {"rounds": 12}, "gaussian": {"rounds": 14}, "language": {"rounds": 14}}


def quick(name: str) -> Column:
    from dataclasses import replace

    return replace(COLUMNS[name], **QUICK[name])


# --- ten lines each -----------------------------------------------------------------------------------------------


class Toy:  # an objective: raise the log-probability of answers that scored above the mean
    def weight(self, batch):
        return batch.mask.sum()

    def __call__(self, policy, batch):
        loss = -((batch.score() > 0).float()[:, None] * policy.log_prob(batch)).mean()
        return loss, {"loss": loss.detach()}


class Coin(CategoricalTable):  # a policy: a coin for each of two people
    def __init__(self):
        super().__init__(["ada", "ben"], 2)


HEADS = Column(
    "coin",
    "coin",
    Coin,
    lambda seed: Prompted(["ada", "ben"], seed=seed),
    lambda: FunctionReward(lambda actions, prompts: (actions[:, 0] == 1).astype("float32"), "heads"),
    goal=1.0,
    lr=0.05,
    one_step=True,
)


@pytest.fixture
def registered():
    matrix.register(Row("toy", "toy", Toy(), rows.as_they_are))
    matrix.register(HEADS)
    yield
    del ROWS["toy"], COLUMNS["coin"]


def test_a_new_objective_is_a_row_and_a_new_policy_a_column(registered, tmp_path):
    """Registered in ten lines, each meets all that was there before, without a line that knows of both."""
    for name in ("table", "categorical"):
        found = run_cell(ROWS["toy"], quick(name))
        assert found["after"] > found["before"] + 0.3 * (COLUMNS[name].goal - found["before"]), (name, found)
    for name, row in ROWS.items():
        if not row.senseless(HEADS):
            found = run_cell(row, HEADS)
            assert found["after"] > 0.8, (name, found)
    records = grid.run_grid(["toy", "dpo"], ["coin"], [0], tmp_path / "cells.jsonl")
    made = report.summarise(records, ["toy", "dpo"], ["coin"])
    assert set(made["cells"]) == {"toy", "dpo"}


def test_no_row_knows_a_column_and_no_column_a_row():
    for name in COLUMNS:
        assert f'"{name}"' not in inspect.getsource(rows), name
        assert f'"{name}"' not in inspect.getsource(grid), name
    for name in ROWS:
        assert f'"{name}"' not in inspect.getsource(columns), name
        assert f'"{name}"' not in inspect.getsource(grid), name


# --- cells ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", list(ROWS))
def test_every_objective_trains_a_categorical_controller(row):
    column = quick("categorical")
    found = run_cell(ROWS[row], column)
    assert not found["error"]
    assert found["after"] > 2 * found["before"], found


@pytest.mark.parametrize("name", ["gaussian", "language"])
@pytest.mark.parametrize("row", ["clip", "dpo", "weighted"])
def test_one_row_of_each_sort_on_further_kinds(row, name):
    """Advantages, pairs, likelihood."""
    found = run_cell(ROWS[row], quick(name))
    assert found["after"] > found["before"] + 0.15 * (COLUMNS[name].goal - found["before"]), found


@pytest.mark.parametrize("name", ["diffusion", "consistency"])
@pytest.mark.parametrize("row", ["clip", "rebel", "dpo", "rejection"])
def test_one_row_of_each_sort_moves_image_models(row, name):
    """Two rounds: no error, and the weights moved."""
    from dataclasses import replace

    column = replace(COLUMNS[name], rounds=2, samples=16, measured=8)
    found = run_cell(ROWS[row], column)
    assert not found["error"]
    assert found["updates"] > 0
    assert found["after"] != found["before"]


def test_shuffled_feedback_teaches_nothing():
    column = quick("categorical")
    trained, control = (run_cell(ROWS["clip"], column, shuffled=s) for s in (False, True))
    assert control["after"] < trained["after"] / 2


def test_a_cell_is_the_same_every_time():
    first, again = (run_cell(ROWS["dpo"], quick("table"), seed=3) for _ in range(2))
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"
    }


def test_parts_keep_groups_together_and_lose_no_row():
    experience = Prompted(["ada", "ben"] * 3, seed=0)
    from guerdon.roles import Role

    traj = experience.collect(Role("actor", Coin()), 24, group_size=4)
    traj.value = torch.arange(24.0)[:, None]
    parts = list(grid.whole_groups(traj, 2, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat([p.value for p in parts]).flatten().tolist()) == list(range(24))
    seen = [set(p.group.tolist()) for p in parts]
    assert not seen[0] & seen[1]


# --- the grid ---------------------------------------------------------------------------------------------------------


def test_the_grid_resumes_where_it_was(tmp_path):
    store = tmp_path / "cells.jsonl"
    first = grid.run_grid(["dpo"], ["table"], [0], store)
    with store.open("a") as file:
        file.write('{"row": "dpo", "colu')  # killed while it wrote
    measured = []
    again = grid.run_grid(["dpo", "ipo"], ["table"], [0], store, report=lambda r, *_: measured.append(r))
    assert again[:2] == first
    assert {r["row"] for r in measured} == {"ipo"}
    assert len(grid.read_store(store)) == 4  # nothing was appended to the line that was cut off


def test_cells_side_by_side_are_those_of_one_process(tmp_path):
    alone = grid.run_grid(["dpo"], ["table"], [0], tmp_path / "one.jsonl")
    beside = grid.run_grid(["dpo"], ["table"], [0], tmp_path / "two.jsonl", jobs=2)
    for a, b in zip(alone, beside, strict=True):
        assert a | {"seconds": 0} == b | {"seconds": 0}


def test_other_settings_are_measured_again(tmp_path, registered):
    from dataclasses import replace

    store = tmp_path / "cells.jsonl"
    grid.run_grid(["dpo"], ["coin"], [0], store)
    matrix.register(replace(HEADS, rounds=2))
    measured = []
    grid.run_grid(["dpo"], ["coin"], [0], store, report=lambda r, *_: measured.append(r))
    assert len(measured) == 2


def test_the_command_writes_record_picture_and_exit_status(tmp_path, capsys):
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "from dataclasses import replace\n"
        "from guerdon.matrix import COLUMNS, ROWS, register\n"
        "register(replace(COLUMNS['table'], name='idle', title='idle table', rounds=0))\n"
        "register(replace(ROWS['ipo'], name='mine', title='mine'))\n"
    )
    args = [
        "--jobs",
        "1",
        "--rows",
        "mine,cpl_discounted",
        "--out",
        str(tmp_path),
        "--store",
        str(tmp_path / "cells.jsonl"),
    ]
    try:
        assert guerdon(["matrix", *args, "--columns", "table", "--plugin", str(plugin)]) == 0
        assert guerdon(["matrix", *args, "--columns", "table,idle", "--plugin", str(plugin)]) == 1
    finally:
        ROWS.pop("mine", None)
        COLUMNS.pop("idle", None)
    record = json.loads((tmp_path / "matrix.json").read_text())
    assert record["cells"]["mine"]["table"]["works"]
    assert not record["cells"]["mine"]["idle"]["works"]
    assert "discount" in record["cells"]["cpl_discounted"]["table"]["senseless"]
    assert (tmp_path / "matrix.png").stat().st_size > 5000
    assert "1 of 2 cells work" in capsys.readouterr().out


def test_measuring_a_part_keeps_the_rest_of_the_record(tmp_path, registered):
    from dataclasses import replace

    records = grid.run_grid(["dpo", "toy"], ["coin", "table"], [0], tmp_path / "cells.jsonl")
    whole = report.summarise(records, ["dpo", "toy"], ["coin", "table"])
    again = grid.run_grid(["dpo"], ["coin"], [1], tmp_path / "cells.jsonl")
    record = report.summarise(again, ["dpo"], ["coin"], json.loads(json.dumps(whole)))
    assert record["cells"]["dpo"]["coin"]["seeds"] == [1]
    assert record["cells"]["toy"] == whole["cells"]["toy"]
    matrix.register(replace(ROWS["toy"], epochs=1))  # other settings: what was measured is no longer true
    record = report.summarise(again, ["dpo"], ["coin"], whole)
    assert "toy" not in record["cells"]
    assert record["cells"]["dpo"]["table"] == whole["cells"]["dpo"]["table"]


def test_unknown_names_get_the_nearest(capsys):
    assert guerdon(["matrix", "--rows", "dpoo"]) == 2
    assert "'dpo'" in capsys.readouterr().err
