"""How a sparse layer looks to whoever only reads graphs; the layers themselves are in sift_compiler.nn."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from sift_compiler.ir.mask_structure import Structure
from sift_compiler.ir.pattern import Pattern


@runtime_checkable
class SparseWeight(Protocol):
    """A module with a compact sparse weight.

    Attributes:
        values: Parameter [slots], the kept weights.
        index: int32 [slots], their flat positions in the dense weight; see :mod:`sift_compiler.ir.pattern`.
        bias: Parameter [out] or None.
        weight_shape: shape of the dense weight, outputs first.
        structure: what its mask must look like.
        pattern: index and shape together.
    """

    values: nn.Parameter
    index: Tensor
    bias: nn.Parameter | None
    weight_shape: tuple[int, ...]
    structure: Structure

    @property
    def pattern(self) -> Pattern:
        """The live pattern."""
