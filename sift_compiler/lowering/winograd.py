"""Winograd's convolution: what a tile of it computes, and which layers it fits.

A tile of m × m outputs of an r × r convolution needs (m + r - 1)² multiplications instead of m² r²:

    Y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A        (Lavin & Gray, 2016, eq. 8; summed over input channels inside the brackets)

The weights G g Gᵀ are dense whatever the mask of g, so zeros are multiplied, too: it is what a layer of moderate sparsity falls back to where
that is faster. The matrices are those of Toom and Cook for the points below and infinity (Blahut, 2010). With six of them they are
those of Barabasz et al. (2020), whose error in float32 is a third of that of 0, ±1, ±2.

A convolution of stride 2 is one of stride 1 on four times as many channels: each holds every second row and column of the input, and its
kernel every second row and column of the layer's kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sift_compiler.lowering.specification import LayerSpec

POINTS = {4: (0, 1, -1), 6: (0, 1, -1, Fraction(1, 2), -2)}
"""The points for tiles that read so many rows and columns."""
Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """The matrices of a tile."""

    size: int
    """m."""
    input: Matrix
    """Bᵀ [m + r - 1, m + r - 1], exact in float32."""
    weight: Matrix
    """G [m + r - 1, r], in float64."""
    output: Matrix
    """Aᵀ [m, m + r - 1], exact in float32."""


@functools.cache
def transforms(taps: int, reach: int) -> Transforms:
    """The matrices of tiles that read ``reach`` rows and columns (4 or 6), for kernels of ``taps`` rows and columns (r)."""
    points = [Fraction(point) for point in POINTS[reach]]
    size = reach - taps + 1
    divisors = [_product(point - other for other in points if other != point) for point in points]
    rows = [_polynomial([other for other in points if other != point]) for point in points]
    weight = [
        tuple(float(point**j / divisor) for j in range(taps)) for point, divisor in zip(points, divisors, strict=True)
    ]
    return Transforms(
        size=size,
        input=tuple(tuple(float(c) for c in (*row, 0)[:reach]) for row in (*rows, _polynomial(points))),
        weight=(*weight, tuple(float(j == taps - 1) for j in range(taps))),
        output=tuple((*(float(point**i) for point in points), float(i == size - 1)) for i in range(size)),
    )  # fmt: skip


def _product(factors: Iterable[Fraction]) -> Fraction:
    return functools.reduce(lambda product, factor: product * factor, factors, Fraction(1))


def _polynomial(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of Π (x - root), the lowest power first."""
    made = [Fraction(1)]
    for root in roots:
        made = [lower - root * same for lower, same in zip([Fraction(0), *made], [*made, Fraction(0)], strict=True)]
    return made


@dataclass(frozen=True, kw_only=True)
class Form:
    """A layer as a convolution of stride 1."""

    taps: int
    """r: rows and columns of its kernels."""
    stride: int
    """Of the layer; its square is how many channels each of the layer's becomes."""

    @property
    def phases(self) -> int:
        """Channels that one of the layer's becomes."""
        return self.stride**2


_STRIDES, _TAPS = (1, 2), (2, 3, 4, 5)


def form(spec: LayerSpec) -> Form | None:
    """The layer as a convolution of stride 1; None if it does not fit: strides alike, 1 or 2, kernels of 2 to 5 rows and columns then."""
    stride = spec.stride[0]
    plain = spec.kind == "conv2d" and spec.groups == 1 and spec.dilation == (1, 1) and spec.nnz > 0
    if not plain or spec.stride[1] != stride or stride not in _STRIDES:
        return None
    taps = {-(-size // stride) for size in spec.kernel_size}
    return Form(taps=taps.pop(), stride=stride) if len(taps) == 1 and taps <= set(_TAPS) else None
