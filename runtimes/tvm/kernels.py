"""The sparse kernel: mask-specialised by data, written in TVM TIR.

For one tile of output positions, block by block of input channels:

1. copy the block's window of the packed input so that it lies contiguously in the first-level cache;
2. for every group of R output rows: take the group's partial sums into R × vectors registers, run one small loop per row pattern
   over its bucket of columns (one load of x, one multiply-add per kept row), put the partial sums back.

Only what shapes the instructions is constant (R, the tile's vectors and their distances, lanes, workers or not); channels, sizes,
blocks, tiles and strides are arguments, so one compiled function serves every layer of its class.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any, Literal

from tvm.script import tirx as T

Output = Literal["images", "stretches", "tokens"]
"""Where a tile goes: lanes over images, stretches of neighbouring positions, or lanes over tokens."""


def sparse_tile(
    *, lanes: int, rows: int, height: int, width: int, pitch: int, output: Output, parallel: bool, name: str
) -> Any:
    """The TIR function of one class of layers.

    Args:
        lanes: float32 lanes of a vector.
        rows: R, output rows computed at once.
        height, width: vectors of a tile, down and across.
        pitch: float32 numbers between two rows of vectors in the window (any number if height is 1).
        output: how a finished tile leaves.
        parallel: run ``workers`` workers on TVM's pool; otherwise the caller's thread does all of it.
        name: symbol of the function.

    The function's arguments, in order: packed input X (the input itself for tokens); offsets, column starts and value starts of the
    program; packed values; bias [M]; stretch starts, tile positions, output positions and lengths (read for ``stretches`` only);
    output Y; window and partial-sum workspaces [workers · size]; then integers, see the signature.
    """
    L, R, NV, NP = lanes, rows, height * width, (1 << rows) - 1
    loop = T.parallel if parallel else T.serial
    images, stretches, tokens = output == "images", output == "stretches", output == "tokens"

    @T.prim_func
    def kernel(
        x: T.handle, offsets: T.handle, column_start: T.handle, value_start: T.handle, values: T.handle, bias: T.handle,
        run_start: T.handle, run_source: T.handle, run_target: T.handle, run_length: T.handle,
        y: T.handle, window: T.handle, sums: T.handle,
        workers: T.int32, tiles: T.int32, tiles_in_group: T.int32, tiles_across: T.int32, across_step: T.int32,
        last_y: T.int32, last_x: T.int32, row_step: T.int32, column_step: T.int32, group_step: T.int32,
        blocks: T.int32, planes: T.int32, block_planes: T.int32, plane_step: T.int32, stretch_step: T.int32,
        stretch_count: T.int32, stretch_vectors: T.int32,
        groups: T.int32, M: T.int32, out_area: T.int32, out_width: T.int32,
    ):  # fmt: skip
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2, n3, n4, n5 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n6, n7, n8, n9, n10, n11, n12 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(offsets, (n1,), "int32", align=4, offset_factor=1)
        CS = T.match_buffer(column_start, (n2,), "int32", align=4, offset_factor=1)
        VS = T.match_buffer(value_start, (n3,), "int32", align=4, offset_factor=1)
        V = T.match_buffer(values, (n4,), "float32", align=4, offset_factor=1)
        B = T.match_buffer(bias, (n5,), "float32", align=4, offset_factor=1)
        RS = T.match_buffer(run_start, (n6,), "int32", align=4, offset_factor=1)
        RF = T.match_buffer(run_source, (n7,), "int32", align=4, offset_factor=1)
        RT = T.match_buffer(run_target, (n8,), "int32", align=4, offset_factor=1)
        RL = T.match_buffer(run_length, (n9,), "int32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n10,), "float32", align=4, offset_factor=1)
        W = T.match_buffer(window, (n11,), "float32", align=64)
        S = T.match_buffer(sums, (n12,), "float32", align=64)
        for worker in loop(workers):
            for turn in range((worker + 1) * tiles // workers - worker * tiles // workers):
                tile: T.let[T.int32] = worker * tiles // workers + turn
                group: T.let[T.int32] = tile // tiles_in_group
                top: T.let[T.int32] = T.min((tile % tiles_in_group) // tiles_across * height, last_y)
                left: T.let[T.int32] = T.min(tile % tiles_in_group % tiles_across * across_step, last_x)
                origin: T.let[T.int32] = group * group_step + top * row_step + left * column_step
                w0: T.let[T.int32] = worker * (block_planes * stretch_count * stretch_vectors * L)
                s0: T.let[T.int32] = worker * (groups * R * NV * L)
                for m, u in T.grid(groups * R, NV):
                    S[T.ramp(s0 + (m * NV + u) * L, 1, L)] = T.broadcast(
                        T.if_then_else(m < M, B[T.min(m, M - 1)], T.float32(0)), L
                    )
                for b in range(blocks):
                    if tokens:
                        for u, c in T.grid(NV, T.min(block_planes, planes - b * block_planes)):
                            W[T.ramp(w0 + (c * NV + u) * L, 1, L)] = X[
                                T.ramp(origin + u * L * plane_step + b * block_planes + c, plane_step, L)
                            ]
                    else:
                        for c, j, i in T.grid(
                            T.min(block_planes, planes - b * block_planes), stretch_count, stretch_vectors
                        ):
                            W[T.ramp(w0 + ((c * stretch_count + j) * stretch_vectors + i) * L, 1, L)] = X[
                                T.ramp(origin + (b * block_planes + c) * plane_step + j * stretch_step + i * L, 1, L)
                            ]
                    for g in range(groups):
                        acc = T.alloc_buffer((R * NV * L,), "float32", scope="local")
                        for u in T.unroll(R * NV):
                            acc[T.ramp(u * L, 1, L)] = S[T.ramp(s0 + (g * R * NV + u) * L, 1, L)]
                        for p in T.unroll(NP):
                            for k in range(CS[(b * groups + g) * NP + p + 1] - CS[(b * groups + g) * NP + p]):
                                for j in T.unroll(height):
                                    for i in T.unroll(width):
                                        for r in T.unroll(R):
                                            if ((p + 1) >> r) & 1 == 1:
                                                acc[T.ramp((r * NV + j * width + i) * L, 1, L)] = (
                                                    acc[T.ramp((r * NV + j * width + i) * L, 1, L)]
                                                    + T.broadcast(
                                                        V[
                                                            VS[(b * groups + g) * NP + p]
                                                            + k * T.popcount(p + 1)
                                                            + T.popcount((p + 1) & ((1 << r) - 1))
                                                        ],
                                                        L,
                                                    )
                                                    * W[
                                                        T.ramp(
                                                            w0
                                                            + F[CS[(b * groups + g) * NP + p] + k]
                                                            + j * pitch
                                                            + i * L,
                                                            1,
                                                            L,
                                                        )
                                                    ]
                                                )
                        for u in T.unroll(R * NV):
                            S[T.ramp(s0 + (g * R * NV + u) * L, 1, L)] = acc[T.ramp(u * L, 1, L)]
                if images:
                    for m, j, i in T.grid(M, height, width):
                        Y[
                            T.ramp((group * L * M + m) * out_area + (top + j) * out_width + left + i, M * out_area, L)
                        ] = S[T.ramp(s0 + (m * NV + j * width + i) * L, 1, L)]
                if tokens:
                    for m, u in T.grid(M, NV):
                        Y[T.ramp((left + u * L) * M + m, M, L)] = S[T.ramp(s0 + (m * NV + u) * L, 1, L)]
                if stretches:
                    for m in range(M):
                        for k in range(RS[tile + 1] - RS[tile]):
                            for i in range(RL[RS[tile] + k]):
                                Y[m * out_area + RT[RS[tile] + k] + i] = S[s0 + m * NV * L + RF[RS[tile] + k] + i]

    return kernel


def gather(*, parallel: bool, name: str) -> Any:
    """``packed[i] = values[order[i]]``; arguments: values, order, packed, workers, count."""
    loop = T.parallel if parallel else T.serial

    @T.prim_func
    def kernel(values: T.handle, order: T.handle, packed: T.handle, workers: T.int32, count: T.int32):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        V = T.match_buffer(values, (n0,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(order, (n1,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(packed, (n2,), "float32", align=4, offset_factor=1)
        for worker in loop(workers):
            for i in range((worker + 1) * count // workers - worker * count // workers):
                P[worker * count // workers + i] = V[F[worker * count // workers + i]]

    return kernel


def pack_images(*, lanes: int, parallel: bool, name: str) -> Any:
    """Packed input with lanes over images: NCHW → [group, channel, phases · plane, lanes].

    Arguments: x, sources (see Packing.sources), packed, workers, groups, channels, area of an image, positions of a channel.
    """
    loop = T.parallel if parallel else T.serial
    L = lanes

    @T.prim_func
    def kernel(
        x: T.handle, sources: T.handle, packed: T.handle,
        workers: T.int32, groups: T.int32, channels: T.int32, area: T.int32, positions: T.int32,
    ):  # fmt: skip
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(sources, (n1,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(packed, (n2,), "float32", align=64)
        for worker in loop(workers):
            for turn in range((worker + 1) * groups * channels // workers - worker * groups * channels // workers):
                plane: T.let[T.int32] = worker * groups * channels // workers + turn
                start: T.let[T.int32] = (plane // channels * L * channels + plane % channels) * area
                for i in range(positions):
                    if F[i] >= 0:
                        P[T.ramp((plane * positions + i) * L, 1, L)] = X[T.ramp(start + F[i], channels * area, L)]
                    else:
                        P[T.ramp((plane * positions + i) * L, 1, L)] = T.broadcast(T.float32(0), L)

    return kernel


def pack_space(*, parallel: bool, name: str) -> Any:
    """Packed input with lanes over space: NCHW → [channel, phases · plane], a plane holding all images.

    Arguments as in :func:`pack_images`, with ``images`` in the place of groups; sources count images.
    """
    loop = T.parallel if parallel else T.serial

    @T.prim_func
    def kernel(
        x: T.handle, sources: T.handle, packed: T.handle,
        workers: T.int32, channels: T.int32, area: T.int32, positions: T.int32,
    ):  # fmt: skip
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(sources, (n1,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(packed, (n2,), "float32", align=64)
        for worker in loop(workers):
            for turn in range((worker + 1) * channels // workers - worker * channels // workers):
                channel: T.let[T.int32] = worker * channels // workers + turn
                for i in range(positions):
                    P[channel * positions + i] = T.if_then_else(F[i] >= 0, X[F[i] + channel * area], T.float32(0))

    return kernel
