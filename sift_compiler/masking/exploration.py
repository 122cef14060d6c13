"""What a moving mask has explored, and where it came back: one byte per entry of the dense weight.

Explored fraction: the share of a weight's entries that have been in its mask at any time, the in-time over-parameterization rate R_s of
Liu et al., "Do We Actually Need Dense Over-Parameterization? In-Time Over-Parameterization in Sparse Training", ICML 2021, Sec. 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPLORED, _INITIAL, _LAST, _BEFORE = 1, 2, 4, 8


@dataclass(frozen=True, kw_only=True)
class Exploration:
    """Counts of one weight after an update of its mask."""

    explored: int
    """Entries that have been in the mask at any time."""
    oscillated: int
    """Entries that are as they were two updates ago and were not one update ago: they flipped back."""
    revisited: int
    """Entries that came with this update, have been in the mask before and left it in an earlier update."""
    iou_initial: float
    """Intersection over union with the first mask, in [0, 1]."""


def begun(index: Tensor, numel: int) -> Tensor:
    """What is remembered of a weight whose mask has not moved yet: uint8 [numel] in main memory.

    Args:
        index: int32 [slots]; negative where a slot is not in the mask.
        numel: entries of the dense weight.
    """
    flags = torch.zeros(numel, dtype=torch.uint8)
    flags[_positions(index)] = _EXPLORED | _INITIAL | _LAST | _BEFORE
    return flags


def follow(flags: Tensor, index: Tensor) -> Exploration:
    """Take the mask after an update into ``flags``, in place, and count.

    Args:
        flags: what :func:`begun` returned, and this function changed since.
        index: int32 [slots], the new mask.
    """
    now = torch.zeros_like(flags, dtype=torch.bool)
    now[_positions(index)] = True
    explored, initial, last, before = ((flags & bit) != 0 for bit in (_EXPLORED, _INITIAL, _LAST, _BEFORE))
    found = Exploration(
        explored=int((explored | now).sum()),
        oscillated=int(((now == before) & (now != last)).sum()),
        revisited=int((now & explored & ~last).sum()),
        iou_initial=mask_iou(now, initial),
    )
    flags.copy_((explored | now) * _EXPLORED + initial * _INITIAL + now * _LAST + last * _BEFORE)
    return found


def mask_iou(one: Tensor, other: Tensor) -> float:
    """Intersection over union of two boolean masks of one shape, in [0, 1]; 1 if both are empty."""
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 1.0


def _positions(index: Tensor) -> Tensor:
    return index[index >= 0].long().cpu()
