"""Every objective on every kind of policy, from the same code: ``guerdon matrix``.

A row is an objective with the few lines that prepare judged answers for it (`guerdon.matrix.rows`); a column is a kind of
policy on a small problem (`guerdon.matrix.columns`). Neither knows of the other: `guerdon.matrix.grid` trains each pair
with one loop. A new row or column is registered with `register`; ``guerdon matrix --plugin FILE.py`` imports a file that
does so.
"""

from guerdon.matrix.columns import COLUMNS, Column
from guerdon.matrix.grid import run_cell
from guerdon.matrix.rows import ROWS, Row

__all__ = ["COLUMNS", "ROWS", "Column", "Row", "register", "run_cell"]


def register(part: Row | Column) -> None:
    """Add a row or a column to the matrix, in place of one of the same name."""
    if isinstance(part, Row):
        ROWS[part.name] = part
    else:
        COLUMNS[part.name] = part
