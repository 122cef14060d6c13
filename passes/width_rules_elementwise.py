"""Width rules of elementwise operators and broadcasts; see width_registry.py for what a rule is."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from sift_compiler.passes.operators import arguments, place
from sift_compiler.passes.width_context import WidthContext, Widths
from sift_compiler.passes.width_registry import broadcast_width, register


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
    "lift_fresh_copy", "isnan", "isinf", "triu", "tril", "clamp.default", "pow.Tensor_Scalar", "threshold", "hardshrink", "softshrink", "flip", "roll", "pow.Scalar",
)  # fmt: skip
register(
    broadcast, "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "pow.Tensor_Tensor", "where.self", "where.ScalarOther",
    "where.ScalarSelf", "lerp", "addcmul", "addcdiv", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or",
    "bitwise_and", "bitwise_or", "__and__", "__or__", "logaddexp", "floor_divide", "true_divide", "multiply", "subtract", "divide", "atan2", "fmod", "remainder", "clamp.Tensor",
)  # fmt: skip


def _prelu(context: WidthContext, node: Node) -> Widths:
    """One slope for all, or one per channel (dimension 1)."""
    widths, slopes = (context.of(each) for each in node.args[:2])
    if slopes and context.size(slopes[0]) != 1 and len(widths) > 1:
        context.unify(slopes[0], widths[1], node)
    else:
        context.pin(slopes, f"{place(node)} has one slope for all")
    return context.of(node.args[0])  # type: ignore[no-any-return]


def _gated(context: WidthContext, node: Node) -> Widths:
    """glu: one half gates the other."""
    widths, axis = list(context.of(node.args[0])), arguments(node)["dim"]
    half = context.fresh(context.size(widths[axis]) // 2, f"{node.name}.half")
    context.unify(widths[axis], half.times(2), node)
    widths[axis] = context.resolved(half)
    return tuple(widths)


register(_prelu, "prelu.default", "_prelu_kernel.default")
register(_gated, "glu.default")
