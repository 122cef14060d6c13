"""Memory for a layer's output: that of an output that nobody holds any more, if there is one.

The C library returns blocks above 32 MB to the system and gets them anew at every call. Page by page, that took a quarter of the time of
a 40 MB layer at 90 % sparsity, and more than the sums did in the first layer of a network.
"""

from __future__ import annotations

import math
import sys
import threading

import torch
from torch import Tensor

from sift_compiler.runtimes.tvm.huge_pages import HUGE, advise_huge_pages

_LARGE = 2 * HUGE
"""Bytes from which on memory is kept."""
_MOST_KEPT = 8
"""Blocks kept per thread, in use or not. A network uses two or three of a size at a time."""
_ROOMY = 4
"""A block may be so many times as large as what is asked for: whoever keeps a small output keeps all of it."""
_local = threading.local()


def fresh_output(shape: tuple[int, ...]) -> Tensor:
    """A float32 tensor with anything in it, the only one on its memory."""
    size = 4 * math.prod(shape)
    if size < _LARGE:
        return torch.empty(shape)
    kept: list[_Block] = _local.__dict__.setdefault("kept", [])
    block = _fitting(kept, size)
    if block is None:
        block = _Block(size)
    else:
        kept.remove(block)
    # The least recently used goes first; one that is still in use merely is not kept.
    kept.append(block)
    del kept[:-_MOST_KEPT]
    return torch.empty(0).set_(block.storage, 0, shape)  # type: ignore[call-overload,no-any-return]


def _fitting(kept: list[_Block], size: int) -> _Block | None:
    """The smallest unused block that is large enough and not too large, None if there is none."""
    best = None
    for block in kept:
        if size <= block.size <= _ROOMY * size and (best is None or block.size < best.size) and block.unused:
            if block.size == size:
                return block
            best = block
    return best


class _Block:
    """Memory of ``size`` bytes, and whether anything but this object holds it."""

    def __init__(self, size: int) -> None:
        self.size, self.storage = size, torch.empty(size, dtype=torch.uint8).untyped_storage()
        self._references = sys.getrefcount(self.storage)
        advise_huge_pages(self.storage)

    @property
    def unused(self) -> bool:
        """No tensor, view, array or storage object holds the memory; Python has one object of a storage for all who ask for it."""
        tensors = int(torch._C._storage_Use_Count(self.storage._cdata)) - 1
        return tensors == 0 and sys.getrefcount(self.storage) == self._references
