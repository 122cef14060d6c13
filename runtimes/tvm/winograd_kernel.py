"""Winograd's convolution with images side by side in vectors, and the transform of its weights; see lowering.winograd."""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

import tvm
from tvm.script import tirx as T

from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.winograd import transforms
from sift_compiler.runtimes.tvm.epilogue import finished_at_run_time
from sift_compiler.runtimes.tvm.registers import IN_REGISTERS, registers
from sift_compiler.runtimes.tvm.streaming import STREAM, STREAMED, streaming
from sift_compiler.runtimes.tvm.winograd_steps import combination, input_transform, products, transform_back


# fmt: off
def winograd_weights(*, rows: int, taps: int, reach: int, parallel: bool, name: str) -> Any:
    """The TIR function that transforms weights: ``u[ξ, block, c, row] = (G g Gᵀ)[ξ]`` of output channel block · rows + row, in float64.

    Arguments: values; slots int32 [M · C · r²], which value stands at an entry of the dense weight, or -1; u
    [n², blocks of rows, C, rows], n = ``reach``; then workers, M, C, blocks.
    """
    loop = T.parallel if parallel else T.serial
    R, N, TAPS, matrix = rows, reach, taps, transforms(taps, reach).weight

    def number(value: float) -> Any:
        return T.float64(value)

    def read(V: Any, F: Any, g: Any, place: Any, inside: Any) -> None:
        for tap in range(TAPS * TAPS):
            slot = F[T.if_then_else(inside, place, 0) + tap]
            T.buffer_store(g, T.if_then_else(T.And(inside, slot >= 0), T.cast(V[T.max(slot, 0)], "float64"), number(0)), [tap])

    def down(g: Any, d: Any) -> None:
        for i in range(N):
            for j in range(TAPS):
                T.buffer_store(d, combination(matrix[i], [g[a * TAPS + j] for a in range(TAPS)], number), [i * TAPS + j])

    def across(d: Any, U: Any, place: Any, step: Any) -> None:
        for i in range(N):
            for j in range(N):
                made = combination(matrix[j], [d[i * TAPS + a] for a in range(TAPS)], number)
                T.buffer_store(U, T.cast(made, "float32"), [place + T.cast((i * N + j) * step, "int64")])

    @T.prim_func
    def kernel(values: T.handle, slots: T.handle, u: T.handle, workers: T.int32, M: T.int32, C: T.int32, blocks: T.int32):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        V = T.match_buffer(values, (n0,), "float32", align=4, offset_factor=1)
        F = T.match_buffer(slots, (n1,), "int32", align=4, offset_factor=1)
        U = T.match_buffer(u, (n2,), "float32", align=64)
        for worker in loop(workers):
            for turn in range((worker + 1) * blocks // workers - worker * blocks // workers):
                for c in range(C):
                    for r in range(R):
                        g = registers(TAPS * TAPS, "float64")
                        d = registers(N * TAPS, "float64")
                        block: T.let[T.int32] = worker * blocks // workers + turn
                        read(V, F, g, ((block * R + r) * C + c) * (TAPS * TAPS), block * R + r < M)
                        down(g, d)
                        across(d, U, T.cast((block * C + c) * R + r, "int64"), blocks * C * R)

    return kernel


def winograd_lanes(
    *, lanes: int, rows: int, vectors: int, taps: int, reach: int, parallel: bool, epilogue: Epilogue, past_caches: bool = False, name: str,
) -> Any:
    """The TIR function of Winograd's convolution on images side by side, tiles of m × m outputs, ``vectors`` of them at a time.

    m is reach - taps + 1, and n stands for ``reach``. C counts the channels of the layer as one of stride 1 (see winograd.Form); X holds C / stride² of them.

    The function's arguments, in order: input X [groups of images, C, H, W, lanes]; u (see :func:`winograd_weights`); bias, scale and shift
    [M] and residual, as those of lane_kernel; output Y [groups of images, M, H', W', lanes]; workspaces of every worker: transformed inputs
    [n², C, vectors, lanes], sums [blocks at once, n², rows, vectors, lanes], one tile [n², lanes], and what tells of
    infinities and NaN: [lanes], zeros before, anything else afterwards if an output is not finite before its residual is added. Then integers: what computes
    where (``workers``, panels of ``vectors`` tiles in all), sizes, and how many blocks of rows are summed before they are transformed back;
    last a 0 that the compiler does not know, or it would take 0 · x for 0.
    """
    L, R, P, S, N = lanes, rows, vectors, reach - taps + 1, reach
    loop = T.parallel if parallel else T.serial
    transform, multiply, stores = f"{name}_input", f"{name}_products", streaming(lanes)

    @T.prim_func
    def kernel(
        x: T.handle, u: T.handle, bias: T.handle, scale: T.handle, shift: T.handle, residual: T.handle, y: T.handle,
        transformed: T.handle, sums: T.handle, one: T.handle, strange: T.handle,
        workers: T.int32, panels: T.int32, tiles_down: T.int32, tiles_across: T.int32, stride: T.int32, C: T.int32, H: T.int32, W: T.int32,
        pad_y: T.int32, pad_x: T.int32, M: T.int32, out_height: T.int32, out_width: T.int32, blocks: T.int32, at_once: T.int32,
        added: T.int32, lowest: T.float32, nought: T.float32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True, IN_REGISTERS: True})
        n0, n1, n2, n3, n4, n5 = T.int32(), T.int64(), T.int32(), T.int32(), T.int32(), T.int32()
        n6, n7, n8, n9, n10 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=64)
        U = T.match_buffer(u, (n1,), "float32", align=64)
        B = T.match_buffer(bias, (n2,), "float32", align=4, offset_factor=1)
        SC = T.match_buffer(scale, (n3,), "float32", align=4, offset_factor=1)
        SH = T.match_buffer(shift, (n4,), "float32", align=4, offset_factor=1)
        E = T.match_buffer(residual, (n5,), "float32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n6,), "float32", align=64)
        V = T.match_buffer(transformed, (n7,), "float32", align=64)
        Q = T.match_buffer(sums, (n8,), "float32", align=64)
        G = T.match_buffer(one, (n9,), "float32", align=64)
        Z = T.match_buffer(strange, (n10,), "float32", align=64)
        T.attr(0, "pragma_import_llvm", stores)
        for worker in loop(workers):
            v0: T.let[T.int32] = worker * (N * N * C * P * L)
            q0: T.let[T.int32] = worker * (at_once * N * N * R * P * L)
            o0: T.let[T.int32] = worker * (N * N * L)
            for turn in range((worker + 1) * panels // workers - worker * panels // workers):
                panel: T.let[T.int32] = worker * panels // workers + turn
                of_image: T.let[T.int32] = (tiles_down * tiles_across + P - 1) // P
                image: T.let[T.int32] = panel // of_image
                first: T.let[T.int32] = panel % of_image * P
                for c in range(C):
                    for p in range(P):
                        tile: T.let[T.int32] = T.min(first + p, tiles_down * tiles_across - 1)
                        phase: T.let[T.int32] = c % (stride * stride)
                        top: T.let[T.int32] = tile // tiles_across * S * stride + phase // stride - pad_y
                        left: T.let[T.int32] = tile % tiles_across * S * stride + phase % stride - pad_x
                        plane: T.let[T.int32] = (image * C + c) // (stride * stride) * H * W
                        if top >= 0 and left >= 0 and top + (N - 1) * stride < H and left + (N - 1) * stride < W:
                            T.evaluate(T.call_extern(
                                "void", transform, T.address_of(X[(plane + top * W + left) * L]),
                                stride * W * L, S * stride * W * L, stride * L, S * stride * L,
                                T.address_of(V[v0 + (c * P + p) * L]), C * P * L,
                            ))
                        else:
                            for i, j in T.grid(N, N):
                                G[T.ramp(o0 + (i * N + j) * L, 1, L)] = T.if_then_else(
                                    T.And(
                                        T.And(top + i * stride >= 0, top + i * stride < H),
                                        T.And(left + j * stride >= 0, left + j * stride < W),
                                    ),
                                    X[T.ramp((plane + (top + i * stride) * W + left + j * stride) * L, 1, L)], T.broadcast(T.float32(0), L),
                                )
                            T.evaluate(T.call_extern(
                                "void", transform, T.address_of(G[o0]), N * L, S * N * L, L, S * L,
                                T.address_of(V[v0 + (c * P + p) * L]), C * P * L,
                            ))
                for part in range((blocks + at_once - 1) // at_once):
                    count: T.let[T.int32] = T.min(at_once, blocks - part * at_once)
                    for xi in range(N * N):
                        T.evaluate(T.call_extern(
                            "void", multiply, T.address_of(U[T.cast(xi * blocks + part * at_once, "int64") * T.cast(C * R, "int64")]),
                            T.address_of(V[v0 + xi * (C * P * L)]), T.address_of(Q[q0 + xi * (R * P * L)]), C, count, N * N * R * P * L,
                        ))
                    for k, p in T.grid(T.min(count * R, M - part * at_once * R), T.min(P, tiles_down * tiles_across - first)):
                        m: T.let[T.int32] = part * at_once * R + k
                        down: T.let[T.int32] = (first + p) // tiles_across * S
                        right: T.let[T.int32] = (first + p) % tiles_across * S
                        back = registers(S * N * L)
                        transform_back(Q, q0 + ((k // R * N * N * R + k % R) * P + p) * L, R * P * L, back, G, o0, L, L, taps, reach)
                        for i, j in T.grid(T.min(S, out_height - down), T.min(S, out_width - right)):
                            place: T.let[T.int32] = (((image * M + m) * out_height + down + i) * out_width + right + j) * L
                            Z[T.ramp(worker * L, 1, L)] = (
                                Z[T.ramp(worker * L, 1, L)] + G[T.ramp(o0 + (i * S + j) * L, 1, L)] * T.broadcast(nought, L)
                            )
                            if past_caches:
                                T.evaluate(T.call_extern("void", STREAM, T.address_of(Y[place]), finished_at_run_time(
                                    epilogue, G[T.ramp(o0 + (i * S + j) * L, 1, L)] + T.broadcast(B[m], L), L,
                                    T.broadcast(SC[m], L), T.broadcast(SH[m], L), E[T.ramp(place, 1, L)], added, lowest,
                                )))
                            else:
                                Y[T.ramp(place, 1, L)] = finished_at_run_time(
                                    epilogue, G[T.ramp(o0 + (i * S + j) * L, 1, L)] + T.broadcast(B[m], L), L,
                                    T.broadcast(SC[m], L), T.broadcast(SH[m], L), E[T.ramp(place, 1, L)], added, lowest,
                                )
            if past_caches:
                T.evaluate(T.call_extern("void", STREAMED))

    return tvm.IRModule({
        name: kernel,
        transform: input_transform(lanes=L, taps=taps, reach=reach, symbol=transform),
        multiply: products(lanes=L, rows=R, vectors=P, symbol=multiply),
    })
# fmt: on
