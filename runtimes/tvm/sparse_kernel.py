"""The sparse kernel: mask-specialised by data, written in TVM TIR.

For one tile of output positions, block by block of input channels:

1. copy the block's window of the packed input so that it lies contiguously in the first-level cache;
2. for every group of R output rows: take the group's partial sums into R × vectors registers, run one small loop per row pattern
   over its columns (one load of x, one multiply-add per kept row), put the partial sums back.

Only what shapes the instructions is constant (R, the tile's vectors and their distances, lanes, workers or not); channels, sizes,
blocks, tiles and strides are arguments, so one compiled function serves every layer of its class. A row of finished tiles is transposed
in registers, so that whole cache lines of the output are written: a line touched once per tile cost a tenth of a sparse layer's time.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any, Literal

import tvm
from tvm.script import tirx as T

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.runtimes.tvm.epilogue import finished
from sift_compiler.runtimes.tvm.products import block_products, group_products
from sift_compiler.runtimes.tvm.registers import IN_REGISTERS, registers
from sift_compiler.runtimes.tvm.transpose import perfect_shuffle, result_half

Output = Literal["images", "stretches", "tokens"]
"""Where a tile goes: lanes over images, stretches of neighbouring positions, or lanes over tokens."""


# fmt: off
def sparse_tile(
    *, lanes: int, rows: int, height: int, width: int, pitch: int, output: Output, strip: int, parallel: bool,
    epilogue: Epilogue, inline: bool = False, dtype: str = "float32", name: str,
) -> Any:
    """The TIR function of one class of layers.

    Args:
        lanes: numbers in a vector.
        rows: R, output rows computed at once.
        height, width: vectors of a tile, down and across.
        pitch: numbers between two rows of vectors in the window (any number if height is 1).
        output: how a finished tile leaves.
        strip: positions transposed at once when a row of tiles over images is finished, a power of two up to ``lanes``; 0 scatters each
            tile by itself (for outputs of fewer than four positions in a row of tiles).
        epilogue: what is done to finished sums.
        parallel: run ``workers`` workers on TVM's pool; otherwise the caller's thread does all of it.
        dtype: of input, values, sums and output; live kernels are made for float32.
        inline: one function, as an exported module needs it; otherwise the inner loops are a function of their own (see products).
        name: symbol of the function.

    The function's arguments, in order: packed input X (the input itself for tokens); the program's stream, and where each block begins
    in it and in the values; packed values; bias [M]; stretch starts, tile positions, output positions and lengths (read for
    ``stretches`` only); where the rows of a window lie, counted from its first number (see :func:`products.block_products`);
    which pieces of strips (rows of tiles) a worker computes, two tables (see lowering.shares); scale and shift [M] and residual, laid out as the output (read if the epilogue says so); output Y; workspaces: windows, partial sums, finished rows of tiles [workers · size]; then integers.
    """
    L, R, NV = lanes, rows, height * width
    N = strip
    loop = T.parallel if parallel else T.serial
    constants: dict[str, Any] = {"lanes": lanes, "rows": rows, "height": height, "width": width, "pitch": pitch, "dtype": dtype}
    add_products, products = group_products(**constants), f"{name}_products"
    images, stretches, tokens = output == "images", output == "stretches", output == "tokens"
    square, square_half = perfect_shuffle(L, L), result_half(L)
    narrow, narrow_half = perfect_shuffle(L, max(N, 2)), result_half(max(N, 2))

    def across(within: Any, line: Any) -> Any:
        return within if images else line

    def block_step(plane_step: Any) -> Any:
        return 1 if tokens else plane_step

    def stored(value: Any, width: int, scale: Any, shift: Any, residual: Any) -> Any:
        return finished(epilogue, value, width, scale, shift, residual, dtype)

    @T.prim_func
    def kernel(
        x: T.handle, stream: T.handle, block_column: T.handle, block_value: T.handle, values: T.handle, bias: T.handle,
        run_start: T.handle, run_source: T.handle, run_target: T.handle, run_length: T.handle,
        rows_ahead: T.handle, begins: T.handle, pieces: T.handle, scale: T.handle, shift: T.handle, residual: T.handle,
        y: T.handle, window: T.handle, sums: T.handle, finished: T.handle,
        workers: T.int32, segments: T.int32, strips_in_group: T.int32, tiles_across: T.int32, across_step: T.int32,
        last_y: T.int32, last_x: T.int32, row_step: T.int32, column_step: T.int32, group_step: T.int32,
        blocks: T.int32, planes: T.int32, block_planes: T.int32, plane_step: T.int32, stretch_step: T.int32,
        stretch_count: T.int32, stretch_vectors: T.int32,
        groups: T.int32, M: T.int32, out_area: T.int32, out_width: T.int32,
        ahead_rows: T.int32, ahead_vectors: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2, n3, n4, n5, n6 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n7, n8, n9, n10, n11, n12, n13 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n14, n15, n16, n17, n18, n19 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), dtype, align=4, offset_factor=1)
        F = T.match_buffer(stream, (n1,), "int32", align=4, offset_factor=1)
        BC = T.match_buffer(block_column, (n2,), "int32", align=4, offset_factor=1)
        BV = T.match_buffer(block_value, (n3,), "int32", align=4, offset_factor=1)
        V = T.match_buffer(values, (n4,), dtype, align=4, offset_factor=1)
        B = T.match_buffer(bias, (n5,), dtype, align=4, offset_factor=1)
        RS = T.match_buffer(run_start, (n6,), "int32", align=4, offset_factor=1)
        RF = T.match_buffer(run_source, (n7,), "int32", align=4, offset_factor=1)
        RT = T.match_buffer(run_target, (n8,), "int32", align=4, offset_factor=1)
        RL = T.match_buffer(run_length, (n9,), "int32", align=4, offset_factor=1)
        A = T.match_buffer(rows_ahead, (n17,), "int32", align=4, offset_factor=1)
        D = T.match_buffer(begins, (n18,), "int32", align=4, offset_factor=1)
        K = T.match_buffer(pieces, (n19,), "int32", align=4, offset_factor=1)
        SC = T.match_buffer(scale, (n14,), dtype, align=4, offset_factor=1)
        SH = T.match_buffer(shift, (n15,), dtype, align=4, offset_factor=1)
        E = T.match_buffer(residual, (n16,), dtype, align=4, offset_factor=1)
        Y = T.match_buffer(y, (n10,), dtype, align=4, offset_factor=1)
        W = T.match_buffer(window, (n11,), dtype, align=64)
        S = T.match_buffer(sums, (n12,), dtype, align=64)
        Q = T.match_buffer(finished, (n13,), dtype, align=64)
        for worker in loop(workers):
            for turn in range((D[worker + 1] - D[worker]) * tiles_across):
                piece: T.let[T.int32] = (D[worker] + turn // tiles_across) * 4
                line: T.let[T.int32] = K[piece]
                segment: T.let[T.int32] = K[piece + 1]
                first_group: T.let[T.int32] = K[piece + 2]
                last_group: T.let[T.int32] = K[piece + 3]
                first_row: T.let[T.int32] = first_group * R
                row_count: T.let[T.int32] = T.min(last_group * R, M) - first_group * R
                group: T.let[T.int32] = line // strips_in_group
                top: T.let[T.int32] = T.min(line % strips_in_group * height, last_y)
                left: T.let[T.int32] = T.min(across(turn % tiles_across, line) * across_step, last_x)
                origin: T.let[T.int32] = group * group_step + top * row_step + left * column_step
                w0: T.let[T.int32] = worker * (block_planes * stretch_count * stretch_vectors * L)
                s0: T.let[T.int32] = worker * (groups * R * NV * L)
                q0: T.let[T.int32] = worker * (M * height * out_width * L)
                for k, u in T.grid((last_group - first_group) * R, NV):
                    S[T.ramp(s0 + (k * NV + u) * L, 1, L)] = T.broadcast(B[T.min(first_row + k, M - 1)], L)
                for b in range(blocks):
                    count: T.let[T.int32] = T.min(block_planes, planes - b * block_planes)
                    if tokens:
                        if count >= L:
                            for u, c in T.grid(NV, (count + L - 1) // L):
                                cells = registers(2 * L * L, dtype)
                                near: T.let[T.int32] = T.min(c * L, count - L)
                                for i in T.unroll(L):
                                    cells[T.ramp(i * L, 1, L)] = X[T.ramp(origin + (u * L + i) * plane_step + b * block_planes + near, 1, L)]
                                square(cells)
                                for i in T.unroll(L):
                                    W[T.ramp(w0 + ((near + i) * NV + u) * L, 1, L)] = cells[T.ramp((square_half * L + i) * L, 1, L)]
                        else:
                            for u, c in T.grid(NV, count):
                                W[T.ramp(w0 + (c * NV + u) * L, 1, L)] = X[T.ramp(origin + u * L * plane_step + b * block_planes + c, plane_step, L)]
                    else:
                        for c, j, i in T.grid(count, stretch_count, stretch_vectors):
                            W[T.ramp(w0 + ((c * stretch_count + j) * stretch_vectors + i) * L, 1, L)] = X[
                                T.ramp(origin + (b * block_planes + c) * plane_step + j * stretch_step + i * L, 1, L)
                            ]
                    if inline:
                        k = registers(1, "int64")
                        v = registers(1, "int64")
                        k[0] = T.cast(BC[b * segments + segment], "int64")
                        v[0] = T.cast(BV[b * segments + segment], "int64")
                        for g in range(last_group - first_group):
                            acc = registers(R * NV * L, dtype)
                            for u in T.unroll(R * NV):
                                acc[T.ramp(u * L, 1, L)] = S[T.ramp(s0 + (g * R * NV + u) * L, 1, L)]
                            add_products(acc, F, V, W, k, v, T.cast(w0, "int64"))
                            for u in T.unroll(R * NV):
                                S[T.ramp(s0 + (g * R * NV + u) * L, 1, L)] = acc[T.ramp(u * L, 1, L)]
                    else:
                        # The window of the next block, or about that of the next tile: a hint, never read.
                        ahead: T.let[T.int32] = origin + T.if_then_else(
                            b + 1 < blocks, (b + 1) * block_planes * block_step(plane_step), across_step * column_step
                        )
                        T.evaluate(T.call_extern(
                            "void", products, T.address_of(F[BC[b * segments + segment]]), T.address_of(V[BV[b * segments + segment]]),
                            T.address_of(W[w0]), T.address_of(S[s0]), last_group - first_group,
                            T.address_of(X[ahead]), T.address_of(A[0]), ahead_rows, ahead_vectors, L,
                        ))
                if images:
                    if N == 0:
                        for n, j, i in T.grid(row_count, height, width):
                            m: T.let[T.int32] = first_row + n
                            scattered: T.let[T.int32] = (group * L * M + m) * out_area + (top + j) * out_width + left + i
                            Y[T.ramp(scattered, M * out_area, L)] = stored(
                                S[T.ramp(s0 + (n * NV + j * width + i) * L, 1, L)], L, T.broadcast(SC[m], L), T.broadcast(SH[m], L), E[T.ramp(scattered, M * out_area, L)]
                            )
                    else:
                        for r, j, i in T.grid(row_count, height, width):
                            Q[T.ramp(q0 + ((r * height + j) * out_width + left + i) * L, 1, L)] = S[T.ramp(s0 + (r * NV + j * width + i) * L, 1, L)]
                        if turn % tiles_across == tiles_across - 1:
                            for n, q in T.grid(row_count, (height * out_width + N - 1) // N):
                                done: T.let[T.int32] = first_row + n
                                cells = registers(2 * N * L, dtype)
                                start: T.let[T.int32] = T.min(q * N, height * out_width - N)
                                for i in T.unroll(N):
                                    cells[T.ramp(i * L, 1, L)] = Q[T.ramp(q0 + (n * height * out_width + start + i) * L, 1, L)]
                                narrow(cells)
                                for i in T.unroll(L):
                                    place: T.let[T.int32] = ((group * L + i) * M + done) * out_area + top * out_width + start
                                    Y[T.ramp(place, 1, N)] = stored(
                                        cells[T.ramp(narrow_half * N * L + i * N, 1, N)], N, T.broadcast(SC[done], N), T.broadcast(SH[done], N), E[T.ramp(place, 1, N)]
                                    )
                if tokens:
                    if row_count >= L:
                        for u, q in T.grid(NV, (row_count + L - 1) // L):
                            cells = registers(2 * L * L, dtype)
                            near_row: T.let[T.int32] = T.min(q * L, row_count - L)
                            row: T.let[T.int32] = first_row + near_row
                            for i in T.unroll(L):
                                cells[T.ramp(i * L, 1, L)] = S[T.ramp(s0 + ((near_row + i) * NV + u) * L, 1, L)]
                            square(cells)
                            for i in T.unroll(L):
                                token: T.let[T.int32] = (left + u * L + i) * M + row
                                Y[T.ramp(token, 1, L)] = stored(
                                    cells[T.ramp((square_half * L + i) * L, 1, L)], L, SC[T.ramp(row, 1, L)], SH[T.ramp(row, 1, L)], E[T.ramp(token, 1, L)]
                                )
                    else:
                        for n, u in T.grid(row_count, NV):
                            channel: T.let[T.int32] = first_row + n
                            Y[T.ramp((left + u * L) * M + channel, M, L)] = stored(
                                S[T.ramp(s0 + (n * NV + u) * L, 1, L)], L, T.broadcast(SC[channel], L), T.broadcast(SH[channel], L), E[T.ramp((left + u * L) * M + channel, M, L)]
                            )
                if stretches:
                    for n in range(row_count):
                        at: T.let[T.int32] = first_row + n
                        for q in range(RS[line + 1] - RS[line]):
                            for i in range(RL[RS[line] + q]):
                                Y[at * out_area + RT[RS[line] + q] + i] = stored(
                                    S[s0 + n * NV * L + RF[RS[line] + q] + i], 1, SC[at], SH[at], E[at * out_area + RT[RS[line] + q] + i]
                                )

    if inline:
        return kernel
    return tvm.IRModule({name: kernel, products: block_products(**constants, symbol=products)})
# fmt: on
