"""WinogradPart: a layer of moderate sparsity by Winograd's convolution, its images side by side in vectors before and after."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.winograd import TAPS
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.epilogue import at_run_time
from sift_compiler.runtimes.tvm.lane_part import LanePart, aligned
from sift_compiler.runtimes.tvm.shared import WORTH_A_WORKER
from sift_compiler.runtimes.tvm.streaming import STREAMED_BYTES
from sift_compiler.runtimes.tvm.winograd_kernel import winograd_lanes
from sift_compiler.runtimes.tvm.winograd_weights import TransformedWeights
from sift_compiler.runtimes.tvm.workspace import scratch

_log = logging.getLogger(__name__)
_SUMS_BYTES = 7 * 2**18
"""Sums that are made before they are transformed back: most of a second-level cache."""


class WinogradPart:
    """One tile choice, ready to run on ``choice.count`` images, a multiple of the tile's lanes.

    Where a sum is not finite, the layer is computed again on its kept weights alone: transforms mix neighbouring positions, so an
    infinity or NaN would reach outputs that it does not belong to.

    Args: as those of :class:`LanePart`.
    """

    def __init__(
        self, spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, threads: int, epilogue: Epilogue = PLAIN,
        freeze: bool = False,
    ) -> None:  # fmt: skip
        tile = choice.tile
        self.spec, self.choice, self.threads = spec, choice, threads
        self._size, self._output, self._cpu, self._epilogue, self._freeze = size, spec.output_size(*size), cpu, epilogue, freeze
        self._one = torch.ones(1)  # stands where the kernel reads nothing
        self._tiles = (-(-self._output[0] // tile.height), -(-self._output[1] // tile.height))
        self._blocks = -(-spec.out_channels // tile.rows)
        self._numbers = (tile.height + TAPS - 1) ** 2
        self._products = tile.rows * tile.width * tile.vector
        self._at_once = max(1, min(self._blocks, _SUMS_BYTES // (4 * self._numbers * self._products)))
        self._weights = TransformedWeights(spec, tile.rows, tile.height, cpu, threads, freeze)
        self._index: np.ndarray[Any, np.dtype[np.int32]] | None = None
        self._exact: LanePart | None = None
        made, self._added, self._lowest = at_run_time(epilogue)
        output = 4 * choice.count * spec.out_channels * self._output[0] * self._output[1]
        self._kernel = compiled(
            winograd_lanes, cpu.name, lanes=tile.vector, rows=tile.rows, vectors=tile.width, size=tile.height,
            parallel=threads > 1, epilogue=made, past_caches=output >= STREAMED_BYTES,
        )  # fmt: skip

    @property
    def program_key(self) -> object:
        """See Part; the transformed weights of parts with equal keys are the same."""
        return self._weights.key

    def share(self, other: object) -> None:
        """Use the weights of ``other``, whose :attr:`program_key` is the same."""
        assert isinstance(other, WinogradPart)
        self._weights, self._index, self._exact = other._weights, other._index, None

    def repack(self, index: np.ndarray[Any, np.dtype[np.int32]]) -> None:
        """Follow the mask ``index``: int32 [nnz]."""
        self._index, self._exact = index, None
        self._weights.follow(index)

    def run(self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, finish: Finish = NOTHING) -> None:
        """Compute ``y`` [groups, M, H', W', lanes] from ``x`` [groups, C, H, W, lanes], both contiguous float32.

        ``finish`` holds contiguous float32 tensors, the residual one like ``y``.
        """
        spec, tile = self.spec, self.choice.tile
        panels = x.shape[0] * -(-self._tiles[0] * self._tiles[1] // tile.width)
        work = self._numbers * spec.in_channels * spec.out_channels * tile.width * panels
        workers = max(1, min(self.threads, panels, work // WORTH_A_WORKER))

        strange = scratch("strange", self.threads * tile.vector)[: workers * tile.vector]
        tensors = (finish.scale, finish.shift, finish.residual)
        self._kernel(
            aligned(x), self._weights.of(values), bias, *(self._one if t is None else t.view(-1) for t in tensors), y.view(-1),
            scratch("transformed", self.threads * self._numbers * spec.in_channels * tile.width * tile.vector),
            scratch("sums", self.threads * self._at_once * self._numbers * self._products),
            scratch("one tile", self.threads * self._numbers * tile.vector), strange,
            workers, panels, *self._tiles, spec.in_channels, *self._size, *spec.padding, spec.out_channels, *self._output,
            self._blocks, self._at_once, self._added, self._lowest,
        )  # fmt: skip
        if float(strange.sum()) != 0:
            self._kept_weights_alone().run(x, values, bias, y, finish)

    def _kept_weights_alone(self) -> LanePart:
        if self._exact is None:
            assert self._index is not None, "a part is packed before it runs"
            _log.info("an output is not finite: a layer of %s runs on its kept weights alone", self.spec.weight_shape)
            lanes = self.choice.tile.vector
            shape = (self.choice.count // lanes, self.spec.in_channels, *self._size, lanes)
            (choice,) = choose(self.spec, shape, self._cpu)
            self._exact = LanePart(
                self.spec, dataclasses.replace(choice, first=self.choice.first), self._size, self._cpu, self.threads, self._epilogue,
                self._freeze,
            )  # fmt: skip
            self._exact.repack(self._index)
        return self._exact
