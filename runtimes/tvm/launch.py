"""Parallel kernels on the OpenMP threads that torch uses, instead of on TVM's own.

Idle threads of either pool spin for milliseconds before they sleep. Where operations of torch and kernels take turns, each pool's workers
would wait for a core on which the other's spin, for several percent of a network's time.

A library that TVM has compiled calls whoever the pointer ``__TVMBackendParallelLaunch`` in it names (tvm/runtime/c_backend_api.h). After it is
loaded, the pointer is set to a function that opens a parallel region of OpenMP by the interface of GCC's runtime, which those of LLVM and
Intel have as well. That function is C, compiled by what links the kernels. Kernels that are no shared library, for want of a compiler, stay on TVM's threads.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import platform
import tempfile
import threading
from pathlib import Path

from sift_compiler.runtimes.cache import Form, KernelCache, default_folder
from sift_compiler.runtimes.fingerprint import Fingerprint

_log = logging.getLogger(__name__)
_POINTER = "__TVMBackendParallelLaunch"
_NEEDED = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads")

# Declared here, not included: which header fits the runtime that torch has loaded is not known, and these never change.
_SOURCE = """
#ifdef __cplusplus
extern "C" {
#endif
typedef struct { void* sync_handle; int num_task; } Environment;
typedef int (*Lambda)(int task, Environment* environment, void* data);
typedef struct { Lambda run; void* data; int failure; } Job;
void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned flags);
int omp_get_thread_num(void), omp_get_num_threads(void), omp_get_max_threads(void);

int sift_threads = 1;

static void sift_work(void* given) {
    Job* job = (Job*)given;
    Environment environment = {0, omp_get_num_threads()};
    int result = job->run(omp_get_thread_num(), &environment, job->data);
    if (result) job->failure = result;
}

/* A loop that TVM compiled divides itself by the number of tasks it is told, so the number asked for (0) need not be kept. */
int sift_launch(Lambda run, void* data, int tasks) {
    Job job = {run, data, 0};
    int usual = omp_get_max_threads();
    (void)tasks;
    GOMP_parallel(sift_work, &job, usual < sift_threads ? sift_threads : usual, 0);
    return job.failure;
}
#ifdef __cplusplus
}
#endif
"""

_lock = threading.Lock()


@functools.cache
def has_openmp() -> bool:
    """Whether a runtime of OpenMP that offers GCC's interface is loaded for all to use, as torch loads its own on Linux."""
    try:
        process = ctypes.CDLL(None)
    except (OSError, TypeError):
        return False
    return all(hasattr(process, name) for name in _NEEDED)


def redirect(library: Path) -> bool:
    """Let the parallel loops of a loaded ``library`` run on OpenMP's threads. False if it has none, or if that cannot be."""
    try:
        pointer = ctypes.c_void_p.in_dll(ctypes.CDLL(str(library)), _POINTER)
    except ValueError:
        return False
    launcher = _launcher()
    if launcher is None:
        return False
    pointer.value = ctypes.cast(launcher.sift_launch, ctypes.c_void_p).value
    return True


def ensure_openmp_threads(threads: int) -> None:
    """Run parallel loops on at least ``threads`` threads from now on, even if torch uses fewer."""
    launcher = _launcher()
    if launcher is not None:
        number = ctypes.c_int.in_dll(launcher, "sift_threads")
        with _lock:
            number.value = max(number.value, threads)


@functools.cache
def _launcher() -> ctypes.CDLL | None:
    """The library of :data:`_SOURCE`, None if there is no OpenMP or no compiler."""
    if not has_openmp():
        return None
    key = Fingerprint(
        generator=f"{__name__}.launcher", constants=(), target=platform.machine(), features=(),
        toolchain=(("c", platform.libc_ver()[0] or platform.system()),), source=hashlib.sha256(_SOURCE.encode()).hexdigest(),
    )  # fmt: skip
    forms: dict[str, Form[ctypes.CDLL | None]] = {"so": Form(_write, _read)}
    made = KernelCache(default_folder(), forms, what="launcher").get(key, lambda: None)
    if made is None:
        _log.info("Parallel kernels run on TVM's threads: their launcher for OpenMP could not be compiled.")
    return made


def _write(_: object, path: Path) -> None:
    from tvm.support import cc

    if cc.get_cc() is None:
        raise FileNotFoundError("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "launch.c"
        source.write_text(_SOURCE, encoding="utf-8")
        # The unfinished file's name need not end as a library's does.
        finished = Path(folder) / "launch.so"
        cc.create_shared(str(finished), [str(source)], options=["-O2"])
        path.write_bytes(finished.read_bytes())


def _read(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
