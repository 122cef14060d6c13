"""Where and with what the numbers of a report were made."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("sift_compiler", "torch", "apache-tvm", "numpy", "scikit-learn", "matplotlib")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A computer and the versions of what ran on it."""

    processor: str
    cores: int
    """Cores this process may use."""
    system: str
    python: str
    versions: dict[str, str]


def this_machine() -> Machine:
    """The machine this runs on."""
    return Machine(
        processor=_processor(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        system=platform.platform(),
        python=platform.python_version(),
        versions={name: version for name in PACKAGES if (version := _version(name)) is not None},
    )


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the platform module knows more there
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
