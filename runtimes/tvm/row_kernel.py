"""Kernels for few tokens: every kept weight is read once, row by row, where the layer keeps it.

With one token the lanes of a vector hold neighbouring kept weights of one output row, and the input is gathered: it is a few kilobytes
and stays in the first-level cache, while weights and columns stream by at the speed of memory. With a few tokens the lanes hold tokens: a
kept weight is one load of its feature's tokens and one multiply-add; rows run side by side, because one row's sum would wait for itself.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any, Literal

from tvm.script import tirx as T

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.row_program import BALANCED
from sift_compiler.runtimes.tvm.epilogue import finished
from sift_compiler.runtimes.tvm.registers import IN_REGISTERS, registers
from sift_compiler.runtimes.tvm.transpose import lane_sums, leaf, perfect_shuffle, result_half

Gather = Literal["avx512", "avx2", "loads"]
"""How a vector is gathered from memory: by an instruction of x86, or lane by lane."""

AHEAD = 512
"""Kept weights between the one that is used and the one that is asked for: gathers fill the processor's window, so that loads alone look
only a few cache lines ahead."""


def ask_for(number: Any) -> Any:
    """Bring the cache line of a buffer's ``number`` to the first level; it may lie beyond the buffer's end."""
    return T.call_llvm_intrin("void", "llvm.prefetch.p0", T.address_of(number), 0, 3, 1)


def gathered(gather: Gather, lanes: int, x: Any, columns: Any) -> Any:
    """``lanes`` float32 of the buffer ``x`` at the int32 vector ``columns``."""
    whole = f"float32x{lanes}"
    if gather == "loads":
        return x[columns]
    base, zero = T.address_of(x[0]), T.broadcast(T.float32(0), lanes)
    if gather == "avx512":
        every = T.broadcast(T.bool(True), lanes)
        return T.call_llvm_intrin(whole, "llvm.x86.avx512.mask.gather.dps.512", zero, base, columns, every, T.int32(4))
    # A lane is loaded where the sign of the mask is set.
    every = T.reinterpret(whole, T.broadcast(T.int32(-1), lanes))
    return T.call_llvm_intrin(whole, "llvm.x86.avx2.gather.d.ps.256", zero, base, columns, every, T.int8(4))


# fmt: off
def one_token(
    *, lanes: int, gather: Gather, columns: str, parallel: bool, epilogue: Epilogue, name: str
) -> Any:
    """The TIR function for one token and at least ``lanes`` values.

    Arguments, in order: x [in]; columns [nnz] and the beginnings of rows [M + 1] (see lowering.row_program); values in that order; bias
    [M]; scale and shift [M] and residual [M] (read if the epilogue says so); output y [M]; a workspace [workers · lanes · lanes]; then the integers
    workers and M.
    """
    L = lanes
    loop = T.parallel if parallel else T.serial
    add_up = lane_sums(L)
    whole = f"int32x{L}"

    def between(position: Any, first: Any, last: Any) -> Any:
        return T.And(position >= T.broadcast(first, L), position < T.broadcast(last, L))

    @T.prim_func
    def kernel(
        x: T.handle, columns_: T.handle, starts: T.handle, values: T.handle, bias: T.handle,
        scale: T.handle, shift: T.handle, residual: T.handle, y: T.handle, sums: T.handle,
        workers: T.int32, M: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2, n3, n4 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n5, n6, n7, n8, n9 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(columns_, (n1,), columns, align=2, offset_factor=1)
        RS = T.match_buffer(starts, (n2,), "int32", align=4, offset_factor=1)
        V = T.match_buffer(values, (n3,), "float32", align=4, offset_factor=1)
        B = T.match_buffer(bias, (n4,), "float32", align=4, offset_factor=1)
        SC = T.match_buffer(scale, (n5,), "float32", align=4, offset_factor=1)
        SH = T.match_buffer(shift, (n6,), "float32", align=4, offset_factor=1)
        E = T.match_buffer(residual, (n7,), "float32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n8,), "float32", align=4, offset_factor=1)
        S = T.match_buffer(sums, (n9,), "float32", align=64)
        for worker in loop(workers):
            s0: T.let[T.int32] = worker * L * L
            for turn in range((worker + 1) * ((M + L - 1) // L) // workers - worker * ((M + L - 1) // L) // workers):
                top: T.let[T.int32] = (worker * ((M + L - 1) // L) // workers + turn) * L
                for i in range(L):
                    acc = registers(L)
                    acc[T.ramp(0, 1, L)] = T.broadcast(T.float32(0), L)
                    begin: T.let[T.int32] = RS[T.min(top + i, M)]
                    end: T.let[T.int32] = RS[T.min(top + i + 1, M)]
                    at = registers(1, "int32")
                    at[0] = begin
                    while at[0] + L <= end:
                        T.evaluate(ask_for(V[at[0] + AHEAD]))
                        T.evaluate(ask_for(F[at[0] + AHEAD]))
                        acc[T.ramp(0, 1, L)] = acc[T.ramp(0, 1, L)] + V[T.ramp(at[0], 1, L)] * gathered(
                            gather, L, X, T.Cast(whole, F[T.ramp(at[0], 1, L)])
                        )
                        at[0] = at[0] + L
                    if at[0] < end:
                        # The last weights of the row, with some before them that do not count: what is read lies within the arrays.
                        near: T.let[T.int32] = T.max(end - L, 0)
                        acc[T.ramp(0, 1, L)] = T.Select(
                            between(T.ramp(near, 1, L), at[0], end),
                            acc[T.ramp(0, 1, L)] + V[T.ramp(near, 1, L)] * gathered(
                                gather, L, X, T.Cast(whole, F[T.ramp(near, 1, L)])
                            ),
                            acc[T.ramp(0, 1, L)],
                        )
                    S[T.ramp(s0 + i * L, 1, L)] = acc[T.ramp(0, 1, L)]
                cells = registers(2 * L * L)
                for i in T.unroll(L):
                    cells[T.ramp((L + i) * L, 1, L)] = S[T.ramp(s0 + leaf(i, L) * L, 1, L)]
                add_up(cells)
                if top + L <= M:
                    Y[T.ramp(top, 1, L)] = finished(
                        epilogue, cells[T.ramp(L, 1, L)] + B[T.ramp(top, 1, L)], L,
                        SC[T.ramp(top, 1, L)], SH[T.ramp(top, 1, L)], E[T.ramp(top, 1, L)],
                    )
                else:
                    S[T.ramp(s0, 1, L)] = cells[T.ramp(L, 1, L)]
                    for i in range(M - top):
                        Y[top + i] = finished(
                            epilogue, S[s0 + i] + B[top + i], 1, SC[top + i], SH[top + i], E[top + i]
                        )

    return kernel


def pack_few_tokens(*, lanes: int, tokens: int, name: str) -> Any:
    """Packed input of the kernel for few tokens: [count, in] → [in, tokens], by transposing in registers.

    ``lanes`` float32 make a vector, ``tokens`` is a power of two. Arguments: x, which token each of ``tokens`` is in x, packed, in.
    """
    L, N = lanes, tokens
    narrow, half = perfect_shuffle(L, N), result_half(N)

    @T.prim_func
    def kernel(x: T.handle, held: T.handle, packed: T.handle, features: T.int32):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        H = T.match_buffer(held, (n1,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(packed, (n2,), "float32", align=64)
        if features >= L:
            for q in range((features + L - 1) // L):
                cells = registers(2 * N * L)
                near: T.let[T.int32] = T.min(q * L, features - L)
                for i in T.unroll(N):
                    cells[T.ramp(i * L, 1, L)] = X[T.ramp(H[i] * features + near, 1, L)]
                narrow(cells)
                for i in T.unroll(N):
                    P[T.ramp(near * N + i * L, 1, L)] = cells[T.ramp((half * N + i) * L, 1, L)]
        else:
            for c, i in T.grid(features, N):
                P[c * N + i] = X[H[i] * features + c]

    return kernel


def few_tokens(
    *, lanes: int, tokens: int, rows: int, columns: str, parallel: bool, epilogue: Epilogue, name: str
) -> Any:
    """The TIR function for up to ``tokens`` tokens (a power of two, at least 2).

    Args:
        lanes: float32 lanes of the processor's vectors.
        tokens: tokens side by side; those that fill no vector of ``lanes`` lie in a narrower one.
        rows: output rows at once, a divisor of ``BALANCED``.
        columns: type of the columns.
        parallel, epilogue, name: as in the other kernels.

    Arguments, in order: packed input [in, tokens]; columns [nnz], the beginnings of rows [M + 1] and the balanced rows [M] (see
    lowering.row_program); values in that order; bias [M]; scale and shift [M] and residual [count, M] (read if the epilogue says so); output y [count, M]; a
    workspace [workers · (BALANCED + lanes) · tokens]; then the integers workers, count and M.
    """
    L, N, R = lanes, tokens, rows
    W = min(L, N)
    NV, U = N // W, max(1, 8 * W // (R * N))
    loop = T.parallel if parallel else T.serial
    narrow, half = perfect_shuffle(N, L), result_half(L)

    @T.prim_func
    def kernel(
        packed: T.handle, columns_: T.handle, starts: T.handle, balanced: T.handle, values: T.handle, bias: T.handle,
        scale: T.handle, shift: T.handle, residual: T.handle, y: T.handle, sums: T.handle,
        workers: T.int32, count: T.int32, M: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2, n3, n4, n5 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n6, n7, n8, n9, n10 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(packed, (n0,), "float32", align=64)
        F = T.match_buffer(columns_, (n1,), columns, align=2, offset_factor=1)
        RS = T.match_buffer(starts, (n2,), "int32", align=4, offset_factor=1)
        RB = T.match_buffer(balanced, (n3,), "int32", align=4, offset_factor=1)
        V = T.match_buffer(values, (n4,), "float32", align=4, offset_factor=1)
        B = T.match_buffer(bias, (n5,), "float32", align=4, offset_factor=1)
        SC = T.match_buffer(scale, (n6,), "float32", align=4, offset_factor=1)
        SH = T.match_buffer(shift, (n7,), "float32", align=4, offset_factor=1)
        E = T.match_buffer(residual, (n8,), "float32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n9,), "float32", align=4, offset_factor=1)
        S = T.match_buffer(sums, (n10,), "float32", align=64)
        for worker in loop(workers):
            s0: T.let[T.int32] = worker * (BALANCED + L) * N
            f0: T.let[T.int32] = s0 + BALANCED * N
            blocks: T.let[T.int32] = (M + BALANCED - 1) // BALANCED
            for turn in range((worker + 1) * blocks // workers - worker * blocks // workers):
                top: T.let[T.int32] = (worker * blocks // workers + turn) * BALANCED
                height: T.let[T.int32] = T.min(BALANCED, M - top)
                # What the next block of rows will read is asked for as this one goes on: its rows are not read in order.
                asked = registers(1, "int32")
                asked[0] = RS[T.min(top + BALANCED, M)]
                for g in range((height + R - 1) // R):
                    acc = registers(U * R * N)
                    # Where each row is, and behind its last weight; rows missing in the last group repeat its last one.
                    at = registers(R, "int32")
                    end = registers(R, "int32")
                    common = registers(1, "int32")
                    common[0] = 2147483647
                    for r in T.unroll(R):
                        at[r] = RS[RB[T.min(top + g * R + r, M - 1)]]
                        end[r] = RS[RB[T.min(top + g * R + r, M - 1)] + 1]
                        common[0] = T.min(common[0], end[r] - at[r])
                    for u in T.unroll(U * R * NV):
                        acc[T.ramp(u * W, 1, W)] = T.broadcast(T.float32(0), W)
                    k = registers(1, "int32")
                    k[0] = 0
                    while k[0] + U <= common[0]:
                        T.evaluate(ask_for(V[asked[0]]))
                        T.evaluate(ask_for(F[asked[0]]))
                        asked[0] = asked[0] + U * R
                        for u in T.unroll(U):
                            for r in T.unroll(R):
                                for i in T.unroll(NV):
                                    acc[T.ramp(((u * R + r) * NV + i) * W, 1, W)] = (
                                        acc[T.ramp(((u * R + r) * NV + i) * W, 1, W)]
                                        + T.broadcast(V[at[r] + k[0] + u], W)
                                        * X[T.ramp(T.Cast("int32", F[at[r] + k[0] + u]) * N + i * W, 1, W)]
                                    )
                        k[0] = k[0] + U
                    for r in T.unroll(R):
                        at[r] = at[r] + k[0]
                        while at[r] < end[r]:
                            for i in T.unroll(NV):
                                acc[T.ramp((r * NV + i) * W, 1, W)] = (
                                    acc[T.ramp((r * NV + i) * W, 1, W)]
                                    + T.broadcast(V[at[r]], W) * X[T.ramp(T.Cast("int32", F[at[r]]) * N + i * W, 1, W)]
                                )
                            at[r] = at[r] + 1
                        for u in T.unroll(1, U):
                            for i in T.unroll(NV):
                                acc[T.ramp((r * NV + i) * W, 1, W)] = (
                                    acc[T.ramp((r * NV + i) * W, 1, W)] + acc[T.ramp(((u * R + r) * NV + i) * W, 1, W)]
                                )
                        for i in T.unroll(NV):
                            S[T.ramp(s0 + (RB[T.min(top + g * R + r, M - 1)] - top) * N + i * W, 1, W)] = acc[
                                T.ramp((r * NV + i) * W, 1, W)
                            ]
                if height >= L:
                    for q in range((height + L - 1) // L):
                        row: T.let[T.int32] = T.min(q * L, height - L)
                        cells = registers(2 * N * L)
                        for i in T.unroll(L):
                            cells[T.ramp(i * N, 1, N)] = S[T.ramp(s0 + (row + i) * N, 1, N)]
                        narrow(cells)
                        # By way of memory: an epilogue for each token would be as much code as tokens.
                        for i in T.unroll(N):
                            S[T.ramp(f0 + i * L, 1, L)] = cells[T.ramp((half * N + i) * L, 1, L)]
                        for i in range(count):
                            Y[T.ramp(i * M + top + row, 1, L)] = finished(
                                epilogue, S[T.ramp(f0 + i * L, 1, L)] + B[T.ramp(top + row, 1, L)], L,
                                SC[T.ramp(top + row, 1, L)], SH[T.ramp(top + row, 1, L)],
                                E[T.ramp(i * M + top + row, 1, L)],
                            )
                else:
                    for m, i in T.grid(height, count):
                        Y[i * M + top + m] = finished(
                            epilogue, S[s0 + m * N + i] + B[top + m], 1, SC[top + m], SH[top + m], E[i * M + top + m]
                        )

    return kernel
# fmt: on
