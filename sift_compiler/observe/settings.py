"""Every environment variable of the package, in one place and validated.

| variable | legal values | effect |
|---|---|---|
| ``SIFT_DUMP`` | a folder, made if missing | every pass leaves its graph there as a numbered text file |
| ``SIFT_LOG`` | debug, info, warning, error | log lines of this package from that level on go to standard error |
| ``SIFT_CACHE_DIR`` | a folder, made if missing | compiled kernels are kept there instead of in the user's cache folder |
| ``SIFT_DEBUG`` | 0, 1 | with 1 the ``sift`` commands show where an error was raised |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sift_compiler.errors import UserError, unknown_name

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True)
class Settings:
    """What the environment asks for.

    Attributes:
        dump: folder of numbered dumps, or None for no dumps.
        log: level as the logging module names it (``"INFO"``), or None to leave logging to the host program.
        debug: whether the command line shows tracebacks.
        cache: folder of compiled kernels, or None for the user's cache folder.
    """

    dump: Path | None = None
    log: str | None = None
    debug: bool = False
    cache: Path | None = None


def from_environment(environment: Mapping[str, str] | None = None) -> Settings:
    """Read and check the variables; an empty one counts as unset.

    Raises:
        UserError: an illegal value.
    """
    variables = os.environ if environment is None else environment
    level = variables.get("SIFT_LOG", "").lower()
    if level and level not in LOG_LEVELS:
        raise unknown_name("log level in the environment variable SIFT_LOG", level, LOG_LEVELS)
    debug = variables.get("SIFT_DEBUG", "")
    if debug not in ("", "0", "1"):
        raise unknown_name("value of the environment variable SIFT_DEBUG", debug, ("0", "1"))
    return Settings(
        dump=_folder("SIFT_DUMP", variables), log=level.upper() or None, debug=debug == "1",
        cache=_folder("SIFT_CACHE_DIR", variables),
    )  # fmt: skip


def _folder(variable: str, variables: Mapping[str, str]) -> Path | None:
    given = variables.get(variable, "")
    path = Path(given).expanduser() if given else None
    if path is not None and path.exists() and not path.is_dir():
        raise UserError(f"The environment variable {variable} names {path}, which is a file; it must name a folder.")
    return path
