"""Width rules of operators that join or divide; see width_registry.py for what a rule is."""

from __future__ import annotations

from torch.fx import Node

from sift_compiler.ir.width import Width, fixed
from sift_compiler.passes.operators import arguments, place
from sift_compiler.passes.width_context import WidthContext, Widths
from sift_compiler.passes.width_registry import register


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
