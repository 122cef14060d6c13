"""Part: one tile choice of a layer for one input shape, prepared so that a call only passes pointers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.packing import Packing, packing
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.program import Program
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.tvm import kernels
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.mask_packer import MaskPacker
from sift_compiler.runtimes.tvm.packed_mask import PackedMask, nothing
from sift_compiler.runtimes.tvm.program_values import ProgramValues
from sift_compiler.runtimes.tvm.shared import WORTH_A_WORKER, shared
from sift_compiler.runtimes.tvm.sparse_kernel import sparse_tile
from sift_compiler.runtimes.tvm.target import host_cpu
from sift_compiler.runtimes.tvm.workspace import scratch

_PACKED_BYTES = 64 * 1024 * 1024
"""Packed input held at once, unless one group of images needs more: it should stay in the last-level cache."""
_INDEX_LIMIT = 2**31 - 1

Code = tuple[Callable[..., Any], dict[str, Any]]
"""A generator of TIR and the constants it is given."""


@dataclass(frozen=True)
class _Tables:
    """What depends on the input's shape only: where packed positions come from, where tiles go."""

    positions: tuple[Tensor, ...]
    runs: tuple[Tensor, Tensor, Tensor, Tensor]


def _targets(layout: Packing, spec: LayerSpec) -> tuple[Tensor, Tensor]:
    """Packed position of each position of an image, -1 for those no tap reads [area]; and the packed positions that are zero."""
    sources = layout.sources(spec)
    targets = np.full(layout.size[0] * layout.size[1], -1, np.int32)
    read = np.flatnonzero(sources >= 0)
    targets[sources[read]] = read
    return torch.from_numpy(targets), torch.from_numpy(np.flatnonzero(sources < 0).astype(np.int32))


