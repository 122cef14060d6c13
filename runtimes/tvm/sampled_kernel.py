"""The sampled kernel: gradients of kept values only, mask-specialised by data, written in TVM TIR.

    dv[m, c, tap] = Σ over positions p of   dy[m, p] · x[c, p + tap]      for kept (m, c, tap) only

It walks the program of the forward kernel (see sparse_kernel). For one tile of output positions, block by block of input channels:

1. copy the block's window of the packed input so that it lies contiguously in the first-level cache;
2. for every group of R output rows: keep the tile of their dy in R × vectors registers, and for each column (one load of x serves every
   kept row) multiply and add over the tile into one vector per kept weight, which is put aside;
3. sum the lanes of what was put aside, ``lanes`` vectors at a time by a tree of shuffles, and add the sums to the gradients. A lane sum
   per weight would cost as much as the products.

Gradients of a group of rows begin at a multiple of ``lanes`` in the sums, so that the tree never straddles two groups.
Tiles do not overlap: outputs that fill no tile are padded by zeros in dy.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from sift_compiler.runtimes.tvm.transpose import lane_sums, leaf


# fmt: off
def sampled_tile(*, lanes: int, rows: int, height: int, width: int, pitch: int, parallel: bool, name: str) -> Any:
    """The TIR function of one class of layers.

    Args:
        lanes, rows, height, width, pitch, parallel, name: as in :func:`sparse_kernel.sparse_tile`.

    The function's arguments, in order: packed input X; packed output gradient D; the program's stream, and where each block begins in it
    and in the sums; sums [workers · size], to be added to; workspaces: windows, vectors put aside [workers · their sizes]; then integers.
    ``clear`` sets the sums to zero first. A row of tiles (``tiles_across`` of them) is the unit of parallel work; every worker has sums
    of its own.
    """
    L, R, NV, NP = lanes, rows, height * width, (1 << rows) - 1
    loop = T.parallel if parallel else T.serial
    tree = lane_sums(L)

    @T.prim_func
    def kernel(
        x: T.handle, dy: T.handle, stream: T.handle, block_column: T.handle, block_sum: T.handle,
        sums: T.handle, window: T.handle, aside: T.handle,
        workers: T.int32, strips: T.int32, strips_in_group: T.int32, tiles_across: T.int32,
        row_step: T.int32, column_step: T.int32, group_step: T.int32,
        dy_row_step: T.int32, dy_column_step: T.int32, dy_group_step: T.int32, dy_plane: T.int32, dy_pitch: T.int32, dy_unit: T.int32,
        blocks: T.int32, planes: T.int32, block_planes: T.int32, plane_step: T.int32, stretch_step: T.int32,
        stretch_count: T.int32, stretch_vectors: T.int32,
        groups: T.int32, M: T.int32, size: T.int32, aside_size: T.int32, clear: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2, n3 = T.int32(), T.int32(), T.int32(), T.int32()
        n4, n5, n6, n7 = T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        D = T.match_buffer(dy, (n1,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(stream, (n2,), "int32", align=4, offset_factor=1)
        BC = T.match_buffer(block_column, (n3,), "int32", align=4, offset_factor=1)
        BS = T.match_buffer(block_sum, (n4,), "int32", align=4, offset_factor=1)
        S = T.match_buffer(sums, (n5,), "float32", align=64)
        W = T.match_buffer(window, (n6,), "float32", align=64)
        A = T.match_buffer(aside, (n7,), "float32", align=64)
        for worker in loop(workers):
            if clear == 1:
                for i in range(size // L):
                    S[T.ramp(worker * size + i * L, 1, L)] = T.broadcast(T.float32(0), L)
            for turn in range(((worker + 1) * strips // workers - worker * strips // workers) * tiles_across):
                line: T.let[T.int32] = worker * strips // workers + turn // tiles_across
                group: T.let[T.int32] = line // strips_in_group
                down: T.let[T.int32] = line % strips_in_group
                across: T.let[T.int32] = turn % tiles_across
                origin: T.let[T.int32] = group * group_step + down * row_step + across * column_step
                start: T.let[T.int32] = group * dy_group_step + down * dy_row_step + across * dy_column_step
                w0: T.let[T.int32] = worker * (block_planes * stretch_count * stretch_vectors * L)
                a0: T.let[T.int32] = worker * aside_size
                s0: T.let[T.int32] = worker * size
                for b in range(blocks):
                    count: T.let[T.int32] = T.min(block_planes, planes - b * block_planes)
                    for c, j, i in T.grid(count, stretch_count, stretch_vectors):
                        W[T.ramp(w0 + ((c * stretch_count + j) * stretch_vectors + i) * L, 1, L)] = X[
                            T.ramp(origin + (b * block_planes + c) * plane_step + j * stretch_step + i * L, 1, L)
                        ]
                    k = T.alloc_buffer((1,), "int32", scope="local")
                    v = T.alloc_buffer((1,), "int32", scope="local")
                    n = T.alloc_buffer((1,), "int32", scope="local")
                    k[0] = BC[b]
                    v[0] = BS[b]
                    for g in range(groups):
                        d = T.alloc_buffer((R * NV * L,), "float32", scope="local")
                        for r in T.unroll(R):
                            for j in T.unroll(height):
                                for i in T.unroll(width):
                                    d[T.ramp((r * NV + j * width + i) * L, 1, L)] = D[
                                        T.ramp(start + T.min(g * R + r, M - 1) * dy_plane + j * dy_pitch + i * dy_unit, 1, L)
                                    ]
                        n[0] = 0
                        for p in T.unroll(NP):
                            while F[k[0]] >= 0:
                                acc = T.alloc_buffer((R * L,), "float32", scope="local")
                                for r in T.unroll(R):
                                    acc[T.ramp(r * L, 1, L)] = T.broadcast(T.float32(0), L)
                                for j in T.unroll(height):
                                    for i in T.unroll(width):
                                        for r in T.unroll(R):
                                            if ((p + 1) >> r) & 1 == 1:
                                                acc[T.ramp(r * L, 1, L)] = (
                                                    acc[T.ramp(r * L, 1, L)]
                                                    + d[T.ramp((r * NV + j * width + i) * L, 1, L)]
                                                    * W[T.ramp(w0 + F[k[0]] + j * pitch + i * L, 1, L)]
                                                )
                                for r in T.unroll(R):
                                    if ((p + 1) >> r) & 1 == 1:
                                        A[T.ramp(a0 + (n[0] + T.popcount((p + 1) & ((1 << r) - 1))) * L, 1, L)] = acc[T.ramp(r * L, 1, L)]
                                k[0] = k[0] + 1
                                n[0] = n[0] + T.popcount(p + 1)
                            k[0] = k[0] + 1
                        for q in range((n[0] + L - 1) // L):
                            cells = T.alloc_buffer((2 * L * L,), "float32", scope="local")
                            for i in T.unroll(L):
                                cells[T.ramp((L + i) * L, 1, L)] = A[T.ramp(a0 + (q * L + leaf(i, L)) * L, 1, L)]
                            tree(cells)
                            S[T.ramp(s0 + v[0], 1, L)] = S[T.ramp(s0 + v[0], 1, L)] + cells[T.ramp(L, 1, L)]
                            v[0] = v[0] + L

    return kernel
# fmt: on
