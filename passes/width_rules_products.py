"""Width rules of matrix products and attention; see width_registry.py for what a rule is."""

from __future__ import annotations

import math

from torch.fx import Node

from sift_compiler.ir.width import Width
from sift_compiler.passes.operators import arguments, place
from sift_compiler.passes.width_context import WidthContext, Widths
from sift_compiler.passes.width_registry import aten, broadcast_width, register
from sift_compiler.passes.width_rules_elementwise import broadcast


def is_power(number: float, size: int, power: float) -> bool:
    """Whether ``number`` was computed as ``size ** power``."""
    return math.isclose(number, size**power, rel_tol=1e-6)


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


def _baddbmm(context: WidthContext, node: Node) -> Widths:
    """bias [b or 1, n or 1, m] + x [b, n, k] · y [b, k, m] → [b, n, m]."""
    call = arguments(node)
    bias, left, right = (context.of(call[name]) for name in ("self", "batch1", "batch2"))
    context.unify(left[-1], right[-2], node)
    context.unify(left[0], right[0], node)
    result = list(context.resolved((left[0], left[1], right[2])))
    for position, width in enumerate(reversed(bias)):
        place_in_result = len(result) - 1 - position
        aligned = [width, result[place_in_result]]
        result[place_in_result] = broadcast_width(context, node, aligned, context.result(node)[place_in_result])
    return tuple(context.resolved(width) for width in result)


def _outer(context: WidthContext, node: Node) -> Widths:
    """[n] x [m] → [n, m]."""
    left, right = (context.of(each) for each in node.args[:2])
    return (left[0], right[0])


def _einsum(context: WidthContext, node: Node) -> Widths:
    """A letter is one width; an ellipsis stands for leading dimensions that broadcast."""
    call = arguments(node)
    operands = [context.of(each) for each in call["tensors"]]
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    terms = inputs.split(",")
    letters: dict[str, Width] = {}
    leading: list[Widths] = []
    for term, widths in zip(terms, operands, strict=True):
        before, dots, after = term.partition("...")
        tail = widths[len(widths) - len(after) :] if dots else widths[len(before) :]
        for letter, width in [*zip(before, widths, strict=False), *zip(after, tail, strict=False)]:
            if letter in letters:
                context.unify(letters[letter], width, node)
            letters.setdefault(letter, width)
        leading.append(widths[len(before) : len(widths) - len(after)] if dots else ())
    if not arrow:
        everything = inputs.replace(",", "").replace("...", "")
        output = "..." * ("..." in inputs) + "".join(
            letter for letter in sorted(set(everything)) if everything.count(letter) == 1
        )
    before, dots, _ = output.partition("...")
    result = list(context.result(node))
    named = output.replace("...", "")
    dotted = len(result) - len(named)
    for position, letter in enumerate(named):
        result[position + (dotted if dots and position >= len(before) else 0)] = letters[letter]
    for position in range(-1, -dotted - 1, -1):
        where = len(before) + dotted + position
        aligned = [widths[position] for widths in leading if len(widths) >= -position]
        result[where] = broadcast_width(context, node, aligned, result[where])
    return tuple(context.resolved(width) for width in result)


def attention(context: WidthContext, node: Node) -> Widths:
    """query [..., h, t, e], key [..., g, s, e], value [..., g, s, v] → [..., h, t, v]; g is h, or a part of it (grouped queries)."""
    query, key, value = (context.of(each) for each in node.args[:3])
    context.unify(query[-1], key[-1], node)
    context.unify(key[-2], value[-2], node)
    for one, other in ((query, key), (key, value)):
        for left, right in zip(one[:-2], other[:-2], strict=False):
            _tie_heads(context, node, left, right)
    result = list(context.resolved((*query[:-1], value[-1])))
    _note_scale(context, node, query[-1])
    mask = context.of(node.args[3]) if len(node.args) > 3 else ()
    for position in range(-3, -len(mask) - 1, -1):
        aligned = [mask[position], result[position]]
        result[position] = broadcast_width(context, node, aligned, result[position])
    return tuple(context.resolved(width) for width in result)


def _note_scale(context: WidthContext, node: Node, width: Width) -> None:
    """A scale of 1 / sqrt(e) that is written as a number follows the width of a head."""
    if node.op == "call_module":
        scale = getattr(context.graph_module.get_submodule(str(node.target)), "scale", None)
    else:
        scale = arguments(node)["scale"]
    if isinstance(scale, float) and is_power(scale, context.size(width), -0.5):
        context.literal(node, "scale", None, width, -0.5)


def _tie_heads(context: WidthContext, node: Node, left: Width, right: Width) -> None:
    queries, keys = context.size(left), context.size(right)
    if queries == keys:
        context.unify(left, right, node)
    elif not queries % keys and keys > 1:
        context.unify(left, right.times(queries // keys), node)
    else:
        context.pin((left, right), f"{place(node)} stretches it")


register(_matmul, "matmul.default", "mm.default", "bmm.default", "mv.default", "dot.default")
register(_addmm, "addmm.default")
register(_baddbmm, "baddbmm.default")
register(_outer, "outer.default")
register(_einsum, "einsum.default")
register(attention, "scaled_dot_product_attention.default")


def _scaled(context: WidthContext, node: Node) -> Widths:
    """x * s and x / s next to a product over a width e, with s = e ** -0.5 or e ** 0.5: the scale of attention scores follows e."""
    widths = broadcast(context, node)
    number = node.args[1] if len(node.args) > 1 else None
    power = -0.5 if node.target is aten.mul.Tensor else 0.5
    if isinstance(number, float) and isinstance(node.args[0], Node):
        for width in _contracted(context, node):
            if is_power(number, context.size(width), power):
                context.literal(node, "other", None, width, power)
                break
    return widths


def _contracted(context: WidthContext, node: Node) -> list[Width]:
    """The width that the product before the node sums over, or the one a product after it will."""
    before = node.args[0]
    assert isinstance(before, Node)
    if before.target in (aten.matmul.default, aten.bmm.default):
        return [context.of(before.args[0])[-1]]
    waiting, found = list(node.users), []
    while waiting:
        user = waiting.pop()
        if user.target in (aten.matmul.default, aten.bmm.default, aten.baddbmm.default):
            found.append(context.of(before)[-1])
        elif user.target in (aten.transpose.int, aten.permute.default, aten.contiguous.default, aten.clone.default):
            waiting += user.users
    return found


register(_scaled, "mul.Tensor", "div.Tensor")
