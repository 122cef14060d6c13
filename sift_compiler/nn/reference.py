"""The reference path: scatter to dense, dense operation, gather the gradient. Works on any device; it is the oracle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input as _conv2d_input
from torch.nn.grad import conv2d_weight as _conv2d_weight

from sift_compiler.ir.pattern import EMPTY, entry_of


def densify(values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """``values`` [slots] at the flat positions ``index`` [slots] of an otherwise zero tensor of ``shape``; slots below 0 are left out."""
    numel = torch.Size(shape).numel()
    # Slots outside the mask all write to one spare entry past the end: no branch, hence no wait for a device.
    places = index.long()
    dense = values.new_zeros(numel + 1).index_copy_(0, torch.where(places < 0, numel, places), values)
    return dense[:numel].view(torch.Size(shape))


def gather(dense: Tensor, index: Tensor) -> Tensor:
    """The entries of a ``dense`` gradient that the slots of ``index`` [slots] stand for, sleeping ones too; 0 for empty slots."""
    entries = entry_of(index)
    taken = dense.reshape(-1)[entries.clamp(min=0)]
    return torch.where(entries == EMPTY, 0.0, taken) if taken.numel() else taken


def conv2d(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """Convolution [N, C, H, W] → [N, M, H', W'] with the weight that ``values`` and ``index`` stand for."""
    weight = densify(values, index, shape)
    return F.conv2d(x, weight, bias, list(stride), list(padding), list(dilation), groups).contiguous()


def conv2d_input_gradient(
    gradient: Tensor, values: Tensor, index: Tensor, shape: Sequence[int], input_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """dL/dx [N, C, H, W] from dL/dy [N, M, H', W']."""
    weight = densify(values, index, shape)
    result: Tensor = _conv2d_input(  # type: ignore[no-untyped-call]
        list(input_shape), weight, gradient, list(stride), list(padding), list(dilation), groups
    )
    return result.contiguous()


def conv2d_weight_gradient(
    gradient: Tensor, x: Tensor, shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    """The dense dL/dW, of ``shape``."""
    result: Tensor = _conv2d_weight(  # type: ignore[no-untyped-call]
        x, torch.Size(shape), gradient, list(stride), list(padding), list(dilation), groups
    )
    return result


def linear(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    """[..., in] → [..., out]."""
    return F.linear(x, densify(values, index, shape), bias).contiguous()


def linear_input_gradient(gradient: Tensor, values: Tensor, index: Tensor, shape: Sequence[int]) -> Tensor:
    """dL/dx [..., in] from dL/dy [..., out]."""
    return gradient @ densify(values, index, shape)


def linear_weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """The dense dL/dW [out, in]."""
    return gradient.reshape(-1, gradient.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
