"""What sparse layers have in common: compact values, the pattern they sit on, and how fresh values are drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sift_compiler.ir.pattern import Pattern


class SparseLayer(nn.Module):
    """A layer that owns ``values`` [nnz] and the ``index`` [nnz] of where they sit in the dense weight.

    Attributes:
        values: Parameter [nnz]. Gradients, optimizer state and checkpoints are as long as this, never as the dense weight.
        index: int32 buffer [nnz], flat positions in the dense weight; see :class:`sift_compiler.ir.pattern.Pattern`.
        bias: Parameter [out] or None.
        weight_shape: shape of the dense weight.
    """

    values: nn.Parameter
    index: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, pattern: Pattern, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        pattern.check()
        self.weight_shape = tuple(pattern.shape)
        self.values = nn.Parameter(torch.empty(pattern.nnz, device=device, dtype=dtype))
        self.register_buffer("index", pattern.index.to(device=device, copy=True))
        self.bias = nn.Parameter(torch.empty(self.weight_shape[0], device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @property
    def pattern(self) -> Pattern:
        """The live pattern; it shares the layer's index."""
        return Pattern(self.weight_shape, self.index)

    @property
    def sparsity(self) -> float:
        """Removed share of the dense weight, in [0, 1]."""
        return self.pattern.sparsity

    def reset_parameters(self) -> None:
        """Draw values and bias as torch's dense layer of the same shape does (uniform, bound 1/sqrt(fan in))."""
        fan_in = math.prod(self.weight_shape[1:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        nn.init.uniform_(self.values, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Take the kept entries of a dense ``weight`` of ``weight_shape`` as values."""
        self.values.copy_(weight.reshape(-1)[self.index.long()])

    def dense_weight(self) -> Tensor:
        """The dense weight, of ``weight_shape``, with zeros where nothing is kept; differentiable in ``values``."""
        flat = self.values.new_zeros(self.pattern.numel).index_copy(0, self.index.long(), self.values)
        return flat.view(self.weight_shape)
