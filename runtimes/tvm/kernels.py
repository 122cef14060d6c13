"""The small kernels around the sparse one: packing of the input, gathering of the values, and the yardstick of all."""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from sift_compiler.runtimes.tvm.transpose import perfect_shuffle, result_half


def gather(*, parallel: bool, dtype: str = "float32", name: str) -> Any:
    """``packed[i] = values[order[i]]``; arguments: values, order, packed, workers, count."""
    loop = T.parallel if parallel else T.serial

    @T.prim_func
    def kernel(values: T.handle, order: T.handle, packed: T.handle, workers: T.int32, count: T.int32):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        V = T.match_buffer(values, (n0,), dtype, align=4, offset_factor=1)
        F = T.match_buffer(order, (n1,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(packed, (n2,), dtype, align=4, offset_factor=1)
        for worker in loop(workers):
            for i in range((worker + 1) * count // workers - worker * count // workers):
                P[worker * count // workers + i] = V[F[worker * count // workers + i]]

    return kernel


def pack_images(*, lanes: int, parallel: bool, dtype: str = "float32", name: str) -> Any:
    """Packed input with lanes over images: NCHW → [group, channel, phases · plane, lanes], by transposing in registers.

    Arguments: x, packed position of each input position or -1 [area], packed positions that are zero, packed; then workers, groups,
    channels, area of an image, positions of a channel, number of zero positions.
    """
    loop = T.parallel if parallel else T.serial
    L = lanes
    square, half = perfect_shuffle(L, L), result_half(L)

    @T.prim_func
    def kernel(
        x: T.handle, targets: T.handle, borders: T.handle, packed: T.handle,
        workers: T.int32, groups: T.int32, channels: T.int32, area: T.int32, positions: T.int32, zeros: T.int32,
    ):  # fmt: skip
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2, n3 = T.int32(), T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), dtype, align=4, offset_factor=1)
        F = T.match_buffer(targets, (n1,), "int32", align=4, offset_factor=1)
        Z = T.match_buffer(borders, (n2,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(packed, (n3,), dtype, align=64)
        for worker in loop(workers):
            for turn in range((worker + 1) * groups * channels // workers - worker * groups * channels // workers):
                plane: T.let[T.int32] = worker * groups * channels // workers + turn
                start: T.let[T.int32] = (plane // channels * L * channels + plane % channels) * area
                for i in range(zeros):
                    P[T.ramp((plane * positions + Z[i]) * L, 1, L)] = T.broadcast(T.cast(T.float32(0), dtype), L)
                if area >= L:
                    for q in range((area + L - 1) // L):
                        cells = T.alloc_buffer((2 * L * L,), dtype, scope="local")
                        begin: T.let[T.int32] = T.min(q * L, area - L)
                        for i in T.unroll(L):
                            cells[T.ramp(i * L, 1, L)] = X[T.ramp(start + i * channels * area + begin, 1, L)]
                        square(cells)
                        for i in T.unroll(L):
                            if F[begin + i] >= 0:
                                P[T.ramp((plane * positions + F[begin + i]) * L, 1, L)] = cells[
                                    T.ramp((half * L + i) * L, 1, L)
                                ]
                else:
                    for i in range(area):
                        if F[i] >= 0:
                            P[T.ramp((plane * positions + F[i]) * L, 1, L)] = X[T.ramp(start + i, channels * area, L)]

    return kernel


def pack_space(*, parallel: bool, dtype: str = "float32", name: str) -> Any:
    """Packed input with lanes over space: NCHW → [channel, phases · plane], a plane holding all images.

    Arguments: x, what each packed position of channel 0 copies or -1 (see Packing.sources), packed; then workers, channels, area of an
    image, positions of a channel.
    """
    loop = T.parallel if parallel else T.serial

    @T.prim_func
    def kernel(
        x: T.handle, sources: T.handle, packed: T.handle,
        workers: T.int32, channels: T.int32, area: T.int32, positions: T.int32,
    ):  # fmt: skip
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), dtype, align=4, offset_factor=1)
        F = T.match_buffer(sources, (n1,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(packed, (n2,), dtype, align=64)
        for worker in loop(workers):
            for turn in range((worker + 1) * channels // workers - worker * channels // workers):
                channel: T.let[T.int32] = worker * channels // workers + turn
                for i in range(positions):
                    P[channel * positions + i] = T.if_then_else(
                        F[i] >= 0, X[F[i] + channel * area], T.cast(T.float32(0), dtype)
                    )

    return kernel


def peak(*, lanes: int, chains: int, parallel: bool, name: str) -> Any:
    """Multiply-adds in registers and nothing else: the most a core can do. Arguments: numbers [workers · chains · lanes], workers, turns."""
    loop = T.parallel if parallel else T.serial
    L = lanes

    @T.prim_func
    def kernel(numbers: T.handle, workers: T.int32, turns: T.int32):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0 = T.int32()
        X = T.match_buffer(numbers, (n0,), "float32", align=64)
        for worker in loop(workers):
            acc = T.alloc_buffer((chains * L,), "float32", scope="local")
            for u in T.unroll(chains):
                acc[T.ramp(u * L, 1, L)] = X[T.ramp((worker * chains + u) * L, 1, L)]
            factor = T.alloc_buffer((L,), "float32", scope="local")
            factor[T.ramp(0, 1, L)] = X[T.ramp(worker * chains * L, 1, L)]
            for _ in range(turns):
                for u in T.unroll(chains):
                    acc[T.ramp(u * L, 1, L)] = (
                        acc[T.ramp(u * L, 1, L)] * factor[T.ramp(0, 1, L)] + factor[T.ramp(0, 1, L)]
                    )
            for u in T.unroll(chains):
                X[T.ramp((worker * chains + u) * L, 1, L)] = acc[T.ramp(u * L, 1, L)]

    return kernel
