"""WinogradLanePart: Winograd's convolution with images side by side in vectors before and after the layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sift_compiler.lowering.choose import choose
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.lane_part import LanePart, aligned
from sift_compiler.runtimes.tvm.streaming import STREAMED_BYTES
from sift_compiler.runtimes.tvm.winograd_kernel import winograd_lanes
from sift_compiler.runtimes.tvm.winograd_part import WinogradPart
from sift_compiler.runtimes.tvm.workspace import scratch


class WinogradLanePart(WinogradPart):
    """x [groups, C, H, W, lanes] → y [groups, M, H', W', lanes], both contiguous float32."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        tile, (height, width) = self.choice.tile, self._output
        output = 4 * self.choice.count * self.spec.out_channels * height * width
        self._kernel = compiled(
            winograd_lanes, self._cpu.name, lanes=tile.vector, rows=tile.rows, vectors=tile.width, taps=self._form.taps, reach=self._reach,
            parallel=self.threads > 1, epilogue=self._made, past_caches=output >= STREAMED_BYTES,
        )  # fmt: skip

    def _compute(
        self, x: Tensor, weights: Tensor, bias: Tensor, epilogue: tuple[Tensor, ...], y: Tensor, strange: Tensor
    ) -> None:
        spec, tile = self.spec, self.choice.tile
        panels = x.shape[0] * -(-self._tiles[0] * self._tiles[1] // tile.width)
        self._kernel(
            aligned(x), weights, bias, *epilogue, y.view(-1),
            scratch("transformed", self.threads * self._numbers * self._channels * tile.width * tile.vector),
            scratch("sums", self.threads * self._at_once * self._numbers * self._products),
            scratch("one tile", self.threads * self._numbers * tile.vector), strange,
            self._workers(tile.width * panels, panels), panels, *self._tiles, self._form.stride, self._channels, *self._size, *spec.padding,
            spec.out_channels, *self._output, self._blocks, self._at_once, self._added, self._lowest, 0.0,
        )  # fmt: skip

    def _sparse(self) -> LanePart:
        lanes = self.choice.tile.vector
        (choice,) = choose(
            self.spec, (self.choice.count // lanes, self.spec.in_channels, *self._size, lanes), self._cpu
        )
        return LanePart(self.spec, choice, self._size, self._cpu, self.threads, self._epilogue, self._freeze)
