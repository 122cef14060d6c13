"""Every error this package raises on purpose.

A message says what went wrong, where (node, module path or file), what was expected and what to do about it. An error that a
caller can act upon derives from :class:`SiftError`; a bare ``assert`` guards only our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SiftError(Exception):
    """Base of all errors of this package."""


class UserError(SiftError, ValueError):
    """An argument, option, file or model that cannot be accepted as it is."""


class InfeasibleError(UserError):
    """No sparsity of the layers that a rewrite takes pays for what it makes of the rest; the message tells the largest that would."""


class UnsupportedError(SiftError):
    """A model uses something for which no rule, pass or kernel exists."""


class PassError(SiftError):
    """A pass did not establish what it promises; the graph it was given is left as it was."""


class RuntimeBuildError(SiftError):
    """A runtime could not compile, link or load machine code."""


class StaleArtifactError(SiftError):
    """A saved artifact is damaged, or was made by something that no longer fits."""


def unknown_name(kind: str, name: object, known: Iterable[str]) -> UserError:
    """Return the error for a name that is not one of ``known``; it lists them and proposes the nearest.

    Args:
        kind: what the name stands for, e.g. ``"runtime"``.
        name: what was given.
        known: the legal names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(names) or 'none'}.")
