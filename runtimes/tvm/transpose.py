"""Transposition of a block of vectors in registers, as TIR statements to be used inside kernels."""

# ruff: noqa: N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def interleave(lanes: int) -> tuple[list[int], list[int]]:
    """Shuffle masks that interleave two vectors: a0 b0 a1 b1 …, lower and upper half."""
    pairs = [index for k in range(lanes) for index in (k, lanes + k)]
    return pairs[:lanes], pairs[lanes:]


def perfect_shuffle(lanes: int, count: int) -> Any:
    """A TIR macro ``(block)``: log2(count) rounds of interleaving vector i with vector i + count/2.

    ``block`` is a local buffer of 2 · count vectors. Vectors 0 … count - 1 hold the rows of a [count, lanes] matrix; afterwards the same
    numbers lie as [lanes, count] in row-major order, in half ``rounds % 2`` of the block (see :func:`result_half`). Every round uses the
    same two masks, which is what makes the loop possible.
    """
    L, N, rounds = lanes, count, count.bit_length() - 1
    low, high = interleave(lanes)

    @T.macro
    def rounds_of_interleaving(block):
        for s in T.unroll(rounds):
            for i in T.unroll(N // 2):
                block[T.ramp(((s + 1) % 2 * N + 2 * i) * L, 1, L)] = T.Shuffle(
                    [block[T.ramp((s % 2 * N + i) * L, 1, L)], block[T.ramp((s % 2 * N + i + N // 2) * L, 1, L)]], low
                )
                block[T.ramp(((s + 1) % 2 * N + 2 * i + 1) * L, 1, L)] = T.Shuffle(
                    [block[T.ramp((s % 2 * N + i) * L, 1, L)], block[T.ramp((s % 2 * N + i + N // 2) * L, 1, L)]], high
                )

    return rounds_of_interleaving


def result_half(count: int) -> int:
    """Which half of the block holds the result of :func:`perfect_shuffle`."""
    return (count.bit_length() - 1) % 2


def lane_sums(lanes: int) -> Any:
    """A TIR macro ``(block)``: the sums of the lanes of ``lanes`` vectors, in lanes - 1 additions and twice as many shuffles.

    ``block`` is a local buffer of 2 · lanes vectors, laid out as a binary heap: vector lanes + i holds what :func:`leaf` names, and
    afterwards lane e of vector 1 is the sum of the lanes of vector number e. Two vectors become one by interleaving them and adding the
    halves, so lanes of the one alternate with lanes of the other, level by level.
    """
    L = lanes
    low, high = interleave(lanes)

    @T.macro
    def add_up(block):
        for i in T.unroll(L - 1):
            block[T.ramp((L - 1 - i) * L, 1, L)] = T.Shuffle(
                [block[T.ramp((2 * (L - 1 - i)) * L, 1, L)], block[T.ramp((2 * (L - 1 - i) + 1) * L, 1, L)]], low
            ) + T.Shuffle(
                [block[T.ramp((2 * (L - 1 - i)) * L, 1, L)], block[T.ramp((2 * (L - 1 - i) + 1) * L, 1, L)]], high
            )

    return add_up


def leaf(position: Any, lanes: int) -> Any:
    """Which vector belongs on leaf ``position`` of :func:`lane_sums`: the position with its bits reversed."""
    bits = lanes.bit_length() - 1
    return sum((((position >> b) & 1) << (bits - 1 - b) for b in range(bits)), 0)
