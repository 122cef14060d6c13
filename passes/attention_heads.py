"""Where a graph splits a width into attention heads.

Heads are split by a reshape on the way to an attention product: ``[n, t, h·d] → [n, t, h, d]``. Walking back from every attention
product, through whatever moves numbers without mixing them, finds these reshapes. Widening can make every head wider (more ``d``) or
give more heads of the same width (more ``h``).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.nn.attention import ScaledDotProductAttention

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SPLITS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int)
_MIXING = (aten.linear.default, aten.addmm.default, aten.scaled_dot_product_attention.default, *_PRODUCTS)
_PASSING_MODULES = (nn.LayerNorm, nn.Dropout)


def head_splits(graph_module: GraphModule) -> frozenset[Node]:
    """The last reshape on every way to an attention product that splits a dimension."""
    found: set[Node] = set()
    seen: set[Node] = set()
    waiting = [operand for node in graph_module.graph.nodes for operand in _operands(graph_module, node)]
    while waiting:
        node = waiting.pop()
        if node in seen or not _moves(graph_module, node):
            continue
        seen.add(node)
        if node.target in _SPLITS and _splits(node):
            found.add(node)  # farther ones split into query, key and value
        else:
            waiting += node.all_input_nodes
    return frozenset(found)


def _splits(node: Node) -> bool:
    """Whether a dimension of known size is gone after a reshape that does not merge."""
    source = node.args[0]
    assert isinstance(source, Node)
    before, after = source.meta["val"].shape, node.meta["val"].shape
    sizes, left = (Counter(size for size in shape if isinstance(size, int)) for shape in (before, after))
    return len(after) >= len(before) and bool(sizes - left)


def _operands(graph_module: GraphModule, node: Node) -> list[Node]:
    """Queries, keys and values of an attention product; of one written out, the operands of the products around its softmax."""
    module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
    if node.target is aten.scaled_dot_product_attention.default or isinstance(module, ScaledDotProductAttention):
        return node.all_input_nodes[:3]
    if node.target not in _SOFTMAX:
        return []
    before, after = _product_before(graph_module, node), _product_after(graph_module, node)
    return [*before.all_input_nodes, *after.all_input_nodes] if before is not None and after is not None else []


def _product_before(graph_module: GraphModule, node: Node | None) -> Node | None:
    while node is not None and node.target not in _PRODUCTS:
        node = node.all_input_nodes[0] if node.all_input_nodes and _moves(graph_module, node) else None
    return node


def _product_after(graph_module: GraphModule, node: Node) -> Node | None:
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if user.target in _PRODUCTS:
            return user
        if _moves(graph_module, user):
            waiting += user.users
    return None


def _moves(graph_module: GraphModule, node: Node) -> bool:
    if node.op == "call_module":
        return isinstance(graph_module.get_submodule(str(node.target)), _PASSING_MODULES)
    return node.op == "call_function" and node.target not in _MIXING
