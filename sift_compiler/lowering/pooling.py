"""Pooling in graphs traced for inference: recognised; max pooling is given to a kernel of the runtime."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sift_compiler.lowering.partition import fake
from sift_compiler.nn import image_vectors as image_vectors  # registers the operator


def pooling(node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel, stride and padding of a max pooling, None for anything else."""
    if node.target is not torch.ops.aten.max_pool2d.default or node.kwargs:
        return None
    given: tuple[Any, ...] = (*node.args[1:], *(None,) * 5)
    kernel, stride, padding, dilation, ceil, *_ = given
    pairs = [[value] * 2 if isinstance(value, int) else list(value or ()) for value in (kernel, stride, padding)]
    plain = (dilation is None or set(dilation) == {1}) and not ceil
    return (pairs[0], pairs[1] or pairs[0], pairs[2] or [0, 0]) if plain else None


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
