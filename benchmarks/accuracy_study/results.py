"""The file of results: one JSON object per line, one line per finished run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from filelock import FileLock

from sift_compiler.errors import UserError
from sift_compiler.whole_file import appearing_whole

from .settings import Cell

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """All finished runs; none if there is no file.

    Raises:
        UserError: a line that is not a record.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            record["cell"], record["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number}, is not a result of this program ({error}). Choose another --output."
            ) from error
        found.append(record)
    return found


def finished(records: list[Record], cell: Cell) -> bool:
    """Whether the run with exactly these settings is among ``records``."""
    return any(record["cell"] == cell.to_plain() for record in records)


def append(path: Path, cell: Cell, result: Record, machine: Record) -> None:
    """Add a finished run. The file is replaced as a whole, under a lock, so that several processes may share it.

    Raises:
        UserError: the file cannot be written.
    """
    with FileLock(f"{path}.lock"):
        records = [*read(path), {"cell": cell.to_plain(), "result": result, "machine": machine}]
        with appearing_whole(path) as unfinished:
            Path(unfinished).write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
