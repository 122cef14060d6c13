"""Packing: where every input position of a convolution lies once it is padded, split into phases and laid out for vectors.

With stride s an output column x reads input columns ``s·x + k·d - pad``. The input is split into its s×s phases (position modulo
stride); inside a phase neighbouring outputs read neighbouring positions, so a tap is one constant offset whatever the stride.
Phases that no tap reads are left out. Linear layers are the 1×1 case with one position per token.

Sizes count *positions*. A position holds one vector of ``tile.vector`` images with lanes over the batch, one number with lanes
over space; ``unit`` is that many float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Packing:
    """The packed input ``[channels, phases, positions, unit]`` of one group of images, and the window of it a tile reads."""

    images: int
    """Images side by side in a plane: all of them with lanes over space, 1 (× ``unit`` lanes) with lanes over the batch."""
    size: tuple[int, int]
    """Height and width of the input."""
    output: tuple[int, int]
    """Height and width of the output."""
    phases: tuple[tuple[int, int], ...]
    """Those that some tap reads."""
    taps: tuple[tuple[int, int, int], ...]
    """Phase, row offset and column offset of every tap, in the order of the weight's last two dimensions."""
    rows: int
    """Rows of one image in a plane."""
    pitch: int
    """Positions of one row in a plane."""
    plane: int
    """Positions of one channel and phase, whole tiles and their windows included."""
    unit: int
    window_rows: int
    """Rows (stretches of neighbouring positions) of a tile's window, per channel and phase."""
    window: int
    """Float32 numbers of one stretch; a multiple of the vector."""
    tiles: tuple[int, int]
    """Tiles down and across one plane."""

    @property
    def offsets(self) -> Int32:
        """int32 [taps]: where a tap's numbers begin in the window of one channel, in float32."""
        pitch = self.window if self.unit > 1 else self.pitch
        stretch = self.window_rows * self.window
        return np.array([phase * stretch + dy * pitch + dx * self.unit for phase, dy, dx in self.taps], np.int32)

    @property
    def channel(self) -> int:
        """Float32 numbers of one channel in a tile's window, all phases."""
        return len(self.phases) * self.window_rows * self.window

    def sources(self, spec: LayerSpec) -> Int32:
        """int32 [phases · plane]: what each packed position of channel 0 copies, -1 for zero.

        It is counted in the NCHW input: image · channels · height · width + row · width + column; channel c lies c · height · width on.
        """
        height, width = self.size
        position = np.arange(self.plane)
        image, rest = np.divmod(position, self.rows * self.pitch)
        row, column = np.divmod(rest, self.pitch)
        stretches = []
        for phase_y, phase_x in self.phases:
            y = row * spec.stride[0] + phase_y - spec.padding[0]
            x = column * spec.stride[1] + phase_x - spec.padding[1]
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (image < self.images)
            stretches.append(np.where(inside, (image * spec.in_channels * height + y) * width + x, -1))
        return np.concatenate(stretches).astype(np.int32)


def packing(spec: LayerSpec, images: int, size: tuple[int, int], tile: Tile) -> Packing:
    """Lay out the input of a convolution.

    Args:
        spec: the layer; its padding, stride and dilation may be anything that leaves an output.
        images: images side by side with lanes over space; ignored (1) with lanes over the batch.
        size: height and width of the input, in pixels.
        tile: its vector, height and width; with lanes over the batch neither may exceed the output's.
    """
    batch = tile.lanes == "batch"
    output = spec.output_size(*size)
    reach = [[k * spec.dilation[a] for k in range(spec.kernel_size[a])] for a in (0, 1)]
    splits = [[divmod(r, spec.stride[a]) for r in reach[a]] for a in (0, 1)]
    pairs = [(dy, py, dx, px) for dy, py in splits[0] for dx, px in splits[1]]
    phases = tuple(sorted({(py, px) for _, py, _, px in pairs}))
    halo = [max(offset for offset, _ in splits[a]) for a in (0, 1)]
    # Neighbouring rows (images) share their zero border where one zero serves the right of one and the left of the next.
    extent = [
        max(size[a] + spec.padding[a], output[a] + halo[a] - spec.padding[a], output[a])
        if spec.stride[a] == 1 and not batch
        else output[a] + halo[a]
        for a in (0, 1)
    ]
    common: dict[str, Any] = {
        "size": size, "output": output, "phases": phases, "rows": extent[0], "pitch": extent[1],
        "taps": tuple((phases.index((py, px)), dy, dx) for dy, py, dx, px in pairs),
    }  # fmt: skip
    if batch:
        tiles = (-(-output[0] // tile.height), -(-output[1] // tile.width))
        return Packing(
            images=1, plane=extent[0] * extent[1], unit=tile.vector, window_rows=tile.height + halo[0],
            window=(tile.width + halo[1]) * tile.vector, tiles=tiles, **common,
        )  # fmt: skip
    step = tile.width * tile.vector
    positions = (images - 1) * extent[0] * extent[1] + output[0] * extent[1]
    window = -(-(step + halo[0] * extent[1] + halo[1]) // tile.vector) * tile.vector
    count = -(-positions // step)
    plane = max((count - 1) * step + window, images * extent[0] * extent[1])
    return Packing(images=images, plane=plane, unit=1, window_rows=1, window=window, tiles=(1, count), **common)
