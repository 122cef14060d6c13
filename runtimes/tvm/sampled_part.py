"""SampledPart: the gradient of kept values over one part of a batch, prepared so that a call only passes pointers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.packing import packing
from sift_compiler.lowering.program import Program
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile
from sift_compiler.runtimes.tvm import kernels
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.mask_packer import MaskPacker
from sift_compiler.runtimes.tvm.packed_mask import nothing
from sift_compiler.runtimes.tvm.sampled_kernel import sampled_tile
from sift_compiler.runtimes.tvm.workspace import scratch


@dataclass(frozen=True)
class _Mask:
    """The program of the present mask."""

    stream: Tensor
    block_column: Tensor
    block_sum: Tensor
    place: Tensor
    """Where each slot's sum lies; slots without a gradient point to a sum that stays zero."""
    size: int
    """Length of the sums."""
    aside: int
    """Most weights of one group of rows in one block, rounded up to whole vectors."""

    @classmethod
    def of(cls, program: Program, tile: Tile) -> _Mask:
        lanes, patterns = tile.vector, tile.patterns
        rows_in = np.array([bin(p).count("1") for p in range(1, patterns + 1)])
        closed = np.flatnonzero(program.stream < 0)
        columns = np.diff(closed, prepend=-1) - 1
        counts = (columns.reshape(-1, patterns) * rows_in).sum(1)
        padded = -(-counts // lanes) * lanes
        begin = np.cumsum(padded) - padded
        size = int(padded.sum()) + lanes
        kept = int(counts.sum())
        shift = (begin - (np.cumsum(counts) - counts)).astype(np.int32)
        sums = torch.from_numpy(np.arange(kept, dtype=np.int32) + np.repeat(shift, counts))
        place = torch.full((program.order.size,), size - lanes, dtype=torch.int32)
        place.index_copy_(0, torch.from_numpy(program.order[:kept]).long(), sums)
        # Workers share positions here, never rows: where whole blocks begin is enough.
        block_column = np.ascontiguousarray(program.block_column.reshape(program.blocks, -1)[:, 0])
        shared = (program.stream, block_column, begin[:: program.groups].astype(np.int32))
        stream, block_begin, block_sum = (torch.from_numpy(a) if a.size else nothing() for a in shared)
        return cls(stream, block_begin, block_sum, place, size, int(padded.max(initial=lanes)))


@dataclass(frozen=True)
class _Positions:
    """Where packed positions come from. With lanes over images ``table`` says where each position goes, -1 for nowhere, and ``zeros`` which
    packed positions are zero; with lanes over space ``table`` says what each packed position copies, -1 for zero."""

    table: Tensor
    zeros: Tensor
    zero_count: int
    packed: int
    """Packed positions."""

    @classmethod
    def read(cls, sources: np.ndarray[Any, Any]) -> _Positions:
        return cls(torch.from_numpy(sources.astype(np.int32)), torch.zeros(1, dtype=torch.int32), 0, sources.size)

    @classmethod
    def scattered(cls, sources: np.ndarray[Any, Any], area: int) -> _Positions:
        targets = np.full(area, -1, np.int32)
        read = np.flatnonzero(sources >= 0)
        targets[sources[read]] = read
        zeros = np.flatnonzero(sources < 0)
        spared = torch.from_numpy(np.append(zeros, 0).astype(np.int32))
        return cls(torch.from_numpy(targets), spared, zeros.size, sources.size)


class SampledPart:
    """One tile choice, ready to run on any number of images (tokens) that fill whole vectors, or on ``images`` with lanes over space.

    Args:
        spec: the layer.
        tile: the tile.
        images: images at once with lanes over space; otherwise not read.
        size: height and width of the input; (1, 1) for a linear layer.
        cpu: the processor.
        threads: workers.
    """

    def __init__(
        self, spec: LayerSpec, tile: Tile, images: int, size: tuple[int, int], cpu: CpuFacts, threads: int
    ) -> None:
        self.spec, self.tile, self.images, self.threads = spec, tile, images, threads
        self._groups = -(-spec.out_channels // tile.rows)
        self._blocks = -(-spec.in_channels // tile.channels)
        self._linear, self._batch = spec.kind == "linear", tile.lanes == "batch"
        self._output = spec.output_size(*size)
        self._mask: _Mask | None = None
        self._layout = packing(self._whole_tiles(), images, size, tile)
        self._prepare_positions(size)
        offsets, channel = self._layout.offsets, self._layout.channel
        if self._linear:
            offsets, channel = np.zeros(1, np.int32), tile.width * tile.vector
        self._packer = MaskPacker(spec, tile.rows, tile.channels, offsets, channel, cpu.name, threads)
        parallel = threads > 1
        pitch = self._layout.window if tile.height > 1 else 0
        self._kernel = compiled(
            sampled_tile, cpu.name,
            lanes=tile.vector, rows=tile.rows, height=tile.height, width=tile.width, pitch=pitch, parallel=parallel,
        )  # fmt: skip
        self._pack_images = compiled(kernels.pack_images, cpu.name, lanes=tile.vector, parallel=parallel)
        self._pack_space = compiled(kernels.pack_space, cpu.name, parallel=parallel)

    def _whole_tiles(self) -> LayerSpec:
        """The layer with its output padded to whole tiles, which must not overlap here."""
        if self._linear or not self._batch:
            return self.spec
        sizes, tile = self._output, (self.tile.height, self.tile.width)
        extra = tuple(-(-sizes[a] // tile[a]) * tile[a] - sizes[a] for a in (0, 1))
        return dataclasses.replace(self.spec, output_padding=(extra[0], extra[1]))

    def _prepare_positions(self, size: tuple[int, int]) -> None:
        """Where packed positions of the input and of the output gradient come from."""
        layout, (height, width) = self._layout, self._output
        if self._linear:
            return
        if self._batch:
            self._x_positions = _Positions.scattered(layout.sources(self._whole_tiles()), size[0] * size[1])
            down, across = layout.output
            row, column = np.divmod(np.arange(down * across), across)
            outputs = np.where((row < height) & (column < width), row * width + column, -1)
            self._dy_positions = _Positions.scattered(outputs, height * width)
            return
        positions = np.arange(layout.tiles[1] * self.tile.width * self.tile.vector)
        image, rest = np.divmod(positions, layout.rows * layout.pitch)
        row, column = np.divmod(rest, layout.pitch)
        inside = (image < layout.images) & (row < height) & (column < width)
        outputs = np.where(inside, (image * self.spec.out_channels * height + row) * width + column, -1)
        self._x_positions, self._dy_positions = _Positions.read(layout.sources(self.spec)), _Positions.read(outputs)

    @property
    def packed_per_group(self) -> int:
        """Float32 numbers that one vector of images (tokens) needs, packed: the input and the output gradient."""
        spec, lanes = self.spec, self.tile.vector
        if self._linear:
            return (spec.in_channels + spec.out_channels) * lanes
        layout = self._layout
        outputs = layout.output[0] * layout.output[1]
        return (spec.in_channels * len(layout.phases) * layout.plane + spec.out_channels * outputs) * lanes

    # --- the mask ---------------------------------------------------------------------------------------------------

    def repack(self, entries: Tensor, program: Program | None = None) -> None:
        """Follow a mask: int32 [slots], the entry that each slot wants the gradient of, negative for none.

        ``program`` is that of ``entries``, if another part with the same :attr:`program_key` has packed it.
        """
        self._mask = _Mask.of(program or self._packer.pack(entries), self.tile)

    @property
    def program_key(self) -> object:
        """Equal for parts whose program of a mask is the same."""
        return self._packer.key

    # --- running ----------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, dy: Tensor) -> Tensor:
        """dL/dvalues [slots] from contiguous x [n, C, H, W] and dy [n, M, H', W'], or [n, in] and [n, out].

        With lanes over images or tokens n is a multiple of the vector.
        """
        assert self._mask is not None, "a part is packed before it runs"
        mask = self._mask
        strips = self._strips(x.shape[0])
        workers = max(1, min(self.threads, strips))
        packed_x = self._pack("packed", x, self.spec.in_channels, self._layout.size)
        packed_dy = self._pack("packed_dy", dy, self.spec.out_channels, self._output)
        tile, layout = self.tile, self._layout
        window = tile.channels * (tile.width * tile.vector if self._linear else layout.channel)
        sums = scratch("sampled", workers * mask.size)
        self._kernel(
            packed_x, packed_dy, mask.stream, mask.block_column, mask.block_sum, sums,
            scratch("window", workers * window), scratch("aside", workers * mask.aside * tile.vector),
            workers, strips, *self._steps(), self._groups, self.spec.out_channels, mask.size, mask.aside * tile.vector, 1,
        )  # fmt: skip
        total = sums[: workers * mask.size].view(workers, mask.size)
        whole = total[0] if workers == 1 else total.sum(0)
        return whole.index_select(0, mask.place)

    def _strips(self, items: int) -> int:
        if self._linear:
            return -(-items // (self.tile.width * self.tile.vector))
        down, across = self._layout.tiles
        return items // self.tile.vector * down if self._batch else across

    def _steps(self) -> tuple[int, ...]:
        """The kernel's integers from ``strips_in_group`` to ``stretch_vectors``."""
        spec, tile, layout = self.spec, self.tile, self._layout
        lanes = tile.vector
        if self._linear:
            step = tile.width * lanes
            return (
                1, 1, 0, 0, step * spec.in_channels, 0, 0, step * spec.out_channels, lanes, 0, lanes * spec.out_channels,
                self._blocks, spec.in_channels, tile.channels, lanes, lanes * spec.in_channels, tile.width, 1,
            )  # fmt: skip
        phases = len(layout.phases)
        window = (self._blocks, spec.in_channels * phases, tile.channels * phases, layout.plane * layout.unit)
        if not self._batch:
            step = tile.width * lanes
            outputs = layout.tiles[1] * step
            return (
                1,
                1,
                0,
                0,
                step,
                0,
                0,
                step,
                outputs,
                0,
                lanes,
                *window,
                0,
                layout.window_rows,
                layout.window // lanes,
            )
        (down, across), (height, width) = layout.tiles, layout.output
        area = height * width * lanes
        return (
            down, across, tile.height * layout.pitch * lanes, tile.width * lanes,
            spec.in_channels * phases * layout.plane * lanes,
            tile.height * width * lanes, tile.width * lanes, spec.out_channels * area, area, width * lanes, lanes,
            *window, layout.pitch * lanes, layout.window_rows, layout.window // lanes,
        )  # fmt: skip

    def _pack(self, purpose: str, tensor: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
        """Lay ``tensor`` out for vectors: the input (``purpose`` "packed") or the output gradient."""
        lanes, items = self.tile.vector, tensor.shape[0]
        if self._linear:
            return self._pack_tokens(purpose, tensor, channels)
        positions = self._x_positions if purpose == "packed" else self._dy_positions
        area = size[0] * size[1]
        if not self._batch:
            packed = scratch(purpose, channels * positions.packed)
            self._pack_space(
                tensor.view(-1), positions.table, packed, self._workers(channels), channels, area, positions.packed
            )
            return packed
        groups = items // lanes
        packed = scratch(purpose, groups * channels * positions.packed * lanes)
        self._pack_images(
            tensor.view(-1), positions.table, positions.zeros, packed,
            self._workers(groups * channels), groups, channels, area, positions.packed, positions.zero_count,
        )  # fmt: skip
        return packed

    def _pack_tokens(self, purpose: str, tensor: Tensor, features: int) -> Tensor:
        """[tokens, features] → [tokens / lanes, features, lanes], zeros up to whole tiles: as images of one channel."""
        lanes, groups = self.tile.vector, tensor.shape[0] // self.tile.vector
        whole = -(-groups // self.tile.width) * self.tile.width
        packed = scratch(purpose, whole * features * lanes)
        packed[groups * features * lanes : whole * features * lanes].zero_()
        targets, none = torch.arange(features, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
        workers = self._workers(groups)
        self._pack_images(tensor.view(-1), targets, none, packed, workers, groups, 1, features, features, 0)
        return packed

    def _workers(self, pieces: int) -> int:
        return max(1, min(self.threads, pieces))
