"""When few tokens run by row programs (lowering.row_program), and how. A pure function with a reason in words."""

from __future__ import annotations

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.lowering.tile import Tile


def choose_rows(spec: LayerSpec, tokens: int, cpu: CpuFacts) -> Choice | None:
    """The choice for ``tokens`` tokens of a linear layer; None where lanes over whole vectors of tokens are faster.

    The kernels read whole vectors of values, so there must be one.
    """
    if spec.nnz < cpu.lanes or tokens > cpu.lanes:
        return None
    if tokens == 1:
        tile = Tile(lanes="weights", vector=cpu.lanes, rows=1, width=1, channels=spec.in_channels)
        return Choice(
            tile=tile, first=0, count=1, reason="one token: lanes over the kept weights of a row, each read once"
        )
    together = 1 << (tokens - 1).bit_length()
    tile = Tile(lanes="tokens", vector=together, rows=2, width=1, channels=spec.in_channels)
    reason = f"{tokens} tokens: every kept weight read once, for {together} tokens side by side"
    return Choice(tile=tile, first=0, count=tokens, reason=reason)
