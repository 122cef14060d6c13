"""The pair program of a mask: kept weights of a linear layer in the order of a kernel that serves many tokens, two output rows at a time.

Input features are taken ``channels`` at a time (a *block*), output rows ``panel`` at a time (a *panel*). In every panel and block each
row gets a partner that keeps about as many weights there and many of the same features: an input feature that both keep is loaded
once. Features of both rows come first, then the others of the two rows side by side, then what the longer row has left. Pairs with
equal numbers are neighbours, so that the processor foresees where loops end. Nothing is padded: a weight of zero would turn an infinite
input into NaN.

Backend-neutral and pure; the order of ``index`` carries no meaning. A runtime packs with code of its own, as runtimes.tvm does; this is
what it must equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sift_compiler.lowering.specification import LayerSpec

Int32 = npt.NDArray[np.int32]

FIELDS = 5
"""Numbers of a pair: where the sums of its two rows begin in the panel, in float32 numbers; how many features both keep; how many weights
beside those the shorter row has; how many more the longer one."""
PARTNERS = 8
"""Rows among which a partner is sought. More find better ones, but pairs of equal numbers become rare: measured, the loops lose what the
loads gain."""
COLUMN = 2
"""A column is counted in this many float32 numbers: then it is an index that processors scale by themselves, and two bytes reach far."""
LARGEST_COLUMN = 2**15 - 1


@dataclass(frozen=True)
class PairProgram:
    """A mask of a linear layer as data.

    Attributes:
        pairs: int32 [panels · blocks · pairs, FIELDS]; panels lie one after the other, in each its blocks, in each its pairs. Of an odd number
            of rows one is paired with the row behind the panel's last, which keeps nothing.
        columns: int16, for each pair the features of both rows, then those of the two rows in turn, then the rest of the longer row's. A column
            is where its input begins in the block's window, in units of ``COLUMN`` float32 numbers.
        starts: int32 [panels · blocks, 2], where each panel and block begins in ``columns`` and in the values.
        order: int32 [slots]; ``values[order]`` are in the order of ``columns``, two for a feature of both rows; what is behind the kept ones
            is not read.
    """

    pairs: Int32
    columns: npt.NDArray[np.int16]
    starts: Int32
    order: Int32


def pack_pairs(index: Int32, spec: LayerSpec, channels: int, panel: int, unit: int) -> PairProgram:
    """Pack a mask.

    Args:
        index: int32 [slots], distinct flat positions in the dense weight, in any order; a negative one is not in the mask.
        spec: a linear layer.
        channels: input features of a block.
        panel: rows of a panel.
        unit: float32 numbers of a feature in a window and of a row in the sums, a multiple of ``COLUMN``.
    """
    rows, width = spec.out_channels, spec.in_channels
    slots = np.full((rows + 1, width), -1, np.int32)
    kept = np.flatnonzero(index >= 0)
    slots.reshape(-1)[index[kept]] = kept
    pairs: list[tuple[int, ...]] = []
    columns: list[int] = []
    order: list[int] = []
    starts = []
    for top in range(0, rows, panel):
        height = min(panel, rows - top)
        for first in range(0, width, channels):
            starts.append((len(columns), len(order)))
            window = slots[top : top + height + 1, first : first + channels].copy()
            window[height] = -1
            for a, b, both in _paired(window >= 0, height + height % 2):
                common, one, other = _split(window[a], window[b], both)
                pairs.append((a * unit, b * unit, both, len(one), len(other) - len(one)))
                side_by_side = [c for two in zip(one, other, strict=False) for c in two]
                rest = other[len(one) :]
                columns += [c * (unit // COLUMN) for c in (*common, *side_by_side, *rest)]
                order += [window[r, c] for c in common for r in (a, b)]
                order += [
                    window[r, c] for two in zip(one, other, strict=False) for r, c in zip((a, b), two, strict=True)
                ]
                order += [window[b, c] for c in rest]
    # As long as the values, as ever; nothing reads what is beyond the kept ones.
    order += [0] * (index.size - len(order))
    return PairProgram(
        np.array(pairs, np.int32).reshape(-1, FIELDS), np.array(columns, np.int16),
        np.array(starts, np.int32).reshape(-1, 2), np.array(order, np.int32),
    )  # fmt: skip


def _paired(mask: npt.NDArray[np.bool_], rows: int) -> list[tuple[int, int, int]]:
    """Pairs of the first ``rows`` rows of ``mask``, the shorter row first, with how many features count as kept by both.

    That number is even: with half as many numbers twice as many neighbours are alike.
    """
    counts = mask.sum(axis=1)
    left = sorted(range(rows), key=lambda row: counts[row])
    found = []
    while left:
        a = left.pop(0)
        near = left[:PARTNERS]
        # A weight that has no counterpart costs about as much as two shared loads save.
        worth = [int((mask[a] & mask[b]).sum()) - 2 * int(counts[b] - counts[a]) for b in near]
        b = near[worth.index(max(worth))]
        left.remove(b)
        found.append((a, b, int((mask[a] & mask[b]).sum()) // 2 * 2))
    return sorted(found, key=lambda pair: (pair[2], counts[pair[0]] - pair[2]))


def _split(a: Int32, b: Int32, both: int) -> tuple[list[int], list[int], list[int]]:
    """The first ``both`` features that two rows keep, and what else each keeps."""
    common = np.flatnonzero((a >= 0) & (b >= 0))[:both].tolist()
    one, other = ([c for c in np.flatnonzero(row >= 0).tolist() if c not in common] for row in (a, b))
    return common, one, other
