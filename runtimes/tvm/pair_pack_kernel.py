"""The packer of pair programs in machine code: what lowering.pair_program.pack_pairs does in Python.

Kept weights are brought to their rows by a counting sort and every row becomes a set of bits, so that what two rows have in common is counted
word by word, and walking the bits yields features in order.
"""

# The annotations of a TIR function are values, evaluated in the enclosing function.
# ruff: noqa: N803, N806
# mypy: disable-error-code="untyped-decorator, no-untyped-def"
from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

from sift_compiler.lowering.pair_program import FIELDS, PARTNERS

MARKS = 32
"""Features marked in one 64-bit word: TVM reckons without wrap-around, so neither the sign nor a carry into it is used."""


# fmt: off
def pack_mask_in_pairs(*, name: str) -> Any:
    """The TIR function.

    Arguments, int32 unless said otherwise, in order. Read: index [nnz], place of each feature in a row's bits [K]: bits of a block begin with a word, and a
    block has ``words``. Scratch: ends of rows [M + 1], places and slots [nnz], slots by place [blocks · words · MARKS], bits [(M + 1) · blocks · words],
    int64, zero before, slots by row and feature [nnz], beginnings of rows and blocks [(M + 1) · blocks + 1], counts, sorted rows and successors [panel + 2 each],
    histogram [channels + 2], pairs as found and two orders of them [(panel + 2) · FIELDS]. Written: pairs, columns (int16) [nnz], starts, order [nnz]. Then the
    integers nnz, K, M, blocks, words, channels, rows of a panel, the units of a row and of a feature, and as float64 the inverse of K.
    """

    def lowest(marks: Any) -> Any:
        """Position of the lowest bit."""
        return T.Cast("int32", T.popcount((marks & -marks) - T.int64(1)))

    @T.macro
    def to_rows(IX, PL, G, KY, SL, nnz, K, M, inverse):
        for r in range(M + 1):
            G[r] = 0
        for i in range(nnz):
            if IX[i] >= 0:
                # Exact: a float64 holds 53 bits, and the half keeps the quotient away from whole numbers.
                G[T.Cast("int32", (T.Cast("float64", IX[i]) + 0.5) * inverse) + 1] += 1
        for r in range(M):
            G[r + 1] += G[r]
        for i in range(nnz):
            if IX[i] >= 0:
                row: T.int32 = T.Cast("int32", (T.Cast("float64", IX[i]) + 0.5) * inverse)
                at: T.int32 = G[row]
                KY[at] = PL[IX[i] - row * K]
                SL[at] = i
                G[row] = at + 1

    @T.macro
    def to_bits(G, KY, SL, CE, BM, OS, BG, M, blocks, words):
        done = T.alloc_buffer((1,), "int32", scope="local")
        done[0] = 0
        for r in range(M):
            first: T.int32 = T.if_then_else(r > 0, G[r - 1], 0)
            for i in range(G[r] - first):
                key: T.int32 = KY[first + i]
                CE[key] = SL[first + i]
                BM[r * blocks * words + (key >> 5)] = BM[r * blocks * words + (key >> 5)] | (T.int64(1) << T.Cast("int64", key & (MARKS - 1)))
            for b in range(blocks):
                BG[r * blocks + b] = done[0]
                for w in range(words):
                    marks: T.int64 = BM[(r * blocks + b) * words + w]
                    while marks > T.int64(0):
                        OS[done[0]] = CE[(b * words + w) * MARKS + lowest(marks)]
                        done[0] = done[0] + 1
                        marks = marks & (marks - T.int64(1))
        for b in range(blocks + 1):
            BG[M * blocks + b] = done[0]

    @T.macro
    def to_counts(BG, CN, SO, NX, H, top, height, even, b, M, blocks, channels):
        for n in range(channels + 2):
            H[n] = 0
        for r in range(even):
            at: T.int32 = T.Select(r < height, top + r, M) * blocks + b
            CN[r] = BG[at + 1] - BG[at]
            H[CN[r] + 1] += 1
        for n in range(channels + 1):
            H[n + 1] += H[n]
        for r in range(even):
            kept: T.int32 = CN[r]
            SO[H[kept]] = r
            H[kept] = H[kept] + 1
        for i in range(even):
            NX[i] = i + 1

    @T.macro
    def to_pairs(BM, CN, SO, NX, PR, top, height, even, b, M, blocks, words):
        head = T.alloc_buffer((1,), "int32", scope="local")
        best = T.alloc_buffer((4,), "int32", scope="local")
        head[0] = 0
        for g in range(even // 2):
            a: T.int32 = SO[head[0]]
            bits: T.int32 = (T.Select(a < height, top + a, M) * blocks + b) * words
            before: T.int32 = head[0]
            at: T.int32 = NX[head[0]]
            tried: T.int32 = 0
            best[0] = -2147483647
            while T.And(tried < PARTNERS, at < even):
                other: T.int32 = SO[at]
                others: T.int32 = (T.Select(other < height, top + other, M) * blocks + b) * words
                both: T.int32 = 0
                for w in range(words):
                    both = both + T.Cast("int32", T.popcount(BM[bits + w] & BM[others + w]))
                worth: T.int32 = both - 2 * (CN[other] - CN[a])
                if worth > best[0]:
                    best[0] = worth
                    best[1] = at
                    best[2] = before
                    best[3] = both
                before = at
                at = NX[at]
                tried = tried + 1
            NX[best[2]] = NX[best[1]]
            head[0] = NX[head[0]]
            partner: T.int32 = SO[best[1]]
            PR[g * FIELDS] = a
            PR[g * FIELDS + 1] = partner
            PR[g * FIELDS + 2] = best[3] & -2
            PR[g * FIELDS + 3] = CN[a] - (best[3] & -2)
            PR[g * FIELDS + 4] = CN[partner] - CN[a]

    @T.macro
    def sort_by(PR, H, before, after, field, count, channels, first):
        for n in range(channels + 2):
            H[n] = 0
        for g in range(count):
            H[PR[g * FIELDS + field] + 1] += 1
        for n in range(channels + 1):
            H[n + 1] += H[n]
        for g in range(count):
            which: T.int32 = T.if_then_else(first, g, before[g])
            number: T.int32 = PR[which * FIELDS + field]
            after[H[number]] = which
            H[number] = H[number] + 1

    @T.macro
    def write_row(BM, OS, F, OR, bits, others, slot, column, value, both, one, second, words, unit):
        """The features of one row of a pair: where both rows keep them, where only this one does, and behind the shorter row's last one."""
        common: T.int32 = 0
        alone: T.int32 = 0
        for w in range(words):
            marks: T.int64 = BM[bits + w]
            theirs: T.int64 = BM[others + w]
            while marks > T.int64(0):
                c: T.int32 = lowest(marks)
                shared: T.int32 = T.Select(common < both, T.Cast("int32", (theirs >> T.Cast("int64", c)) & T.int64(1)), 0)
                behind: T.int32 = T.Select(alone < one, 2 * alone + second, alone + one)
                F[column + T.Select(shared > 0, common, both + behind)] = T.Cast("int16", (w * MARKS + c) * unit)
                OR[value + T.Select(shared > 0, 2 * common + second, 2 * both + behind)] = OS[slot + common + alone]
                common = common + shared
                alone = alone + 1 - shared
                marks = marks & (marks - T.int64(1))

    @T.prim_func
    def kernel(
        index: T.handle, place: T.handle, row_end: T.handle, key: T.handle, slot: T.handle, cell: T.handle, bits_: T.handle, ordered: T.handle,
        begin: T.handle, counts: T.handle, sorted_rows: T.handle, successor: T.handle, histogram: T.handle, found: T.handle, by_one: T.handle, by_both: T.handle,
        pairs: T.handle, columns: T.handle, starts: T.handle, order: T.handle,
        nnz: T.int32, K: T.int32, M: T.int32, blocks: T.int32, words: T.int32, channels: T.int32, panel: T.int32, row_unit: T.int32, unit: T.int32,
        inverse: T.float64,
    ):
        T.func_attr({"global_symbol": name, "tirx.noalias": True})
        n0, n1, n2, n3, n4, n5, n6 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n7, n8, n9, n10, n11, n12, n13 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        n14, n15, n16, n17, n18, n19 = T.int32(), T.int32(), T.int32(), T.int32(), T.int32(), T.int32()
        IX = T.match_buffer(index, (n0,), "int32", align=4, offset_factor=1)
        PL = T.match_buffer(place, (n1,), "int32", align=4, offset_factor=1)
        G = T.match_buffer(row_end, (n2,), "int32", align=4, offset_factor=1)
        KY = T.match_buffer(key, (n3,), "int32", align=4, offset_factor=1)
        SL = T.match_buffer(slot, (n4,), "int32", align=4, offset_factor=1)
        CE = T.match_buffer(cell, (n5,), "int32", align=4, offset_factor=1)
        BM = T.match_buffer(bits_, (n6,), "int64", align=8, offset_factor=1)
        OS = T.match_buffer(ordered, (n7,), "int32", align=4, offset_factor=1)
        BG = T.match_buffer(begin, (n8,), "int32", align=4, offset_factor=1)
        CN = T.match_buffer(counts, (n9,), "int32", align=4, offset_factor=1)
        SO = T.match_buffer(sorted_rows, (n10,), "int32", align=4, offset_factor=1)
        NX = T.match_buffer(successor, (n11,), "int32", align=4, offset_factor=1)
        H = T.match_buffer(histogram, (n12,), "int32", align=4, offset_factor=1)
        PR = T.match_buffer(found, (n13,), "int32", align=4, offset_factor=1)
        O1 = T.match_buffer(by_one, (n14,), "int32", align=4, offset_factor=1)
        O2 = T.match_buffer(by_both, (n15,), "int32", align=4, offset_factor=1)
        P = T.match_buffer(pairs, (n16,), "int32", align=4, offset_factor=1)
        F = T.match_buffer(columns, (n17,), "int16", align=2, offset_factor=1)
        ST = T.match_buffer(starts, (n18,), "int32", align=4, offset_factor=1)
        OR = T.match_buffer(order, (n19,), "int32", align=4, offset_factor=1)
        to_rows(IX, PL, G, KY, SL, nnz, K, M, inverse)
        to_bits(G, KY, SL, CE, BM, OS, BG, M, blocks, words)
        done = T.alloc_buffer((3,), "int32", scope="local")
        for k in T.unroll(3):
            done[k] = 0
        for p, b in T.grid((M + panel - 1) // panel, blocks):
            top: T.int32 = p * panel
            height: T.int32 = T.min(panel, M - p * panel)
            even: T.int32 = (height + 1) // 2 * 2
            ST[(p * blocks + b) * 2] = done[0]
            ST[(p * blocks + b) * 2 + 1] = done[1]
            to_counts(BG, CN, SO, NX, H, top, height, even, b, M, blocks, channels)
            to_pairs(BM, CN, SO, NX, PR, top, height, even, b, M, blocks, words)
            sort_by(PR, H, O1, O1, 3, even // 2, channels, True)
            sort_by(PR, H, O1, O2, 2, even // 2, channels, False)
            for g in range(even // 2):
                pair: T.int32 = O2[g] * FIELDS
                one: T.int32 = T.Select(PR[pair] < height, top + PR[pair], M)
                other: T.int32 = T.Select(PR[pair + 1] < height, top + PR[pair + 1], M)
                P[done[2]] = PR[pair] * row_unit
                P[done[2] + 1] = PR[pair + 1] * row_unit
                for k in T.unroll(2, FIELDS):
                    P[done[2] + k] = PR[pair + k]
                bits: T.int32 = (one * blocks + b) * words
                others: T.int32 = (other * blocks + b) * words
                write_row(BM, OS, F, OR, bits, others, BG[one * blocks + b], done[0], done[1], PR[pair + 2], PR[pair + 3], 0, words, unit)
                write_row(BM, OS, F, OR, others, bits, BG[other * blocks + b], done[0], done[1], PR[pair + 2], PR[pair + 3], 1, words, unit)
                done[0] = done[0] + PR[pair + 2] + 2 * PR[pair + 3] + PR[pair + 4]
                done[1] = done[1] + 2 * (PR[pair + 2] + PR[pair + 3]) + PR[pair + 4]
                done[2] = done[2] + FIELDS

    return kernel
# fmt: on
