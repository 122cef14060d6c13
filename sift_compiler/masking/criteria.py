"""Which weights go and which come: scores, and how the best are chosen.

Ties are broken by :func:`priority`, a hash of a seed and of the weight's position in the dense weight. It is a pure function in
64-bit integers, so every device and every rank breaks ties alike, training resumed from a checkpoint too, and no random number
generator has a state to keep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from sift_compiler.masking.order_statistics import nth_largest, where

Score = Callable[[Tensor], Tensor]
"""Gives the scores [n] of positions int64 [n]."""

# The constants of splitmix64 (Steele, Lea and Flood 2014), as signed 64-bit integers.
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def stream(*parts: object) -> int:
    """A signed 64-bit seed that depends on every part, e.g. (method seed, layer name, step, purpose)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


def priority(positions: Tensor, seed: int) -> Tensor:
    """An int64 [n] that looks random and differs wherever ``positions`` [n] do (splitmix64 is a bijection)."""
    mixed = (positions.long() + 1) * _GAMMA + seed
    mixed = (mixed ^ _shifted(mixed, 30)) * _MIX_1
    mixed = (mixed ^ _shifted(mixed, 27)) * _MIX_2
    return mixed ^ _shifted(mixed, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    # torch's >> copies the sign bit; a logical shift fills with zeros.
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def magnitude(tensor: Tensor) -> Tensor:
    """|x|, of any shape: the score of a weight that may be dropped, or of a gradient where a weight may grow."""
    return tensor.detach().abs()


def largest(scores: Tensor, positions: Tensor, count: int, seed: int) -> Tensor:
    """Choose the ``count`` largest of ``scores`` [n]; among equals the larger :func:`priority` of ``positions`` [n] wins.

    Args:
        scores: finite numbers [n].
        positions: where each stands in the flattened dense weight, distinct integers [n].
        count: how many to choose, at most n.
        seed: a seed of :func:`stream`.

    Returns:
        bool [n] with exactly ``count`` ones.
    """
    if count == 0 or count == scores.numel():
        return torch.full_like(scores, fill_value=count > 0, dtype=torch.bool)
    threshold = nth_largest(scores, count)
    chosen = scores > threshold
    tied = where(scores == threshold)
    wanted = count - int(chosen.count_nonzero())
    if wanted < tied.numel():
        tied = tied[priority(positions[tied], seed).argsort(descending=True)[:wanted]]
    chosen[tied] = True
    return chosen


def smallest(scores: Tensor, positions: Tensor, count: int, seed: int) -> Tensor:
    """As :func:`largest`, for the smallest."""
    return largest(-scores, positions, count, seed)
