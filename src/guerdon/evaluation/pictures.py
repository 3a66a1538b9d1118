"""Grids of small pictures with labels, for looking at what a policy makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from guerdon.errors import ShapeError

_TARGET = 112  # pixels: what a picture is enlarged to, about
_MARGIN, _GAP, _PAD = 16, 8, 8
_PAPER, _INK, _SOFT, _EDGE = "#FFFFFF", "#222222", "#666666", "#D0D0D0"


def grid(
    rows: Sequence[Tensor | np.ndarray],
    labels: Sequence[str] = (),
    captions: Sequence[str] = (),
    notes: Sequence[Sequence[str]] = (),
    *,
    scale: int | None = None,
    font_size: int = 13,
) -> Image.Image:
    """Rows of pictures, enlarged without blurring.

    Args:
        rows: uint8 ``[N, H, W, 3]`` each (``N`` may differ), all of one ``H`` and ``W``.
        labels: one a row, written to its left ("before", "after 100 rounds").
        captions: one a column, written above it (the prompts).
        notes: for each row, one a picture, written below it (its reward).
        scale: how many pixels wide to draw each pixel; by default so that pictures are about 112 wide.
        font_size: of captions; labels are as large, notes a little smaller.

    Returns:
        The picture; save it with ``run.save_image`` or ``.save("grid.png")``.

    Raises:
        ShapeError: a row that is not uint8 ``[N, H, W, 3]``, pictures of different sizes, or more texts than
            there are rows or columns.
    """
    arrays = [_array(row, index) for index, row in enumerate(rows)]
    if not arrays:
        raise ShapeError("grid() got no rows of pictures")
    sizes = {array.shape[1:3] for array in arrays}
    if len(sizes) > 1:
        raise ShapeError(f"the rows of a grid hold pictures of different sizes: {sorted(sizes)}")
    height, width = sizes.pop()
    columns = max(len(array) for array in arrays)
    _fit("labels", labels, len(arrays), "rows")
    _fit("captions", captions, columns, "columns")
    _fit("rows of notes", notes, len(arrays), "rows")
    if scale is None:
        scale = max(1, round(_TARGET / max(height, width)))
    cell_w, cell_h = width * scale, height * scale

    font: Any = ImageFont.load_default(font_size)
    small: Any = ImageFont.load_default(max(8, font_size - 2))
    # a text column never narrower than some words, however small the pictures
    step = max(cell_w, 48) + _GAP
    wrapped_labels = [wrap(label, font, 150) for label in labels]
    wrapped_captions = [wrap(caption, font, step - _GAP) for caption in captions]
    wrapped_notes = [[wrap(note, small, step - _GAP) for note in row] for row in notes]

    left = _MARGIN + (max((_width(lines, font) for lines in wrapped_labels), default=0))
    left += _PAD + 4 if labels else 0
    line, small_line = _line(font), _line(small)
    top = _MARGIN + (max((len(c) for c in wrapped_captions), default=0)) * line + (_PAD if captions else 0)
    below = [
        max((len(note) for note in row), default=0) * small_line + (4 if any(row) else 0)
        for row in wrapped_notes
    ] + [0] * (len(arrays) - len(wrapped_notes))
    heights = [
        max(cell_h, len(wrapped_labels[r]) * line if r < len(wrapped_labels) else 0) + below[r]
        for r in range(len(arrays))
    ]
    total_w = left + columns * step - _GAP + _MARGIN
    between = _GAP + (6 if notes else 0)
    total_h = top + sum(heights) + between * (len(arrays) - 1) + _MARGIN

    canvas = Image.new("RGB", (total_w, total_h), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for column, lines in enumerate(wrapped_captions):
        # the last line of each caption sits on the picture
        y = top - _PAD - len(lines) * line
        _write(draw, lines, left + column * step, y, step - _GAP, font, line, _INK)
    y = top
    for r, array in enumerate(arrays):
        if r < len(wrapped_labels):
            lines = wrapped_labels[r]
            text_y = y + (cell_h - len(lines) * line) // 2
            for index, text in enumerate(lines):
                draw.text(
                    (left - _PAD - 4, max(y, text_y) + index * line), text, fill=_INK, font=font, anchor="ra"
                )
        for column, picture in enumerate(array):
            x = left + column * step + (step - _GAP - cell_w) // 2
            enlarged = Image.fromarray(picture).resize((cell_w, cell_h), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (x, y))
            # an edge outside the picture: a white one stays visible, and no pixel of it is hidden
            draw.rectangle((x - 1, y - 1, x + cell_w, y + cell_h), outline=_EDGE)
            if r < len(wrapped_notes) and column < len(wrapped_notes[r]):
                lines = wrapped_notes[r][column]
                _write(
                    draw, lines, left + column * step, y + cell_h + 4, step - _GAP, small, small_line, _SOFT
                )
        y += heights[r] + between
    return canvas


def wrap(text: str, font: Any, width: int, most: int = 5) -> list[str]:
    """``text`` in lines of at most ``width`` pixels; a longer word is cut, and what goes beyond ``most``
    lines becomes an ellipsis."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") <= width:
                line = f"{line} {word}"
                continue
            if line:
                lines.append(line)
            while font.getlength(word) > width and len(word) > 1:
                cut = next(
                    n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width
                )
                lines.append(word[:cut])
                word = word[cut:]
            line = word
        lines.append(line)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "...") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "..."]
    return lines if any(lines) else []


def _array(row: Tensor | np.ndarray, index: int) -> np.ndarray:
    array = row.detach().cpu().numpy() if isinstance(row, Tensor) else np.asarray(row)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
        raise ShapeError(
            f"row {index} of the grid is {array.dtype} {list(array.shape)}, expected uint8 [N, H, W, 3]"
        )
    return np.ascontiguousarray(array)


def _fit(name: str, texts: Sequence[Any], count: int, what: str) -> None:
    if len(texts) > count:
        raise ShapeError(f"the grid got {len(texts)} {name} for {count} {what}")


def _line(font: Any) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 1


def _width(lines: list[str], font: Any) -> int:
    return max((int(font.getlength(text) + 1) for text in lines), default=0)


def _write(
    draw: Any, lines: list[str], x: int, y: int, width: int, font: Any, line: int, colour: str
) -> None:
    """Lines centred in a column."""
    for index, text in enumerate(lines):
        draw.text((x + width / 2, y + index * line), text, fill=colour, font=font, anchor="ma")
