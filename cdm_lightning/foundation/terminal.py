"""Printed tables whose names are whole wherever they go."""

from __future__ import annotations

from rich.console import Console
from rich.table import Column, Table

WIDE = 1000  # columns; a table takes what it needs of them


def whole_console() -> Console:
    """A console for tables: as wide as its terminal, and where output is none, wide enough to cut and wrap nothing.

    rich takes 80 columns for a file or a pipe, and shortens names to fit.
    """
    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def whole_table(*heads: str) -> Table:
    """A table that folds what does not fit into a narrow terminal, where rich would cut it."""
    return Table(*(Column(head, overflow="fold") for head in heads))
