"""Dense gradients as a whole group of processes sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Condition = Literal["usable", "missing", "not finite"]

_CONDITIONS: tuple[Condition, ...] = ("usable", "missing", "not finite")


def condition(tensors: Sequence[Tensor | None]) -> Condition:
    """Whether a layer's tensors can be ranked: "missing" if one is None, "not finite" if one holds NaN or infinity."""
    if any(tensor is None for tensor in tensors):
        return "missing"
    numbers = [tensor._values() if tensor.is_sparse else tensor for tensor in tensors if tensor is not None]
    finite = all(bool(torch.isfinite(each).all()) for each in numbers)
    return "usable" if finite else "not finite"


def agreed(conditions: Sequence[Condition], device: torch.device) -> list[Condition]:
    """The worst condition of each layer over all ranks; every rank gets the same, so that none waits for another in vain."""
    if not distributed() or not conditions:
        return list(conditions)
    worst = torch.tensor([_CONDITIONS.index(one) for one in conditions], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return [_CONDITIONS[int(one)] for one in worst.tolist()]


def averaged(gradient: Tensor) -> Tensor:
    """The mean of ``gradient`` over all ranks; itself where there is one process.

    The mean comes before |.|: averaging magnitudes would grow weights on which the ranks disagree.
    """
    if not distributed():
        return gradient
    total = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def distributed() -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
