"""LanePart: a convolution between sparse layers for one input shape, its images side by side in vectors before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.packing import packing
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.program import Program
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.tvm import kernels
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.epilogue import at_run_time
from sift_compiler.runtimes.tvm.lane_kernel import lane_tile
from sift_compiler.runtimes.tvm.mask_packer import MaskPacker
from sift_compiler.runtimes.tvm.packed_mask import PackedMask
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.program_values import ProgramValues
from sift_compiler.runtimes.tvm.shared import WORTH_A_WORKER, shared
from sift_compiler.runtimes.tvm.streaming import STREAMED_BYTES
from sift_compiler.runtimes.tvm.workspace import scratch

_ALIGNMENT = 64


class LanePart:
    """One tile choice, ready to run on ``choice.count`` images, a multiple of the tile's lanes.

    Args:
        spec: a convolution.
        choice: the tile, with lanes over the batch, and how many images there are.
        size: height and width of the input.
        cpu: the processor.
        threads: workers; with 1 no thread pool is touched.
        epilogue: what is done to finished sums.
        freeze: see program_values.
    """

    def __init__(
        self, spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, threads: int, epilogue: Epilogue = PLAIN,
        freeze: bool = False,
    ) -> None:  # fmt: skip
        tile = choice.tile
        self.spec, self.choice, self.threads = spec, choice, threads
        self._size, self._output = size, spec.output_size(*size)
        layout = packing(spec, choice.count, size, tile)
        self._layout = layout
        self._phase = torch.tensor(layout.phases, dtype=torch.int32).t().contiguous().view(-1)
        self._rows_ahead = self._window_rows()
        self._groups, self._blocks = -(-spec.out_channels // tile.rows), -(-spec.in_channels // tile.channels)
        self._packer = MaskPacker(spec, tile.rows, tile.channels, layout.offsets, layout.channel, cpu.name, threads)
        self._mask: PackedMask | None = None
        self._one = torch.ones(1)  # stands where the kernel reads nothing
        parallel = threads > 1
        output = 4 * choice.count * spec.out_channels * self._output[0] * self._output[1]
        made, self._added, self._lowest = at_run_time(epilogue)
        self._values = ProgramValues(compiled(kernels.gather, cpu.name, parallel=parallel), threads, freeze)
        self._kernel = compiled(
            lane_tile, cpu.name, lanes=tile.vector, rows=tile.rows, height=tile.height, width=tile.width,
            pitch=layout.window if tile.height > 1 else 0, parallel=parallel, epilogue=made,
            past_caches=output >= STREAMED_BYTES,
        )  # fmt: skip

    @property
    def program_key(self) -> object:
        """See Part."""
        return self._packer.key

    def share(self, other: object) -> None:
        """Use the program of ``other``, whose :attr:`program_key` is the same."""
        assert isinstance(other, LanePart | Part)
        self._mask = other._mask

    def repack(self, index: np.ndarray[Any, np.dtype[np.int32]]) -> Program:
        """Follow the mask ``index``: int32 [nnz]."""
        program = self._packer.pack(torch.from_numpy(index))
        self._mask = PackedMask.of(program)
        return program

    def run(self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish = NOTHING) -> None:
        """Compute ``y`` [groups, M, H', W', lanes] from ``x`` [groups, C, H, W, lanes], both contiguous float32.

        ``finish`` holds contiguous float32 tensors, the residual one like ``y``.
        """
        mask = self._mask
        assert mask is not None, "a part is packed before it runs"
        packed_values = self._values.of(values, mask.order, self.spec.nnz)
        self._kernel(*self._arguments(x, packed_values, bias, finish, y, self._tiles(x)))

    def trial(
        self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, share: float
    ) -> tuple[Callable[[], None], float]:
        """A call that computes about ``share`` of ``y``, and how many times as long all of it takes; see :meth:`Part.trial`."""
        mask = self._mask
        assert mask is not None, "a part is packed before it runs"
        packed_values = self._values.of(values, mask.order, self.spec.nnz).clone()
        tiles = self._tiles(x)
        most = min(tiles, self.threads * max(1, round(share * tiles / self.threads)))
        arguments = self._arguments(x, packed_values, bias, NOTHING, y, most)
        return lambda: self._kernel(*arguments), tiles / most

    def _arguments(
        self, x: Tensor, packed_values: Tensor, bias: Tensor, finish: Finish, y: Tensor, tiles: int
    ) -> tuple[Any, ...]:
        """What the kernel takes to compute the first ``tiles`` tiles."""
        mask = self._mask
        assert mask is not None, "a part is packed before it runs"
        workers = self._workers(self.spec.nnz * self.choice.tile.vectors * tiles // WORTH_A_WORKER)
        pieces = shared(tiles, self.threads, self._groups, workers)
        tensors = (finish.scale, finish.shift, finish.residual)
        return (
            aligned(x), mask.stream, mask.block_column, mask.block_value, packed_values, bias,
            *(self._one if t is None else t.view(-1) for t in tensors), self._phase, self._rows_ahead, *pieces, y.view(-1), *self._workspaces(),
            workers, self.threads, *self._geometry(), self._added, self._lowest,
        )  # fmt: skip

    def _tiles(self, x: Tensor) -> int:
        return x.shape[0] * self._layout.tiles[0] * self._layout.tiles[1]

    def _workers(self, pieces: int) -> int:
        return max(1, min(self.threads, pieces))

    def _window_rows(self) -> Tensor:
        """int32 [channels of a block · phases · rows]: where each row of a window begins in the input, from that of its first position."""
        layout, (height, width), stride = self._layout, self._size, self.spec.stride
        channel = np.arange(min(self.choice.tile.channels, self.spec.in_channels))[:, None, None] * height * width
        phase = np.array([y * width + x for y, x in layout.phases])[:, None]
        row = np.arange(layout.window_rows) * stride[0] * width
        return torch.from_numpy(((channel + phase + row).reshape(-1) * self.choice.tile.vector).astype(np.int32))

    def _workspaces(self) -> tuple[Tensor, Tensor]:
        """Windows and partial sums, one of each per worker."""
        tile = self.choice.tile
        sums = self._groups * tile.accumulators * tile.vector
        return scratch("window", self.threads * tile.channels * self._layout.channel), scratch(
            "sums", self.threads * sums
        )

    def _geometry(self) -> tuple[int, ...]:
        """The kernel's integers after ``segments``."""
        spec, tile, layout = self.spec, self.choice.tile, self._layout
        return (
            *layout.tiles, self._output[0] - tile.height, self._output[1] - tile.width,
            spec.in_channels, *self._size, *spec.stride, *spec.padding,
            len(layout.phases), layout.window_rows, layout.window // tile.vector, self._blocks, tile.channels,
            self._groups, spec.out_channels, *self._output,
        )  # fmt: skip


def aligned(x: Tensor) -> Tensor:
    """``x`` as a vector that begins on a cache line, as vectors in the kernel do."""
    return (x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()).view(-1)
