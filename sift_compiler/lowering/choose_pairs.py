"""When many tokens run by pair programs (lowering.pair_program), and how. A pure function with a reason in words."""

from __future__ import annotations

import math

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.pair_program import COLUMN, LARGEST_COLUMN
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile

_DENSEST = 0.55
"""Up to this share of kept weights: measured, beyond it three rows that share every load by its pattern are as fast."""
_WINDOW = 0.75
"""Share of the first-level cache that holds the window; partial sums and weights stream by through the rest."""
_USUAL, _NEARLY = 4, 1.03
"""A width that is taken where it costs at most so many times as much as the best: sizes of batch with one width share code and programs."""
_WEIGHT_BYTES = 6
"""A value and a column."""


def choose_pairs(spec: LayerSpec, tokens: int, cpu: CpuFacts) -> Choice | None:
    """The choice for ``tokens`` tokens of a linear layer; None where sharing loads by row patterns is faster, or there is no vector of tokens."""
    if tokens < cpu.lanes or 1 - spec.sparsity > _DENSEST or spec.in_channels == 0:
        return None
    most = max(1, min(8, cpu.registers * 22 // 64, tokens // cpu.lanes))
    tiles = {width: _tile(spec, width, cpu) for width in range(1, most + 1)}
    costs = {width: _cost(spec, tokens, tile, cpu) for width, tile in tiles.items()}
    width = min(costs, key=lambda each: costs[each])
    if costs.get(_USUAL, math.inf) < _NEARLY * costs[width]:
        width = _USUAL
    cost, tile = costs[width], tiles[width]
    reason = f"sparsity {spec.sparsity:.2f}: two rows with most features in common share loads, lanes over tokens, relative cost {cost:.2f}"
    return Choice(tile=tile, first=0, count=tokens, reason=reason)


def _tile(spec: LayerSpec, width: int, cpu: CpuFacts) -> Tile:
    unit = width * cpu.lanes
    most = max(1, min(int(_WINDOW * cpu.l1_bytes / (4 * unit)), LARGEST_COLUMN * COLUMN // unit))
    channels = -(-spec.in_channels // -(-spec.in_channels // most))
    return Tile(lanes="pairs", vector=cpu.lanes, rows=2, width=width, channels=channels)


def _cost(spec: LayerSpec, tokens: int, tile: Tile, cpu: CpuFacts) -> float:
    """Relative time per useful multiply-add: loading a weight and its column, which the vectors share, from beyond the second level if they do not
    fit there; and the way of the sums to the second level and back, which the kept weights of a row and block share (constants fitted
    to measurements)."""
    step = tile.width * tile.vector
    kept = max(1 - spec.sparsity, 1e-6) * tile.channels
    loading = 1.5 if _WEIGHT_BYTES * spec.nnz <= cpu.l2_bytes // 2 else 2.1
    return -(-tokens // step) * step / tokens * (1 + loading / tile.width + 7 / kept)
