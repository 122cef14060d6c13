"""Huge pages, where the system gives some: addresses of memory that is read at random are then all at hand."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor, UntypedStorage

_PAGE, HUGE = 4096, 2 * 1024 * 1024
_MADV_HUGEPAGE = 14


def advise_huge_pages(memory: UntypedStorage) -> None:
    """Ask for huge pages. That is advice: where the system refuses, nothing changes."""
    advise = _madvise()
    if advise is not None:
        begin = -(-memory.data_ptr() // _PAGE) * _PAGE
        advise(begin, (memory.data_ptr() + memory.nbytes() - begin) // _PAGE * _PAGE, _MADV_HUGEPAGE)


def zeros_in_huge_pages(count: int) -> Tensor:
    """``count`` float32 zeros that begin with a huge page; the last one is taken up as a whole."""
    held = torch.empty(-(-4 * count // HUGE) * HUGE + HUGE, dtype=torch.uint8)
    advise_huge_pages(held.untyped_storage())
    first = -held.data_ptr() % HUGE
    return held[first : first + 4 * count].view(torch.float32).zero_()


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The C library's madvise, where there is one."""
    try:
        function = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function
