"""Sparse linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sift_compiler.ir.mask_structure import UNSTRUCTURED, Structure
from sift_compiler.ir.pattern import Pattern
from sift_compiler.nn.growth import NO_PROBE
from sift_compiler.nn.layer import SparseLayer


class SparseLinear(SparseLayer):
    """``y = x Wᵀ + b`` with a compact sparse W of dense shape [out_features, in_features].

    Args:
        in_features: size of the last dimension of x.
        out_features: size of the last dimension of y.
        bias: whether there is a b.
        sparsity: removed share in [0, 1), for a random pattern with an exact count; ignored when ``pattern`` is given.
        pattern: where the kept weights sit.
        generator: source of randomness of the random pattern.
        structure: what the pattern must look like.
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, sparsity: float = 0.9,
        pattern: Pattern | None = None, generator: torch.Generator | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        structure: Structure = UNSTRUCTURED,
    ) -> None:  # fmt: skip
        shape = (out_features, in_features)
        if pattern is None:
            pattern = structure.random(shape, structure.kept(shape, sparsity), generator)
        super().__init__(pattern, bias, device, dtype, structure)
        self.in_features, self.out_features = in_features, out_features

    @classmethod
    def like(cls, dense: nn.Linear, pattern: Pattern, structure: Structure = UNSTRUCTURED) -> SparseLinear:
        """A layer with the geometry, device, dtype and kept weights of ``dense``."""
        weight = dense.weight
        layer = cls(
            dense.in_features, dense.out_features, dense.bias is not None, pattern=pattern,
            device=weight.device, dtype=weight.dtype, structure=structure,
        )  # fmt: skip
        layer.set_weight(weight.detach())
        if dense.bias is not None and layer.bias is not None:
            layer.bias.data.copy_(dense.bias.detach())
        return layer

    def forward(self, x: Tensor, hook: int = NO_PROBE) -> Tensor:
        """x [..., in_features] → [..., out_features]; ``hook`` is the handle of a mask hook."""
        result: Tensor = torch.ops.sift.linear(x, self.values, self.index, self.bias, self.weight_shape, hook, 0)
        return result

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.described()}"
