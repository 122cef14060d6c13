"""How a sparse layer looks to whoever only reads graphs; the layers themselves are in sift_compiler.nn."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from sift_compiler.ir.pattern import Pattern


@runtime_checkable
class SparseWeight(Protocol):
    """A module with a compact sparse weight.

    Attributes:
        values: Parameter [nnz], the kept weights.
        index: int32 [nnz], their flat positions in the dense weight.
        bias: Parameter [out] or None.
        weight_shape: shape of the dense weight, outputs first.
        pattern: index and shape together.
    """

    values: nn.Parameter
    index: Tensor
    bias: nn.Parameter | None
    weight_shape: tuple[int, ...]

    @property
    def pattern(self) -> Pattern:
        """The live pattern."""
