"""The sparse kernel between sparse layers: input and output lie as [group of images, channel, row, column, lane].

It multiplies as sparse_kernel does. But images already lie side by side in vectors, so nothing is packed, padded or transposed: windows
are copied straight from the layer before, zeros where they reach past the border, and finished tiles are stored as they are.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.runtimes.tvm.epilogue import finished_at_run_time
from sift_compiler.runtimes.tvm.products import block_products
from sift_compiler.runtimes.tvm.streaming import STREAM, STREAMED, streaming


# fmt: off
def lane_tile(
    *, lanes: int, rows: int, height: int, width: int, pitch: int, parallel: bool, epilogue: Epilogue,
    past_caches: bool = False, dtype: str = "float32", name: str,
) -> Any:
    """The TIR function of one class of layers; see :func:`sparse_kernel.sparse_tile` for its constants. With ``past_caches`` the
    output is stored past the caches (see streaming).

    The function's arguments, in order: input X [groups of images, C, H, W, lanes]; the program's stream, and where each block begins in
    it and in the values; packed values; bias, scale and shift [M] and residual, laid out as the output (scale and shift
    are read if the epilogue says so, the residual also if it is ``added``);
    first row and first column of each phase [2 · phases]; where the rows of a window lie
    [channels of a block · phases · rows], counted from its first position in the input; output Y [groups of images, M, H', W', lanes]; workspaces: windows and partial
    sums; then integers. Which pieces of tiles a worker computes
    is said by two tables (see lowering.shares), which stand before the output.
    """
    L, R, NV = lanes, rows, height * width
    loop = T.parallel if parallel else T.serial
    products, stores = f"{name}_products", streaming(lanes, dtype)

    @T.prim_func
    def kernel(
        x: T.handle, stream: T.handle, block_column: T.handle, block_value: T.handle, values: T.handle, bias: T.handle,
        scale: T.handle, shift: T.handle, residual: T.handle, phase: T.handle, rows_ahead: T.handle, begins: T.handle, pieces: T.handle,
        y: T.handle, window: T.handle, sums: T.handle,
        workers: T.int32, segments: T.int32, tiles_down: T.int32, tiles_across: T.int32, last_y: T.int32, last_x: T.int32,
        C: T.int32, H: T.int32, W: T.int32, stride_y: T.int32, stride_x: T.int32, pad_y: T.int32, pad_x: T.int32,
        phases: T.int32, window_rows: T.int32, window_columns: T.int32, blocks: T.int32, block_channels: T.int32,
        groups: T.int32, M: T.int32, out_height: T.int32, out_width: T.int32,
        added: T.int32, lowest: T.float32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2, n3, n4, n5, n6 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n7, n8, n9, n10, n11, n12, n13 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n14, n15 = T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), dtype, align=64)
        F = T.match_buffer(stream, (n1,), "int32", align=4, offset_factor=1)
        BC = T.match_buffer(block_column, (n2,), "int32", align=4, offset_factor=1)
        BV = T.match_buffer(block_value, (n3,), "int32", align=4, offset_factor=1)
        V = T.match_buffer(values, (n4,), dtype, align=4, offset_factor=1)
        B = T.match_buffer(bias, (n5,), dtype, align=4, offset_factor=1)
        SC = T.match_buffer(scale, (n6,), dtype, align=4, offset_factor=1)
        SH = T.match_buffer(shift, (n7,), dtype, align=4, offset_factor=1)
        E = T.match_buffer(residual, (n8,), dtype, align=4, offset_factor=1)
        P = T.match_buffer(phase, (n9,), "int32", align=4, offset_factor=1)
        A = T.match_buffer(rows_ahead, (n13,), "int32", align=4, offset_factor=1)
        D = T.match_buffer(begins, (n14,), "int32", align=4, offset_factor=1)
        K = T.match_buffer(pieces, (n15,), "int32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n10,), dtype, align=64)
        N = T.match_buffer(window, (n11,), dtype, align=64)
        S = T.match_buffer(sums, (n12,), dtype, align=64)
        T.attr(0, "pragma_import_llvm", stores)
        for worker in loop(workers):
            for turn in range(D[worker + 1] - D[worker]):
                tile: T.let[T.int32] = K[(D[worker] + turn) * 4]
                segment: T.let[T.int32] = K[(D[worker] + turn) * 4 + 1]
                first_group: T.let[T.int32] = K[(D[worker] + turn) * 4 + 2]
                last_group: T.let[T.int32] = K[(D[worker] + turn) * 4 + 3]
                image: T.let[T.int32] = tile // tiles_across // tiles_down
                top: T.let[T.int32] = T.min(tile // tiles_across % tiles_down * height, last_y)
                left: T.let[T.int32] = T.min(tile % tiles_across * width, last_x)
                w0: T.let[T.int32] = worker * (block_channels * phases * window_rows * window_columns * L)
                s0: T.let[T.int32] = worker * (groups * R * NV * L)
                for r, u in T.grid((last_group - first_group) * R, NV):
                    S[T.ramp(s0 + (r * NV + u) * L, 1, L)] = T.broadcast(B[T.min(first_group * R + r, M - 1)], L)
                for b in range(blocks):
                    for f, c in T.grid(phases, T.min(block_channels, C - b * block_channels)):
                        # Columns of the window that lie left of the image, and up to where they lie inside.
                        outer: T.let[T.int32] = left * stride_x + P[phases + f] - pad_x
                        first: T.let[T.int32] = T.min(window_columns, T.max(0, stride_x - 1 - outer) // stride_x)
                        last: T.let[T.int32] = T.max(first, T.min(window_columns, (T.max(0, W - outer) + stride_x - 1) // stride_x))
                        for j in range(window_rows):
                            down: T.let[T.int32] = (top + j) * stride_y + P[f] - pad_y
                            source: T.let[T.int32] = (((image * C + b * block_channels + c) * H + down) * W + outer) * L
                            target: T.let[T.int32] = w0 + ((c * phases + f) * window_rows + j) * window_columns * L
                            if down >= 0 and down < H:
                                for i in range(first):
                                    N[T.ramp(target + i * L, 1, L)] = T.broadcast(T.cast(T.float32(0), dtype), L)
                                for i in range(last - first):
                                    N[T.ramp(target + (first + i) * L, 1, L)] = X[T.ramp(source + (first + i) * stride_x * L, 1, L)]
                                for i in range(window_columns - last):
                                    N[T.ramp(target + (last + i) * L, 1, L)] = T.broadcast(T.cast(T.float32(0), dtype), L)
                            else:
                                for i in range(window_columns):
                                    N[T.ramp(target + i * L, 1, L)] = T.broadcast(T.cast(T.float32(0), dtype), L)
                    # The window of the next block, or the first one of the next tile, wherever the image ends: a hint, never read.
                    begin: T.let[T.int32] = (image * C * H + T.max(0, top * stride_y - pad_y)) * W + T.max(0, left * stride_x - pad_x)
                    ahead: T.let[T.int32] = (begin + T.if_then_else(b + 1 < blocks, (b + 1) * block_channels * H * W, width * stride_x)) * L
                    T.evaluate(T.call_extern(
                        "void", products, T.address_of(F[BC[b * segments + segment]]), T.address_of(V[BV[b * segments + segment]]),
                        T.address_of(N[w0]), T.address_of(S[s0]), last_group - first_group,
                        T.address_of(X[ahead]), T.address_of(A[0]), T.min(block_channels, C) * phases * window_rows, window_columns, stride_x * L,
                    ))
                for n, j, i in T.grid(T.min(last_group * R, M) - first_group * R, height, width):
                    m: T.let[T.int32] = first_group * R + n
                    place: T.let[T.int32] = (((image * M + m) * out_height + top + j) * out_width + left + i) * L
                    if past_caches:
                        T.evaluate(T.call_extern("void", STREAM, T.address_of(Y[place]), finished_at_run_time(
                            epilogue, S[T.ramp(s0 + (n * NV + j * width + i) * L, 1, L)], L,
                            T.broadcast(SC[m], L), T.broadcast(SH[m], L), E[T.ramp(place, 1, L)], added, lowest, dtype,
                        )))
                    else:
                        Y[T.ramp(place, 1, L)] = finished_at_run_time(
                            epilogue, S[T.ramp(s0 + (n * NV + j * width + i) * L, 1, L)], L,
                            T.broadcast(SC[m], L), T.broadcast(SH[m], L), E[T.ramp(place, 1, L)], added, lowest, dtype,
                        )
            if past_caches:
                T.evaluate(T.call_extern("void", STREAMED))

    subroutine = block_products(lanes=lanes, rows=rows, height=height, width=width, pitch=pitch, dtype=dtype, symbol=products)
    return tvm.IRModule({name: kernel, products: subroutine})
# fmt: on
