"""Width rules of operators that move, merge or divide dimensions; see width_registry.py for what a rule is."""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import Node

from sift_compiler.ir.width import Width, fixed
from sift_compiler.passes.operators import arguments, lengthened, place
from sift_compiler.passes.reshape_widths import reshaped
from sift_compiler.passes.width_context import WidthContext, Widths
from sift_compiler.passes.width_registry import broadcast_width, frozen, register
from sift_compiler.passes.width_rules_elementwise import broadcast


def _reshape(context: WidthContext, node: Node) -> Widths:
    widths = reshaped(context, node, context.of(node.args[0]), context.result(node))
    call = arguments(node)
    name = next((name for name in ("size", "shape") if name in call), None)
    if name is not None:
        _note_sizes(context, node, name, call[name], widths)
    return widths


def _note_sizes(context: WidthContext, node: Node, name: str, sizes: Any, widths: Widths) -> None:
    for position, (size, width) in enumerate(zip(sizes, widths, strict=False)):
        if width.fixed or size == -1:
            continue
        if isinstance(size, int):
            context.literal(node, name, position, width)
        elif not _note_factor(context, size, width):
            context.pin(width, f"{place(node)} computes it from another size")


def _note_factor(context: WidthContext, size: Any, width: Width) -> bool:
    """A size computed as ``batch * heads``: the number in it is a width."""
    if not (isinstance(size, Node) and size.target is operator.mul and len(width.terms) == 1 and not width.constant):
        return False
    for position, number in enumerate(size.args):
        present = context.size(Width(((width.terms[0][0], 1),)))
        if isinstance(number, int) and number % present == 0:
            context.literal(size, "", position, Width(((width.terms[0][0], number // present),)))
            return True
    return False


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
    one, other = (
        call.get(name, call.get(name.replace("dim", "axis"), number)) for number, name in enumerate(("dim0", "dim1"))
    )
    widths[one], widths[other] = widths[other], widths[one]
    return tuple(widths)


register(_permute, "permute.default")


def _matrix_transpose(context: WidthContext, node: Node) -> Widths:
    widths = context.of(node.args[0])
    return (*widths[:-2], widths[-1], widths[-2])


register(_transpose, "transpose.int", "t.default", "numpy_T.default", "swapaxes.default", "swapdims.default")
register(_matrix_transpose, "mT.default", "mH.default", "adjoint.default")


def _expand(context: WidthContext, node: Node) -> Widths:
    widths, result = context.of(node.args[0]), list(context.result(node))
    for position in range(-1, -len(widths) - 1, -1):
        result[position] = broadcast_width(context, node, [widths[position]], result[position])
    _note_sizes(context, node, "size", arguments(node)["size"], tuple(result))
    return tuple(result)


register(_expand, "expand.default")
register(broadcast, "expand_as.default")


def _move(context: WidthContext, node: Node) -> Widths:
    call, widths = arguments(node), context.of(node.args[0])
    source, target = ([each % len(widths) for each in lengthened(call[name], 1)] for name in ("source", "destination"))
    order = [position for position in range(len(widths)) if position not in source]
    for goal, start in sorted(zip(target, source, strict=True)):
        order.insert(goal, start)
    return tuple(widths[position] for position in order)


def _repeat(context: WidthContext, node: Node) -> Widths:
    """Whole copies side by side, in front of new dimensions."""
    call, widths = arguments(node), context.of(node.args[0])
    repeats = list(call["repeats"] if "repeats" in call else call["dims"])
    repeats = [1] * (len(widths) - len(repeats)) + repeats
    aligned = [fixed(1)] * (len(repeats) - len(widths)) + list(widths)
    result = list(context.result(node))
    for position, (width, count) in enumerate(zip(aligned, repeats, strict=True)):
        if isinstance(count, int):
            result[position] = width.times(count)
        else:
            context.pin(width, f"{place(node)} repeats it a computed number of times")
    return tuple(result)


def _repeat_interleave(context: WidthContext, node: Node) -> Widths:
    call, widths = arguments(node), list(context.of(node.args[0]))
    if call["dim"] is None or not isinstance(call["repeats"], int):
        return frozen(context, node)  # type: ignore[no-any-return]
    axis = call["dim"] % len(widths)
    widths[axis] = widths[axis].times(call["repeats"])
    return tuple(widths)


def _pixel_shuffle(context: WidthContext, node: Node) -> Widths:
    """[..., C r r, H, W] → [..., C, H r, W r]."""
    widths, result = context.of(node.args[0]), context.result(node)
    square = arguments(node)["upscale_factor"] ** 2
    context.pin(widths[-2:], f"{place(node)} enlarges it")
    if widths[-3].fixed:
        return (*widths[:-3], *result[-3:])
    channels = context.fresh(result[-3].constant, f"{node.name}.channels")
    context.unify(widths[-3], channels.times(square), node)
    return (*widths[:-3], context.resolved(channels), *result[-2:])


def _pixel_unshuffle(context: WidthContext, node: Node) -> Widths:
    """[..., C, H r, W r] → [..., C r r, H, W]."""
    widths = context.of(node.args[0])
    context.pin(widths[-2:], f"{place(node)} reduces it")
    return (*widths[:-3], widths[-3].times(arguments(node)["downscale_factor"] ** 2), *context.result(node)[-2:])


def _unfold_image(context: WidthContext, node: Node) -> Widths:
    """[N, C, H, W] → [N, C kh kw, positions]."""
    widths, kernel = context.of(node.args[0]), arguments(node)["kernel_size"]
    context.pin(widths[-2:], f"{place(node)} slides over it")
    return (*widths[:-3], widths[-3].times(kernel[0] * kernel[1]), context.result(node)[-1])


register(_move, "movedim.intlist", "movedim.int")
register(_repeat, "repeat.default", "tile.default")
register(_repeat_interleave, "repeat_interleave.self_int")
register(_pixel_shuffle, "pixel_shuffle.default")
register(_pixel_unshuffle, "pixel_unshuffle.default")
register(_unfold_image, "im2col.default")
