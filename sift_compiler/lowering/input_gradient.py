"""The gradient of a sparse layer's input is another sparse layer: the same values on the transposed pattern.

    dx[c, i] = Σ over kept (m, c, k) and o with stride·o + dilation·k - padding = i   of   v · dy[m, o]

Input rows (and columns) fall into ``stride`` phases i = stride·q + r. A tap k meets one phase only, r = (dilation·k - padding) mod stride,
and there it reads dy at o = q + e with e = -floor((dilation·k - padding) / stride). So the input channels of every phase are output
channels of one stride-1 convolution over dy, in which each kept weight occurs once; with stride 1 there is one phase. Phases that no tap
meets have gradient zero and are left out.

Backend-neutral and pure.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from sift_compiler.lowering.specification import LayerSpec

Int32 = npt.NDArray[np.int32]

_PIECE = 1 << 16
"""Slots transposed in one go: what is made of them stays in the second-level cache."""


@dataclass(frozen=True)
class _Axis:
    """Where the taps of one axis read the gradient."""

    phases: tuple[int, ...]
    """Those that some tap meets, ascending."""
    phase: tuple[int, ...]
    """Per tap: position of its phase in ``phases``."""
    tap: tuple[int, ...]
    """Per tap: its tap in the derived kernel."""
    taps: int
    dilation: int
    padding: int

    @classmethod
    def of(cls, kernel: int, stride: int, padding: int, dilation: int) -> _Axis:
        reads = [divmod(dilation * k - padding, stride) for k in range(kernel)]
        offsets = [-down for down, _ in reads]
        first = min(offsets)
        step = math.gcd(*(offset - first for offset in offsets)) or 1
        phases = tuple(sorted({phase for _, phase in reads}))
        return cls(
            phases,
            tuple(phases.index(phase) for _, phase in reads),
            tuple((offset - first) // step for offset in offsets),
            (max(offsets) - first) // step + 1,
            step,
            -first,
        )


class TransposedLayer:
    """The layer that computes the gradient of another one's input, for one size of that input.

    Args:
        layer: the layer whose input gradient is wanted.
        size: height and width of its input; (1, 1) for a linear layer.
    """

    def __init__(self, layer: LayerSpec, size: tuple[int, int]) -> None:
        self.layer, self._size = layer, size
        self._axes = tuple(
            _Axis.of(layer.kernel_size[a], layer.stride[a], layer.padding[a], layer.dilation[a]) for a in (0, 1)
        )
        self.spec = self._specification()

    @property
    def _phases(self) -> int:
        return len(self._axes[0].phases) * len(self._axes[1].phases)

    @property
    def direct(self) -> bool:
        """Whether its output is the gradient as it is; if not, :meth:`assemble` it."""
        return self.layer.stride == (1, 1)

    def _specification(self) -> LayerSpec:
        layer, axes = self.layer, self._axes
        inward = layer.out_channels // layer.groups
        if layer.kind == "linear":
            return LayerSpec(kind="linear", weight_shape=(layer.in_channels, inward), dtype=layer.dtype, nnz=layer.nnz)
        given = layer.output_size(*self._size)
        extra = []
        for axis, size, stride, out in zip(axes, self._size, layer.stride, given, strict=True):
            wanted = max((size - phase + stride - 1) // stride for phase in axis.phases)
            extra.append(max(1, wanted) - (out + 2 * axis.padding - axis.dilation * (axis.taps - 1)))
        return LayerSpec(
            kind="conv2d", weight_shape=(layer.in_channels * self._phases, inward, axes[0].taps, axes[1].taps),
            padding=(axes[0].padding, axes[1].padding), dilation=(axes[0].dilation, axes[1].dilation),
            output_padding=(extra[0], extra[1]), groups=layer.groups, dtype=layer.dtype, nnz=layer.nnz,
        )  # fmt: skip

    def index(self, index: Int32) -> Int32:
        """Where every slot's value lies in the transposed weight: int32 [slots] → int32 [slots], ``-1`` for slots outside the mask."""
        if index.size and int(index.min()) < 0:
            return np.where(index < 0, np.int32(-1), self.index(np.maximum(index, 0)))
        of_row, of_column = self._offsets
        made = np.empty(index.size, np.int32)
        for first in range(0, index.size, _PIECE):
            piece = index[first : first + _PIECE]
            row = piece // np.int32(of_column.size)
            column = piece - row * np.int32(of_column.size)
            np.add(of_row[row], of_column[column], out=made[first : first + _PIECE])
        return made

    @functools.cached_property
    def _offsets(self) -> tuple[Int32, Int32]:
        """The place in the transposed weight is a sum: what a row of the weight adds [M], and what a column adds [C / groups · taps]."""
        layer, (vertical, horizontal) = self.layer, self._axes
        inward, outward = layer.weight_shape[1], layer.out_channels // max(1, layer.groups)
        taps_there = vertical.taps * horizontal.taps
        phases, taps = self._tap_tables()
        group, row = np.divmod(np.arange(layer.out_channels), max(1, outward))
        channel, tap = np.divmod(np.arange(inward * phases.size), phases.size)
        # Rows of the derived weight: (group, phase, channel of the group).
        of_row = (group * self._phases * inward * outward + row) * taps_there
        of_column = (phases[tap] * inward + channel) * outward * taps_there + taps[tap]
        return of_row.astype(np.int32), of_column.astype(np.int32)

    def _tap_tables(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Per tap of the layer: its phase among all phases, its tap in the derived kernel."""
        vertical, horizontal = self._axes
        phases = np.add.outer(np.array(vertical.phase) * len(horizontal.phases), np.array(horizontal.phase))
        taps = np.add.outer(np.array(vertical.tap) * horizontal.taps, np.array(horizontal.tap))
        return phases.ravel(), taps.ravel()

    def assemble(self, derived: Tensor) -> Tensor:
        """The gradient [N, C, H, W] out of the derived layer's output [N, C · phases, h, w]."""
        layer, (vertical, horizontal), (height, width) = self.layer, self._axes, self._size
        stride = layer.stride
        every = self._phases == stride[0] * stride[1]
        shape = (derived.shape[0], layer.groups, layer.weight_shape[1], height, width)
        gradient = derived.new_empty(shape) if every else derived.new_zeros(shape)
        pieces = derived.view(derived.shape[0], layer.groups, self._phases, layer.weight_shape[1], *derived.shape[2:])
        for i, y in enumerate(vertical.phases):
            for j, x in enumerate(horizontal.phases):
                target = gradient[..., y :: stride[0], x :: stride[1]]
                target.copy_(pieces[:, :, i * len(horizontal.phases) + j, :, : target.shape[3], : target.shape[4]])
        return gradient.view(derived.shape[0], layer.in_channels, height, width)
