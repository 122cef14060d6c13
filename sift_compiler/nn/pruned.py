"""The operators ``sift::pruned_conv2d`` and ``sift::pruned_linear``: dense layers whose weight holds many zeros, in inference.

They take the dense weight itself, so that the kernel behind the handle sees every change of it. There is no backward: the torch.compile
backend puts them only into graphs that were traced without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.nn import live


class DenseKernel(Protocol):
    """Computes one layer, given its dense weight."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output, contiguous; none of the arguments is changed."""


def register(kernel: DenseKernel) -> int:
    """A fresh handle for ``kernel``, among those of nn.live; only the operators of this module may be given it."""
    return live.register(cast(live.Kernel, kernel))


@torch.library.custom_op("sift::pruned_conv2d", mutates_args=())
def pruned_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, kernel_handle: int,
) -> Tensor:  # fmt: skip
    """x [N, C, H, W], weight [M, C / groups, kh, kw] → [N, M, H', W'], contiguous."""
    return cast(DenseKernel, live.lookup(kernel_handle))(x, weight, bias)


@pruned_conv2d.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, kernel_handle: int,
) -> Tensor:  # fmt: skip
    y = F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("sift::pruned_linear", mutates_args=())
def pruned_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_handle: int) -> Tensor:
    """x [..., in], weight [out, in] → [..., out], contiguous."""
    return cast(DenseKernel, live.lookup(kernel_handle))(x, weight, bias)


@pruned_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, kernel_handle: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
