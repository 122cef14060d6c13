"""How workers share a layer: whole tiles, and where those do not divide evenly, groups of rows of one tile.

A 7 × 7 image makes seven tiles at best, and a batch of one a single one: two workers with whole tiles would wait for each other for a
seventh or for half of the time. A program therefore has a beginning in several places of each block, its *segments* (see
:mod:`sift_compiler.lowering.program`), and a worker may stop and begin there.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


def shares(tiles: int, segments: int, groups: int, workers: int) -> tuple[Int32, Int32]:
    """Divide ``tiles`` of ``segments`` each, neighbours together.

    Returns:
        begins: int32 [workers + 1], the first piece of each worker.
        pieces: int32 [pieces, 4]: the tile, its first segment, its first group of rows, and the group after its last.
    """
    units = tiles * segments
    edges = np.arange(workers + 1, dtype=np.int64) * units // workers
    begins, pieces = [0], []
    for first, last in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        for tile in range(first // segments, -(-last // segments) if last > first else first // segments):
            start, stop = max(0, first - tile * segments), min(segments, last - tile * segments)
            pieces.append((tile, start, start * groups // segments, stop * groups // segments))
        begins.append(len(pieces))
    return np.array(begins, np.int32), np.array(pieces, np.int32).reshape(-1, 4)
