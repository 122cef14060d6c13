"""EveryWeight: a kernel of a layer that keeps every weight, for graphs that hold no index of its weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.runtimes.base import LiveKernel


class EveryWeight:
    """A live kernel (see runtimes.base.LiveKernel) that takes the dense weight, flattened, for its values; the index it is given is not read."""

    def __init__(self, kernel: LiveKernel) -> None:
        self.kernel, self.name, self.spec, self.specialisations = (
            kernel,
            kernel.name,
            kernel.spec,
            kernel.specialisations,
        )
        self._index = torch.arange(math.prod(kernel.spec.weight_shape), dtype=torch.int32)

    def prepare(self, input_shape: tuple[int, ...], index: Tensor | None) -> None:
        """Prepare the kernel; ``index`` is not read."""
        self.kernel.prepare(input_shape, self._index)

    def __call__(
        self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, finish: Finish = NOTHING
    ) -> Tensor:
        """Compute the layer; ``values`` are all numbers of the weight, row by row."""
        return self.kernel(x, values, self._index, bias, finish)
