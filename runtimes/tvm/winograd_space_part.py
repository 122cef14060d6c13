"""WinogradSpacePart: Winograd's convolution of images in the usual order, tiles of an image side by side in vectors."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.choose import sparse_space
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.winograd_part import WinogradPart
from sift_compiler.runtimes.tvm.winograd_space import winograd_space
from sift_compiler.runtimes.tvm.workspace import scratch

_MOST = 2**31 - 1


class WinogradSpacePart(WinogradPart):
    """x [count, C, H, W] → y [count, M, H', W'], both contiguous float32."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        tile = self.choice.tile
        halo = (self._reach - 1) // tile.height
        self._pitch = self._tiles[1] + halo
        positions = (self._tiles[0] - 1) * self._pitch + self._tiles[1]
        self._panels = -(-positions // (tile.width * tile.vector))
        reach = self._panels * tile.width * tile.vector + halo * (self._pitch + 1)
        self._plane = -(-reach // tile.vector) * tile.vector
        self._sources = torch.from_numpy(
            _sources(self.spec, self._form.stride, self._size, tile.height, self._pitch, self._plane)
        )
        # As many pieces for every worker, whole panels if they can be dealt out.
        self._own = int(self._panels % self.threads == 0)
        parts = -(-self._blocks // self._at_once)
        while self._panels * parts % self.threads and parts < self._blocks:
            parts += 1
        self._at_once = -(-self._blocks // parts)
        self._kernel = compiled(
            winograd_space, self._cpu.name, lanes=tile.vector, rows=tile.rows, vectors=tile.width, taps=self._form.taps, reach=self._reach,
            parallel=self.threads > 1, epilogue=self._made,
        )  # fmt: skip

    def _compute(
        self, x: Tensor, weights: Tensor, bias: Tensor, epilogue: tuple[Tensor, ...], y: Tensor, strange: Tensor
    ) -> None:
        scale, shift, residual = epilogue
        # Kernels count in 32 bits.
        items = max(1, _MOST // max(x[0].numel(), y[0].numel()))
        for first in range(0, x.shape[0], items):
            rows = slice(first, first + items)
            of_rows = residual.view(y.shape)[rows].view(-1) if residual is not self._one else residual
            self._compute_images(x[rows], weights, bias, (scale, shift, of_rows), y[rows], strange)

    def _compute_images(
        self, x: Tensor, weights: Tensor, bias: Tensor, epilogue: tuple[Tensor, ...], y: Tensor, strange: Tensor
    ) -> None:
        spec, tile = self.spec, self.choice.tile
        vectors, planes = self._panels * tile.width, tile.height**2
        # Rows are read in whole vectors, the last one past its end, and what is read there must not look like a NaN.
        end = spec.out_channels * planes * vectors * tile.vector
        tiles = scratch("tiles", end + tile.vector)
        tiles[end : end + tile.vector].zero_()
        self._kernel(
            x.view(-1), self._sources, weights, bias, *epilogue, y.view(-1),
            scratch("planes", self.threads * planes * self._plane),
            scratch("transformed", vectors * self._numbers * self._channels * tile.vector),
            scratch("sums", self.threads * self._at_once * self._numbers * self._products),
            tiles,
            scratch("tails", self.threads * tile.vector), strange,
            self.threads, x.shape[0], self._form.phases, self._channels, *self._size, spec.out_channels, *self._output,
            *self._tiles, self._pitch, self._plane, self._panels, self._blocks, self._at_once, self._own, self._added, self._lowest, 0.0,
        )  # fmt: skip

    def _sparse(self) -> Part:
        choice = sparse_space(self.spec, self.choice, self._size, self._cpu)
        return Part(self.spec, choice, self._size, self._cpu, self.threads, self._epilogue, self._freeze)


def _sources(
    spec: LayerSpec, stride: int, size: tuple[int, int], tile: int, pitch: int, plane: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """int32 [stride² · tile² · plane]: the position in a channel that each number of the planes copies, -1 for zero."""
    row, column = np.divmod(np.arange(plane), pitch)
    made = []
    for phase_y, phase_x, a, b in itertools.product(range(stride), range(stride), range(tile), range(tile)):
        y = (row * tile + a) * stride + phase_y - spec.padding[0]
        x = (column * tile + b) * stride + phase_x - spec.padding[1]
        inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
        made.append(np.where(inside, y * size[1] + x, -1))
    return np.concatenate(made).astype(np.int32)
