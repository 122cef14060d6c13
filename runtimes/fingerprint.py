"""Fingerprint: everything that decides what machine code a kernel becomes, and a digest of it.

A field that is added here enters every key by itself: the digest is taken over the fields, none of them is listed by hand. Values
and masks never enter; they are arguments of the code.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib.abc
import importlib.util
import json
import threading
from dataclasses import dataclass
from typing import Any

_PACKAGE = __name__.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What a compiled kernel depends on."""

    generator: str
    """The function that writes the kernel, ``module.name``."""
    constants: tuple[tuple[str, str], ...]
    """Name and ``repr`` of every constant the generator is given, sorted."""
    target: str
    """What the compiler was told about the processor: name and all else."""
    features: tuple[str, ...]
    """Instruction set extensions of the target, sorted."""
    toolchain: tuple[tuple[str, str], ...]
    """Compilers and their versions, sorted."""
    source: str
    """Digest of the generator's source, see :func:`source_digest`."""

    @property
    def digest(self) -> str:
        """Name of the artifact: 32 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_plain(), sort_keys=True).encode()).hexdigest()[:32]

    def to_plain(self) -> dict[str, Any]:
        """The fields as what JSON gives back: lists and strings."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


parsing = threading.RLock()
"""Held by whoever has Python source parsed: CPython 3.11 counts the depth of syntax trees for all threads at once and raises SystemError
where two build one at a time."""


@functools.cache
def source_digest(*modules: str) -> str | None:
    """SHA-256 over the sources of ``modules`` and of every module of this package that they import, directly or not.

    Returns:
        64 hexadecimal digits; None if a source cannot be read, as in an installation without ``.py`` files.
    """
    sources: dict[str, str] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in sources:
            continue
        source = _source(name)
        if source is None:
            return None
        sources[name] = source
        waiting += _imports(source)
    digest = hashlib.sha256()
    for name in sorted(sources):
        digest.update(f"{name}\0{len(sources[name])}\0{sources[name]}".encode())
    return digest.hexdigest()


def _source(module: str) -> str | None:
    try:
        found = importlib.util.find_spec(module)
        loader = None if found is None else found.loader
        return loader.get_source(module) if isinstance(loader, importlib.abc.InspectLoader) else None
    except (OSError, ImportError):
        return None


def _imports(source: str) -> list[str]:
    """Modules of this package that a source imports, wherever in it."""
    found: list[str] = []
    with parsing:
        tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names if _is_module(node.module, alias.name)]
    return [name for name in found if name.partition(".")[0] == _PACKAGE]


def _is_module(package: str, name: str) -> bool:
    """Whether ``from package import name`` imports a module."""
    if package.partition(".")[0] != _PACKAGE:
        return False
    try:
        return importlib.util.find_spec(f"{package}.{name}") is not None
    except ModuleNotFoundError:  # ``package`` is a module, ``name`` something in it
        return False
