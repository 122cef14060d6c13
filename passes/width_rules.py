"""Width rules of layers, elementwise operators, pooling and products; see width_registry.py for what a rule is."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from sift_compiler.ir.width import fixed
from sift_compiler.passes.operators import arguments, lengthened, place
from sift_compiler.passes.width_context import Rule, WidthContext, Widths
from sift_compiler.passes.width_registry import broadcast_width, frozen, register

# --- same shape, broadcasts --------------------------------------------------------------------------------------------


def unary(context: WidthContext, node: Node) -> Widths:
    """The result has the shape of the first argument."""
    return context.of(node.args[0])  # type: ignore[no-any-return]


def broadcast(context: WidthContext, node: Node) -> Widths:
    """Elementwise over several tensors: aligned from the right, sizes of 1 stretch."""
    operands = [context.of(each) for each in arguments(node).values() if isinstance(each, Node) and _is_tensor(each)]
    result = list(context.result(node))
    for position in range(-1, -len(result) - 1, -1):
        aligned = [widths[position] for widths in operands if len(widths) >= -position]
        result[position] = broadcast_width(context, node, aligned, result[position])
    return tuple(result)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor) or node.op == "get_attr"


register(
    unary, "relu", "relu6", "gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "leaky_relu", "elu", "selu",
    "celu", "mish", "softplus", "log_sigmoid", "exp", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "neg", "abs", "erf", "sin", "cos",
    "square", "sign", "round", "floor", "ceil", "clamp_min", "clamp_max", "clone", "contiguous", "detach", "detach_", "alias", "to",
    "_to_copy", "type_as", "dropout", "feature_dropout", "alpha_dropout", "softmax.int", "_softmax.default", "log_softmax.int",
    "bitwise_not", "logical_not", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "empty_like", "cumsum",
    "lift_fresh_copy", "isnan", "isinf", "triu", "tril", "clamp.default", "pow.Tensor_Scalar", "threshold", "hardshrink", "softshrink",
)  # fmt: skip
register(
    broadcast, "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "pow.Tensor_Tensor", "where.self", "where.ScalarOther",
    "where.ScalarSelf", "lerp", "addcmul", "addcdiv", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
    "bitwise_and", "bitwise_or", "prelu", "atan2", "fmod", "remainder", "clamp.Tensor",
)  # fmt: skip


# --- convolution, linear, norms, embedding: also used for modules ------------------------------------------------------


def convolution(context: WidthContext, node: Node, x: Any, weight: Tensor, bias: Tensor | None, groups: int) -> Widths:
    """x [N, in, ...], weight [out, in / groups, ...] → [N, out, ...]; a depthwise convolution ties in to out."""
    kernel = range(2, weight.dim())
    depthwise = groups > 1 and weight.shape[1] == 1
    out, inner = context.parameter(weight, (1, *kernel) if depthwise else tuple(kernel))[:2]
    channels, spatial = context.of(x)[-weight.dim() + 1], context.of(x)[-weight.dim() + 2 :]
    context.pin(spatial, f"{place(node)} slides over it")
    if depthwise:
        context.unify(out, channels.times(weight.shape[0] // groups), node)
        context.literal(node, "groups", None, context.resolved(channels))
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


# --- pooling, padding, reductions --------------------------------------------------------------------------------------


def _spatial(rank: int) -> Rule:
    def rule(context: WidthContext, node: Node) -> Widths:
        widths = context.of(node.args[0])
        context.pin(widths[-rank:], f"{place(node)} changes it")
        return (*widths[:-rank], *context.result(node)[-rank:])

    return rule


for _rank in (1, 2, 3):
    register(
        _spatial(_rank), f"max_pool{_rank}d.default", f"avg_pool{_rank}d.default", f"adaptive_avg_pool{_rank}d.default",
        f"upsample_nearest{_rank}d",
    )  # fmt: skip
register(_spatial(2), "upsample_bilinear2d", "upsample_bicubic2d")


def _pad(context: WidthContext, node: Node) -> Widths:
    return _spatial(len(arguments(node)["pad"]) // 2)(context, node)  # type: ignore[no-any-return]


register(_pad, "pad.default", "constant_pad_nd.default")


def _reduction(context: WidthContext, node: Node) -> Widths:
    call, widths = arguments(node), context.of(node.args[0])
    chosen = call.get("dim")
    dimensions = range(len(widths)) if chosen is None or chosen == [] else lengthened(chosen, 1)
    reduced = {dimension % len(widths) for dimension in dimensions} if widths else set()
    if call.get("keepdim"):
        return tuple(fixed(1) if position in reduced else width for position, width in enumerate(widths))
    return tuple(width for position, width in enumerate(widths) if position not in reduced)


register(
    _reduction, "mean.default", "mean.dim", "sum.default", "sum.dim_IntList", "amax.default", "amin.default", "std.dim",
    "var.dim", "std.correction", "var.correction", "argmax.default", "logsumexp.default", "prod.dim_int", "norm.ScalarOpt_dim",
)  # fmt: skip


# --- products ----------------------------------------------------------------------------------------------------------


def _matmul(context: WidthContext, node: Node) -> Widths:
    """[..., n, k] x [..., k, m] → [..., n, m]; a vector on either side has no n or no m."""
    left, right = (context.of(each) for each in node.args[:2])
    context.unify(left[-1], right[-2] if len(right) > 1 else right[-1], node)
    result = list(context.result(node))
    tail = [*left[-2:-1], *(right[-1:] if len(right) > 1 else ())]
    result[len(result) - len(tail) :] = tail
    for position in range(len(result) - len(tail)):
        back = position - len(result) + len(tail)
        aligned = [part[:-2][back] for part in (left, right) if len(part[:-2]) >= -back]
        result[position] = broadcast_width(context, node, aligned, result[position])
    return tuple(context.resolved(width) for width in result)


def _addmm(context: WidthContext, node: Node) -> Widths:
    """bias [m] + x [n, k] · weight [k, m] → [n, m]."""
    call = arguments(node)
    bias, left, right = (context.of(call[name]) for name in ("self", "mat1", "mat2"))
    context.unify(left[-1], right[-2], node)
    context.unify(bias[-1], right[-1], node)
    return (left[0], context.resolved(right[-1]))


def attention(context: WidthContext, node: Node) -> Widths:
    """query [..., t, e], key [..., s, e], value [..., s, v] → [..., t, v]."""
    query, key, value = (context.of(each) for each in node.args[:3])
    context.unify(query[-1], key[-1], node)
    context.unify(key[-2], value[-2], node)
    for one, other in ((query, key), (key, value)):
        for left, right in zip(one[:-2], other[:-2], strict=False):
            context.unify(left, right, node)
    return tuple(context.resolved(width) for width in (*query[:-1], value[-1]))


register(_matmul, "matmul.default", "mm.default", "bmm.default", "mv.default")
register(_addmm, "addmm.default")
register(attention, "scaled_dot_product_attention.default")
