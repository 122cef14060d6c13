"""Images side by side in vectors: [N, C, H, W] as [N / lanes, C, H, W, lanes], the layout between sparse convolutions.

A vector holds the same position of ``lanes`` images. What works on channels and positions works on either layout.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.nn import live


def to_image_vectors(x: Tensor, lanes: int) -> Tensor:
    """[N, C, H, W] → [N / lanes, C, H, W, lanes], contiguous; N is a multiple of ``lanes``."""
    return x.reshape(x.shape[0] // lanes, lanes, *x.shape[1:]).permute(0, 2, 3, 4, 1).contiguous()


def from_image_vectors(y: Tensor) -> Tensor:
    """[N / lanes, C, H, W, lanes] → [N, C, H, W], contiguous."""
    return y.permute(0, 4, 1, 2, 3).reshape(y.shape[0] * y.shape[4], *y.shape[1:4])


def average_image_vectors(y: Tensor, keepdim: bool) -> Tensor:
    """[N / lanes, C, H, W, lanes] → [N, C], or [N, C, 1, 1]: the average over all positions, of an image and a channel each."""
    means = y.mean((2, 3)).transpose(1, 2).reshape(-1, y.shape[1])
    return means[:, :, None, None] if keepdim else means


def by_image(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``layer``, which maps [N, C, H, W] to [N, M, H', W'], on either layout."""
    if x.dim() != 5:
        return layer(x)
    return to_image_vectors(layer(from_image_vectors(x)), x.shape[4])


class Pool(Protocol):
    """A kernel that pools in either layout."""

    def __call__(self, x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
        """Return the largest of every window, contiguous; ``x`` is not changed."""


@torch.library.custom_op("sift::max_pool2d", mutates_args=())
def max_pool2d(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], kernel_handle: int = 0
) -> Tensor:
    """``F.max_pool2d`` in either layout: [N, C, H, W] → [N, C, H', W'], or [N / lanes, C, H, W, lanes] → [N / lanes, C, H', W', lanes].

    Args:
        x: float32.
        kernel, stride, padding: two numbers each, down and across; padding is at most half the kernel.
        kernel_handle: of a :class:`Pool` (see live); 0 is the reference.
    """
    if kernel_handle != live.REFERENCE:
        return cast(Pool, live.lookup(kernel_handle))(x, kernel, stride, padding)
    return reference_max_pool2d(x, kernel, stride, padding)


def pool_directly(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], kernel_handle: int
) -> Tensor:
    """:func:`max_pool2d` with a kernel, without the dispatcher."""
    return cast(Pool, live.lookup(kernel_handle))(x, kernel, stride, padding)


@max_pool2d.register_fake
def _(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], kernel_handle: int = 0
) -> Tensor:
    size = [(x.shape[2 + a] + 2 * padding[a] - kernel[a]) // stride[a] + 1 for a in (0, 1)]
    return x.new_empty((*x.shape[:2], *size, *x.shape[4:]))


def reference_max_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The reference of :func:`max_pool2d`."""
    if x.dim() == 4:
        return torch.max_pool2d(x, list(kernel), list(stride), list(padding)).contiguous()
    return max_pool_image_vectors(x, kernel, stride, padding)


def max_pool_image_vectors(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """The reference for images side by side; arguments as those of :func:`max_pool2d`."""
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
