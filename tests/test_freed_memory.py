"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import weakref
from pathlib import Path

import pytest
import torch

from sift_compiler import freed_memory
from sift_compiler.freed_memory import release_freed_memory


class Cycle:
    """Holds itself."""

    def __init__(self) -> None:
        self.self = self


def test_garbage_in_cycles_is_collected() -> None:
    gc.disable()
    try:
        gone = weakref.ref(Cycle())
        assert gone() is not None
        release_freed_memory()
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_what_the_c_library_keeps_goes_back() -> None:
    if freed_memory._malloc_trim() is None:
        pytest.skip("the C library is not glibc")
    small = [torch.zeros(16_000) for _ in range(1600)]  # 100 MB below the size at which blocks go back by themselves
    barrier = torch.zeros(16_000)
    del small
    before = resident()
    release_freed_memory()
    assert resident() < before - 50e6
    assert barrier.numel()


def resident() -> float:
    """Bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024


def test_other_c_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> object:
        raise OSError("no such library")

    freed_memory._malloc_trim.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    try:
        release_freed_memory()
        assert freed_memory._malloc_trim() is None
    finally:
        freed_memory._malloc_trim.cache_clear()
