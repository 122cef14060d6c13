"""MaskPacker: packs masks of one layer for one tile with the compiled packer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.program import Int32, Program, pack
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.pack_kernel import MARKS, pack_mask
from sift_compiler.runtimes.tvm.workspace import scratch

_MOST = 2**31 - 1


class MaskPacker:
    """Same arguments and same result as :func:`sift_compiler.lowering.program.pack`, in a tenth of the time.

    Args:
        spec: the layer.
        rows: R, 1 … 6.
        channels: input channels of a block.
        offsets: int32 [taps], where a tap begins in the window of one channel, in float32.
        channel_stride: float32 numbers of one channel in a window.
        cpu: the compiler's name of the processor.
        segments: parts of a block that have a beginning of their own.
    """

    def __init__(
        self,
        spec: LayerSpec,
        rows: int,
        channels: int,
        offsets: Int32,
        channel_stride: int,
        cpu: str,
        segments: int = 1,
    ) -> None:
        self._spec, self._rows, self._channels, self._offsets, self._stride = (
            spec,
            rows,
            channels,
            offsets,
            channel_stride,
        )
        self._segments = segments
        self.key = (rows, channels, offsets.tobytes(), channel_stride, segments)
        """What the order of a program depends on, but for the layer."""
        self._groups, self._blocks = -(-spec.out_channels // rows), -(-spec.in_channels // channels)
        self._buckets = self._blocks * self._groups * ((1 << rows) - 1)
        taps = offsets.size
        self._columns, self._width = spec.in_channels * taps, spec.weight_shape[1] * taps
        channel, tap = np.divmod(np.arange(self._columns), taps)
        first = np.arange(spec.out_channels) // max(1, spec.out_channels // spec.groups) * self._width
        tables = (first, offsets[tap] + channel % channels * channel_stride, channel // channels)
        self._tables = tuple(torch.from_numpy(table.astype(np.int32)) for table in tables)
        self._kernel = compiled(pack_mask, cpu, rows=rows)

    def pack(self, index: Tensor) -> Program:
        """The program of ``index``: int32 [nnz], distinct flat positions in the dense weight; a negative one is not in the mask."""
        nnz = index.numel()
        if not self._fits(nnz):
            return pack(
                index.numpy(), self._spec, self._rows, self._channels, self._offsets, self._stride, self._segments
            )
        stream = torch.zeros(nnz + self._buckets, dtype=torch.int32)
        starts = torch.zeros(2, self._blocks * self._segments, dtype=torch.int32)
        # What is not kept has no place in the order; the rest of it is zero.
        order = torch.zeros(nnz + self._rows, dtype=torch.int32)
        work = self._scratch(nnz)
        self._kernel(
            index.contiguous(), *self._tables, *work, stream, starts[0], starts[1], order,
            nnz, self._width, self._columns, self._groups, self._blocks, self._segments, 1 / self._width,
        )  # fmt: skip
        columns = int(work[0][2 * self._groups])
        used = stream[: columns + self._buckets].numpy()
        return Program(used, starts[0].numpy(), starts[1].numpy(), order[:nnz].numpy(), self._groups, self._blocks)

    def _fits(self, nnz: int) -> bool:
        """Whether there is anything to pack, and all positions fit 32 bits."""
        return nnz > 0 and max(nnz + self._buckets, self._columns << self._rows) <= _MOST

    def _scratch(self, nnz: int) -> tuple[Tensor, ...]:
        """Marks and patterns are zero, and the packer leaves them so."""
        rows, columns = self._rows, self._columns
        return (
            _integers("groups", 2 * self._groups + 1), _integers("positions", nnz), _integers("slots", nnz),
            torch.zeros(-(-columns // MARKS), dtype=torch.int64), torch.zeros(columns, dtype=torch.int32),
            _integers("cells", columns * rows), _integers("columns", nnz + rows), _integers("sorted", nnz + rows),
            _integers("bucket_columns", self._buckets), _integers("bucket_values", self._buckets),
        )  # fmt: skip


def _integers(purpose: str, size: int) -> Tensor:
    return scratch(purpose, size).view(torch.int32)
