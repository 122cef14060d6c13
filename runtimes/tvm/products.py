"""The inner loops of the sparse kernels, a function of their own: the kept weights of one block of input channels, all groups of rows.

It is called once per block and tile. Inside a kernel, with a kernel's forty arguments alive, LLVM reloads addresses from the stack in
every turn of the innermost loops, and loads are what these loops are short of.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def, valid-type"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from sift_compiler.lowering.program import SKIP
from sift_compiler.runtimes.tvm.registers import IN_REGISTERS, registers
from sift_compiler.runtimes.tvm.subroutines import SUBROUTINE

_MOST = 2**31 - 1
_CHECKED_ROWS = 2
"""With so many rows and fewer, looking whether all buckets but the last are empty takes as long as passing them."""


# fmt: off
def group_products(*, lanes: int, rows: int, height: int, width: int, pitch: int, dtype: str = "float32") -> Any:
    """A TIR macro ``(acc, stream, values, window, column, value, begin)``: the buckets of one group of rows, one small loop each.

    Args:
        lanes: numbers in a vector.
        rows: R, output rows computed at once.
        height, width: vectors of a tile, down and across.
        pitch: numbers between two rows of vectors in the window (any number if height is 1).
        dtype: of input, values and sums.

    It reads the group's buckets from ``stream[column[0]]`` and ``values[value[0]]`` on, moves both past them (int64, as addresses are), and adds
    weight times input to ``acc`` [rows · height · width · lanes], which lives in registers: one load of x and one multiply-add per row of
    the bucket's pattern. The window begins at ``begin``.

    A loop over a bucket ends at a sentinel in the stream: a counted loop would be unrolled by LLVM, and its odd iterations would cost
    a second branch miss per bucket.
    """
    L, R, NV, NP = lanes, rows, height * width, (1 << rows) - 1

    @T.macro
    def add_bucket(acc, stream, values, window, column, value, begin, p):
        while stream[column[0]] >= 0:
            for j in T.unroll(height):
                for i in T.unroll(width):
                    for r in T.unroll(R):
                        if ((p + 1) >> r) & 1 == 1:
                            acc[T.ramp((r * NV + j * width + i) * L, 1, L)] = (
                                acc[T.ramp((r * NV + j * width + i) * L, 1, L)]
                                + T.broadcast(values[value[0] + T.popcount((p + 1) & ((1 << r) - 1))], L)
                                * window[T.ramp(begin + T.cast(stream[column[0]], "int64") + T.int64(j * pitch + i * L), 1, L)]
                            )
            column[0] = column[0] + T.int64(1)
            value[0] = value[0] + T.popcount(p + 1)
        column[0] = column[0] + T.int64(1)

    @T.macro
    def add_products(acc, stream, values, window, column, value, begin):
        if R > _CHECKED_ROWS:
            if stream[column[0]] == SKIP:
                column[0] = column[0] + T.int64(NP - 1)
            else:
                for p in T.unroll(NP - 1):
                    add_bucket(acc, stream, values, window, column, value, begin, p)
            add_bucket(acc, stream, values, window, column, value, begin, NP - 1)
        else:
            for p in T.unroll(NP):
                add_bucket(acc, stream, values, window, column, value, begin, p)

    return add_products


def block_products(
    *, lanes: int, rows: int, height: int, width: int, pitch: int, dtype: str = "float32", symbol: str
) -> Any:
    """The TIR function ``(stream, values, window, sums, groups, ahead, rows_ahead, row_count, columns, column_step)``.

    It adds weight times input to ``sums``.

    Args:
        lanes, rows, height, width, pitch, dtype: see :func:`group_products`.
        symbol: what the function is called.

    Its pointers stand at the block's first column, its first packed value, its window, and the tile's sums
    [groups, rows, height · width, lanes]. For every group it takes the sums into registers, runs one small loop per row pattern over its
    columns (one load of x, one multiply-add per kept row), and puts the sums back.

    While it computes, it asks for what the next window will be copied from: ``columns`` vectors, ``column_step`` apart, from ``ahead`` plus
    each of the ``row_count`` numbers of ``rows_ahead`` on, a few rows per group. Copied unasked, a window costs forty cycles per vector.
    """
    L, R, NV = lanes, rows, height * width
    add_products = group_products(lanes=lanes, rows=rows, height=height, width=width, pitch=pitch, dtype=dtype)

    @T.prim_func
    def block(
        stream: T.handle("int32"), values: T.handle(dtype), window: T.handle(dtype), sums: T.handle(dtype), groups: T.int32,
        ahead: T.handle(dtype), rows_ahead: T.handle("int32"), row_count: T.int32, columns: T.int32, column_step: T.int32,
    ):
        T.func_attr({"tirx.noalias": True, IN_REGISTERS: True, SUBROUTINE: symbol})
        F = T.decl_buffer((_MOST,), "int32", data=stream)
        V = T.decl_buffer((_MOST,), dtype, data=values)
        W = T.decl_buffer((_MOST,), dtype, data=window)
        S = T.decl_buffer((_MOST,), dtype, data=sums)
        X = T.decl_buffer((_MOST,), dtype, data=ahead)
        A = T.decl_buffer((_MOST,), "int32", data=rows_ahead)
        k = registers(1, "int64")
        v = registers(1, "int64")
        k[0] = T.int64(0)
        v[0] = T.int64(0)
        for g in range(groups):
            for q in range((g + 1) * row_count // groups - g * row_count // groups):
                for i in range(columns):
                    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(X[A[g * row_count // groups + q] + i * column_step]), 0, 2, 1))
            acc = registers(R * NV * L, dtype)
            for u in T.unroll(R * NV):
                acc[T.ramp(u * L, 1, L)] = S[T.ramp((g * R * NV + u) * L, 1, L)]
            add_products(acc, F, V, W, k, v, T.int64(0))
            for u in T.unroll(R * NV):
                S[T.ramp((g * R * NV + u) * L, 1, L)] = acc[T.ramp(u * L, 1, L)]

    return block.without_attr("global_symbol")
# fmt: on
