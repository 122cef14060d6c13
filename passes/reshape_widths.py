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
            context.pin(widths, f"{place(node)} mixes dimensions")
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
    """One of the parts grows: one that needs no new constraint if there is one, else the last (heads stay, their dimension grows)."""
    parts = [fixed(size) for size in sizes]
    candidates = [position for position in range(len(sizes) - 1, -1, -1) if sizes[position] > 1]
    if width.fixed or not candidates:
        return parts
    total = math.prod(sizes)
    for position in candidates:
        others = total // sizes[position]
        if width.factor % others == 0:
            parts[position] = width.divided(others)
            return parts
    last = candidates[0]
    part = context.fresh(sizes[last], f"{node.name}[{last}]")
    context.unify(width, part.times(total // sizes[last]), node)
    parts[last] = context.resolved(part)
    return parts
