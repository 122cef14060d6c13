"""Winograd's convolution: what a tile of it computes, which layers it fits, and what it costs beside the sparse kernels.

A tile of m × m outputs of a 3 × 3 convolution of stride 1 needs (m + 2)² multiplications instead of 9 m²:

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        (Lavin & Gray, 2016, eq. 8; summed over input channels inside the brackets)

The weights G g Gᵀ are dense whatever the mask of g, so zeros are multiplied, too: it is what a layer of moderate sparsity falls back to where
that is faster. The matrices are those of Toom and Cook for the points below and infinity (Blahut, 2010). With m = 4 the points are those
of Barabasz et al. (2020), whose error in float32 is a third of that of 0, ±1, ±2.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile

TAPS = 3
"""Rows and columns of the kernels it is made for."""

_POINTS = {2: (0, 1, -1), 4: (0, 1, -1, Fraction(1, 2), -2)}

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """The matrices of a tile of ``size`` × ``size`` outputs, exact in float32."""

    size: int
    """m."""
    input: Matrix
    """Bᵀ [m + 2, m + 2]."""
    weight: tuple[tuple[float, ...], ...]
    """G [m + 2, 3], in float64."""
    output: Matrix
    """Aᵀ [m, m + 2]."""

    @property
    def reach(self) -> int:
        """Inputs of a tile, down and across: m + 2."""
        return self.size + TAPS - 1


@functools.cache
def transforms(size: int) -> Transforms:
    """The matrices for tiles of ``size``, 2 or 4."""
    points = [Fraction(point) for point in _POINTS[size]]
    divisors = [_product(point - other for other in points if other != point) for point in points]
    rows = [_polynomial([other for other in points if other != point]) for point in points]
    last = _polynomial(points)
    return Transforms(
        size=size,
        input=tuple(tuple(float(c) for c in (*row, 0)[: size + TAPS - 1]) for row in (*rows, last)),
        weight=(
            *(tuple(float(point**j / divisor) for j in range(TAPS)) for point, divisor in zip(points, divisors, strict=True)),
            (*(0.0 for _ in range(TAPS - 1)), 1.0),
        ),
        output=tuple((*(float(point**i) for point in points), float(i == size - 1)) for i in range(size)),
    )  # fmt: skip


def _product(factors: object) -> Fraction:
    return functools.reduce(lambda product, factor: product * factor, factors, Fraction(1))  # type: ignore[call-overload,no-any-return]


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of Π (x - root), the lowest power first."""
    made = [Fraction(1)]
    for root in roots:
        made = [
            lower - root * same for lower, same in zip([Fraction(0), *made], [*made, Fraction(0)], strict=True)
        ]
    return made


# --- the choice -----------------------------------------------------------------------------------------------------

_LOAD, _STEPS = 0.6, 1.2
"""Time of a load beside multiply-adds (docs/performance.md), and of the products over that of their loads and multiply-adds."""
_READING, _WRITING = 70, 30
"""Vector multiply-adds in whose time one vector is transformed before and after the products, with images side by side …"""
_GATHERING, _SCATTERING = 90, 60
"""… and with tiles of one image."""
_STREAMED = 3
"""The same for one number of the weights, read past the second-level cache for the tiles of one image."""
_REMADE = 350
"""The same for all numbers of a weight of one channel to one other."""
_SHAPES = {True: ((6, 4), (4, 6), (6, 3), (5, 5), (6, 2)), False: ((4, 3), (6, 2), (3, 4))}
"""Output channels and vectors whose sums are held in registers, by whether there are at least 32 of them."""
_CACHED_BYTES, _HALF_SPEED_BYTES = 8 * 2**20, 100 * 2**20
"""Transformed weights up to the first number come from the caches at full speed; this many more take twice the time."""
_MOST_BYTES = 48 * 2**20
"""Transformed weights of a layer beyond this are not made."""


def fits(spec: LayerSpec) -> bool:
    """Whether Winograd's convolution computes such a layer: 3 × 3, stride and dilation 1, one group."""
    return (
        spec.kind == "conv2d" and spec.kernel_size == (TAPS, TAPS) and spec.stride == spec.dilation == (1, 1)
        and spec.groups == 1 and min(spec.padding) >= 0 and spec.nnz > 0
    )  # fmt: skip


def weight_bytes(spec: LayerSpec, size: int) -> int:
    """Bytes of the transformed weights."""
    return 4 * spec.out_channels * spec.in_channels * (size + TAPS - 1) ** 2


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
        largest: m at most; 0 for never.
        frozen: weights are transformed once, not at every call.
        cpu: the processor.
    """

    def vectors(size: int) -> int:
        return -(-output[0] // size) * -(-output[1] // size)

    full = output[0] * output[1]
    return _best(spec, vectors, full, images / cpu.lanes, largest, frozen, cpu, (_READING, _WRITING, 0))


def of_positions(
    spec: LayerSpec, output: tuple[int, int], images: int, largest: int, frozen: bool, cpu: CpuFacts
) -> Fallback | None:
    """The best tile with tiles of one image side by side; arguments as those of :func:`of_image_vectors`."""

    def vectors(size: int) -> int:
        return -(-(-(-output[0] // size) * (-(-output[1] // size) + 1) - 1) // cpu.lanes)

    full = output[0] * output[1] / cpu.lanes
    return _best(spec, vectors, full, images, largest, frozen, cpu, (_GATHERING, _SCATTERING, _STREAMED))


def _best(
    spec: LayerSpec, vectors: Callable[[int], int], full: float, repeats: float, largest: int, frozen: bool,
    cpu: CpuFacts, transforming: tuple[int, int, int],
) -> Fallback | None:  # fmt: skip
    """``vectors`` of tiles, for a size, and ``full`` vectors of outputs are computed ``repeats`` times with the same weights."""
    if not fits(spec):
        return None
    found = []
    for size in _POINTS:
        if size <= largest and weight_bytes(spec, size) <= _MOST_BYTES:
            for rows, width in _SHAPES[cpu.registers >= 32]:
                tile = Tile(
                    lanes="winograd", vector=cpu.lanes, rows=rows, height=size, width=width, channels=spec.in_channels
                )
                found.append(Fallback(tile=tile, cost=_cost(spec, tile, vectors(size), full, repeats, frozen, transforming)))
    return min(found, key=lambda each: each.cost, default=None)


def _cost(
    spec: LayerSpec, tile: Tile, vectors: int, full: float, repeats: float, frozen: bool, transforming: tuple[int, int, int]
) -> float:
    rows, width = tile.rows, tile.width
    loads = 1 + _LOAD * (rows + width) / (rows * width)
    past_caches = max(0, weight_bytes(spec, tile.height) - _CACHED_BYTES) / _HALF_SPEED_BYTES
    channels, wide = -(-spec.out_channels // rows) * rows, -(-vectors // width) * width
    products = spec.in_channels * channels * wide * loads * _STEPS * (1 + past_caches)
    transformed = wide * (transforming[0] * spec.in_channels + transforming[1] * spec.out_channels)
    transformed += transforming[2] * spec.in_channels * spec.out_channels
    remade = 0 if frozen else _REMADE * spec.in_channels * spec.out_channels / repeats
    numbers = (tile.height + TAPS - 1) ** 2
    return (numbers * (products + transformed) + remade) / (TAPS**2 * spec.in_channels * spec.out_channels * full)
