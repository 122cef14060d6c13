"""What several commands take: MODEL, its inputs, where a report goes, JSON, threads."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from sift_compiler.errors import UserError

# torch, TVM and the model are imported by the command that needs them: sift --help is instant, and sift doctor runs without them.

Model = Annotated[str, typer.Argument(help="A file.pt2, package.module:factory or path/to/file.py:factory.")]
Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Element type and sizes, batch first: 'f32[16,3,224,224]'. Once per input."),
]
ReportFile = Annotated[
    Path | None,
    typer.Option("--report", help="Where the report goes: .html one page that needs no other file, .json or .txt."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
STRUCTURE_FORMS = "unstructured, nm:N:M, transposable:N:M, block:ROWS:COLUMNS, constant-fan-in or channel"
"""How the structure of a mask is written."""


def names(known: Iterable[str]) -> str:
    """Legal values, as a help text lists them."""
    return ", ".join(known)


def threads_of(given: int | None) -> int:
    """``--threads``, or what torch uses.

    Raises:
        UserError: less than 1.
    """
    import torch

    if given is not None and given < 1:
        raise UserError(f"--threads {given}: there must be at least 1.")
    return given or torch.get_num_threads()
