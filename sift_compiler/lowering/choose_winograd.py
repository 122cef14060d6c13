"""Choose tiles of Winograd's convolution, and what they cost beside the sparse kernels: pure functions, as in choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile
from sift_compiler.lowering.winograd import POINTS, Form, form

_LOAD, _STEPS = 0.6, 1.2
"""Time of a load beside multiply-adds (docs/performance.md), and of the products over that of their loads and multiply-adds."""
_BLOCK = 30
"""Vector multiply-adds in whose time sums are begun and put down."""
_REMADE = 350
"""The same for all numbers of a weight of one channel to one other."""
_SHAPES = {True: ((6, 4), (4, 6), (6, 3), (5, 5), (6, 2)), False: ((4, 3), (6, 2), (3, 4))}
"""Output channels and vectors whose sums are held in registers, by whether there are at least 32 of them."""
_CACHED_BYTES, _HALF_SPEED_BYTES = 8 * 2**20, 100 * 2**20
"""Transformed weights up to the first number come from the caches at full speed; this many more take twice the time."""
_MOST_BYTES = 48 * 2**20
"""Transformed weights of a layer beyond this are not made."""
_MOST_TRANSFORMED = 2**26
"""Transformed inputs of one image beyond this, in numbers, are not made; with images side by side only those of a few tiles are there."""
_TAPS_OF_NAME = 3
"""Options name tiles by their outputs with kernels of three rows and columns."""


@dataclass(frozen=True, kw_only=True)
class _Layout:
    """How tiles lie in vectors, and what that costs, in vector multiply-adds (measured)."""

    vectors: Callable[[int, int], int]
    """Vectors of tiles of a size, whose inputs reach to so many more tiles."""
    outputs: float
    """Vectors of outputs."""
    at_once: bool
    """Whether all transformed inputs are there at once."""
    repeats: float
    """How often as many are computed with the same weights."""
    reading: int
    """To transform a vector of the input."""
    writing: int
    """To transform a vector of sums, and store it."""
    streamed: int
    """To fetch a number of the weights from beyond the second-level cache."""


@dataclass(frozen=True, kw_only=True)
class Fallback:
    """A tile and its cost: time in vector multiply-adds at full speed, per multiply-add of the dense convolution."""

    tile: Tile
    cost: float


def of_image_vectors(
    spec: LayerSpec, output: tuple[int, int], images: int, largest: int, frozen: bool, cpu: CpuFacts
) -> Fallback | None:
    """The best tile with images side by side; None if the layer does not fit.

    Args:
        spec: the layer.
        output: height and width of its output.
        images: how many there are.
        largest: outputs of a tile at most, down and across, with kernels of three rows and columns; 0 for never.
        frozen: weights are transformed once, not at every call.
        cpu: the processor.
    """
    layout = _Layout(
        vectors=lambda size, _: -(-output[0] // size) * -(-output[1] // size), outputs=output[0] * output[1], at_once=False,
        repeats=images / cpu.lanes, reading=88, writing=12, streamed=0,
    )  # fmt: skip
    return _best(spec, layout, largest, frozen, cpu)


def of_positions(
    spec: LayerSpec, output: tuple[int, int], images: int, largest: int, frozen: bool, cpu: CpuFacts
) -> Fallback | None:
    """The best tile with tiles of one image side by side; arguments as those of :func:`of_image_vectors`."""
    layout = _Layout(
        vectors=lambda size, more: -(-(-(-output[0] // size) * (-(-output[1] // size) + more) - more) // cpu.lanes),
        outputs=output[0] * output[1] / cpu.lanes, at_once=True, repeats=images, reading=115, writing=45, streamed=6,
    )  # fmt: skip
    return _best(spec, layout, largest, frozen, cpu)


def _best(spec: LayerSpec, layout: _Layout, largest: int, frozen: bool, cpu: CpuFacts) -> Fallback | None:
    shape = form(spec)
    if shape is None:
        return None
    found = []
    for reach in POINTS:
        size = reach - shape.taps + 1
        if size > 1 and reach < largest + _TAPS_OF_NAME and _affordable(spec, shape, layout, reach, cpu):
            for rows, width in _SHAPES[cpu.registers >= 32]:
                channels = spec.in_channels * shape.phases
                tile = Tile(lanes="winograd", vector=cpu.lanes, rows=rows, height=size, width=width, channels=channels)
                found.append(Fallback(tile=tile, cost=_cost(spec, shape, layout, tile, frozen)))
    return min(found, key=lambda each: each.cost, default=None)


def _affordable(spec: LayerSpec, shape: Form, layout: _Layout, reach: int, cpu: CpuFacts) -> bool:
    """Whether weights and inputs, transformed, are within bounds."""
    size = reach - shape.taps + 1
    vectors = layout.vectors(size, (reach - 1) // size) if layout.at_once else 1
    transformed = vectors * cpu.lanes * reach**2 * spec.in_channels * shape.phases
    return transformed <= _MOST_TRANSFORMED and _weight_bytes(spec, shape, reach) <= _MOST_BYTES


def _weight_bytes(spec: LayerSpec, shape: Form, reach: int) -> int:
    return 4 * spec.out_channels * spec.in_channels * shape.phases * reach**2


def _cost(spec: LayerSpec, shape: Form, layout: _Layout, tile: Tile, frozen: bool) -> float:
    rows, width, channels = tile.rows, tile.width, tile.channels
    reach = tile.height + shape.taps - 1
    blocks, panels = -(-spec.out_channels // rows), -(-layout.vectors(tile.height, (reach - 1) // tile.height) // width)
    slower = 1 + max(0, _weight_bytes(spec, shape, reach) - _CACHED_BYTES) / _HALF_SPEED_BYTES
    step = (rows * width + _LOAD * (rows + width)) * _STEPS * slower
    products = blocks * panels * (channels * step + _BLOCK)
    transformed = panels * width * (layout.reading * channels + layout.writing * spec.out_channels)
    weights = layout.streamed * channels * spec.out_channels
    remade = 0 if frozen else _REMADE * channels * spec.out_channels / layout.repeats
    dense = spec.kernel_size[0] * spec.kernel_size[1] * spec.in_channels * spec.out_channels * layout.outputs
    return (reach**2 * (products + transformed + weights) + remade) / dense
