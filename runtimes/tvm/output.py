"""Fresh memory for a layer's output."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

_PAGE, _HUGE = 4096, 2 * 1024 * 1024
_MADV_HUGEPAGE = 14


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


def fresh_output(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 tensor; a large one asks the system for huge pages.

    The C library returns blocks above 32 MB to the system and gets them anew at every call. Touched page by page, that took 7 % of
    a 40 MB layer at 90 % sparsity; with huge pages next to nothing. It is advice: where the system refuses, nothing changes.
    """
    y = torch.empty(shape)
    size = 4 * y.numel()
    advise = _madvise() if size >= 2 * _HUGE else None
    if advise is not None:
        begin = -(-y.data_ptr() // _PAGE) * _PAGE
        advise(begin, (y.data_ptr() + size - begin) // _PAGE * _PAGE, _MADV_HUGEPAGE)
    return y
