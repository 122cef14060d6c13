"""What sparse layers have in common: compact values, the pattern they sit on, and how fresh values are drawn."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sift_compiler.ir.mask_structure import UNSTRUCTURED, Structure
from sift_compiler.ir.pattern import Pattern
from sift_compiler.nn.reference import gather


class SparseLayer(nn.Module):
    """A layer that owns ``values`` [slots] and the ``index`` [slots] of where they sit in the dense weight.

    Attributes:
        values: Parameter [slots]. Gradients, optimizer state and checkpoints are as long as this, never as the dense weight.
        index: int32 buffer [slots], flat positions in the dense weight; see :mod:`sift_compiler.ir.pattern` for slots out of use.
        bias: Parameter [out] or None.
        weight_shape: shape of the dense weight.
        structure: what its mask must look like, also when it moves.
    """

    values: nn.Parameter
    index: Tensor
    bias: nn.Parameter | None
    structure: Structure

    def __init__(
        self, pattern: Pattern, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None,
        structure: Structure,
    ) -> None:  # fmt: skip
        super().__init__()
        structure.check(pattern)
        self.structure = structure
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
        """Take the entries of a dense ``weight`` of ``weight_shape`` that slots stand for as values; 0 for empty slots."""
        self.values.copy_(gather(weight, self.index))

    def dense_weight(self) -> Tensor:
        """The dense weight, of ``weight_shape``, with zeros where nothing is kept; differentiable in ``values``."""
        kept = self.index >= 0
        numel = self.pattern.numel
        flat = self.values.new_zeros(numel).index_copy(0, self.index[kept].long(), self.values[kept])
        return flat.view(self.weight_shape)

    def described(self) -> str:
        """Sparsity and, where there is one, structure and slots out of use, for the representation of a layer."""
        pattern = self.pattern
        structure = "" if self.structure == UNSTRUCTURED else f", structure={self.structure}"
        idle = "" if pattern.nnz == pattern.slots else f", slots={pattern.slots}"
        return f"sparsity={pattern.sparsity:.4f}{structure}{idle}"
