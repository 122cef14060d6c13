"""Keep images side by side in vectors from one sparse convolution to the next, in graphs that are traced for inference.

    conv(conv(x) + …)  →  from_image_vectors(conv(conv(to_image_vectors(x)) + …))

A kernel with lanes over images otherwise transposes its input and its output back, and both pass through memory once more. A
convolution takes part if the batch fills whole vectors and a neighbour does too: what it reads or adds comes from one, or one reads it.
Max pooling of what such a convolution returns counts as one. Whatever else reads its output gets it in the usual order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx

from sift_compiler.lowering.fuse import mutates
from sift_compiler.lowering.partition import fake
from sift_compiler.lowering.pooling import averages, pooling
from sift_compiler.nn.image_vectors import average_image_vectors, from_image_vectors, to_image_vectors

_MOST = 2**31 - 1
_X, _RESIDUAL = 0, 9
"""Positions of the arguments of conv2d_fused that change their layout."""


def keep_image_vectors(graph: fx.Graph, calls: Iterable[fx.Node], lanes: int, pool: int = 0) -> tuple[fx.Node, ...]:
    """Change the layout between those of ``calls`` that can take part.

    Args:
        graph: holds fake tensors as Dynamo leaves them.
        calls: nodes that call ``sift::conv2d_fused`` with kernels for either layout.
        lanes: images in a vector.
        pool: handle of a kernel for max pooling, 0 for the reference.

    Returns:
        The calls that took part, in the new layout.
    """
    able = {node for node in calls if fake(node.args[1]).numel() and _fits(node, lanes)}  # type: ignore[arg-type]
    for node in graph.nodes:
        if pooling(node) is not None and node.args[0] in able and _fits(node, lanes):
            able.add(node)
    chosen = {node for node in able if able & {*_sources(node), *node.users}}
    side_by_side: dict[fx.Node, fx.Node] = {}
    for node in [node for node in graph.nodes if node in chosen]:
        with graph.inserting_before(node):
            for source in _sources(node):
                if source not in side_by_side:
                    side_by_side[source] = _converted(graph, source, lanes)
            call = _moved(graph, node, side_by_side, pool)
        call.meta = {**node.meta, "example_value": _with_lanes(fake(node), lanes)}
        side_by_side[node] = call
    for node in chosen:
        _give_back(graph, node, side_by_side[node], chosen)
    for node in reversed([node for node in graph.nodes if node in chosen]):
        graph.erase_node(node)
    return tuple(side_by_side[node] for node in chosen if pooling(node) is None)


def _moved(graph: fx.Graph, node: fx.Node, side_by_side: dict[fx.Node, fx.Node], pool: int) -> fx.Node:
    """The same call on what lies side by side."""
    pooled = pooling(node)
    if pooled is not None:
        arguments = (side_by_side[node.args[0]], *pooled, pool)  # type: ignore[index]
        return graph.call_function(torch.ops.sift.max_pool2d.default, arguments)
    given = list(node.args)
    for place in (_X, _RESIDUAL):
        given[place] = side_by_side.get(node.args[place])  # type: ignore[arg-type]
    return graph.call_function(node.target, tuple(given))  # type: ignore[arg-type]


def _sources(node: fx.Node) -> tuple[fx.Node, ...]:
    """What a call reads in the layout of images: its input and its residual."""
    if pooling(node) is not None:
        return (node.args[0],)  # type: ignore[return-value]
    return tuple(source for source in (node.args[_X], node.args[_RESIDUAL]) if isinstance(source, fx.Node))


def _fits(node: fx.Node, lanes: int) -> bool:
    """Whether batch and sizes allow it, and nobody changes what the call reads or returns in place."""
    shapes = [fake(tensor).shape for tensor in (node, *_sources(node))]
    if not all(isinstance(size, int) for shape in shapes for size in shape):
        return False
    images = shapes[0][0]
    small = all(0 < math.prod(shape) <= _MOST for shape in shapes)
    still = not any(mutates(user) for tensor in (node, *_sources(node)) for user in tensor.users)
    return images > 0 and images % lanes == 0 and small and still


def _converted(graph: fx.Graph, source: fx.Node, lanes: int) -> fx.Node:
    node = graph.call_function(to_image_vectors, (source, lanes))
    node.meta = {"example_value": _with_lanes(fake(source), lanes)}
    return node


def _with_lanes(value: torch.Tensor, lanes: int) -> torch.Tensor:
    return value.new_empty((value.shape[0] // lanes, *value.shape[1:], lanes))


def _give_back(graph: fx.Graph, node: fx.Node, call: fx.Node, chosen: set[fx.Node]) -> None:
    """Everybody else reads what ``node`` returned in the usual order; averages over positions are taken where it lies."""
    for user in [user for user in node.users if user not in chosen and averages(user)]:
        with graph.inserting_before(user):
            mean = graph.call_function(average_image_vectors, (call, fake(user).dim() == 4))
        mean.meta = dict(user.meta)
        user.replace_all_uses_with(mean)
        graph.erase_node(user)
    others = [user for user in node.users if user not in chosen]
    if not others:
        return
    with graph.inserting_after(call):
        usual = graph.call_function(from_image_vectors, (call,))
        usual.meta = dict(node.meta)
    for user in others:
        user.replace_input_with(node, usual)
