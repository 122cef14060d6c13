"""How commands show things: tables, a spinner, where a report went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_NUMBERS = (
    "sparsity", "kept", "MFLOPs", "batch", "threads", "median ms", "fastest", "slowest", "times sift",
    "processor ms", "times sift ", "µs", "of peak", "dense µs", "break-even",
)  # fmt: skip
"""Heads of columns that hold numbers."""


def show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print ``rows`` below ``heads``; only the column "why" is wrapped."""
    table = Table(box=None, pad_edge=False)
    for head in heads:
        right = head in _NUMBERS
        table.add_column(head, justify="right" if right else "left", no_wrap=head != "why")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # A pipe has no width: the table is then as wide as it needs.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def busy(what: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, nothing in a pipe."""
    return Console(stderr=True).status(f"{what} …")


def tell_report(path: Path | None) -> None:
    """Say where the report went, if one was asked for."""
    if path is not None:
        typer.echo(f"Report {path}")
