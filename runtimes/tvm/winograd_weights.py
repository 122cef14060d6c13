"""A layer's weights as Winograd's convolution takes them: made at every call, or kept while the same values are frozen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.winograd import weight_bytes
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.huge_pages import zeros_in_huge_pages
from sift_compiler.runtimes.tvm.winograd_kernel import winograd_weights
from sift_compiler.runtimes.tvm.workspace import scratch


class TransformedWeights:
    """``G g Gᵀ`` of a layer, [(m + 2)², blocks of rows, C, rows]; see winograd_kernel.winograd_weights.

    Args:
        spec: the layer.
        rows: output channels of a block.
        size: m.
        cpu: the processor.
        threads: workers.
        freeze: keep them until other values come, the mask moves, or the values' version says that they were changed in place.
    """

    def __init__(self, spec: LayerSpec, rows: int, size: int, cpu: CpuFacts, threads: int, freeze: bool) -> None:
        self._spec, self._size, self._threads, self._freeze = spec, size, threads, freeze
        self._blocks = -(-spec.out_channels // rows)
        self._count = weight_bytes(spec, size) // 4 // spec.out_channels * self._blocks * rows
        self._kernel = compiled(winograd_weights, cpu.name, rows=rows, size=size, parallel=threads > 1)
        self._slots: Tensor | None = None
        self._kept: Tensor | None = None
        self._state: tuple[int, int] | None = None
        self._held: Tensor | None = None
        self.key = ("winograd", rows, size)
        """Equal for those of one layer that are the same."""

    def follow(self, index: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """The mask is ``index`` now: int32 [slots]."""
        slots = np.full(math.prod(self._spec.weight_shape), -1, np.int32)
        kept = np.flatnonzero(index >= 0)
        slots[index[kept]] = kept
        self._slots, self._state = torch.from_numpy(slots), None

    def of(self, values: Tensor) -> Tensor:
        """Those of ``values`` [slots]; unless frozen, in memory that the next call uses again."""
        if not self._freeze:
            return self._made(values, scratch("winograd weights", self._count))
        # Tensors made in inference mode count no versions.
        state = (values.data_ptr(), 0 if values.is_inference() else values._version)
        if self._kept is None or state != self._state:
            self._kept = self._made(values, zeros_in_huge_pages(self._count) if self._kept is None else self._kept)
            # Held, so that its memory is not given to others.
            self._state, self._held = state, values
        return self._kept

    def _made(self, values: Tensor, target: Tensor) -> Tensor:
        assert self._slots is not None, "a part is packed before it runs"
        spec = self._spec
        workers = max(1, min(self._threads, self._blocks))
        self._kernel(values, self._slots, target, workers, spec.out_channels, spec.in_channels, self._blocks)
        return target
