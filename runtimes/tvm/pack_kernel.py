"""The packer of masks in machine code: what lowering.program.pack does in NumPy, in a tenth of the time.

Three passes over the kept weights, none of which touches memory at random beyond the second-level cache:

1. bring the weights to their group of R rows (a counting sort);
2. group by group, drop them into a table [column, row of the group], mark its columns in a bit set, and walk the marks: that yields
   columns in order with their patterns, and counts the buckets;
3. with the buckets' beginnings known, write the stream and the order of the values.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from sift_compiler.lowering.program import END, SKIP

MARKS = 32
"""Columns marked in one 64-bit word: TVM reckons without wrap-around, so neither the sign nor a carry into it is used."""


# fmt: off
def pack_mask(*, rows: int, name: str) -> Any:
    """The TIR function for groups of ``rows`` (R) output rows, P = 2^R - 1 patterns, and S columns (input channels · taps).

    Arguments, int32 unless said otherwise, in order. Read: index [nnz], first column of each output row [M], offset in the window and block of each
    column [S]. Scratch: ends of groups [2 · groups + 1], positions in a group's table and slots [nnz], marks [ceil(S / MARKS)], int64, and patterns [S], both zero
    before and after, cells [S · R], columns and sorted slots [nnz + R], beginnings of buckets in the stream and in the values [blocks · groups · P].
    Written: stream [columns + buckets], block_column, block_value [blocks · segments], order [nnz + R], of which R are spare. Then the integers nnz, M, S,
    groups, blocks, segments, and as float64 the inverse of the columns that one output row can read.
    """
    R, NP, W = rows, (1 << rows) - 1, MARKS

    @T.macro
    def to_groups(IX, FR, G, K, SL, nnz, groups, width, inverse):
        for g in range(groups + 1):
            G[g] = 0
        for i in range(nnz):
            if IX[i] >= 0:
                # Exact: a float64 holds 53 bits, and the half keeps the quotient away from whole numbers.
                G[T.truncdiv(T.Cast("int32", (T.Cast("float64", IX[i]) + 0.5) * inverse), R) + 1] += 1
        for g in range(groups):
            G[g + 1] += G[g]
        for i in range(nnz):
            if IX[i] >= 0:
                row: T.int32 = T.Cast("int32", (T.Cast("float64", IX[i]) + 0.5) * inverse)
                group: T.int32 = T.truncdiv(row, R)
                at: T.int32 = G[group]
                K[at] = (IX[i] - row * width + FR[row]) * R + (row - group * R)
                SL[at] = i
                G[group] = at + 1

    @T.macro
    def to_columns(first, last, g, K, SL, BM, PT, CE, CO, SO, BC, OB, done, S, groups):
        for i in range(last - first):
            key: T.int32 = K[first + i]
            column: T.int32 = T.truncdiv(key, R)
            word: T.int32 = T.truncdiv(column, W)
            CE[key] = SL[first + i]
            PT[column] = PT[column] | (1 << (key - column * R))
            BM[word] = BM[word] | (T.int64(1) << T.Cast("int64", column - word * W))
        for word in range((S + W - 1) // W):
            marks: T.int64 = BM[word]
            BM[word] = T.int64(0)
            while marks > T.int64(0):
                c: T.int32 = word * W + T.Cast("int32", T.popcount((marks & -marks) - T.int64(1)))
                marks = marks & (marks - T.int64(1))
                p: T.int32 = PT[c]
                CO[done[0]] = c * (NP + 1) + p
                done[0] = done[0] + 1
                BC[(OB[c] * groups + g) * NP + p - 1] += 1
                # What is not kept is overwritten by the next: no branch to miss.
                for r in T.unroll(R):
                    SO[done[1]] = CE[c * R + r]
                    done[1] = done[1] + ((p >> r) & 1)
                PT[c] = 0

    @T.macro
    def to_buckets(BC, BV, F, FC, FV, groups, blocks, segments):
        done = T.alloc_buffer((3,), "int32", scope="local")
        done[0] = 0
        done[1] = 0
        for b, s in T.grid(blocks, segments):
            FC[b * segments + s] = done[0]
            FV[b * segments + s] = done[1]
            for g in range((s + 1) * groups // segments - s * groups // segments):
                done[2] = done[0]
                for p in T.unroll(NP):
                    bucket: T.int32 = (b * groups + s * groups // segments + g) * NP + p
                    count: T.int32 = BC[bucket]
                    BC[bucket] = done[0]
                    BV[bucket] = done[1]
                    F[done[0] + count] = END
                    if p > 0 and p == NP - 1 and done[0] == done[2] + NP - 1:
                        F[done[2]] = SKIP
                    done[0] = done[0] + count + 1
                    done[1] = done[1] + count * T.popcount(p + 1)

    @T.macro
    def to_stream(first, last, g, CO, SO, OF, OB, BC, BV, F, OR, taken, groups):
        for i in range(last - first):
            c: T.int32 = CO[first + i] // (NP + 1)
            p: T.int32 = CO[first + i] % (NP + 1)
            bucket: T.int32 = (OB[c] * groups + g) * NP + p - 1
            at: T.int32 = BC[bucket]
            F[at] = OF[c]
            BC[bucket] = at + 1
            v: T.int32 = BV[bucket]
            for r in T.unroll(R):
                OR[v + r] = T.Select(r < T.popcount(p), SO[taken[0] + r], OR[v + r])
            BV[bucket] = v + T.popcount(p)
            taken[0] = taken[0] + T.popcount(p)

    @T.prim_func
    def kernel(
        index: T.handle, first_column: T.handle, offset: T.handle, block: T.handle,
        group_end: T.handle, key: T.handle, slot: T.handle, marks: T.handle, pattern: T.handle, cell: T.handle,
        column: T.handle, ordered: T.handle, bucket_column: T.handle, bucket_value: T.handle,
        stream: T.handle, block_column: T.handle, block_value: T.handle, order: T.handle,
        nnz: T.int32, width: T.int32, S: T.int32, groups: T.int32, blocks: T.int32, segments: T.int32, inverse: T.float64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2, n3, n4, n5, n6 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n7, n8, n9, n10, n11, n12, n13 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n14, n15, n16, n17 = T.int32(), T.int32(), T.int32(), T.int32()
        IX = T.match_buffer(index, (n0,), "int32", align=4, offset_factor=1)
        FR = T.match_buffer(first_column, (n1,), "int32", align=4, offset_factor=1)
        OF = T.match_buffer(offset, (n2,), "int32", align=4, offset_factor=1)
        OB = T.match_buffer(block, (n3,), "int32", align=4, offset_factor=1)
        G = T.match_buffer(group_end, (n4,), "int32", align=4, offset_factor=1)
        K = T.match_buffer(key, (n5,), "int32", align=4, offset_factor=1)
        SL = T.match_buffer(slot, (n6,), "int32", align=4, offset_factor=1)
        BM = T.match_buffer(marks, (n7,), "int64", align=8, offset_factor=1)
        PT = T.match_buffer(pattern, (n8,), "int32", align=4, offset_factor=1)
        CE = T.match_buffer(cell, (n9,), "int32", align=4, offset_factor=1)
        CO = T.match_buffer(column, (n10,), "int32", align=4, offset_factor=1)
        SO = T.match_buffer(ordered, (n11,), "int32", align=4, offset_factor=1)
        BC = T.match_buffer(bucket_column, (n12,), "int32", align=4, offset_factor=1)
        BV = T.match_buffer(bucket_value, (n13,), "int32", align=4, offset_factor=1)
        F = T.match_buffer(stream, (n14,), "int32", align=4, offset_factor=1)
        FC = T.match_buffer(block_column, (n15,), "int32", align=4, offset_factor=1)
        FV = T.match_buffer(block_value, (n16,), "int32", align=4, offset_factor=1)
        OR = T.match_buffer(order, (n17,), "int32", align=4, offset_factor=1)
        to_groups(IX, FR, G, K, SL, nnz, groups, width, inverse)
        for bucket in range(blocks * groups * NP):
            BC[bucket] = 0
        done = T.alloc_buffer((2,), "int32", scope="local")
        done[0] = 0
        done[1] = 0
        for g in range(groups):
            first: T.int32 = T.if_then_else(g > 0, G[g - 1], 0)
            last: T.int32 = G[g]
            to_columns(first, last, g, K, SL, BM, PT, CE, CO, SO, BC, OB, done, S, groups)
            G[groups + 1 + g] = done[0]
        to_buckets(BC, BV, F, FC, FV, groups, blocks, segments)
        done[0] = 0
        for g in range(groups):
            begin: T.int32 = T.if_then_else(g > 0, G[groups + g], 0)
            end: T.int32 = G[groups + 1 + g]
            to_stream(begin, end, g, CO, SO, OF, OB, BC, BV, F, OR, done, groups)

    return kernel
# fmt: on
