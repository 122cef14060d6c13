"""LayerSpec: everything about one sparse layer but its mask, its values and the size of its input."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Kind = Literal["conv2d", "linear"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What a runtime must know before it sees a mask.

    A linear layer is described as the 1×1 convolution it is: ``weight_shape`` is then ``(out, in)`` and the geometry is neutral.
    """

    kind: Kind
    weight_shape: tuple[int, ...]
    """Dense shape, ``(out, in)`` or ``(out, in / groups, kernel height, kernel width)``."""
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    output_padding: tuple[int, int] = (0, 0)
    """Rows and columns of output beyond what ``padding`` allows (negative: fewer), at the end; zeros stand where they read past the
    input. Only layers derived for gradients have any."""
    bias: bool = False
    dtype: str = "float32"
    nnz: int
    """Kept weights; a mask update never changes it."""

    @property
    def in_channels(self) -> int:
        """Channels (features) of the input."""
        return self.weight_shape[1] * self.groups

    @property
    def out_channels(self) -> int:
        """Channels (features) of the output."""
        return self.weight_shape[0]

    @property
    def kernel_size(self) -> tuple[int, int]:
        """Height and width of the kernel; (1, 1) for a linear layer."""
        return (self.weight_shape[2], self.weight_shape[3]) if self.kind == "conv2d" else (1, 1)

    @property
    def sparsity(self) -> float:
        """Share of the weights that the mask removes, 0 … 1; 0 of a layer without weights."""
        entries = math.prod(self.weight_shape)
        return 1 - self.nnz / entries if entries else 0.0

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output for an input of ``height`` × ``width``."""
        sizes = (height, width)
        taps = self.kernel_size
        out = [
            (sizes[a] + 2 * self.padding[a] - self.dilation[a] * (taps[a] - 1) - 1) // self.stride[a]
            + 1
            + self.output_padding[a]
            for a in (0, 1)
        ]
        return out[0], out[1]

    def flops(self, positions: int) -> int:
        """FLOPs of one forward call: 2 per kept weight and output position."""
        return 2 * self.nnz * positions
