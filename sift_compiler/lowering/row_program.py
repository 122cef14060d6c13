"""The row program of a mask: the kept weights of each output row one after the other, for kernels that serve few tokens.

Kept weights lie in memory as the layer keeps its values wherever these come row by row, which is how patterns are made and how
``sift.compact`` leaves them: then nothing is copied at a call, and weights are read once, in order. Only a mask that has moved weights
between slots needs its values brought into order first.

Backend-neutral and pure: NumPy in, NumPy out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sift_compiler.lowering.specification import LayerSpec

Int32 = npt.NDArray[np.int32]

SHORT_COLUMNS = 1 << 15
"""Up to so many input features a column is stored in two bytes, and every one of them is positive whether the two bytes have a sign or not."""
BALANCED = 64
"""Rows that are ordered by their number of kept weights among themselves: rows that run side by side should end together, and memory
should still be read nearly in order."""


@dataclass(frozen=True)
class RowProgram:
    """A mask of a linear layer, row by row.

    Attributes:
        columns: int16 (up to ``SHORT_COLUMNS`` input features) or int32 [nnz]; the input feature of each kept weight.
        starts: int32 [M + 1], where each row begins in ``columns``.
        balanced: int32 [M], the rows, every ``BALANCED`` of them ordered by falling number of kept weights.
        order: int32 [slots]; ``values[order]`` are in the order of ``columns``; what is behind the kept ones is not read.
        direct: whether ``order`` changes nothing: values can be read where they are.
    """

    columns: npt.NDArray[Any]
    starts: Int32
    balanced: Int32
    order: Int32
    direct: bool


def column_type(spec: LayerSpec) -> str:
    """Name of the type that holds a column of the layer."""
    return "int16" if spec.in_channels <= SHORT_COLUMNS else "int32"


def pack_rows(index: Int32, spec: LayerSpec) -> RowProgram:
    """Pack a mask.

    Args:
        index: int32 [slots], distinct flat positions in the dense weight, in any order; a negative one is not in the mask.
        spec: a linear layer.
    """
    width = np.int32(max(1, spec.in_channels))
    rows = index // width
    columns = index - rows * width
    # Slots outside the mask go behind the last row.
    rows[index < 0] = spec.out_channels
    direct = bool((rows[1:] >= rows[:-1]).all())
    if direct:
        order = np.arange(index.size, dtype=np.int32)
    else:
        short = rows.astype(np.uint16) if spec.out_channels < 1 << 16 else rows
        order = np.argsort(short, kind="stable").astype(np.int32)
        columns = columns[order]
    counts = np.bincount(rows, minlength=spec.out_channels + 1)[: spec.out_channels]
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    blocks = np.arange(spec.out_channels) // BALANCED
    balanced = np.lexsort((-counts, blocks)).astype(np.int32)
    kept = columns[: starts[-1]].astype(column_type(spec))
    return RowProgram(kept, starts, balanced, order, direct)
