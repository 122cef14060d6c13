"""The n-th largest number, where a mask is set, and which entries reach a threshold.

On the CPU by NumPy, whose selection and searches are several times as fast as torch's; on other devices by torch. Results are the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sift_compiler.ir.entries import Entries

_PIECE = 1 << 17
"""Numbers looked at in one go: they and what is made of them stay in the second-level cache."""


def nth_largest(scores: Tensor, n: int) -> Tensor:
    """The ``n``-th largest, 1 ≤ n ≤ m, of finite ``scores`` [m]; a scalar on their device."""
    if scores.device.type == "cpu":
        numbers = _on_host(scores)
        place = numbers.size - n
        return torch.tensor(np.partition(numbers, place)[place]).to(scores.dtype)
    # On other devices kthvalue is refused in torch's deterministic mode, for its indices. Values of topk are defined, too.
    return scores.topk(n, sorted=False).values.min()


def where(flags: Tensor) -> Tensor:
    """Where ``flags``, bool [m], are set: int64, ascending."""
    if flags.device.type != "cpu":
        return flags.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(flags.numpy()))


def reaching(dense: Tensor, least: float) -> Entries:
    """The entries of ``dense`` with |x| ≥ ``least``, ascending; none if it is not finite."""
    flat = dense.reshape(-1)
    if flat.device.type == "cpu" and flat.dtype in (torch.float32, torch.float64):
        return _reaching(flat, least)
    return Entries.of(flat, (flat.abs() >= least).nonzero().squeeze(1))


def _reaching(flat: Tensor, least: float) -> Entries:
    numbers = flat.detach().numpy()
    sizes, flags = np.empty(_PIECE, numbers.dtype), np.empty(_PIECE, np.bool_)
    places, found = [np.empty(0, np.int32)], [numbers[:0]]
    for first in range(0, numbers.size, _PIECE):
        piece = numbers[first : first + _PIECE]
        size = np.abs(piece, out=sizes[: piece.size])
        # The largest of numbers of which one is NaN is NaN.
        if not np.isfinite(size.max()):
            nothing = torch.empty(0, dtype=torch.int32)
            return Entries(places=nothing, numbers=flat.new_empty(0), numel=flat.numel(), finite=False)
        inside = np.flatnonzero(np.greater_equal(size, numbers.dtype.type(least), out=flags[: piece.size]))
        found.append(piece[inside])
        places.append((inside + first).astype(np.int32))
    return Entries(
        places=torch.from_numpy(np.concatenate(places)), numbers=torch.from_numpy(np.concatenate(found)), numel=flat.numel()
    )  # fmt: skip


def _on_host(scores: Tensor) -> npt.NDArray[np.generic]:
    # Single precision holds every number of half precision, and NumPy knows no bfloat16.
    half = scores.dtype in (torch.float16, torch.bfloat16)
    return (scores.float() if half else scores).detach().numpy()
