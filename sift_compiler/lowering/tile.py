"""Tile: how one sparse layer is cut into pieces that fit registers and the first-level cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sift_compiler.errors import UserError

Lanes = Literal["batch", "space", "pairs", "weights", "tokens", "winograd"]
"""What lies side by side in a vector: the same position of several images (tokens), or neighbouring positions. Tokens
with output rows in pairs (lowering.pair_program) for many of them. For few tokens, which run by row programs (lowering.row_program): the kept weights of one output row with one token, the tokens with some. Or images, or tiles of one
image, with Winograd's convolution (lowering.winograd)."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One cut of a layer; see docs/performance.md for what its numbers do to speed.

    A tile of the output is ``rows`` output channels × ``vectors`` vectors, held in registers while the kept weights of
    ``channels`` input channels are applied to it.
    """

    lanes: Lanes
    vector: int
    """float32 lanes of a vector."""
    rows: int
    """R, output channels computed at once; columns are bucketed by which of them keep a weight there (2^R - 1 patterns)."""
    height: int = 1
    """Output rows of a tile, and its columns with Winograd's convolution; 1 with lanes over space and for linear layers."""
    width: int
    """Output columns of a tile with lanes over the batch; vectors of neighbouring positions, tokens or Winograd tiles otherwise, 1 with lanes over weights."""
    channels: int
    """Input channels of a block; the tile of the input and the kept weights' partial sums should share the first-level cache."""

    def __post_init__(self) -> None:
        for field in ("vector", "rows", "height", "width", "channels"):
            if getattr(self, field) < 1:
                raise UserError(f"Tile({field}={getattr(self, field)}) is not possible: {field} must be at least 1.")
        if self.rows > 6:
            raise UserError(
                f"Tile(rows={self.rows}) is not possible: 2^rows - 1 loops are generated, so rows is at most 6."
            )

    @property
    def vectors(self) -> int:
        """Vectors of one output channel in a tile."""
        return self.height * self.width

    @property
    def accumulators(self) -> int:
        """Vector registers that hold partial sums."""
        return self.rows * self.vectors

    @property
    def patterns(self) -> int:
        """Non-empty row patterns, 2^rows - 1."""
        return (1 << self.rows) - 1

    def __str__(self) -> str:
        if self.lanes == "winograd":
            return f"Winograd tiles {self.height}×{self.height}, R{self.rows}, {self.width} vectors of {self.vector}"
        return f"{self.lanes} lanes {self.vector}, R{self.rows}, {self.height}×{self.width}, {self.channels} channels"
