"""The pieces that workers share, as tensors that a kernel takes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sift_compiler.lowering.shares import shares

WORTH_A_WORKER = 20_000
"""Multiply-adds of vectors, about ten microseconds, below which waking a worker takes longer than its share."""


# Tables of a large batch take 100 KB: enough of them for the layers of a few networks, no more.
@lru_cache(maxsize=256)
def shared(tiles: int, segments: int, groups: int, workers: int) -> tuple[Tensor, Tensor]:
    """See :func:`sift_compiler.lowering.shares.shares`; pieces one after the other."""
    begins, pieces = shares(tiles, segments, groups, workers)
    return torch.from_numpy(begins), torch.from_numpy(pieces.reshape(-1))
