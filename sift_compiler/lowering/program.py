"""The program of a mask: the same kept weights, ordered for a kernel that computes R output rows at once.

Output rows are taken R at a time (a *group*), input channels ``tile.channels`` at a time (a *block*). A *column* is one (channel,
tap) of a block in which at least one row of the group keeps a weight; which rows do is the column's *pattern*, a bit mask of
1 … 2^R - 1. Columns are bucketed by (block, group, pattern), so the kernel runs one small loop per pattern, with the rows of the
pattern unrolled: one load of x serves every kept row, and the mask is data, never code.

Backend-neutral and pure: NumPy in, NumPy out; the order of ``index`` carries no meaning. A runtime may pack with code of its own, as
runtimes.tvm does; this is what it must equal.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sift_compiler.lowering.specification import LayerSpec

Int32 = npt.NDArray[np.int32]

END = -1
"""Closes a bucket in the stream; offsets are never negative."""
SKIP = -2
"""Closes the first bucket of a group in which no column has but some of the rows: all buckets but the last are empty. A kernel may go on to
the last one at once, or take it for ``END``. Blocks of R rows are such masks, and dense rows."""


@dataclass(frozen=True)
class Program:
    """A mask as data.

    Attributes:
        stream: int32 [columns + buckets]; for each block, group and pattern in turn the columns of that bucket, closed by ``END`` or ``SKIP``. A
            column is where its input begins in the block's window, in float32 numbers. The columns take their values in the order
            of the stream, one per row of the pattern, rows ascending.
        block_column: int32 [blocks · segments], where each segment of a block begins in the stream: segment s of S has the groups from
            ``s · groups // S`` on, for workers that share a tile.
        block_value: int32 [blocks · segments], where each begins in the packed values.
        order: int32 [nnz]; ``packed_values = values[order]``.
        groups: ceil(out channels / rows).
        blocks: ceil(in channels / block channels).
    """

    stream: Int32
    block_column: Int32
    block_value: Int32
    order: Int32
    groups: int
    blocks: int


def _ordered(keys: npt.NDArray[np.integer[Any]], size: int) -> tuple[npt.NDArray[np.integer[Any]], Int32]:
    """Sort distinct ``keys`` below ``size``: sorted keys, and where each was. A table beats a sort unless it is mostly empty."""
    if size > 64 * max(1, keys.size):
        order = np.argsort(keys, kind="stable").astype(np.int32)
        return keys[order], order
    table = np.zeros(size, np.int32)
    table[keys] = np.arange(1, keys.size + 1, dtype=np.int32)
    present = np.flatnonzero(table)
    return present.astype(np.int32), table[present] - 1


def _keys(index: Int32, spec: LayerSpec, rows: int, channels: int, taps: int) -> npt.NDArray[np.integer[Any]]:
    """Position of every kept weight in [block, group, channel of the block, tap, row of the group], flattened."""
    per_group_out = spec.out_channels // spec.groups
    per_group_in = spec.weight_shape[1]
    row, rest = np.divmod(index, np.int32(per_group_in * taps))
    if spec.groups > 1:
        rest = rest + (row // np.int32(per_group_out)) * np.int32(per_group_in * taps)
    block, column = np.divmod(rest, np.int32(channels * taps))
    group, lane = np.divmod(row, np.int32(rows))
    groups = -(-spec.out_channels // rows)
    keys = ((block.astype(np.int64) * groups + group) * (channels * taps) + column) * rows + lane
    return keys if keys.size and int(keys.max()) > np.iinfo(np.int32).max else keys.astype(np.int32)


def pack(
    index: Int32, spec: LayerSpec, rows: int, channels: int, offsets: Int32, channel_stride: int, segments: int = 1
) -> Program:
    """Pack a mask.

    Args:
        index: int32 [nnz], distinct flat positions in the dense weight, in any order; a negative one is not in the mask.
        spec: the layer.
        rows: R, 1 … 6.
        channels: input channels of a block.
        offsets: int32 [taps], where a tap begins in the window of one channel, in float32.
        channel_stride: float32 numbers of one channel in a window.
        segments: parts of a block that have a beginning of their own.
    """
    kept = np.flatnonzero(index >= 0)
    if kept.size < index.size:
        program = pack(index[kept], spec, rows, channels, offsets, channel_stride, segments)
        # As long as the values, as ever; no bucket reaches what is beyond the kept ones.
        order = np.zeros(index.size, np.int32)
        order[: kept.size] = kept[program.order]
        return dataclasses.replace(program, order=order)
    taps = offsets.size
    groups, blocks = -(-spec.out_channels // rows), -(-spec.in_channels // channels)
    patterns = (1 << rows) - 1
    span = channels * taps
    keys, slots = _ordered(_keys(index, spec, rows, channels, taps), blocks * groups * span * rows)

    column_of, lane = np.divmod(keys, keys.dtype.type(rows))
    first = (
        np.flatnonzero(np.concatenate(([True], column_of[1:] != column_of[:-1]))) if keys.size else np.zeros(0, np.intp)
    )
    bits = (np.uint8(1) << lane.astype(np.uint8)).astype(np.uint8)
    pattern = np.bitwise_or.reduceat(bits, first) if keys.size else bits
    part, column = np.divmod(column_of[first], keys.dtype.type(span))
    counts = np.bincount(part * patterns + (pattern - 1), minlength=blocks * groups * patterns)
    rows_in = np.array([bin(p).count("1") for p in range(1, patterns + 1)])
    buckets = counts.size
    column_start = np.cumsum(counts) - counts + np.arange(buckets)
    values_in = counts * np.tile(rows_in, blocks * groups)
    value_start = np.cumsum(values_in) - values_in
    where = offsets[np.arange(span) % taps] + (np.arange(span) // taps) * channel_stride
    where = where.astype(np.int32)[column]

    stream, order = np.full(first.size + buckets, END, np.int32), np.empty(keys.size, np.int32)
    for p in range(1, patterns + 1):
        chosen = np.flatnonzero(pattern == p)
        bucket = part[chosen] * patterns + (p - 1)
        before = np.cumsum(counts[p - 1 :: patterns]) - counts[p - 1 :: patterns]
        rank = np.arange(chosen.size) - before[part[chosen]]
        stream[column_start[bucket] + rank] = where[chosen]
        target = value_start[bucket] + rank * rows_in[p - 1]
        for lane_in in range(rows_in[p - 1]):
            order[target + lane_in] = slots[first[chosen] + lane_in]
    begins = np.arange(blocks)[:, None] * groups + np.arange(segments) * groups // segments
    if patterns > 1:
        first_of, some = column_start[::patterns], counts.reshape(-1, patterns)[:, :-1].any(1)
        stream[first_of[~some]] = SKIP
    block_column, block_value = (a[begins.ravel() * patterns].astype(np.int32) for a in (column_start, value_start))
    return Program(stream, block_column, block_value, order, groups, blocks)
