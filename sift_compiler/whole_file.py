"""Files that appear whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sift_compiler.errors import UserError


@contextlib.contextmanager
def appearing_whole(target: Path) -> Iterator[str]:
    """The name of an empty file beside ``target`` that takes its place when the block ends well, and vanishes otherwise.

    Raises:
        UserError: the block, or the move, fails with an OSError or RuntimeError: the folder is missing, read-only or full.
    """
    unfinished = None
    try:
        handle, unfinished = tempfile.mkstemp(prefix=f".{target.name}.", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        yield unfinished
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, target)
        unfinished = None
    except (OSError, RuntimeError) as error:  # torch's archive writer raises RuntimeError on a full disk
        raise UserError(
            f"{target} cannot be written ({error}). Nothing was changed. Choose a file in a folder that exists, may be "
            "written to and has room."
        ) from error
    finally:
        if unfinished is not None:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
