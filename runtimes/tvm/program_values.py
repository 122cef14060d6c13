"""A layer's values in the order of its program: gathered at every call, or kept while the same values are frozen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sift_compiler.runtimes.tvm.workspace import scratch

_PER_WORKER = 65_536
"""Values below which a second worker is not worth waking."""


class ProgramValues:
    """``values[order]``.

    Args:
        gather: the kernel that copies (see kernels.gather).
        threads: its workers.
        freeze: keep the copy until other values come, the mask moves, or the values' version says that they were changed in place. Changes
            that no version counts (through ``.data`` or a NumPy view) go unnoticed.
    """

    def __init__(self, gather: Callable[..., Any], threads: int, freeze: bool) -> None:
        self._gather, self._threads, self._freeze = gather, threads, freeze
        self._kept: Tensor | None = None
        # Held, so that their memory is not given to others.
        self._source: Tensor | None = None
        self._order: Tensor | None = None
        self._version = 0

    def of(self, values: Tensor, order: Tensor, count: int) -> Tensor:
        """The first ``count`` entries of ``order`` of ``values``; unless frozen, in memory that the next call uses again."""
        if not self._freeze:
            return self._gathered(values, order, scratch("values", count), count)
        # Tensors made in inference mode count no versions.
        version = 0 if values.is_inference() else values._version
        same = self._source is not None and self._source.data_ptr() == values.data_ptr() and self._version == version
        if self._kept is None or self._order is not order or not same:
            # One vector at least: kernels are given no empty tensors.
            self._kept = self._gathered(values, order, torch.empty(max(count, 16)), count)
            self._source, self._order, self._version = values, order, version
        return self._kept

    def _gathered(self, values: Tensor, order: Tensor, target: Tensor, count: int) -> Tensor:
        self._gather(values, order, target, max(1, min(self._threads, count // _PER_WORKER)), count)
        return target
