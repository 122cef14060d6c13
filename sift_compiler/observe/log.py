"""Where log lines of this package go when the environment asks for them."""

from __future__ import annotations

import logging

from sift_compiler.observe.settings import Settings

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(settings: Settings) -> None:
    """Send this package's log lines to standard error from ``settings.log`` on; without it, leave logging to the host program."""
    if settings.log is None:
        return
    logger = logging.getLogger("sift_compiler")
    logger.setLevel(settings.log)
    if not any(getattr(handler, "sift", False) for handler in logger.handlers):
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        handler.sift = True  # type: ignore[attr-defined]
        logger.addHandler(handler)
        logger.propagate = False
