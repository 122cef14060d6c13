"""How many loads of x a mask needs: the one property of a mask, besides its share of kept weights, that decides which tile is fast.

A tile that computes R output rows at once loads an input once for all of them that keep a weight there. Unstructured masks share few loads
when they are sparse, masks in blocks of R rows always all. Both, and whatever lies between, are told by one number per R.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sift_compiler.lowering.specification import LayerSpec

Loads = tuple[float, float, float, float]
"""Loads of x per kept weight if 1, 2, 3 or 4 rows are computed at once: between 1 / rows, where rows keep the same columns, and 1."""

MOST_ROWS = 4
_BAND = 12
"""Rows that are whole groups of 1, 2, 3 and 4."""
_BANDS = 4
"""Bands looked at, neighbours in the middle of the layer: it takes a millisecond or two where looking at all takes twenty."""

_AT_ONCE = 1 << 15
"""Entries of an index at once, so that what is made of them stays in the first-level caches."""


def unstructured_loads(density: float) -> Loads:
    """What random masks need that keep ``density``, 0 … 1, of the weights: (1 - (1 - density)^R) / (R · density)."""
    if density <= 0:
        return (1.0, 1.0, 1.0, 1.0)
    one, two, three, four = ((1 - (1 - density) ** rows) / (rows * density) for rows in range(1, MOST_ROWS + 1))
    return (one, two, three, four)


def measured_loads(index: npt.NDArray[np.int32], spec: LayerSpec) -> Loads:
    """What the mask ``index`` needs, measured on some of its rows.

    Args:
        index: int32 [slots], distinct flat positions in the dense weight, in any order; a negative one is not in the mask.
        spec: the layer.

    Returns:
        Distinct pairs of a group of R rows and a column, over kept weights; those of a random mask where there is nothing to look at.
    """
    entries = math.prod(spec.weight_shape)
    if not entries or not index.size or index.size == entries:
        return unstructured_loads(1.0 if index.size else 0.0)
    width = entries // spec.out_channels
    first = (-(-spec.out_channels // _BAND) - _BANDS) // 2 * _BAND if spec.out_channels > _BANDS * _BAND else 0
    rows = min(_BANDS * _BAND, -(-(spec.out_channels - first) // _BAND) * _BAND)
    # As numbers without sign, what lies before and what is not in the mask are beyond the end.
    shifted = (
        index[at : at + _AT_ONCE].view(np.uint32) - np.uint32(first * width) for at in range(0, index.size, _AT_ONCE)
    )
    flat = np.concatenate([some[some < rows * width] for some in shifted])
    if not flat.size:
        return unstructured_loads(1 - spec.sparsity)
    kept = np.zeros(rows * width, bool)
    kept[flat] = True
    one = kept.reshape(rows, width)
    if spec.groups > 1:
        one = _apart(one, first, spec)
    two = one[0::2] | one[1::2]
    three, four = one[0::3] | one[1::3] | one[2::3], two[0::2] | two[1::2]
    loads = [int(np.count_nonzero(columns)) / flat.size for columns in (two, three, four)]
    return (1.0, loads[0], loads[1], loads[2])


def _apart(kept: npt.NDArray[np.bool_], first: int, spec: LayerSpec) -> npt.NDArray[np.bool_]:
    """Rows of a grouped convolution in columns of their own group, for rows of different groups read different inputs."""
    rows, width = kept.shape
    group = (first + np.arange(rows)) // (spec.out_channels // spec.groups)
    group -= group[0]
    apart = np.zeros((rows, int(group[-1]) + 1, width), bool)
    apart[np.arange(rows), group] = kept
    return apart.reshape(rows, -1)
