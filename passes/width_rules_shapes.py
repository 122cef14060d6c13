"""Width rules of operators that move, join or divide dimensions; see width_registry.py for what a rule is."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from sift_compiler.ir.width import Width, fixed
from sift_compiler.passes.operators import arguments, place
from sift_compiler.passes.reshape_widths import reshaped
from sift_compiler.passes.width_context import WidthContext, Widths
from sift_compiler.passes.width_registry import broadcast_width, register, register_width_rule
from sift_compiler.passes.width_rules import broadcast

# --- shapes ------------------------------------------------------------------------------------------------------------


def _reshape(context: WidthContext, node: Node) -> Widths:
    widths = reshaped(context, node, context.of(node.args[0]), context.result(node))
    call = arguments(node)
    name = next((name for name in ("size", "shape") if name in call), None)
    if name is not None:
        _note_sizes(context, node, name, call[name], widths)
    return widths


def _note_sizes(context: WidthContext, node: Node, name: str, sizes: Any, widths: Widths) -> None:
    for position, (size, width) in enumerate(zip(sizes, widths, strict=False)):
        if isinstance(size, int) and size != -1 and not width.fixed:
            context.literal(node, name, position, width)


def _unflatten(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    widths = reshaped(context, node, context.of(node.args[0]), context.result(node))
    start = call["dim"] % len(context.of(node.args[0]))
    _note_sizes(context, node, "sizes", call["sizes"], widths[start:])
    return widths


register(
    _reshape,
    "view.default",
    "reshape.default",
    "_unsafe_view.default",
    "flatten.using_ints",
    "squeeze",
    "unsqueeze.default",
)
register(_unflatten, "unflatten.int")


def _permute(context: WidthContext, node: Node) -> Widths:
    widths = context.of(node.args[0])
    return tuple(widths[dimension] for dimension in arguments(node)["dims"])


def _transpose(context: WidthContext, node: Node) -> Widths:
    call, widths = arguments(node), list(context.of(node.args[0]))
    if len(widths) < 2:
        return tuple(widths)
    one, other = call.get("dim0", 0), call.get("dim1", 1)
    widths[one], widths[other] = widths[other], widths[one]
    return tuple(widths)


register(_permute, "permute.default")
register(_transpose, "transpose.int", "t.default", "numpy_T.default")


def _expand(context: WidthContext, node: Node) -> Widths:
    widths, result = context.of(node.args[0]), list(context.result(node))
    for position in range(-1, -len(widths) - 1, -1):
        result[position] = broadcast_width(context, node, [widths[position]], result[position])
    _note_sizes(context, node, "size", arguments(node)["size"], tuple(result))
    return tuple(result)


register(_expand, "expand.default")
register(broadcast, "expand_as.default")


# --- joining and dividing ----------------------------------------------------------------------------------------------


def _concatenate(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    parts = [context.of(each) for each in call["tensors"]]
    parts = [part for part in parts if len(part) == len(context.result(node))]
    axis = call["dim"] % len(parts[0])
    result = list(parts[0])
    for part in parts[1:]:
        for position, width in enumerate(part):
            if position == axis:
                result[axis] = context.resolved(result[axis]).plus(width)
            else:
                context.unify(result[position], width, node)
    return tuple(context.resolved(width) for width in result)


def _stack(context: WidthContext, node: Node) -> Widths:
    call = arguments(node)
    parts = [context.of(each) for each in call["tensors"]]
    for part in parts[1:]:
        context.unify_all(parts[0], part, node)
    result = list(context.resolved(parts[0]))
    result.insert(call["dim"] % (len(result) + 1), fixed(len(parts)))
    return tuple(result)


def _divide(context: WidthContext, node: Node) -> tuple[Widths, ...]:
    """chunk, split: equal parts share a new width; unequal parts follow a concatenation they undo, or are pinned."""
    call, widths = arguments(node), context.of(node.args[0])
    axis = call["dim"] % len(widths)
    results = [context.sizes(each) for each in node.meta["val"]]
    sizes = [each[axis].constant for each in results]
    parts = _parts(context, node, widths[axis], sizes)
    if isinstance(call.get("split_size"), int):
        context.literal(node, "split_size", None, parts[0])
    for position, part in enumerate(parts):
        if isinstance(call.get("split_sizes", call.get("split_size")), (list, tuple)):
            context.literal(node, "split_sizes" if "split_sizes" in call else "split_size", position, part)
    return tuple((*widths[:axis], part, *widths[axis + 1 :]) for part in parts)


def _parts(context: WidthContext, node: Node, width: Width, sizes: list[int]) -> list[Width]:
    if width.fixed:
        return [fixed(size) for size in sizes]
    if len(set(sizes)) == 1:
        if width.factor % len(sizes) == 0:
            return [width.divided(len(sizes))] * len(sizes)
        part = context.fresh(sizes[0], f"{node.name}.part")
        context.unify(width, part.times(len(sizes)), node)
        return [context.resolved(part)] * len(sizes)
    own = [Width((term,)) for term in width.terms] + ([fixed(width.constant)] if width.constant else [])
    if [context.size(part) for part in own] == sizes:
        return own
    context.pin(width, f"{place(node)} divides it into unequal parts")
    return [fixed(size) for size in sizes]


register(_concatenate, "cat.default", "concat.default")
register(_stack, "stack.default")
register(_divide, "chunk.default", "split.Tensor", "split.sizes", "split_with_sizes.default")


def _slice(context: WidthContext, node: Node) -> Widths:
    call, widths, result = arguments(node), context.of(node.args[0]), context.result(node)
    axis = call["dim"] % len(widths)
    if context.size(widths[axis]) == result[axis].constant and call["step"] == 1:
        return widths  # type: ignore[no-any-return]
    context.pin(widths[axis], f"{place(node)} takes a part of it")
    return (*widths[:axis], result[axis], *widths[axis + 1 :])


def _select(context: WidthContext, node: Node) -> Widths:
    widths = context.of(node.args[0])
    axis = arguments(node)["dim"] % len(widths)
    context.pin(widths[axis], f"{place(node)} selects from it")
    return (*widths[:axis], *widths[axis + 1 :])


def _unbind(context: WidthContext, node: Node) -> tuple[Widths, ...]:
    widths = context.of(node.args[0])
    axis = arguments(node)["dim"] % len(widths)
    context.pin(widths[axis], f"{place(node)} takes it apart")
    return tuple((*widths[:axis], *widths[axis + 1 :]) for _ in node.meta["val"])


register(_unbind, "unbind.int")
register(_slice, "slice.Tensor")
register(_select, "select.int")


# --- what has no width of its own --------------------------------------------------------------------------------------


def _plain(context: WidthContext, node: Node) -> Any:
    return context.result(node)


register(
    _plain,
    "arange",
    "zeros.default",
    "ones.default",
    "full.default",
    "empty.memory_format",
    "scalar_tensor",
    "sym_size",
    "linspace",
)


def _item(context: WidthContext, node: Node) -> Any:
    whole, key = node.args
    widths = context.of(whole)
    return widths[key] if isinstance(key, int) and widths and not isinstance(widths[0], Width) else context.result(node)


register_width_rule(operator.getitem, _item)
