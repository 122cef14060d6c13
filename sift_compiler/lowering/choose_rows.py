"""When few tokens run by row programs (lowering.row_program), and how. A pure function with a reason in words."""

from __future__ import annotations

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile

_ROWS = {1: 2, 2: 4, 4: 2}
"""Output rows at once, for so many vectors of tokens: measured; sums of fewer than four vectors would wait for each other."""


def choose_rows(spec: LayerSpec, tokens: int, cpu: CpuFacts) -> Choice | None:
    """The choice for ``tokens`` tokens of a linear layer; None where lanes over whole vectors of tokens are faster.

    One token's kernel reads whole vectors of values, so there must be one. With many tokens an input feature is as long as several
    vectors: then it pays to hold blocks of them in the first-level cache and come back to the sums.
    """
    if spec.nnz < cpu.lanes:
        return None
    if tokens == 1:
        tile = Tile(lanes="weights", vector=cpu.lanes, rows=1, width=1, channels=spec.in_channels)
        reason = f"sparsity {spec.sparsity:.2f}: one token, lanes over the kept weights of a row, each read once"
        return Choice(tile=tile, first=0, count=1, reason=reason)
    together = 1 << (tokens - 1).bit_length()
    vector = min(together, cpu.lanes)
    vectors = together // vector
    held = together * spec.in_channels * 4
    if vectors not in _ROWS or (vectors > 2 and tokens <= 3 * vector) or held > cpu.l2_bytes // 2:
        return None
    tile = Tile(lanes="tokens", vector=vector, rows=_ROWS[vectors], width=vectors, channels=spec.in_channels)
    reason = f"sparsity {spec.sparsity:.2f}: {tokens} tokens, every kept weight read once, for {together} tokens side by side"
    return Choice(tile=tile, first=0, count=tokens, reason=reason)
