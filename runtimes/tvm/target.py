"""This machine and others that code is made for, as TVM's LLVM sees them, and TVM's thread pool."""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.runtimes.tvm.launch import ensure_openmp_threads

_log = logging.getLogger(__name__)
_pool_lock = threading.Lock()
_pool_threads = 0


TRIPLES: Mapping[str, dict[str, Any]] = {"aarch64-linux-gnu": {"mcpu": "generic", "mattr": ["+neon"]}}
"""Platforms other than this machine's that code can be made for, and what every processor of theirs has. Their names stand where a
processor's does."""


def _cache_bytes(level: int, otherwise: int) -> int:
    """Size of one core's data cache of a level, read from sysfs where there is one."""
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind = (folder / "type").read_text().strip()
            if kind != "Instruction" and int((folder / "level").read_text()) == level:
                size = (folder / "size").read_text().strip()
                return int(size[:-1]) * 1024 if size.endswith("K") else int(size)
        except (OSError, ValueError):
            continue
    return otherwise


@functools.cache
def host_cpu() -> CpuFacts:
    """The processor of this machine."""
    import tvm

    name = str(tvm.get_global_func("target.llvm_get_system_cpu")())
    return cpu_facts(name)


@functools.cache
def cpu_facts(name: str) -> CpuFacts:
    """What LLVM knows about the processor it calls ``name``, or about any of a platform in :data:`TRIPLES`."""
    import tvm

    target = llvm_target(name)
    has = tvm.get_global_func("target.target_has_feature")

    def feature(flag: str) -> bool:
        return bool(has(flag, target))

    x86 = feature("sse2")
    if feature("avx512f"):
        lanes, registers = 16, 32
    elif feature("avx2") and feature("fma"):
        lanes, registers = 8, 16
    else:
        lanes, registers = 4, 16 if x86 else 32
    caches = 32 * 1024, 1024 * 1024
    if name not in TRIPLES:
        caches = _cache_bytes(1, caches[0]), _cache_bytes(2, caches[1])
    return CpuFacts(name=name, lanes=lanes, registers=registers, l1_bytes=caches[0], l2_bytes=caches[1])


def gather_instruction(name: str) -> Literal["avx512", "avx2", "loads"]:
    """How vectors of ``cpu_facts(name).lanes`` float32 are gathered from memory: by an instruction, or lane by lane."""
    lanes = cpu_facts(name).lanes
    return "avx512" if lanes == 16 else "avx2" if lanes == 8 else "loads"


@functools.cache
def llvm_target(cpu: str) -> Any:
    """TVM's target for a processor, or for one of :data:`TRIPLES`."""
    import tvm

    what = {"mtriple": cpu, **TRIPLES[cpu]} if cpu in TRIPLES else {"mcpu": cpu}
    return tvm.target.Target({"kind": "llvm", **what, "num-cores": os.cpu_count() or 1})


def ensure_pool(threads: int) -> None:
    """Make sure that parallel loops run on at least ``threads`` threads, of OpenMP (see launch) and of TVM, without pinning any.

    TVM starts its pool at the first parallel call and then binds its workers *and the calling thread* to cores, unless
    TVM_BIND_THREADS says 0; a pinned main thread would slow everything else in a torch process, so it is set unless the
    user has set it.
    """
    global _pool_threads
    with _pool_lock:
        if threads <= _pool_threads:
            return
        import tvm

        os.environ.setdefault("TVM_BIND_THREADS", "0")
        first = _pool_threads == 0
        if first:
            os.environ.setdefault("TVM_NUM_THREADS", str(threads))
        available = int(tvm.get_global_func("runtime.NumThreads")())
        if available < threads:
            tvm.get_global_func("runtime.config_threadpool")(0, threads)
            available = int(tvm.get_global_func("runtime.NumThreads")())
        if available < threads:
            _log.warning("TVM's pool has %d threads, %d were asked for (TVM_NUM_THREADS).", available, threads)
        ensure_openmp_threads(threads)
        _pool_threads = threads
