"""What both parts of Winograd's convolution share: the transformed weights, and what is done where a sum is not finite."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.winograd import form
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.tvm.epilogue import at_run_time
from sift_compiler.runtimes.tvm.lane_part import LanePart
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.shared import WORTH_A_WORKER
from sift_compiler.runtimes.tvm.winograd_weights import TransformedWeights
from sift_compiler.runtimes.tvm.workspace import scratch

_log = logging.getLogger(__name__)
_SUMS_BYTES = 2**19, 7 * 2**18
"""Sums that are made before they are transformed back: twice the inputs of which they are made, within these limits."""


class WinogradPart(ABC):
    """One tile choice, ready to run on ``choice.count`` images.

    Where a sum is not finite, the layer is computed again on its kept weights alone: transforms mix neighbouring positions, so an
    infinity or NaN would reach outputs that it does not belong to.

    Args: as those of :class:`Part`.
    """

    def __init__(
        self, spec: LayerSpec, choice: Choice, size: tuple[int, int], cpu: CpuFacts, threads: int, epilogue: Epilogue = PLAIN,
        freeze: bool = False,
    ) -> None:  # fmt: skip
        tile, output = choice.tile, spec.output_size(*size)
        self.spec, self.choice, self.threads = spec, choice, threads
        self._size, self._output, self._cpu, self._epilogue, self._freeze = size, output, cpu, epilogue, freeze
        self._one = torch.ones(1)  # stands where the kernel reads nothing
        self._tiles = (-(-output[0] // tile.height), -(-output[1] // tile.height))
        self._blocks = -(-spec.out_channels // tile.rows)
        shape = form(spec)
        assert shape is not None, "a layer that does not fit is not given to this part"
        self._form, self._reach = shape, tile.height + shape.taps - 1
        self._channels, self._numbers = spec.in_channels * shape.phases, self._reach**2
        self._products = tile.rows * tile.width * tile.vector
        inputs = 4 * self._numbers * self._channels * tile.width * tile.vector
        sums = min(max(2 * inputs, _SUMS_BYTES[0]), _SUMS_BYTES[1])
        self._at_once = max(1, min(self._blocks, sums // (4 * self._numbers * self._products)))
        self._weights = TransformedWeights(spec, tile.rows, shape, self._reach, cpu, threads, freeze)
        self._index: np.ndarray[Any, np.dtype[np.int32]] | None = None
        self._exact: Part | LanePart | None = None
        self._made, self._added, self._lowest = at_run_time(epilogue)

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
        """Compute ``y`` from ``x``, as the part on kept weights does."""
        count = self.threads * self.choice.tile.vector
        strange = scratch("strange", count)[:count].zero_()
        epilogue = tuple(self._one if t is None else t.view(-1) for t in (finish.scale, finish.shift, finish.residual))
        self._compute(x, self._weights.of(values), bias, epilogue, y, strange)
        if strange.numpy().any():
            self._kept_weights_alone().run(x, values, bias, y, finish)

    def trial(
        self, x: Tensor, values: Tensor, bias: Tensor, y: Tensor, share: float
    ) -> tuple[Callable[[], None], float]:
        """A call that computes all of ``y``, however small a ``share`` is asked for, and 1; see :meth:`Part.trial`."""
        weights = self._weights.of(values).clone()
        strange, nothing = torch.zeros(self.threads * self.choice.tile.vector), (self._one,) * 3
        return lambda: self._compute(x, weights, bias, nothing, y, strange), 1.0

    @abstractmethod
    def _compute(
        self, x: Tensor, weights: Tensor, bias: Tensor, epilogue: tuple[Tensor, ...], y: Tensor, strange: Tensor
    ) -> None:
        """Run the kernel; ``strange`` is 0 and becomes anything else if an output may not be finite before its residual is added."""

    @abstractmethod
    def _sparse(self) -> Part | LanePart:
        """The part that computes the same on kept weights, not packed yet."""

    def _workers(self, vectors: int, pieces: int) -> int:
        """Workers for ``vectors`` vectors of tiles in all, of which ``pieces`` can be computed at a time."""
        work = self._numbers * self._channels * self.spec.out_channels * vectors
        return max(1, min(self.threads, pieces, work // WORTH_A_WORKER))

    def _kept_weights_alone(self) -> Part | LanePart:
        if self._exact is None:
            assert self._index is not None, "a part is packed before it runs"
            _log.info("an output is not finite: a layer of %s runs on its kept weights alone", self.spec.weight_shape)
            self._exact = self._sparse()
            self._exact.repack(self._index)
        return self._exact
