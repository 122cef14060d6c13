"""Max pooling between sparse convolutions: in the usual layout, and of images that lie side by side in vectors."""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from tvm.script import tirx as T

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.nn.image_vectors import reference_max_pool2d
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.output import fresh_output
from sift_compiler.runtimes.tvm.workspace import scratch

_MOST = 2**31 - 1
"""The kernel counts in 32 bits."""


# fmt: off
def pool_images(*, lanes: int, vector: int, parallel: bool, name: str) -> Any:
    """[planes, H, W, lanes] → [planes, H', W', lanes], the largest of every window; what lies past the border is none of it.

    First the rows of a window become one row, then its columns one. NaN spreads. ``vector`` positions are stored at once: 1 with more
    than one lane. The function's arguments: x, y, a workspace [workers, W + 2 · padding, lanes] and a vector, workers, planes, H, W, H', W', and
    kernel, stride and padding, each down and across.
    """
    L, V = lanes, vector
    N = L * V
    loop = T.parallel if parallel else T.serial

    @T.prim_func
    def kernel(
        x: T.handle, y: T.handle, rows: T.handle, workers: T.int32, planes: T.int32, H: T.int32, W: T.int32,
        out_height: T.int32, out_width: T.int32,
        kernel_y: T.int32, kernel_x: T.int32, stride_y: T.int32, stride_x: T.int32, pad_y: T.int32, pad_x: T.int32,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2 = T.int32(), T.int32(), T.int32()
        X = T.match_buffer(x, (n0,), "float32", align=4, offset_factor=1)
        Y = T.match_buffer(y, (n1,), "float32", align=4, offset_factor=1)
        R = T.match_buffer(rows, (n2,), "float32", align=4, offset_factor=1)
        for worker in loop(workers):
            begin: T.let[T.int32] = worker * (W + 2 * pad_x) * L
            inside: T.let[T.int32] = begin + pad_x * L
            for i in range(pad_x * L):
                R[begin + i] = T.float32(-math.inf)
                R[inside + W * L + i] = T.float32(-math.inf)
            for turn in range(((worker + 1) * planes // workers - worker * planes // workers) * out_height):
                line: T.let[T.int32] = worker * planes // workers * out_height + turn
                top: T.let[T.int32] = line % out_height * stride_y - pad_y
                first: T.let[T.int32] = T.max(top, 0)
                source: T.let[T.int32] = (line // out_height * H + first) * W * L
                for i in range(W * L // N):
                    R[T.ramp(inside + i * N, 1, N)] = X[T.ramp(source + i * N, 1, N)]
                for i in range(W * L % N):
                    R[inside + W * L // N * N + i] = X[source + W * L // N * N + i]
                for dy in range(T.min(top + kernel_y, H) - first - 1):
                    for i in range(W * L // N):
                        R[T.ramp(inside + i * N, 1, N)] = _larger(
                            R[T.ramp(inside + i * N, 1, N)], X[T.ramp(source + (dy + 1) * W * L + i * N, 1, N)]
                        )
                    for i in range(W * L % N):
                        R[inside + W * L // N * N + i] = _larger(
                            R[inside + W * L // N * N + i], X[source + (dy + 1) * W * L + W * L // N * N + i]
                        )
                if L > 1:
                    for i in range(out_width):
                        Y[T.ramp((line * out_width + i) * L, 1, L)] = R[T.ramp(begin + i * stride_x * L, 1, L)]
                        for dx in range(kernel_x - 1):
                            Y[T.ramp((line * out_width + i) * L, 1, L)] = _larger(
                                Y[T.ramp((line * out_width + i) * L, 1, L)], R[T.ramp(begin + (i * stride_x + dx + 1) * L, 1, L)]
                            )
                if L == 1:
                    # The last vector begins earlier, so that it ends with the row; a row shorter than a vector goes number by number.
                    for i in range(T.if_then_else(out_width >= V, (out_width + V - 1) // V, 0)):
                        at: T.let[T.int32] = T.min(i * V, out_width - V)
                        if stride_x == 2:
                            Y[T.ramp(line * out_width + at, 1, V)] = second(R, begin + at * 2, V)
                            for dx in range(kernel_x - 1):
                                Y[T.ramp(line * out_width + at, 1, V)] = _larger(
                                    Y[T.ramp(line * out_width + at, 1, V)], second(R, begin + at * 2 + dx + 1, V)
                                )
                        else:
                            Y[T.ramp(line * out_width + at, 1, V)] = R[T.ramp(begin + at * stride_x, stride_x, V)]
                            for dx in range(kernel_x - 1):
                                Y[T.ramp(line * out_width + at, 1, V)] = _larger(
                                    Y[T.ramp(line * out_width + at, 1, V)], R[T.ramp(begin + at * stride_x + dx + 1, stride_x, V)]
                                )
                    for i in range(T.if_then_else(out_width >= V, 0, out_width)):
                        Y[line * out_width + i] = R[begin + i * stride_x]
                        for dx in range(kernel_x - 1):
                            Y[line * out_width + i] = _larger(Y[line * out_width + i], R[begin + i * stride_x + dx + 1])

    return kernel
# fmt: on


def second(row: Any, begin: Any, lanes: int) -> Any:
    """Every second of ``2 · lanes`` numbers of a buffer: two loads and a shuffle, where LLVM would load number by number."""
    halves = [row[T.ramp(begin + half * lanes, 1, lanes)] for half in (0, 1)]
    return T.Shuffle(halves, list(range(0, 2 * lanes, 2)))


def _larger(now: Any, other: Any) -> Any:
    """The larger of two vectors lane by lane, NaN if one is."""
    return T.Select(T.Or(other <= now, T.isnan(now)), now, other)


class MaxPool:
    """Max pooling in either layout; see nn.image_vectors.max_pool2d."""

    def __init__(self, cpu: CpuFacts, threads: int) -> None:
        self._cpu, self._threads = cpu, threads

    def __call__(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        """[N, C, H, W] → [N, C, H', W'], or [N / lanes, C, H, W, lanes] → [N / lanes, C, H', W', lanes], contiguous float32."""
        if x.numel() > _MOST:
            return reference_max_pool2d(x, kernel, stride, padding)
        lanes = x.shape[4] if x.dim() == 5 else 1
        code = compiled(
            pool_images,
            self._cpu.name,
            lanes=lanes,
            vector=1 if lanes > 1 else self._cpu.lanes,
            parallel=self._threads > 1,
        )
        height, width = x.shape[2:4]
        size = [(x.shape[2 + a] + 2 * padding[a] - kernel[a]) // stride[a] + 1 for a in (0, 1)]
        y = fresh_output((*x.shape[:2], *size, *x.shape[4:]))
        planes = x.shape[0] * x.shape[1]
        workers = max(1, min(self._threads, planes))
        if y.numel():
            rows = scratch("window", workers * (width + 2 * padding[1]) * lanes + self._cpu.lanes)
            code(
                x.contiguous().view(-1), y.view(-1), rows, workers, planes, height, width, *size, *kernel, *stride, *padding
            )  # fmt: skip
        return y
