"""The sparse kernel of linear layers for many tokens: lanes are tokens, and output rows run in pairs that share loads.

For one tile of tokens: the tokens are transposed once, feature by feature; then, panel by panel of output rows and block by block of
features, every pair of rows takes its partial sums into 2 × vectors registers, runs a loop over the features that both rows keep, one over
the others of both side by side and one over what the longer row has left, and puts the sums back (see lowering.pair_program).

A processor that could do two multiply-adds per cycle does about 1.4 if each loads its x, so a load that serves two rows counts. Loops go four
steps at a time and what remains in steps of two and one, each behind a branch of its own: as pairs are ordered by their numbers, these
branches go as they went for the pair before.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def, valid-type"
from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.pair_program import COLUMN, FIELDS
from sift_compiler.runtimes.tvm.epilogue import finished
from sift_compiler.runtimes.tvm.registers import IN_REGISTERS, registers
from sift_compiler.runtimes.tvm.subroutines import SUBROUTINE
from sift_compiler.runtimes.tvm.transpose import perfect_shuffle, result_half

_MOST = 2**31 - 1
_COLUMN = "sift_column"
_LOADED_ALONE = f"""
define i64 @{_COLUMN}(ptr %address) alwaysinline {{
  %short = load volatile i16, ptr %address, align 2
  %long = zext i16 %short to i64
  ret i64 %long
}}
"""
"""``sift_column(address)``, a column in 64 bits. LLVM would load those of several steps as one vector and take it apart again on the units that
multiply and add; a volatile load is left alone."""


# fmt: off
def _products(*, lanes: int, vectors: int, alone: bool) -> Any:
    """A TIR macro ``(pairs, columns, values, window, sums, bias, pair, begin, column, weight, top, first, last, fresh)``: one pair of rows.

    It adds weight times input to the sums of the rows, or, if ``fresh``, to their bias. The block's window begins at ``begin``, the panel's sums
    at ``top``; ``column[0]`` and ``weight[0]`` are where the pair's columns and weights begin, and are moved past them (all of these int64, as
    addresses are). The bias of the panel lies at ``first`` to ``last`` (int32). Columns are loaded ``alone`` in a function that imports
    ``_LOADED_ALONE``.
    """
    L, NV = lanes, vectors

    def loaded(columns: Any, position: Any) -> Any:
        if alone:
            return T.call_extern("int64", _COLUMN, T.address_of(columns[position]))
        return T.cast(columns[position], "int64")

    @T.macro
    def multiply(acc, columns, values, window, begin, column, weight, row, step):
        """Step ``step`` of several: a weight of ``row``, whose column and value lie ``step`` behind."""
        at: T.let[T.int64] = loaded(columns, column[0] + step)
        for i in T.unroll(NV):
            acc[T.ramp((row * NV + i) * L, 1, L)] = (
                acc[T.ramp((row * NV + i) * L, 1, L)]
                + T.broadcast(values[weight[0] + step], L) * window[T.ramp(begin + at * COLUMN + i * L, 1, L)]
            )

    @T.macro
    def both(acc, x, columns, values, window, begin, column, weight, steps):
        for u in T.unroll(steps):
            at: T.let[T.int64] = loaded(columns, column[0] + u)
            for i in T.unroll(NV):
                x[T.ramp(0, 1, L)] = window[T.ramp(begin + at * COLUMN + i * L, 1, L)]
                for r in T.unroll(2):
                    acc[T.ramp((r * NV + i) * L, 1, L)] = (
                        acc[T.ramp((r * NV + i) * L, 1, L)] + T.broadcast(values[weight[0] + (2 * u + r)], L) * x[T.ramp(0, 1, L)]
                    )
        column[0] = column[0] + T.int64(steps)
        weight[0] = weight[0] + T.int64(2 * steps)

    @T.macro
    def side_by_side(acc, columns, values, window, begin, column, weight, steps):
        for u in T.unroll(2 * steps):
            multiply(acc, columns, values, window, begin, column, weight, u % 2, u)
        column[0] = column[0] + T.int64(2 * steps)
        weight[0] = weight[0] + T.int64(2 * steps)

    @T.macro
    def add_products(pairs, columns, values, window, sums, bias, pair, begin, column, weight, top, first, last, fresh):
        acc = registers(2 * NV * L)
        x = registers(L)
        count = registers(1, "int32")
        if fresh:
            for r in T.unroll(2):
                for i in T.unroll(NV):
                    acc[T.ramp((r * NV + i) * L, 1, L)] = T.broadcast(bias[T.min(first + T.truncdiv(pairs[pair + r], NV * L), last)], L)
        else:
            for r in T.unroll(2):
                for i in T.unroll(NV):
                    acc[T.ramp((r * NV + i) * L, 1, L)] = sums[T.ramp(top + T.cast(pairs[pair + r], "int64") + i * L, 1, L)]
        count[0] = pairs[pair + 2]
        while count[0] >= 4:
            both(acc, x, columns, values, window, begin, column, weight, 4)
            count[0] = count[0] - 4
        if count[0] > 0:
            both(acc, x, columns, values, window, begin, column, weight, 2)
        count[0] = pairs[pair + 3]
        while count[0] >= 4:
            side_by_side(acc, columns, values, window, begin, column, weight, 4)
            count[0] = count[0] - 4
        if count[0] >= 2:
            side_by_side(acc, columns, values, window, begin, column, weight, 2)
            count[0] = count[0] - 2
        if count[0] > 0:
            side_by_side(acc, columns, values, window, begin, column, weight, 1)
        count[0] = pairs[pair + 4]
        while count[0] > 0:
            multiply(acc, columns, values, window, begin, column, weight, 1, 0)
            column[0] = column[0] + T.int64(1)
            weight[0] = weight[0] + T.int64(1)
            count[0] = count[0] - 1
        for r in T.unroll(2):
            for i in T.unroll(NV):
                sums[T.ramp(top + T.cast(pairs[pair + r], "int64") + i * L, 1, L)] = acc[T.ramp((r * NV + i) * L, 1, L)]

    return add_products


def _block(*, lanes: int, vectors: int, symbol: str) -> Any:
    """The TIR function ``(pairs, columns, values, window, sums, bias, count, last, fresh)``: the ``count`` pairs of one panel and block.

    A function of its own, with few arguments: inside the kernel LLVM would reload addresses from the stack in the innermost loops.
    """
    add_products = _products(lanes=lanes, vectors=vectors, alone=True)

    @T.prim_func
    def block(
        pairs: T.handle("int32"), columns: T.handle("int16"), values: T.handle("float32"), window: T.handle("float32"),
        sums: T.handle("float32"), bias: T.handle("float32"), count: T.int32, last: T.int32, fresh: T.int32,
    ):
        T.func_attr({"tirx.noalias": True, IN_REGISTERS: True, SUBROUTINE: symbol})
        G = T.decl_buffer((_MOST,), "int32", data=pairs)
        F = T.decl_buffer((_MOST,), "int16", data=columns)
        V = T.decl_buffer((_MOST,), "float32", data=values)
        W = T.decl_buffer((_MOST,), "float32", data=window)
        S = T.decl_buffer((_MOST,), "float32", data=sums)
        B = T.decl_buffer((_MOST,), "float32", data=bias)
        T.attr(0, "pragma_import_llvm", _LOADED_ALONE)
        column = registers(1, "int64")
        weight = registers(1, "int64")
        column[0] = T.int64(0)
        weight[0] = T.int64(0)
        for g in range(count):
            add_products(
                G, F, V, W, S, B, g * FIELDS, T.int64(0), column, weight, T.int64(0), 0, last, fresh == 1
            )

    return block.without_attr("global_symbol")


def pair_tile(
    *, lanes: int, vectors: int, parallel: bool, epilogue: Epilogue, inline: bool = False, name: str
) -> Any:
    """The TIR function for at least ``lanes`` · ``vectors`` tokens.

    Args:
        lanes: float32 lanes of a vector.
        vectors: vectors of tokens in a tile; twice as many registers hold partial sums.
        parallel: run ``workers`` workers on TVM's pool; otherwise the caller's thread does all of it.
        epilogue: what is done to finished sums.
        inline: one function, as an exported module needs it; otherwise the inner loops are a function of their own.
        name: symbol of the function.

    Arguments, in order: tokens x [tokens, K]; the program's pairs, columns and starts (see lowering.pair_program); values in its order;
    bias [M]; scale and shift [M] and residual [tokens, M] (read if the epilogue says so); output y [tokens, M]; workspaces: transposed
    tokens [workers · K · vectors · lanes] and partial sums [workers · ((panel + 1) · vectors + lanes) · lanes]; then the integers workers, units, tokens, K, M,
    blocks, channels of a block, panels and rows of a panel. A unit of parallel work is one panel of one tile, panels of a tile one after
    the other.
    """
    L, NV = lanes, vectors
    loop = T.parallel if parallel else T.serial
    square, half = perfect_shuffle(L, L), result_half(L)
    # By way of memory and in a loop: an activation for each of a block's rows would be as much code, which LLVM takes minutes for.
    long_epilogue = epilogue.activation not in ("none", "relu")
    add_products, products = _products(lanes=lanes, vectors=vectors, alone=False), f"{name}_products"

    @T.prim_func
    def kernel(
        x: T.handle, pairs_: T.handle, columns_: T.handle, starts: T.handle, values: T.handle, bias: T.handle,
        scale: T.handle, shift: T.handle, residual: T.handle, y: T.handle, window: T.handle, sums: T.handle,
        workers: T.int32, units: T.int32, tokens: T.int32, K: T.int32, M: T.int32, blocks: T.int32, channels: T.int32,
        panels: T.int32, panel_rows: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2, n3, n4, n5 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n6, n7, n8, n9, n10, n11 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        G = T.match_buffer(pairs_, (n1,), "int32", align=4, offset_factor=1)
        F = T.match_buffer(columns_, (n2,), "int16", align=2, offset_factor=1)
        BS = T.match_buffer(starts, (n3,), "int32", align=4, offset_factor=1)
        V = T.match_buffer(values, (n4,), "float32", align=4, offset_factor=1)
        B = T.match_buffer(bias, (n5,), "float32", align=4, offset_factor=1)
        SC = T.match_buffer(scale, (n6,), "float32", align=4, offset_factor=1)
        SH = T.match_buffer(shift, (n7,), "float32", align=4, offset_factor=1)
        E = T.match_buffer(residual, (n8,), "float32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n9,), "float32", align=4, offset_factor=1)
        W = T.match_buffer(window, (n10,), "float32", align=64)
        S = T.match_buffer(sums, (n11,), "float32", align=64)
        for worker in loop(workers):
            w0: T.let[T.int64] = T.cast(worker, "int64") * T.cast(K, "int64") * T.int64(NV * L)
            s0: T.let[T.int64] = T.cast(worker, "int64") * (T.cast(panel_rows + 1, "int64") * T.int64(NV * L) + T.int64(L * L))
            f0: T.let[T.int64] = s0 + T.cast(panel_rows + 1, "int64") * T.int64(NV * L)
            for turn in range((worker + 1) * units // workers - worker * units // workers):
                unit: T.let[T.int32] = worker * units // workers + turn
                left: T.let[T.int32] = T.min(unit // panels * (NV * L), tokens - NV * L)
                top: T.let[T.int32] = unit % panels * panel_rows
                height: T.let[T.int32] = T.min(panel_rows, M - top)
                count: T.let[T.int32] = (height + 1) // 2
                if T.Or(turn == 0, unit % panels == 0):
                    if K >= L:
                        for u, c in T.grid(NV, (K + L - 1) // L):
                            cells = registers(2 * L * L)
                            near: T.let[T.int32] = T.min(c * L, K - L)
                            for i in T.unroll(L):
                                cells[T.ramp(i * L, 1, L)] = X[T.ramp((left + u * L + i) * K + near, 1, L)]
                            square(cells)
                            for i in T.unroll(L):
                                W[T.ramp(w0 + (T.cast(near, "int64") + i) * (NV * L) + u * L, 1, L)] = cells[T.ramp((half * L + i) * L, 1, L)]
                    else:
                        for u, c in T.grid(NV, K):
                            W[T.ramp(w0 + (c * NV + u) * L, 1, L)] = X[T.ramp((left + u * L) * K + c, K, L)]
                for b in range(blocks):
                    first: T.let[T.int32] = (unit % panels * blocks * ((panel_rows + 1) // 2) + b * count) * FIELDS
                    start: T.let[T.int32] = (unit % panels * blocks + b) * 2
                    origin: T.let[T.int64] = w0 + T.cast(b, "int64") * T.cast(channels, "int64") * T.int64(NV * L)
                    if inline:
                        column = registers(1, "int64")
                        weight = registers(1, "int64")
                        column[0] = T.cast(BS[start], "int64")
                        weight[0] = T.cast(BS[start + 1], "int64")
                        for g in range(count):
                            add_products(
                                G, F, V, W, S, B, first + g * FIELDS, origin, column, weight, s0,
                                top, top + height - 1, b == 0,
                            )
                    else:
                        T.evaluate(T.call_extern(
                            "void", products, T.address_of(G[first]), T.address_of(F[BS[start]]), T.address_of(V[BS[start + 1]]),
                            T.address_of(W[origin]), T.address_of(S[s0]), T.address_of(B[top]), count, height - 1, T.if_then_else(b == 0, 1, 0),
                        ))
                if height >= L:
                    for u, q in T.grid(NV, (height + L - 1) // L):
                        cells = registers(2 * L * L)
                        row: T.let[T.int32] = T.min(q * L, height - L)
                        for i in T.unroll(L):
                            cells[T.ramp(i * L, 1, L)] = S[T.ramp(s0 + ((row + i) * NV + u) * L, 1, L)]
                        square(cells)
                        if long_epilogue:
                            for i in T.unroll(L):
                                S[T.ramp(f0 + i * L, 1, L)] = cells[T.ramp((half * L + i) * L, 1, L)]
                            for i in range(L):
                                token: T.let[T.int32] = (left + u * L + i) * M + top + row
                                Y[T.ramp(token, 1, L)] = finished(
                                    epilogue, S[T.ramp(f0 + i * L, 1, L)], L,
                                    SC[T.ramp(top + row, 1, L)], SH[T.ramp(top + row, 1, L)], E[T.ramp(token, 1, L)],
                                )
                        else:
                            for i in T.unroll(L):
                                place: T.let[T.int32] = (left + u * L + i) * M + top + row
                                Y[T.ramp(place, 1, L)] = finished(
                                    epilogue, cells[T.ramp((half * L + i) * L, 1, L)], L,
                                    SC[T.ramp(top + row, 1, L)], SH[T.ramp(top + row, 1, L)], E[T.ramp(place, 1, L)],
                                )
                else:
                    for m, u in T.grid(height, NV):
                        scattered: T.let[T.int32] = (left + u * L) * M + top + m
                        Y[T.ramp(scattered, M, L)] = finished(
                            epilogue, S[T.ramp(s0 + (m * NV + u) * L, 1, L)], L,
                            T.broadcast(SC[top + m], L), T.broadcast(SH[top + m], L), E[T.ramp(scattered, M, L)],
                        )

    if inline:
        return kernel
    return tvm.IRModule({name: kernel, products: _block(lanes=lanes, vectors=vectors, symbol=products)})
# fmt: on
