"""Images side by side in vectors: [N, C, H, W] as [N / lanes, C, H, W, lanes], the layout between sparse convolutions.

A vector holds the same position of ``lanes`` images. What works on channels and positions works on either layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def to_image_vectors(x: Tensor, lanes: int) -> Tensor:
    """[N, C, H, W] → [N / lanes, C, H, W, lanes], contiguous; N is a multiple of ``lanes``."""
    return x.reshape(x.shape[0] // lanes, lanes, *x.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


def from_image_vectors(y: Tensor) -> Tensor:
    """[N / lanes, C, H, W, lanes] → [N, C, H, W], contiguous."""
    return y.permute(0, 4, 1, 2, 3).reshape(y.shape[0] * y.shape[4], *y.shape[1:4])


def by_image(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer``, which maps [N, C, H, W] to [N, M, H', W'], on either layout."""
    if x.dim() != 5:
        return layer(x)
    return to_image_vectors(layer(from_image_vectors(x)), x.shape[4])


def max_pool_image_vectors(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Max pooling of [N / lanes, C, H, W, lanes] as ``F.max_pool2d`` does it image by image: [N / lanes, C, H', W', lanes].

    Args:
        kernel, stride, padding: two numbers each, down and across.
    """
    down, across = (
        (size + 2 * p - k) // s + 1 for size, k, s, p in zip(x.shape[2:4], kernel, stride, padding, strict=True)
    )
    padded = F.pad(x, (0, 0, padding[1], padding[1], padding[0], padding[0]), value=-math.inf)
    shifts = [(i, j) for i in range(kernel[0]) for j in range(kernel[1])]
    pieces = (
        padded[:, :, i : i + stride[0] * (down - 1) + 1 : stride[0], j : j + stride[1] * (across - 1) + 1 : stride[1]]
        for i, j in shifts
    )
    return functools.reduce(torch.maximum, pieces).contiguous()
