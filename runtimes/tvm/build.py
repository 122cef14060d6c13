"""Compile TIR functions once per process: a memory cache of machine code."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from sift_compiler.errors import RuntimeBuildError
from sift_compiler.runtimes.tvm.target import llvm_target

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_compiled: dict[tuple[object, ...], tuple[Any, Any]] = {}


def compiled(generator: Callable[..., Any], cpu: str, **constants: Any) -> Any:
    """The packed function that ``generator(**constants, name=…)`` describes, for processor ``cpu``; compiled on first use.

    The key is the generator, the processor and every constant; nothing else enters the code.

    Raises:
        RuntimeBuildError: TVM could not compile it.
    """
    key = (generator.__module__, generator.__qualname__, cpu, *sorted(constants.items()))
    with _lock:
        if key not in _compiled:
            _compiled[key] = _compile(generator, cpu, constants)
        return _compiled[key][1]


def module(generator: Callable[..., Any], cpu: str, **constants: Any) -> Any:
    """The TVM module that holds :func:`compiled`'s function, to look at its assembly."""
    compiled(generator, cpu, **constants)
    return _compiled[(generator.__module__, generator.__qualname__, cpu, *sorted(constants.items()))][0]


def _compile(generator: Callable[..., Any], cpu: str, constants: dict[str, Any]) -> tuple[Any, Any]:
    import tvm

    begin = time.perf_counter()
    name = f"sift_{generator.__name__}"
    try:
        library = tvm.compile(generator(**constants, name=name), target=llvm_target(cpu))
    except Exception as error:
        raise RuntimeBuildError(
            f"TVM could not compile the kernel {generator.__name__}({constants}) for {cpu}: {error}. "
            "Run the layer with runtime='eager', and please report this."
        ) from error
    _log.info(
        "compiled %s(%s) for %s in %.0f ms", generator.__name__, constants, cpu, 1e3 * (time.perf_counter() - begin)
    )
    return library, library[name]
