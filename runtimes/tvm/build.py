"""Machine code of TIR functions: from memory, else from disk, else compiled."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from sift_compiler.errors import RuntimeBuildError
from sift_compiler.runtimes.cache import Form, KernelCache, default_folder
from sift_compiler.runtimes.fingerprint import Fingerprint, parsing, source_digest
from sift_compiler.runtimes.tvm.launch import redirect
from sift_compiler.runtimes.tvm.target import llvm_target

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_compiled: dict[tuple[object, ...], Future[tuple[Any, Any]]] = {}
"""Libraries and their functions; threads that ask for one in the making wait for it."""

_TOOLCHAIN = ("apache-tvm", "apache-tvm-ffi")


def compiled(generator: Callable[..., Any], cpu: str, **constants: Any) -> Any:
    """The packed function that ``generator(**constants, name=…)`` describes, for processor ``cpu``; compiled on first use.

    The key is the generator, the processor and every constant; on disk also the generator's source, the processor's instruction sets
    and the versions of TVM and LLVM (see runtimes.fingerprint). Nothing else enters the code.

    Raises:
        RuntimeBuildError: TVM could not compile it.
    """
    key = (generator.__module__, generator.__qualname__, cpu, *sorted(constants.items()))
    with _lock:
        mine = key not in _compiled
        future = _compiled.setdefault(key, Future())
    if mine:
        try:
            library = _from_disk(generator, cpu, constants)
            future.set_result((library, library[_symbol(generator)]))
        except BaseException as error:
            with _lock:
                del _compiled[key]
            future.set_exception(error)
            raise
    return future.result()[1]


def compile_anew(generator: Callable[..., Any], cpu: str, **constants: Any) -> Any:
    """A freshly compiled TVM executable of the function, to look at its assembly: ``.mod.inspect_source("asm")``.

    Raises:
        RuntimeBuildError: TVM could not compile it.
    """
    import tvm

    from sift_compiler.runtimes.tvm.registers import IN_REGISTERS
    from sift_compiler.runtimes.tvm.subroutines import pipeline

    begin = time.perf_counter()
    try:
        # TVMScript keeps what it builds in variables of the process: one at a time. Lowering and LLVM keep theirs apart.
        with parsing:
            function, lowering = generator(**constants, name=_symbol(generator)), pipeline()
        made_of = function.functions.values() if isinstance(function, tvm.IRModule) else (function,)
        in_registers = any(IN_REGISTERS in (each.attrs or {}) for each in made_of)
        with tvm.transform.PassContext(opt_level=3, config={"tirx.disable_storage_rewrite": in_registers}):
            made = tvm.compile(function, target=llvm_target(cpu), tir_pipeline=lowering)
    except Exception as error:
        raise RuntimeBuildError(
            f"TVM could not compile the kernel {generator.__name__}({constants}) for {cpu}: {error}. "
            "Run the layer with runtime='eager', and please report this."
        ) from error
    _log.info(
        "compiled %s(%s) for %s in %.0f ms", generator.__name__, constants, cpu, 1e3 * (time.perf_counter() - begin)
    )
    return made


def fingerprint(generator: Callable[..., Any], cpu: str, constants: dict[str, Any]) -> Fingerprint | None:
    """What the machine code of ``generator(**constants)`` depends on; None if the generator's source cannot be read."""
    source = source_digest(generator.__module__)
    if source is None:
        return None
    return Fingerprint(
        generator=f"{generator.__module__}.{generator.__qualname__}",
        constants=tuple(sorted((name, repr(value)) for name, value in constants.items())),
        target=str(llvm_target(cpu)), features=_features(cpu), toolchain=_toolchain(), source=source,
    )  # fmt: skip


def _symbol(generator: Callable[..., Any]) -> str:
    return f"sift_{generator.__name__}"


def _from_disk(generator: Callable[..., Any], cpu: str, constants: dict[str, Any]) -> Any:
    key = fingerprint(generator, cpu, constants)
    if key is None:
        return compile_anew(generator, cpu, **constants)
    return KernelCache(default_folder(), _FORMS).get(key, lambda: compile_anew(generator, cpu, **constants))


@functools.cache
def _features(cpu: str) -> tuple[str, ...]:
    import tvm

    return tuple(sorted(str(name) for name in tvm.get_global_func("target.llvm_get_cpu_features")(llvm_target(cpu))))


@functools.cache
def _toolchain() -> tuple[tuple[str, str], ...]:
    import tvm

    versions = {name: importlib.metadata.version(name) for name in _TOOLCHAIN}
    versions["llvm"] = str(tvm.get_global_func("target.llvm_version_major")())
    versions["system"] = str(tvm.get_global_func("target.llvm_get_system_triple")())
    return tuple(sorted(versions.items()))


# --- what is stored -------------------------------------------------------------------------------------------------
# A shared library loads in a millisecond but needs a C++ compiler to be linked. LLVM's text needs none; reading it saves writing and
# lowering the kernel, about half of the time, and leaves LLVM's part.


def _write_library(code: Any, path: Path) -> None:
    from tvm.support import cc

    if cc.get_cc() is None:
        raise FileNotFoundError("no C++ compiler to link with")
    code.export_library(str(path))


def _write_llvm(code: Any, path: Path) -> None:
    code.mod.write_to_file(str(path), "ll")
    _log.info(
        "%s is stored as LLVM text: loading it takes about half as long as compiling. A C++ compiler helps.", path.name
    )


def _read(path: Path) -> Any:
    import tvm

    return tvm.runtime.load_module(str(path))


def _read_library(path: Path) -> Any:
    module = _read(path)
    redirect(path)
    return module


_FORMS = {"so": Form(_write_library, _read_library), "ll": Form(_write_llvm, _read)}
