"""Winograd's convolution: what a tile of it computes, which layers it fits, and what it costs beside the sparse kernels.

A tile of m × m outputs of a 3 × 3 convolution of stride 1 needs (m + 2)² multiplications instead of 9 m²:

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        (Lavin & Gray, 2016, eq. 8; summed over input channels inside the brackets)

The weights G g Gᵀ are dense whatever the mask of g, so zeros are multiplied, too: it is what a layer of moderate sparsity falls back to where
that is faster. The matrices are those of Toom and Cook for the points below and infinity (Blahut, 2010). With m = 4 the points are those
of Barabasz et al. (2020), whose error in float32 is a third of that of 0, ±1, ±2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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

_MULTIPLIED = 0.62
"""Share of the peak at which the products run."""
_READING, _WRITING = 70, 30
"""Vector multiply-adds in whose time one number is transformed before and after the products."""
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


def rows_and_vectors(cpu: CpuFacts) -> tuple[int, int]:
    """Output channels and vectors of tiles whose products are summed in registers at once."""
    return (6, 4) if cpu.registers >= 32 else (4, 3)


def weight_bytes(spec: LayerSpec, size: int) -> int:
    """Bytes of the transformed weights."""
    return 4 * spec.out_channels * spec.in_channels * (size + TAPS - 1) ** 2


def cost(spec: LayerSpec, output: tuple[int, int], size: int, vectors: int) -> float:
    """Time in vector multiply-adds at full speed, per multiply-add of the dense convolution, with ``vectors`` tiles at a time."""
    tiles = -(-output[0] // size) * -(-output[1] // size)
    tiles = -(-tiles // vectors) * vectors
    channels = spec.in_channels * spec.out_channels
    past_caches = max(0, weight_bytes(spec, size) - _CACHED_BYTES) / _HALF_SPEED_BYTES
    products = channels / _MULTIPLIED * (1 + past_caches)
    transformed = _READING * spec.in_channels + _WRITING * spec.out_channels
    return tiles * (size + TAPS - 1) ** 2 * (products + transformed) / (9 * channels * output[0] * output[1])


def best(spec: LayerSpec, output: tuple[int, int], largest: int, cpu: CpuFacts) -> tuple[Tile, float] | None:
    """The tile of least :func:`cost` and its cost, with images side by side; None if the layer does not fit.

    Args:
        spec: the layer.
        output: height and width of its output.
        largest: m at most; 0 for never.
        cpu: the processor.
    """
    sizes = [size for size in _POINTS if size <= largest and weight_bytes(spec, size) <= _MOST_BYTES]
    if not sizes or not fits(spec):
        return None
    rows, vectors = rows_and_vectors(cpu)
    size = min(sizes, key=lambda size: cost(spec, output, size, vectors))
    tile = Tile(lanes="winograd", vector=cpu.lanes, rows=rows, height=size, width=vectors, channels=spec.in_channels)
    return tile, cost(spec, output, size, vectors)
