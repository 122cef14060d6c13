"""Width rules of operators that take parts, and of what makes tensors from nothing; see width_registry.py for what a rule is."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from sift_compiler.ir.width import Width
from sift_compiler.passes.operators import arguments, place
from sift_compiler.passes.width_context import WidthContext, Widths
from sift_compiler.passes.width_registry import frozen, register, register_width_rule


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


def _index(context: WidthContext, node: Node) -> Widths:
    """x[:, i, j]: indexed dimensions are taken from; those that stay keep their widths."""
    widths, indices = context.of(node.args[0]), arguments(node)["indices"]
    taken = [position for position, index in enumerate(indices) if index is not None]
    context.pin([widths[position] for position in taken], f"{place(node)} takes parts of it")
    result = list(context.result(node))
    together = taken == list(range(taken[0], taken[-1] + 1))
    first, grown = (taken[0] if together else 0), len(result) - (len(widths) - len(taken))
    kept = [width for position, width in enumerate(widths) if position not in taken]
    for position, width in enumerate(kept):
        result[position if position < first else position + grown] = width
    return tuple(result)


def _index_select(context: WidthContext, node: Node) -> Widths:
    widths, result = context.of(node.args[0]), context.result(node)
    axis = arguments(node)["dim"] % len(widths)
    context.pin(widths[axis], f"{place(node)} takes parts of it")
    return (*widths[:axis], result[axis], *widths[axis + 1 :])


register(_unbind, "unbind.int")
register(_slice, "slice.Tensor")
register(_select, "select.int")
register(_index, "index.Tensor")
register(_index_select, "index_select.default", "narrow.default")


def _plain(context: WidthContext, node: Node) -> Any:
    return context.result(node)


register(
    _plain, "arange", "zeros.default", "ones.default", "full.default", "empty.memory_format", "scalar_tensor", "sym_size", "linspace", "eye",
)  # fmt: skip


def _item(context: WidthContext, node: Node) -> Any:
    whole, key = node.args
    widths = context.of(whole)
    return widths[key] if isinstance(key, int) and widths and not isinstance(widths[0], Width) else context.result(node)


register_width_rule(operator.getitem, _item)
register_width_rule(torch.ops.higher_order.wrap_with_set_grad_enabled, frozen)
register_width_rule(torch.ops.higher_order.wrap_with_autocast, frozen)
