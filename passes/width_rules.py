"""Width rules of layers: convolution, linear, norms, embedding; see width_registry.py for what a rule is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from sift_compiler.passes.operators import arguments, place
from sift_compiler.passes.width_context import WidthContext, Widths
from sift_compiler.passes.width_registry import frozen, register


def convolution(context: WidthContext, node: Node, x: Any, weight: Tensor, bias: Tensor | None, groups: int) -> Widths:
    """x [N, in, ...], weight [out, in / groups, ...] → [N, out, ...]; more groups tie in to out, as in a depthwise convolution."""
    kernel = range(2, weight.dim())
    more_groups = groups > 1 and (weight.shape[1] == 1 or context.choices.groups == "group_width_fixed")
    out, inner = context.parameter(weight, (1, *kernel) if more_groups else tuple(kernel))[:2]
    channels, spatial = context.of(x)[-weight.dim() + 1], context.of(x)[-weight.dim() + 2 :]
    context.pin(spatial, f"{place(node)} slides over it")
    if more_groups:
        count = context.fresh(groups, f"{node.name}.groups")
        context.unify(channels, count.times(weight.shape[1]), node)
        context.unify(out, count.times(weight.shape[0] // groups), node)
        context.literal(node, "groups", None, context.resolved(count))
        if weight.shape[1] > 1:
            context.counts.append(count)
    elif groups > 1:
        each = context.fresh(weight.shape[0] // groups, f"{node.name}.group")
        context.unify(channels, inner.times(groups), node)
        context.unify(out, each.times(groups), node)
    else:
        context.unify(channels, inner, node)
    for width in context.parameter(bias):
        context.unify(width, out, node)
    result = list(context.result(node))
    result[-weight.dim() + 1] = context.resolved(out)
    result[: -weight.dim() + 1] = context.of(x)[: -weight.dim() + 1]
    return tuple(result)


def linear(context: WidthContext, node: Node, x: Any, weight: Tensor, bias: Tensor | None) -> Widths:
    """x [..., in], weight [out, in] → [..., out]."""
    out, inner = context.parameter(weight)
    context.unify(context.of(x)[-1], inner, node)
    for width in context.parameter(bias):
        context.unify(width, out, node)
    return (*context.of(x)[:-1], context.resolved(out))


def channel_norm(context: WidthContext, node: Node, x: Any, tensors: list[Tensor | None]) -> Widths:
    """Batch norm and its like: every tensor is as long as dimension 1."""
    for tensor in tensors:
        for width in context.parameter(tensor):
            context.unify(width, context.of(x)[1], node)
    return context.of(x)  # type: ignore[no-any-return]


def trailing_norm(context: WidthContext, node: Node, x: Any, tensors: list[Tensor | None], rank: int) -> Widths:
    """Layer norm and its like: every tensor has the shape of the last ``rank`` dimensions."""
    for tensor in tensors:
        if tensor is not None:
            context.unify_all(context.parameter(tensor), context.of(x)[-rank:], node)
    return context.of(x)  # type: ignore[no-any-return]


def embedding(context: WidthContext, node: Node, indices: Any, weight: Tensor) -> Widths:
    """indices [...], weight [entries, width] → [..., width]."""
    return (*context.of(indices), context.parameter(weight, (0,))[1])


def _convolution(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    weight = context.tensor(call["weight"])
    if weight is None:
        return frozen(context, node)  # type: ignore[no-any-return]
    return convolution(context, node, call["input"], weight, context.tensor(call["bias"]), call["groups"])


def _linear(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    weight = context.tensor(call["weight"])
    if weight is None:
        return frozen(context, node)  # type: ignore[no-any-return]
    return linear(context, node, call["input"], weight, context.tensor(call["bias"]))


def _batch_norm(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    tensors = [context.tensor(call[name]) for name in ("weight", "bias", "running_mean", "running_var")]
    return channel_norm(context, node, call["input"], tensors)


def _group_norm(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    channels = context.of(call["input"])[1]
    if not channels.fixed and channels.factor % call["num_groups"]:
        group = context.fresh(context.size(channels) // call["num_groups"], f"{node.name}.group")
        context.unify(channels, group.times(call["num_groups"]), node)
    return channel_norm(context, node, call["input"], [context.tensor(call["weight"]), context.tensor(call["bias"])])


def _layer_norm(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    rank = len(call["normalized_shape"])
    for position, width in enumerate(context.of(call["input"])[-rank:]):
        context.literal(node, "normalized_shape", position, width)
    tensors = [context.tensor(call.get(name)) for name in ("weight", "bias")]
    return trailing_norm(context, node, call["input"], tensors, rank)


def _embedding(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    weight = context.tensor(call["weight"])
    return frozen(context, node) if weight is None else embedding(context, node, call["indices"], weight)


register(_convolution, "conv1d", "conv2d", "conv3d")
register(_linear, "linear.default")
register(_batch_norm, "batch_norm.default", "instance_norm.default")
register(_group_norm, "group_norm.default")
register(_layer_norm, "layer_norm.default", "rms_norm.default")
register(_embedding, "embedding.default")
