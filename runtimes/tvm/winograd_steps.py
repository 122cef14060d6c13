"""The steps of Winograd's convolution as functions of their own (see subroutines): transform of the input, products, transform of the sums."""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def, valid-type"
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.script import tirx as T

from sift_compiler.lowering.winograd import Matrix, transforms
from sift_compiler.runtimes.tvm.registers import IN_REGISTERS, registers
from sift_compiler.runtimes.tvm.subroutines import SUBROUTINE

_MOST = 2**31 - 1


def combination(coefficients: Sequence[float], terms: Sequence[Any], splat: Callable[[float], Any]) -> Any:
    """The expression Σ coefficient · term. Additions and subtractions come first: what follows are multiply-adds.

    Args:
        coefficients: numbers, not all 0.
        terms: expressions, as many.
        splat: a number as an expression of the terms' type.
    """
    ranked = sorted(
        (pair for pair in zip(coefficients, terms, strict=True) if pair[0]),
        key=lambda pair: (pair[0] != 1, abs(pair[0]) != 1),
    )
    first, made = ranked[0]
    made = made if first == 1 else splat(first) * made
    for coefficient, term in ranked[1:]:
        made = (
            made + term if coefficient == 1 else made - term if coefficient == -1 else made + splat(coefficient) * term
        )
    return made


def _applied(matrix: Matrix, terms: Sequence[Any], lanes: int) -> list[Any]:
    """The expressions Σ matrix[i][j] terms[j]."""
    return [combination(row, terms, lambda number: T.broadcast(T.float32(number), lanes)) for row in matrix]


def _vector(place: Any, lanes: int) -> Any:
    return T.ramp(place, 1, lanes)


# fmt: off
def input_transform(*, lanes: int, taps: int, reach: int, symbol: str) -> Any:
    """The TIR function ``(x, down, next_down, across, next_across, v, step)``: Bᵀ d B of the inputs d [n, n] of a tile, n = ``reach``.

    Vector (i, j) of d begins at ``x[i % m · down + i // m · next_down + j % m · across + j // m · next_across]``, vector (i, j) of the
    result at ``v[(n i + j) · step]``.

    Args:
        lanes: float32 lanes of a vector.
        taps, reach: see winograd.transforms; m = reach - taps + 1.
        symbol: what the function is called.
    """
    L, N, size, matrix = lanes, reach, reach - taps + 1, transforms(taps, reach).input

    def columns(X: Any, d: Any, down: Any, next_down: Any, across: Any, next_across: Any) -> None:
        for j in range(N):
            place = j % size * across + j // size * next_across
            column = [X[_vector(i % size * down + i // size * next_down + place, L)] for i in range(N)]
            for i, made in enumerate(_applied(matrix, column, L)):
                T.buffer_store(d, made, [_vector((i * N + j) * L, L)])

    def rows(d: Any, V: Any, step: Any) -> None:
        for i in range(N):
            row = [d[_vector((i * N + j) * L, L)] for j in range(N)]
            for j, made in enumerate(_applied(matrix, row, L)):
                T.buffer_store(V, made, [_vector((i * N + j) * step, L)])

    @T.prim_func
    def transform(
        x: T.handle("float32"), down: T.int32, next_down: T.int32, across: T.int32, next_across: T.int32, v: T.handle("float32"), step: T.int32,
    ):
        T.func_attr({"tirx.noalias": True, IN_REGISTERS: True, SUBROUTINE: symbol})
        X = T.decl_buffer((_MOST,), "float32", data=x)
        V = T.decl_buffer((_MOST,), "float32", data=v)
        d = registers(N * N * L)
        columns(X, d, down, next_down, across, next_across)
        rows(d, V, step)

    return transform.without_attr("global_symbol")


def products(*, lanes: int, rows: int, vectors: int, symbol: str) -> Any:
    """The TIR function ``(u, v, m, channels, blocks, step)``: for each of ``blocks`` blocks b of output channels

        m[b · step + (r · vectors + p) · lanes] = Σ_c u[(b · channels + c) · rows + r] v[(c · vectors + p) · lanes]

    with all sums of a block in registers.

    Args:
        lanes: float32 lanes of a vector.
        rows: output channels of a block.
        vectors: p.
        symbol: what the function is called.
    """
    L, R, P = lanes, rows, vectors

    @T.prim_func
    def multiply(
        u: T.handle("float32"), v: T.handle("float32"), m: T.handle("float32"), channels: T.int32, blocks: T.int32, step: T.int32,
    ):
        T.func_attr({"tirx.noalias": True, IN_REGISTERS: True, SUBROUTINE: symbol})
        U = T.decl_buffer((_MOST,), "float32", data=u)
        V = T.decl_buffer((_MOST,), "float32", data=v)
        M = T.decl_buffer((_MOST,), "float32", data=m)
        for b in range(blocks):
            acc = registers(R * P * L)
            for s in T.unroll(R * P):
                acc[T.ramp(s * L, 1, L)] = T.broadcast(T.float32(0), L)
            for c in range(channels):
                for r in T.unroll(R):
                    for p in T.unroll(P):
                        acc[T.ramp((r * P + p) * L, 1, L)] = (
                            acc[T.ramp((r * P + p) * L, 1, L)]
                            + T.broadcast(U[(b * channels + c) * R + r], L) * V[T.ramp((c * P + p) * L, 1, L)]
                        )
            for s in T.unroll(R * P):
                M[T.ramp(b * step + s * L, 1, L)] = acc[T.ramp(s * L, 1, L)]

    return multiply.without_attr("global_symbol")


def transform_back(
    M: Any, begin: Any, step: Any, scratch: Any, Y: Any, target: Any, apart: Any, lanes: int, taps: int, reach: int
) -> None:
    """Write the statements of Aᵀ M A into the TIR function that is being written.

    No function of its own: LLVM would put one so small into its caller, and then takes for granted that buffers of different names lie
    apart.

    Args:
        M: a buffer; vector (i, j) of a tile's sums begins at ``begin + (n i + j) · step``, n = ``reach``.
        begin, step: int32 expressions.
        scratch: a local buffer of m · n vectors.
        Y: the buffer of the result; vector (i, j) begins at ``target + (m i + j) · apart``.
        target, apart: int32 expressions.
        lanes: float32 lanes of a vector.
        taps, reach: see winograd.transforms; m = reach - taps + 1.
    """
    L, N, size, matrix = lanes, reach, reach - taps + 1, transforms(taps, reach).output
    for j in range(N):
        column = [M[_vector(begin + (i * N + j) * step, L)] for i in range(N)]
        for i, made in enumerate(_applied(matrix, column, L)):
            T.buffer_store(scratch, made, [_vector((i * N + j) * L, L)])
    for i in range(size):
        row = [scratch[_vector((i * N + j) * L, L)] for j in range(N)]
        for j, made in enumerate(_applied(matrix, row, L)):
            T.buffer_store(Y, made, [_vector(target + (i * size + j) * apart, L)])
# fmt: on
