"""The errors a user can meet. Each says in one sentence what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GuerdonError(Exception):
    """Base of every error that guerdon raises on purpose; the command line prints it as one line."""

    exit_status = 2


class UsageError(GuerdonError):
    """An option, a name or a combination of pieces that cannot work."""


class DataError(GuerdonError):
    """A file or a row that cannot be read; the message names the file, the row and what was expected."""


class ShapeError(GuerdonError, ValueError):
    """A tensor whose shape, dtype or values do not fit the batch it was put into."""


class FeedbackError(GuerdonError):
    """A judge that raised, or whose answer has the wrong length, type or value."""


class NonFiniteError(GuerdonError):
    """A loss, gradient or reward became NaN or infinite; the message names the saved batch."""


class CheckpointError(GuerdonError):
    """No usable checkpoint, or one that does not fit the run."""


class StorageError(GuerdonError):
    """The disk is full or a folder cannot be written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A closing clause for a message about an unknown ``name``: the nearest known one, or all of them."""
    choices = sorted(known)
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    if len(choices) <= 12:
        return "known: " + ", ".join(choices)
    return f"there are {len(choices)} known names"
