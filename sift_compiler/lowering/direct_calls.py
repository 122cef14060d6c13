"""Operators called as plain functions, in graphs for inference that run as they were traced.

The dispatcher, and what torch wraps around operators of Python, take longer the more layers have driven Python out of the caches: of a
whole network as much as a layer. Nothing asks the dispatcher for anything here: no gradients, no compiler
behind, plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from sift_compiler.nn import fused, image_vectors, live

_FUSED = (
    torch.ops.sift.conv2d_fused,
    torch.ops.sift.conv2d_fused.default,
    torch.ops.sift.linear_fused,
    torch.ops.sift.linear_fused.default,
)
_POOLS = (torch.ops.sift.max_pool2d, torch.ops.sift.max_pool2d.default)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def call_directly(graph: fx.Graph, example_inputs: Sequence[Any], freeze: bool) -> int:
    """Let fused layers and max poolings call their kernels; a graph with inputs of other types than plain tensors is left alone.

    Args:
        graph: needs no gradients and is not given to a compiler.
        example_inputs: the graph's inputs.
        freeze: keep scale and shift of a norm until its tensors change (see nn.fused.KeptNorm).

    Returns:
        How many calls changed.
    """
    if any(isinstance(value, torch.Tensor) and type(value) not in _PLAIN for value in example_inputs):
        return 0
    changed = 0
    for node in [node for node in graph.nodes if node.op == "call_function"]:
        direct = _direct(node, freeze)
        if direct is not None:
            node.target = direct
            changed += 1
    return changed


def _direct(node: fx.Node, freeze: bool) -> Callable[..., torch.Tensor] | None:
    # The handle is the last argument, where it is given at all.
    if node.target in _FUSED and len(node.args) == _count(node.target) and node.args[-1] != live.REFERENCE:
        return fused.direct(freeze)
    if node.target in _POOLS and len(node.args) == _count(node.target) and node.args[-1] != live.REFERENCE:
        return image_vectors.pool_directly
    return None


def _count(target: Any) -> int:
    operator = target if isinstance(target, torch._ops.OpOverload) else target.default
    return len(operator._schema.arguments)
