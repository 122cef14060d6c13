"""A layer's weights as Winograd's convolution takes them: made at every call, or kept while the same values are frozen."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.winograd import Form
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.huge_pages import zeros_in_huge_pages
from sift_compiler.runtimes.tvm.winograd_kernel import winograd_weights
from sift_compiler.runtimes.tvm.workspace import scratch


class TransformedWeights:
    """``G g Gᵀ`` of a layer, [n², blocks of rows, C, rows]; see winograd_kernel.winograd_weights.

    Args:
        spec: the layer.
        rows: output channels of a block.
        form: the layer as one of stride 1.
        reach: n, see winograd.transforms.
        cpu: the processor.
        threads: workers.
        freeze: keep them until other values come, the mask moves, or the values' version says that they were changed in place.
    """

    def __init__(
        self, spec: LayerSpec, rows: int, form: Form, reach: int, cpu: CpuFacts, threads: int, freeze: bool
    ) -> None:
        self._spec, self._form, self._threads, self._freeze = spec, form, threads, freeze
        self._blocks = -(-spec.out_channels // rows)
        self._channels = spec.in_channels * form.phases
        self._count = reach**2 * self._blocks * self._channels * rows
        self._kernel = compiled(
            winograd_weights, cpu.name, rows=rows, taps=form.taps, reach=reach, parallel=threads > 1
        )
        self._slots: Tensor | None = None
        self._kept: Tensor | None = None
        self._state: tuple[int, int] | None = None
        self._held: Tensor | None = None
        self.key = ("winograd", rows, reach)
        """Equal for those of one layer that are the same."""

    def follow(self, index: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """The mask is ``index`` now: int32 [slots]."""
        slots = np.full(math.prod(self._spec.weight_shape), -1, np.int32)
        kept = np.flatnonzero(index >= 0)
        slots[index[kept]] = kept
        self._slots, self._state = torch.from_numpy(self._as_stride_1(slots)), None

    def _as_stride_1(self, slots: np.ndarray[Any, np.dtype[np.int32]]) -> np.ndarray[Any, np.dtype[np.int32]]:
        """int32 [M · C · stride² · r²]: of each channel the kernels of its phases, -1 where the layer's kernel has ended."""
        spec, stride, taps = self._spec, self._form.stride, self._form.taps
        whole = np.full((spec.out_channels, spec.in_channels, stride * taps, stride * taps), -1, np.int32)
        whole[:, :, : spec.kernel_size[0], : spec.kernel_size[1]] = slots.reshape(spec.weight_shape)
        split = whole.reshape(spec.out_channels, spec.in_channels, taps, stride, taps, stride)
        return np.ascontiguousarray(split.transpose(0, 1, 3, 5, 2, 4)).reshape(-1)

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
        self._kernel(values, self._slots, target, workers, spec.out_channels, self._channels, self._blocks)
        return target
