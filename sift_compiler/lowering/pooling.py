"""Pooling in graphs traced for inference: recognised; max pooling is given to a kernel of the runtime."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sift_compiler.lowering.partition import fake
from sift_compiler.nn import image_vectors as image_vectors  # registers the operator

_MAX_POOLS = (torch.ops.aten.max_pool2d.default, torch.max_pool2d, F.max_pool2d)
_NAMES = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")


def pooling(node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel, stride and padding of a max pooling, None for anything else."""
    if node.target not in _MAX_POOLS or not node.args:
        return None
    given: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    kernel, stride, padding, dilation = (_pair(given.get(name)) for name in _NAMES[1:5])
    plain = given.keys() <= set(_NAMES) and not given.get("ceil_mode") and not given.get("return_indices")
    if not plain or not kernel or set(dilation) - {1}:
        return None
    return kernel, stride or kernel, padding or [0, 0]


def _pair(value: Any) -> list[int]:
    """One number for both directions, two numbers, or nothing."""
    if isinstance(value, int):
        return [value] * 2
    return [*value] * 2 if value and len(value) == 1 else list(value or ())


_ADAPTIVE = (F.adaptive_avg_pool2d, torch.ops.aten.adaptive_avg_pool2d.default)
_MEANS = ("mean", torch.mean, torch.ops.aten.mean.dim)


def averages(node: fx.Node) -> bool:
    """Whether a node is the average over all positions of an image, for every channel of [N, C, H, W]: [N, C, 1, 1] or [N, C]."""
    if node.target in _ADAPTIVE:
        return not node.kwargs and len(node.args) == 2 and node.args[1] in (1, (1, 1), [1, 1])
    if node.target not in _MEANS or fake(node.args[0]).dim() != 4:  # type: ignore[arg-type]
        return False
    given: dict[str, Any] = {**dict(zip(("input", "dim", "keepdim"), node.args, strict=False)), **node.kwargs}
    dims = given.get("dim")
    return (
        given.keys() <= {"input", "dim", "keepdim"}
        and isinstance(dims, tuple | list)
        and len(dims) == 2
        and all(isinstance(dim, int) for dim in dims)
        and {dim % 4 for dim in dims} == {2, 3}
    )


def take_pools(graph: fx.Graph, handle: int) -> None:
    """Let the kernel behind ``handle`` do the max poolings of float32 tensors [N, C, H, W] on the CPU."""
    for node in [node for node in graph.nodes if pooling(node) is not None]:
        arguments: tuple[Any, ...] = node.args
        geometry, value = pooling(node), fake(arguments[0])
        if geometry is None or value.dim() != 4 or value.dtype != torch.float32 or value.device.type != "cpu":
            continue
        with graph.inserting_before(node):
            made = graph.call_function(torch.ops.sift.max_pool2d.default, (arguments[0], *geometry, handle))
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
