"""Dense convolutions of few input channels that lead to sparse ones, given to the kernels of those, in graphs traced for inference.

The first convolution of a network reads the image and writes the largest tensor there is. As a sparse layer that keeps every weight it
computes batch norm and activation before it stores, and stores what the sparse layers behind it read (see image_vectors).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from sift_compiler.lowering.partition import fake
from sift_compiler.lowering.pooling import pooling
from sift_compiler.nn import operators as operators  # registers torch.ops.sift

_CONVOLUTIONS = (torch.conv2d, F.conv2d, torch.ops.aten.conv2d.default)
_BETWEEN = (
    F.batch_norm,
    torch.batch_norm,
    F.relu,
    torch.relu,
    torch.ops.aten.relu.default,
    torch.ops.aten.relu_.default,
)
_MOST_CHANNELS = 4


def take_first_layers(graph: fx.Graph) -> frozenset[fx.Node]:
    """Turn such convolutions into ``sift::conv2d`` without an index: their kernels have to know that every weight is kept.

    Args:
        graph: holds fake tensors as Dynamo leaves them.

    Returns:
        The new calls.
    """
    taken = set()
    for node in [node for node in graph.nodes if _is_first(node)]:
        given: list[Any] = [*node.args, *_DEFAULTS[len(node.args) :]]
        x, weight, bias, stride, padding, dilation, groups = given
        shape = [int(size) for size in fake(weight).shape]
        with graph.inserting_before(node):
            values = graph.call_method("reshape", (weight, -1))
            values.meta["example_value"] = fake(weight).reshape(-1)
            index = graph.call_method("new_empty", (weight, (0,)), {"dtype": torch.int32})
            index.meta["example_value"] = fake(weight).new_empty((0,), dtype=torch.int32)
            arguments = (x, values, index, bias, shape, _pair(stride), _pair(padding), _pair(dilation), groups)
            made = graph.call_function(torch.ops.sift.conv2d, arguments)
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
        taken.add(made)
    return frozenset(taken)


_DEFAULTS = (None, None, None, 1, 0, 1, 1)


def _pair(value: Any) -> list[int]:
    return [value] * 2 if isinstance(value, int) else [int(number) for number in value]


def _is_first(node: fx.Node) -> bool:
    if (
        node.target not in _CONVOLUTIONS
        or node.kwargs
        or any(isinstance(value, fx.Node | str) for value in node.args[3:])
    ):
        return False
    x, weight = fake(node.args[0]), fake(node.args[1])  # type: ignore[arg-type]
    plain = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 4
    groups = node.args[6] if len(node.args) > 6 else 1
    if not plain or groups != 1 or not all(isinstance(size, int) for size in x.shape):
        return False
    return 0 < x.shape[1] <= _MOST_CHANNELS and x.shape[0] > 0 and _leads_to_sparse(node)


def _leads_to_sparse(node: fx.Node) -> bool:
    """Whether a sparse convolution reads the result, with nothing but norms, activations and pooling between."""
    for user in node.users:
        if (
            getattr(user.target, "_qualified_op_name", "") == "sift::conv2d"
            or user.target is torch.ops.sift.conv2d.default
        ):
            return True
        if (user.target in _BETWEEN or pooling(user) is not None) and _leads_to_sparse(user):
            return True
    return False
