"""Scratch memory shared by all kernels of a thread: what one layer leaves there, the next may overwrite."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from sift_compiler.runtimes.tvm.huge_pages import zeros_in_huge_pages

_LARGE = 2**17
"""Numbers from which on a huge page is worth its two megabytes: partial sums are visited in no order, and 64 ordinary pages are all
that a processor finds at once."""
_local = threading.local()


def scratch(purpose: str, size: int) -> Tensor:
    """A float32 tensor of at least ``size`` numbers, 64-byte aligned, with anything in it; the same memory at every call of a thread."""
    buffers: dict[str, Tensor] = _local.__dict__.setdefault("buffers", {})
    buffer = buffers.get(purpose)
    if buffer is None or buffer.numel() < size:
        # Made in inference mode it could not be written to outside.
        with torch.inference_mode(False):
            buffer = zeros_in_huge_pages(size) if size >= _LARGE else torch.zeros(max(size, 16), dtype=torch.float32)
        buffers[purpose] = buffer
    return buffer


@contextlib.contextmanager
def exact_scratch() -> Iterator[None]:
    """Inside, scratch tensors are fresh and as small as was asked for (at least 16 numbers); what there was comes back afterwards."""
    before = _local.__dict__.get("buffers", {})
    _local.__dict__["buffers"] = {}
    try:
        yield
    finally:
        _local.__dict__["buffers"] = before
