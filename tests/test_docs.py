"""The code that the docs show runs as it stands."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import pytest

from guerdon import catalog, launch

DOCS = Path(__file__).parents[1] / "docs"


def _blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def test_the_method_in_40_lines_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = _blocks(DOCS / "architecture.md")[0]
    code = [line for line in method.splitlines() if line.strip()]
    assert len(code) <= 40
    (tmp_path / "best_of_n_demo.py").write_text(method)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(catalog, "SYSTEMS", catalog.SYSTEMS)
    row = dataclasses.replace(
        catalog.find("reinforce"), slug="best_of_n_demo", method="best_of_n_demo", cls="BestOfN"
    )
    catalog.register(row)
    result = launch.train("best_of_n_demo", "tokens", runs=tmp_path, rounds=25, progress=False)
    assert result.before["reward"] < 0.2
    assert result.after["reward"] > result.before["reward"] + 0.2
    sys.modules.pop("best_of_n_demo", None)


def test_every_command_of_the_readme_is_one_that_the_command_line_knows() -> None:
    from guerdon.cli import COMMANDS

    text = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    used = set(
        re.findall(
            r"guerdon (train|resume|sample|evaluate|export|list|tasks|reproduce|matrix|plan|bench)\b", text
        )
    )
    assert used <= set(COMMANDS)
    for method in re.findall(r"guerdon train (\w+)", text):
        assert catalog.find(method).status == "ready"


def test_links_and_pictures_of_the_docs_exist() -> None:
    for page in [DOCS.parent / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_tutorial_of_the_matrix_trains_an_image_model() -> None:
    """Its last block of code, for two rounds; the blocks before it register a row and a column."""
    from guerdon import matrix

    row, column, cell = _blocks(DOCS / "matrix.md")
    try:
        exec(row, {})
        exec(column, {})
        assert matrix.run_cell(matrix.ROWS["apo"], matrix.COLUMNS["coin"])["after"] > 0.8
    finally:
        matrix.ROWS.pop("apo", None)
        matrix.COLUMNS.pop("coin", None)
    assert "ROUNDS = 30" in cell
    names: dict[str, object] = {}
    exec(cell.replace("ROUNDS = 30", "ROUNDS = 2"), names)
    assert names["actor"].updates == 2  # type: ignore[attr-defined]
    example = (DOCS.parent / "examples" / "cpl_on_a_consistency_model.py").read_text(encoding="utf-8")
    for line in (
        "experience.collect(actor, 64",
        "reference_log_prob=traj.log_prob",
        "label(traj[0::2], traj[1::2]",
    ):
        assert line in cell
        assert line in example
