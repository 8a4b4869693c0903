"""How a command shows a list: a table for a person, lines for a pipe; both with a header."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

# A pipe has no width of its own; the widest tables need this much.
PIPE_WIDTH = 150


def plain_console(**options: Any) -> Console:
    """A console that prints text as it is: errors may hold what rich takes for markup, such as ``[/tmp/a]``."""
    return Console(markup=False, emoji=False, **options)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """A table on a terminal; in a pipe a line of column names and one for each row, their cells parted by tabs.

    Args:
        columns: their names; all empty for facts, which have a name in each row.
        right: columns of numbers.
    """
    console = plain_console()
    if not console.is_terminal:
        for row in [columns, *rows] if any(columns) else rows:
            typer.echo("\t".join(row))
        return
    table = Table(box=None, pad_edge=False, show_header=any(columns))
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left")
    for row in rows:
        table.add_row(*row)
    # A narrow terminal breaks its lines rather than lose half of every address.
    console.width = max(console.width, PIPE_WIDTH)
    console.print(table)
