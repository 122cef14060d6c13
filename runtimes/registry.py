"""Runtimes by name, imported when asked for."""

from __future__ import annotations

import functools
import importlib
from typing import cast

from sift_compiler.errors import RuntimeBuildError, unknown_name
from sift_compiler.runtimes.base import Runtime

_RUNTIMES = {
    "eager": ("sift_compiler.runtimes.eager", "EagerRuntime"),
    "tvm": ("sift_compiler.runtimes.tvm.runtime", "TvmRuntime"),
}


def names() -> tuple[str, ...]:
    """Names of the runtimes that run layers in a torch process."""
    return tuple(_RUNTIMES)


@functools.cache
def get(name: str) -> Runtime:
    """The runtime called ``name``.

    Raises:
        UserError: there is no runtime of this name.
        RuntimeBuildError: its dependencies cannot be imported.
    """
    if name not in _RUNTIMES:
        raise unknown_name("runtime", name, _RUNTIMES)
    module, attribute = _RUNTIMES[name]
    try:
        loaded = importlib.import_module(module)
    except ImportError as error:
        raise RuntimeBuildError(
            f"The runtime {name!r} cannot be loaded: {error}. Install its dependencies: pip install sift_compiler"
        ) from error
    return cast(Runtime, getattr(loaded, attribute)())
