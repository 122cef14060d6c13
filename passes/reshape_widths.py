"""Widths through a reshape: which dimensions of the result carry which widths of the argument.

Consecutive dimensions are grouped where their sizes multiply to the same number:

    [N, C, 7, 7] → [N, 49 C]          N | C 7 7 → one dimension of 49 C
    [N, T, H D]  → [N, T, H, D]       N | T | H D → H is kept, D grows
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import Node

from sift_compiler.ir.width import Width, fixed
from sift_compiler.passes.operators import place
from sift_compiler.passes.width_context import WidthContext, Widths


def reshaped(context: WidthContext, node: Node, before: Widths, after: Widths) -> Widths:
    """Widths of the result of a reshape of a tensor with widths ``before`` to the sizes ``after``."""
    result = list(after)
    sizes_before, sizes_after = [context.size(width) for width in before], [width.constant for width in after]
    for sources, targets in groups(sizes_before, sizes_after):
        widths = [before[position] for position in sources]
        if len(targets) == 1 and sources:
            result[targets[0]] = _merged(context, node, widths)
        elif len(sources) == 1 and targets:
            parts = _split(context, node, widths[0], [sizes_after[position] for position in targets])
            for position, part in zip(targets, parts, strict=True):
                result[position] = after[position] if part.fixed else part
        else:
            for position, part in zip(
                targets, _regrouped(context, node, widths, [after[each] for each in targets]), strict=True
            ):
                result[position] = part
    return tuple(result)


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest grouping of consecutive dimensions with equal products; trailing ones form a group of their own."""
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        sources, targets = [i], [j]
        left, right = before[i], after[j]
        i, j = i + 1, j + 1
        while left != right and (i < len(before) or j < len(after)):
            if left < right and i < len(before):
                sources.append(i)
                left, i = left * before[i], i + 1
            elif j < len(after):
                targets.append(j)
                right, j = right * after[j], j + 1
            else:
                break
        result.append((sources, targets))
    if i < len(before) or j < len(after):
        result.append((list(range(i, len(before))), list(range(j, len(after)))))
    return result


def _merged(context: WidthContext, node: Node, widths: list[Width]) -> Width:
    growing = [width for width in widths if not width.fixed]
    rest = [width for width in widths if width.fixed and context.size(width) != 1]
    if len(growing) > 1 or (growing and any(width.dynamic for width in rest)):
        context.pin(growing, f"{place(node)} multiplies it with another size that is not a plain number")
        growing = []
    if not growing:
        dynamic = any(width.dynamic for width in widths)
        return fixed(math.prod(context.size(width) for width in widths), dynamic)
    return growing[0].times(math.prod(context.size(width) for width in rest))


def _split(context: WidthContext, node: Node, width: Width, sizes: list[int]) -> list[Width]:
    """One of the parts grows: the width of attention heads or their number, as chosen; else one that needs no new constraint if there
    is one; else the last."""
    parts = [fixed(size) for size in sizes]
    candidates = [position for position in range(len(sizes) - 1, -1, -1) if sizes[position] > 1]
    if width.fixed or not candidates:
        return parts
    total, heads = math.prod(sizes), node in context.head_splits and len(sizes) > 1
    if heads and context.more_heads(node) and sizes[-2] > 1:
        candidates = [len(sizes) - 2]
    elif not heads or sizes[-1] == 1:
        free = [position for position in candidates if width.factor % (total // sizes[position]) == 0]
        candidates = [*free, *candidates]
    grown = candidates[0]
    part = _part(context, node, width, sizes[grown], total // sizes[grown])
    if heads:
        _note_heads(context, node, part, number=context.more_heads(node))
    parts[grown] = part
    return parts


def _part(context: WidthContext, node: Node, width: Width, size: int, others: int) -> Width:
    if width.factor % others == 0:
        return width.divided(others)
    part = context.fresh(size, f"{node.name}.part")
    context.unify(width, part.times(others), node)
    return context.resolved(part)  # type: ignore[no-any-return]


def _note_heads(context: WidthContext, node: Node, part: Width, number: bool) -> None:
    if number:
        context.counts.append(part)
    else:
        context.head_parts.append((node, part))


def _regrouped(context: WidthContext, node: Node, before: list[Width], after: list[Width]) -> list[Width]:
    """Several dimensions become several others, as when heads move into the batch and back: [n, h d] → [n h, d], [n h, d] → [n, h d]."""
    growing = [position for position, width in enumerate(before) if not width.fixed]
    sizes, targets = [context.size(width) for width in before], [context.size(width) for width in after]
    if len(growing) == 1 and growing[0] == len(before) - 1 and len(after) == 2 and sizes[-1] % targets[-1] == 0:
        heads = sizes[-1] // targets[-1]
        if not context.more_heads(node):
            part = _part(context, node, before[-1], targets[-1], heads)
            if node in context.head_splits:
                _note_heads(context, node, part, number=False)
            return [after[0], part]
        count = _part(context, node, before[-1], heads, targets[-1])
        _note_heads(context, node, count, number=True)
        return [Width(count.times(targets[0] // heads).terms, 0, after[0].dynamic), after[1]]
    if len(growing) == 1 and len(before[growing[0]].terms) == 1 and not before[growing[0]].constant:
        key = before[growing[0]].terms[0][0]
        each = context.size(Width(((key, 1),)))
        if targets[-1] % (each * math.prod(sizes[growing[0] + 1 :])) == 0:
            return [*after[:-1], Width(((key, targets[-1] // each),))]
    context.pin(before, f"{place(node)} mixes dimensions")
    return after
