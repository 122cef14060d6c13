"""Put one layer in the place of another: everywhere it stands in a module, and with the forward and backward hooks users gave it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sift_compiler.errors import UnsupportedError
from sift_compiler.nn.conv import SparseConv2d
from sift_compiler.nn.layer import SparseLayer
from sift_compiler.nn.linear import SparseLinear

_HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


def exchange(root: nn.Module, layers: Mapping[Any, nn.Module]) -> nn.Module:
    """Replace the keys of ``layers`` by their values wherever they are children in ``root``, in place.

    Hooks of the old layers go to the new ones; the handles that registered them keep working.

    Returns:
        ``root``, or what replaces it.
    """
    parents = list(root.modules())
    for old, new in layers.items():
        for name in _HOOKS:
            setattr(new, name, getattr(old, name))
        new.training = old.training
        for parent in parents:
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new
    return layers.get(root, root)


def dense_layer(layer: SparseLayer) -> nn.Linear | nn.Conv2d:
    """The dense layer that computes what ``layer`` does: its weight is 0 outside the mask; its bias is the same Parameter.

    Raises:
        UnsupportedError: a kind of sparse layer for which no dense one is known.
    """
    bias, dtype = layer.bias is not None, layer.values.dtype
    dense: nn.Linear | nn.Conv2d
    if isinstance(layer, SparseConv2d):
        dense = nn.Conv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias, device="meta", dtype=dtype,
        )  # fmt: skip
    elif isinstance(layer, SparseLinear):
        dense = nn.Linear(layer.in_features, layer.out_features, bias, device="meta", dtype=dtype)
    else:
        raise UnsupportedError(f"No dense layer is known that computes what {type(layer).__name__} does.")
    dense.weight = nn.Parameter(layer.dense_weight().detach(), requires_grad=layer.values.requires_grad)
    dense.bias = layer.bias
    return dense


@torch.no_grad()
def scattered(per_slot: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """``per_slot`` [slots] at the active entries of a dense tensor of ``shape``, 0 elsewhere."""
    kept = index >= 0
    flat = per_slot.new_zeros(torch.Size(shape).numel())
    flat[index[kept].long()] = per_slot[kept]
    return flat.view(shape)