def _stretches(layout: Packing, step: int, channels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut every output row of every image at tile borders (each ``step`` positions).

    Returns:
        Per tile the first of its stretches [tiles + 1]; per stretch the position in the tile, the position in the output
        (image · channels · height · width + row · width + column) and the length.
    """
    height, width = layout.output
    image, row = (a.ravel() for a in np.meshgrid(np.arange(layout.images), np.arange(height), indexing="ij"))
    begin = (image * layout.rows + row) * layout.pitch
    first, last = begin // step, (begin + width - 1) // step
    pieces = last - first + 1
    which = np.repeat(np.arange(begin.size), pieces)
    tile = first[which] + np.arange(which.size) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = np.maximum(begin[which], tile * step)
    length = np.minimum(begin[which] + width, (tile + 1) * step) - start
    target = image[which] * channels * height * width + row[which] * width + start - begin[which]
    starts = np.concatenate(([0], np.cumsum(np.bincount(tile, minlength=layout.tiles[1]))))
    return tuple(torch.from_numpy(a.astype(np.int32)) for a in (starts, start - tile * step, target, length))  # type: ignore[return-value]


class Part:
    """One tile choice, ready to run on ``choice.count`` images or tokens.

    Args:
        spec: the layer.
        choice: the tile and how many images (tokens) there are.
        size: height and width of the input; (1, 1) for a linear layer.
        cpu: the processor.
        threads: workers; with 1 no thread pool is touched.
        epilogue: what is done to finished sums.
        freeze: see program_values.
        recorded: its kernel calls will only be recorded (see :meth:`record`): nothing is compiled for ``cpu``, which may be another machine's.
    """

    def __init__(
        self,
        spec: LayerSpec,
        choice: Choice,
        size: tuple[int, int],
        cpu: CpuFacts,
        threads: int,
        epilogue: Epilogue = PLAIN,
        freeze: bool = False,
        recorded: bool = False,
    ) -> None:
        self.spec, self.choice, self.threads, self._cpu, self._epilogue = spec, choice, threads, cpu, epilogue
        self._mask: PackedMask | None = None
        self._one = torch.ones(1)  # stands where the kernel reads nothing
        self._pack_kernel: Callable[..., Any]
        tile = choice.tile
        self._groups = -(-spec.out_channels // tile.rows)
        self._blocks = -(-spec.in_channels // tile.channels)
        self._layout = packing(spec, choice.count, size, tile)
        self._packer = self._mask_packer(host_cpu() if recorded else cpu)
        self._kernel: Callable[..., Any]
        self._values: ProgramValues
        if not recorded:
            self._kernel, gather = self._compile()
            self._values = ProgramValues(gather, threads, freeze)
        self._items = self._items_at_once()
        self._ahead = self._window_rows()
        if spec.kind == "linear":
            self._tables = _Tables((), (nothing(),) * 4)
        elif tile.lanes == "space":
            runs = _stretches(self._layout, tile.width * tile.vector, spec.out_channels)
            self._tables = _Tables((torch.from_numpy(self._layout.sources(spec)),), runs)
        else:
            self._tables = _Tables(_targets(self._layout, spec), (nothing(),) * 4)

    # --- the mask -------------------------------------------------------------------------------------------------

    def repack(self, index: np.ndarray[Any, np.dtype[np.int32]]) -> Program:
        """Follow the mask ``index``: int32 [nnz]."""
        program = self._packer.pack(torch.from_numpy(index))
        self._mask = PackedMask.of(program)
        return program

    @property
    def program_key(self) -> object:
        """Equal for parts whose program of a mask is the same."""
        return self._packer.key

    def share(self, other: Any) -> None:
        """Use the program of ``other``, whose :attr:`program_key` is the same."""
        assert isinstance(other._mask, PackedMask)
        self._mask = other._mask

    def _mask_packer(self, cpu: CpuFacts) -> MaskPacker:
        tile, layout = self.choice.tile, self._layout
        linear = self.spec.kind == "linear"
        offsets = np.zeros(1, np.int32) if linear else layout.offsets
        channel = tile.width * tile.vector if linear else layout.channel
        return MaskPacker(self.spec, tile.rows, tile.channels, offsets, channel, cpu.name, self.threads)

    # --- running --------------------------------------------------------------------------------------------------

    def run(self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish = NOTHING) -> None:
        """Compute ``y`` from contiguous float32 ``x``: [count, C, H, W] → [count, M, H', W'], or [count, in] → [count, out].

        ``finish`` holds contiguous float32 tensors, the residual one like ``y``.
        """
        mask = self._mask
        assert mask is not None, "a part is packed before it runs"
        packed_values = self._values.of(values, mask.order, self.spec.nnz)
        items = self._items
        for first in range(0, x.shape[0], items):
            whole = items >= x.shape[0]
            source, target = (x, y) if whole else (x[first : first + items], y[first : first + items])
            residual = finish.residual if whole or finish.residual is None else finish.residual[first : first + items]
            packed, sizes, strips = self._pack(source)
            self._kernel(*self._arguments(packed, packed_values, bias, finish, residual, target, strips, sizes))

    def trial(
        self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, share: float
    ) -> tuple[Callable[[], None], float]:
        """A call that computes about ``share`` of ``y``, at least a row of tiles per worker; and how many times as long all of it takes.

        Arguments as those of :meth:`run`. The input is packed and values are gathered beforehand.
        """
        mask = self._mask
        assert mask is not None, "a part is packed before it runs"
        packed, sizes, strips = self._pack(x)
        # Packed images are the same whatever the tile.
        packed = packed if self.choice.tile.lanes == "batch" else packed.clone()
        packed_values = self._values.of(values, mask.order, self.spec.nnz).clone()
        most = min(strips, self.threads * max(1, round(share * strips / self.threads)))
        arguments = self._arguments(packed, packed_values, bias, NOTHING, None, y, most, sizes)
        return lambda: self._kernel(*arguments), strips / most

    def _arguments(
        self, packed: Tensor, packed_values: Tensor, bias: Tensor, finish: Finish, residual: Tensor | None, y: Tensor,
        strips: int, sizes: tuple[int, ...],
    ) -> tuple[Any, ...]:  # fmt: skip
        """What the kernel takes to compute the first ``strips`` rows of tiles."""
        mask = self._mask
        assert mask is not None, "a part is packed before it runs"
        workers = self._workers(self.spec.nnz * self.choice.tile.vectors * strips * sizes[1] // WORTH_A_WORKER)
        pieces = shared(strips, self.threads, self._groups, workers)
        return (
            packed, mask.stream, mask.block_column, mask.block_value, packed_values, bias, *self._tables.runs, self._ahead[0], *pieces,
            *(self._one if t is None else t.view(-1) for t in (finish.scale, finish.shift, residual)), y.view(-1),
            *self._workspaces(), workers, self.threads, *sizes, *self._ahead[1:],
        )  # fmt: skip

    def _workers(self, pieces: int) -> int:
        return max(1, min(self.threads, pieces))

    def _workspaces(self) -> tuple[Tensor, Tensor, Tensor]:
        """Windows, partial sums and finished rows of tiles, one of each per worker."""
        tile, layout, spec = self.choice.tile, self._layout, self.spec
        window = tile.channels * (tile.width * tile.vector if spec.kind == "linear" else layout.channel)
        sums = self._groups * tile.accumulators * tile.vector
        finished = spec.out_channels * self._row_positions * tile.vector if self._strip else 1
        return (
            scratch("window", self.threads * window),
            scratch("sums", self.threads * sums),
            scratch("finished", self.threads * finished),
        )

    @property
    def _row_positions(self) -> int:
        """Output positions of a row of tiles."""
        return self.choice.tile.height * self._layout.output[1]

    @property
    def _strip(self) -> int:
        """Positions transposed at once: the largest power of two up to the lanes that a row of tiles holds, 0 below four."""
        if self.spec.kind == "linear" or self.choice.tile.lanes != "batch":
            return 0
        positions = min(self._row_positions, self.choice.tile.vector)
        return 1 << (positions.bit_length() - 1) if positions >= 4 else 0

    def _pack(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
        """The packed input, the kernel's integers after ``segments``, and the number of strips (rows of tiles)."""
        if self.spec.kind == "linear":
            return self._pack_tokens(x)
        return self._pack_images(x) if self.choice.tile.lanes == "batch" else self._pack_space(x)

    def _pack_tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
        tile, spec = self.choice.tile, self.spec
        tokens, features = x.shape[0], spec.in_channels
        step = tile.width * tile.vector
        tiles = -(-tokens // step)
        sizes = (tiles, 1, step, 0, tokens - step, 0, features, 0)
        window = (self._blocks, features, tile.channels, features, 0, 1, tile.width)
        return x.view(-1), (*sizes, *window, self._groups, spec.out_channels, 1, 1), tiles

    def _pack_images(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
        tile, spec, layout = self.choice.tile, self.spec, self._layout
        groups = x.shape[0] // tile.vector
        positions = len(layout.phases) * layout.plane
        group_step = spec.in_channels * positions * tile.vector
        packed = scratch("packed", groups * group_step)
        area = layout.size[0] * layout.size[1]
        channels = spec.in_channels
        pieces = groups * channels
        targets, zeros = self._tables.positions
        count = zeros.numel()
        self._pack_kernel(
            x.view(-1),
            targets,
            zeros if count else nothing(),
            packed,
            self._workers(pieces),
            groups,
            channels,
            area,
            positions,
            count,
        )
        (down, across), (height, width) = layout.tiles, layout.output
        sizes = (
            down, across, tile.width, height - tile.height, width - tile.width,
            layout.pitch * tile.vector, tile.vector, group_step,
        )  # fmt: skip
        return (
            packed,
            (*sizes, *self._window(layout.pitch * tile.vector), height * width, width),
            groups * down,
        )

    def _pack_space(self, x: Tensor) -> tuple[Tensor, tuple[int, ...], int]:
        tile, spec, layout = self.choice.tile, self.spec, self._layout
        positions = len(layout.phases) * layout.plane
        packed = scratch("packed", spec.in_channels * positions)
        area = layout.size[0] * layout.size[1]
        self._pack_kernel(
            x.view(-1),
            *self._tables.positions,
            packed,
            self._workers(spec.in_channels),
            spec.in_channels,
            area,
            positions,
        )
        tiles = layout.tiles[1]
        sizes = (tiles, 1, tile.width, 0, (tiles - 1) * tile.width, 0, tile.vector, 0)
        area = layout.output[0] * layout.output[1]
        return packed, (*sizes, *self._window(0), area, layout.output[1]), tiles

    def _window(self, stretch_step: int) -> tuple[int, ...]:
        """The kernel's integers from ``blocks`` to ``M``."""
        tile, spec, layout = self.choice.tile, self.spec, self._layout
        phases = len(layout.phases)
        return (
            self._blocks, spec.in_channels * phases, tile.channels * phases, layout.plane * layout.unit, stretch_step,
            layout.window_rows, layout.window // tile.vector, self._groups, spec.out_channels,
        )  # fmt: skip

    def _window_rows(self) -> tuple[Tensor, int, int]:
        """Where the rows of a window lie in the packed input, int32, counted from its first number; how many rows, and vectors in each."""
        tile, layout = self.choice.tile, self._layout
        if self.spec.kind == "linear":
            rows = np.arange(tile.width * tile.vector) * self.spec.in_channels
            vectors = -(-min(tile.channels, self.spec.in_channels) // tile.vector)
        else:
            planes = min(tile.channels, self.spec.in_channels) * len(layout.phases)
            plane, pitch = layout.plane * layout.unit, layout.pitch * layout.unit if layout.unit > 1 else 0
            rows = (np.arange(planes)[:, None] * plane + np.arange(layout.window_rows) * pitch).reshape(-1)
            vectors = layout.window // tile.vector
        return torch.from_numpy(rows.astype(np.int32)), rows.size, vectors

    # --- preparing ------------------------------------------------------------------------------------------------

    def code(self, inline: bool = True) -> tuple[Code | None, Code]:
        """What is compiled: the packing of the input (None for tokens, which need none) and the sparse kernel, ``inline`` or of two functions."""
        tile, layout, parallel = self.choice.tile, self._layout, self.threads > 1
        output = "tokens" if self.spec.kind == "linear" else "images" if tile.lanes == "batch" else "stretches"
        packing_code: Code | None = None
        if output == "images":
            packing_code = (kernels.pack_images, {"lanes": tile.vector, "parallel": parallel})
        elif output == "stretches":
            packing_code = (kernels.pack_space, {"parallel": parallel})
        constants = {
            "lanes": tile.vector, "rows": tile.rows, "height": tile.height, "width": tile.width,
            "pitch": layout.window if tile.height > 1 else 0, "output": output, "strip": self._strip,
            "parallel": parallel, "epilogue": self._epilogue, "inline": inline,
        }  # fmt: skip
        return packing_code, (sparse_tile, constants)

    workspace_count = 3
    """The last tensors of the sparse kernel are workspaces; the output stands before them."""

    packed_values_position = 4
    """Where the packed values stand among the sparse kernel's tensors; they are copied from the layer's values at each run."""

    def record(self, pack_kernel: Callable[..., Any] | None, kernel: Callable[..., Any]) -> None:
        """Hand the kernel calls of later runs to these instead of running them; values are not gathered any more."""
        if pack_kernel is not None:
            self._pack_kernel = pack_kernel
        self._kernel = kernel
        self._values = ProgramValues(lambda *_: None, 1, False)

    def _compile(self) -> tuple[Any, Any]:
        packing_code, (generator, constants) = self.code(inline=False)
        self._pack_kernel = lambda *_: None
        if packing_code is not None:
            self._pack_kernel = compiled(packing_code[0], self._cpu.name, **packing_code[1])
        kernel = compiled(generator, self._cpu.name, **constants)
        return kernel, compiled(kernels.gather, self._cpu.name, parallel=self.threads > 1)

    def _items_at_once(self) -> int:
        """Images (tokens) per kernel call: enough work for all workers, within the packed budget and 32-bit indices."""
        spec, layout, tile = self.spec, self._layout, self.choice.tile
        into = spec.in_channels * layout.size[0] * layout.size[1]
        out = spec.out_channels * layout.output[0] * layout.output[1]
        fits = _INDEX_LIMIT // max(into, out, spec.in_channels * len(layout.phases) * layout.rows * layout.pitch)
        if spec.kind == "linear":
            return max(fits // (tile.width * tile.vector), 1) * tile.width * tile.vector
        if tile.lanes == "space":
            return self.choice.count
        group = spec.in_channels * len(layout.phases) * layout.plane * tile.vector * 4
        groups = max(_PACKED_BYTES // group, -(-4 * self.threads // layout.tiles[0]), 1)
        return max(1, min(groups, fits // tile.vector)) * tile.vector
