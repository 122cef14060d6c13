"""The inner loops of the sparse kernels: the kept weights of one group of rows and one block of channels, as a TIR macro."""

# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


# fmt: off
def products(*, lanes: int, rows: int, height: int, width: int, pitch: int) -> Any:
    """A TIR macro ``(acc, stream, values, window, column, value, begin)``: one small loop per row pattern over its columns.

    Args:
        lanes: float32 lanes of a vector.
        rows: R, output rows computed at once.
        height, width: vectors of a tile, down and across.
        pitch: float32 numbers between two rows of vectors in the window (any number if height is 1).

    The macro reads the buckets of the next group from ``stream`` and ``values``, from ``column[0]`` and ``value[0]`` on, which it moves
    past them, and adds weight times input to ``acc`` [rows · height · width · lanes], which lives in registers. The input of a column
    lies at ``begin`` plus the column's offset in ``window``.

    A loop over a bucket ends at a sentinel in the stream: a counted loop would be unrolled by LLVM, and its odd iterations would cost
    a second branch miss per bucket.
    """
    L, R, NV = lanes, rows, height * width

    @T.macro
    def add_products(acc, stream, values, window, column, value, begin):
        for p in T.unroll((1 << R) - 1):
            while stream[column[0]] >= 0:
                for j in T.unroll(height):
                    for i in T.unroll(width):
                        for r in T.unroll(R):
                            if ((p + 1) >> r) & 1 == 1:
                                acc[T.ramp((r * NV + j * width + i) * L, 1, L)] = (
                                    acc[T.ramp((r * NV + j * width + i) * L, 1, L)]
                                    + T.broadcast(values[value[0] + T.popcount((p + 1) & ((1 << r) - 1))], L)
                                    * window[T.ramp(begin + stream[column[0]] + j * pitch + i * L, 1, L)]
                                )
                column[0] = column[0] + 1
                value[0] = value[0] + T.popcount(p + 1)
            column[0] = column[0] + 1

    return add_products
# fmt: on
