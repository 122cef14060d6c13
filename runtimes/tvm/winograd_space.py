"""Winograd's convolution of images in the usual order, one after another: the lanes of a vector are neighbouring tiles."""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.runtimes.tvm.epilogue import finished_at_run_time
from sift_compiler.runtimes.tvm.registers import IN_REGISTERS, registers
from sift_compiler.runtimes.tvm.winograd_steps import input_transform, products, transform_back


# fmt: off
def winograd_space(
    *, lanes: int, rows: int, vectors: int, taps: int, reach: int, parallel: bool, epilogue: Epilogue, name: str,
) -> Any:
    """The TIR function of Winograd's convolution on images in the usual order, tiles of m × m outputs, ``vectors`` · lanes of them at a
    time; m is reach - taps + 1, and n stands for ``reach``.

    A channel of an image, as one of stride 1 (see winograd.Form: C counts those), is laid out in m² planes, plane (a, b) holding the padded
    input's rows a, a + m … and columns b, b + m …, so that what
    neighbouring tiles read at one place lies side by side. Rows of planes hold what tiles reach to besides, so those at their
    ends compute what nobody reads.

    The function's arguments, in order: input x [images, C, H, W]; where each number of the planes is found in a channel
    [phases · m² · plane], -1 for zero; u (see winograd_weights); bias, scale and shift [M] and residual, as the output; output y [images, M, H', W']; workspaces: planes of
    a channel [workers, m² · plane], transformed inputs [panels, n², C, vectors, lanes], sums of every worker
    [blocks at once, n², rows, vectors, lanes], outputs by tiles [M, m², panels · vectors, lanes], tails [workers, lanes], and
    what tells of infinities and NaN [workers, lanes], zeros before, anything else afterwards if an output may not be finite before its residual is added.
    Then integers, and last a 0 as that of winograd_lanes.
    """
    L, R, P, S, N = lanes, rows, vectors, reach - taps + 1, reach
    loop = T.parallel if parallel else T.serial
    transform, multiply = f"{name}_input", f"{name}_products"

    def interleaved(cells: Any) -> None:
        """Vectors 0 to S - 1 of ``cells``, number by number in turn, to vectors S to 2 S - 1."""
        vectors = [cells[T.ramp(j * L, 1, L)] for j in range(S)]
        for j in range(S):
            places = [(j * L + i) % S * L + (j * L + i) // S for i in range(L)]
            T.buffer_store(cells, T.Shuffle(vectors, places), [T.ramp((S + j) * L, 1, L)])

    @T.prim_func
    def kernel(
        x: T.handle, sources: T.handle, u: T.handle, bias: T.handle, scale: T.handle, shift: T.handle, residual: T.handle, y: T.handle,
        planes: T.handle, transformed: T.handle, sums: T.handle, tiles: T.handle, tails: T.handle, strange: T.handle,
        workers: T.int32, images: T.int32, phases: T.int32, C: T.int32, H: T.int32, W: T.int32, M: T.int32, out_height: T.int32, out_width: T.int32,
        tiles_down: T.int32, tiles_across: T.int32, pitch: T.int32, plane: T.int32, panels: T.int32, blocks: T.int32, at_once: T.int32, own: T.int32,
        added: T.int32, lowest: T.float32, nought: T.float32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2, n3, n4, n5 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n6, n7, n8, n9, n10, n11, n12, n13 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(sources, (n1,), "int32", align=4, offset_factor=1)
        U = T.match_buffer(u, (n2,), "float32", align=64)
        B = T.match_buffer(bias, (n3,), "float32", align=4, offset_factor=1)
        SC = T.match_buffer(scale, (n4,), "float32", align=4, offset_factor=1)
        SH = T.match_buffer(shift, (n5,), "float32", align=4, offset_factor=1)
        E = T.match_buffer(residual, (n6,), "float32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n7,), "float32", align=4, offset_factor=1)
        A = T.match_buffer(planes, (n8,), "float32", align=64)
        V = T.match_buffer(transformed, (n9,), "float32", align=64)
        Q = T.match_buffer(sums, (n10,), "float32", align=64)
        D = T.match_buffer(tiles, (n11,), "float32", align=64)
        G = T.match_buffer(tails, (n12,), "float32", align=64)
        Z = T.match_buffer(strange, (n13,), "float32", align=64)
        for image in range(images):
            for worker in loop(workers):
                # With own panels a worker transforms all channels of those alone, which then lie in its caches; else its share of all.
                c0: T.let[T.int32] = T.if_then_else(own > 0, 0, worker * C // workers)
                c1: T.let[T.int32] = T.if_then_else(own > 0, C, (worker + 1) * C // workers)
                p0: T.let[T.int32] = T.if_then_else(own > 0, worker * panels // workers, 0)
                p1: T.let[T.int32] = T.if_then_else(own > 0, (worker + 1) * panels // workers, panels)
                a0: T.let[T.int32] = worker * (S * S * plane)
                i0: T.let[T.int32] = p0 * (P * L)
                for turn in range(c1 - c0):
                    c: T.let[T.int32] = c0 + turn
                    for f in range(S * S):
                        for i in range(T.min(p1 * (P * L) + (N - 1) // S * (pitch + 1), plane) - i0):
                            A[a0 + f * plane + i0 + i] = T.if_then_else(
                                F[(c % phases * (S * S) + f) * plane + i0 + i] >= 0,
                                X[F[(c % phases * (S * S) + f) * plane + i0 + i] + (image * C + c) // phases * (H * W)], T.float32(0),
                            )
                    for q, p in T.grid(p1 - p0, P):
                        T.evaluate(T.call_extern(
                            "void", transform, T.address_of(A[a0 + ((p0 + q) * P + p) * L]), S * plane, pitch, plane, 1,
                            T.address_of(V[((p0 + q) * (N * N * C) + c) * (P * L) + p * L]), C * P * L,
                        ))
            for worker in loop(workers):
                parts: T.let[T.int32] = (blocks + at_once - 1) // at_once
                q0: T.let[T.int32] = worker * (at_once * N * N * R * P * L)
                for turn in range((worker + 1) * panels * parts // workers - worker * panels * parts // workers):
                    panel: T.let[T.int32] = (worker * panels * parts // workers + turn) // parts
                    part: T.let[T.int32] = (worker * panels * parts // workers + turn) % parts
                    count: T.let[T.int32] = T.min(at_once, blocks - part * at_once)
                    for xi in range(N * N):
                        T.evaluate(T.call_extern(
                            "void", multiply, T.address_of(U[(xi * blocks + part * at_once) * (C * R)]),
                            T.address_of(V[(panel * N * N + xi) * (C * P * L)]), T.address_of(Q[q0 + xi * (R * P * L)]), C, count, N * N * R * P * L,
                        ))
                    for k, p in T.grid(T.min(count * R, M - part * at_once * R), P):
                        back = registers(S * N * L)
                        transform_back(
                            Q, q0 + ((k // R * N * N * R + k % R) * P + p) * L, R * P * L, back,
                            D, ((part * at_once * R + k) * (S * S) * panels + panel) * (P * L) + p * L, panels * P * L, L, taps, reach,
                        )
            for worker in loop(workers):
                for turn in range((worker + 1) * M // workers - worker * M // workers):
                    m: T.let[T.int32] = worker * M // workers + turn
                    for row in range(out_height):
                        for chunk in range((tiles_across + L - 1) // L):
                            cells = registers(2 * S * L)
                            first: T.let[T.int32] = (m * S + row % S) * (S * panels * P * L) + row // S * pitch + chunk * L
                            for j in T.unroll(S):
                                cells[T.ramp(j * L, 1, L)] = D[T.ramp(first + j * (panels * P * L), 1, L)]
                                Z[T.ramp(worker * L, 1, L)] = Z[T.ramp(worker * L, 1, L)] + cells[T.ramp(j * L, 1, L)] * T.broadcast(nought, L)
                            interleaved(cells)
                            for j in T.unroll(S):
                                column: T.let[T.int32] = (chunk * S + j) * L
                                place: T.let[T.int32] = ((image * M + m) * out_height + row) * out_width + column
                                if column < out_width:
                                    # Past the end of a row stands the next one, which is written later; past the last row stands another channel.
                                    if row * out_width + column + L <= out_height * out_width:
                                        Y[T.ramp(place, 1, L)] = finished_at_run_time(
                                            epilogue, cells[T.ramp((S + j) * L, 1, L)] + T.broadcast(B[m], L), L,
                                            T.broadcast(SC[m], L), T.broadcast(SH[m], L), E[T.ramp(place, 1, L)], added, lowest,
                                        )
                                    else:
                                        G[T.ramp(worker * L, 1, L)] = cells[T.ramp((S + j) * L, 1, L)]
                                        for i in range(out_width - column):
                                            Y[place + i] = finished_at_run_time(
                                                epilogue, G[worker * L + i] + B[m], 1, SC[m], SH[m], E[place + i], added, lowest,
                                            )

    return tvm.IRModule({
        name: kernel,
        transform: input_transform(lanes=L, taps=taps, reach=reach, symbol=transform),
        multiply: products(lanes=L, rows=R, vectors=P, symbol=multiply),
    })
# fmt: on
