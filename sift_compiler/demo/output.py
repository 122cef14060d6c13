"""The folder a demo writes into, proven writable before anything is trained."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sift_compiler.errors import UserError

FIGURE, REPORT, NETWORK = "curves.png", "report.json", "sparse.pt2"


def prepare_folder(folder: Path) -> Path:
    """Make ``folder`` if it is missing and check that files can be written there; returns it, absolute.

    Raises:
        UserError: it is a file, cannot be made, or cannot be written to.
    """
    place = folder.expanduser().absolute()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
        for name in (FIGURE, REPORT, NETWORK):
            if (place / name).is_dir():
                raise IsADirectoryError(f"{place / name} is a folder")
    except OSError as error:
        raise UserError(
            f"Nothing can be written to the folder {place}: {error}. Give another one with --out DIR."
        ) from error
    return place
