"""Dense gradients as a whole group of processes sees them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from sift_compiler.ir.entries import Entries, is_finite

Condition = Literal["usable", "missing", "not finite"]

_CONDITIONS: tuple[Condition, ...] = ("usable", "missing", "not finite")


def condition(tensors: Sequence[Tensor | Entries | None]) -> Condition:
    """Whether a layer's tensors can be ranked: "missing" if one is None, "not finite" if one holds NaN or infinity."""
    if any(tensor is None for tensor in tensors):
        return "missing"
    return "usable" if all(_finite(tensor) for tensor in tensors if tensor is not None) else "not finite"


def _finite(tensor: Tensor | Entries) -> bool:
    return tensor.finite if isinstance(tensor, Entries) else is_finite(tensor)


Group: TypeAlias = "dist.ProcessGroup | None"
"""The processes that train one model; None: all."""


def agreed(conditions: Sequence[Condition], device: torch.device, group: Group = None) -> list[Condition]:
    """The worst condition of each layer over all ranks; every rank gets the same, so that none waits for another in vain."""
    if not distributed(group) or not conditions:
        return list(conditions)
    worst = torch.tensor([_CONDITIONS.index(one) for one in conditions], device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=group)
    return [_CONDITIONS[int(one)] for one in worst.tolist()]


def averaged(gradient: Tensor, group: Group = None) -> Tensor:
    """The mean of ``gradient`` over all ranks; itself where there is one process.

    The mean comes before |.|: averaging magnitudes would grow weights on which the ranks disagree.
    """
    if not distributed(group):
        return gradient
    total = gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient.clone()
    dist.all_reduce(total, group=group)
    return total / dist.get_world_size(group)


def unscaled(gradient: Tensor, scale: float) -> Tensor:
    """``gradient`` / ``scale``: what it would be had the loss not been multiplied by ``scale``. Never less than single precision, in which
    what half precision cannot hold is not lost."""
    if scale == 1:
        return gradient
    return (gradient.float() if gradient.dtype in (torch.float16, torch.bfloat16) else gradient) / scale


def agreed_passes(ranges: Sequence[tuple[int, int]], device: torch.device, group: Group = None) -> list[int]:
    """How many backward passes complete each layer's gradient, if that is beyond doubt; 0 where it is not.

    Args:
        ranges: the least and the most passes of a step there have been, of each layer.
        device: of the layers.
        group: the processes.

    With one process the most will do: where fewer come the sum is kept whole. With several all must take part in the mean, which is
    taken at the last pass: they do where on all of them every step had the same number.
    """
    if not distributed(group) or not ranges:
        return [most for _, most in ranges]
    least_and_most = torch.tensor([(least, -most) for least, most in ranges], device=device)
    dist.all_reduce(least_and_most, op=dist.ReduceOp.MIN, group=group)
    return [least if least == -negated else 0 for least, negated in least_and_most.tolist()]


def distributed(group: Group = None) -> bool:
    """Whether there are several processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1
