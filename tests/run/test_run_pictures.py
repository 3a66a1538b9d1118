"""Plots and grids: files of the right size that show what they should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from toy_training import ToyEngine

from guerdon.errors import DataError, ShapeError, UsageError
from guerdon.evaluation.pictures import grid, wrap
from guerdon.run import Run
from guerdon.run.plots import PALETTE, _moving, against_each_other, curves


def records(count: int, slope: float = 1.0) -> list[dict[str, Any]]:
    return [
        {
            "step": i,
            "reward": slope * i,
            "accuracy": 1 - i / count,
            "note": "x",
            "kl": None if i % 2 else 0.1 * i,
        }
        for i in range(count)
    ]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def has_colour(image: np.ndarray, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(image.astype(int) - wanted).sum(-1) < 30).any())


def test_one_curve(tmp_path: Path) -> None:
    image = pixels(curves(records(20), ["reward"], tmp_path / "sub" / "one.png"))
    assert image.shape == (600, 960, 3)
    assert has_colour(image, PALETTE[0])
    assert not has_colour(image, PALETTE[1])


def test_panels_sources_and_seeds(tmp_path: Path) -> None:
    source = {"a": [records(90), records(70, 2.0)], "b": records(80, 0.5)}
    image = pixels(curves(source, ["reward", "accuracy", "kl"], tmp_path / "many.png", names={"kl": "KL"}))
    assert image.shape == (510, 2040, 3)
    assert has_colour(image, PALETTE[0])
    assert has_colour(image, PALETTE[1])


def test_a_run_against_seconds(tmp_path: Path) -> None:
    with Run(tmp_path / "run", engine=ToyEngine(), progress=False) as run:
        for step in run.steps(5):
            run.log(reward=step)
    curves(tmp_path / "run", ["reward"], tmp_path / "seconds.png", against="seconds")
    curves([tmp_path / "run", tmp_path / "run"], ["reward"], tmp_path / "seeds.png")
    assert pixels(tmp_path / "seconds.png").shape == (600, 960, 3)


def test_one_metric_against_another(tmp_path: Path) -> None:
    source = {"no anchor": records(100), "anchor": records(30, 0.5)}
    image = pixels(against_each_other(source, "reward", "accuracy", tmp_path / "path.png"))
    assert image.shape == (690, 840, 3)
    assert has_colour(image, PALETTE[0])
    assert has_colour(image, PALETTE[1])


def test_plots_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no record has the metric rewards \(did you mean 'reward'"):
        curves(records(3), ["rewards"], tmp_path / "x.png")
    with pytest.raises(DataError, match=r"no metrics.jsonl"):
        curves(tmp_path, ["reward"], tmp_path / "x.png")
    with pytest.raises(UsageError, match="'step' or 'seconds'"):
        curves(records(3), ["reward"], tmp_path / "x.png", against="time")
    with pytest.raises(UsageError, match="no runs"):
        curves({}, ["reward"], tmp_path / "x.png")


def test_the_moving_average_is_that_of_the_window() -> None:
    values = np.random.default_rng(0).normal(size=31)
    expected = [values[max(0, i - 3) : i + 4].mean() for i in range(31)]
    np.testing.assert_allclose(_moving(values, 7), expected, atol=1e-12)
    assert _moving(values, 1) is values


def test_a_grid_enlarges_without_blurring() -> None:
    row = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8)
    image = np.asarray(grid([row, row[:2]]))
    # two margins of 16, pictures of 16 x 7 = 112 pixels, gaps of 8
    assert image.shape == (2 * 16 + 2 * 112 + 8, 2 * 16 + 4 * 112 + 3 * 8, 3)
    second = image[16 : 16 + 112, 16 + 120 : 16 + 120 + 112]
    assert np.array_equal(second, row[1].numpy().repeat(7, 0).repeat(7, 1))
    assert (image[16 + 120 : -16, 16 + 240 :] == 255).all(), "the shorter row leaves its places empty"


def test_a_grid_has_room_for_its_texts() -> None:
    row = np.zeros((3, 32, 32, 3), dtype=np.uint8)
    bare = grid([row, row])
    assert bare.size[0] == 2 * 16 + 3 * 128 + 2 * 8, "32 pixels times 4"
    labelled = grid([row, row], labels=["before", "after a hundred rounds of training"])
    captioned = grid([row, row], captions=["short", "a caption that is far too long for one line", ""])
    noted = grid([row, row], notes=[["reward 0.5"] * 3, ["0.7", "", "0.9"]])
    assert labelled.size[0] > bare.size[0] + 60
    assert labelled.size[1] == bare.size[1]
    assert captioned.size[0] == bare.size[0]
    assert captioned.size[1] > bare.size[1] + 30
    assert noted.size[1] > bare.size[1] + 20
    assert grid([row], scale=2).size == (2 * 16 + 3 * 64 + 2 * 8, 2 * 16 + 64)


def test_a_grid_refuses_what_it_cannot_draw() -> None:
    row = np.zeros((3, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ShapeError, match=r"row 1 of the grid is float32 \[3, 8, 8, 3\], expected uint8"):
        grid([row, row.astype(np.float32)])
    with pytest.raises(ShapeError, match="different sizes"):
        grid([row, row[:, :4]])
    with pytest.raises(ShapeError, match="got 4 captions for 3 columns"):
        grid([row], captions=["a"] * 4)
    with pytest.raises(ShapeError, match="no rows"):
        grid([])


def test_text_is_wrapped_by_its_width() -> None:
    font = ImageFont.load_default(13)
    lines = wrap("a large blue square above a small green triangle", font, 100)
    assert " ".join(lines) == "a large blue square above a small green triangle"
    assert all(font.getlength(line) <= 100 for line in lines)
    cut = wrap("antidisestablishmentarianism", font, 60)
    assert "".join(cut) == "antidisestablishmentarianism"
    assert wrap("", font, 60) == []
    short = wrap("word " * 60, font, 60)
    assert len(short) == 5
    assert short[-1].endswith("...")
