"""The registry of width rules, and what rules share.

A rule ties the widths of an operator's arguments (``context.unify``), pins what may not grow (``context.pin``), notes numbers in the
call that are widths (``context.literal``) and returns the widths of the result. To add one for an operator of your own:

    from sift_compiler.passes.width_registry import register_width_rule
    register_width_rule(torch.ops.mine.gate.default, lambda context, node: context.of(node.args[0]))
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from sift_compiler.errors import UserError
from sift_compiler.ir.width import Width
from sift_compiler.passes.operators import place
from sift_compiler.passes.width_context import Rule, WidthContext

aten = torch.ops.aten
_RULES: dict[Any, Rule] = {}


def register_width_rule(target: Any, rule: Rule) -> None:
    """Give the operator ``target`` (an OpOverload such as ``torch.ops.mine.gate.default``) a width rule; one it had is replaced."""
    if not callable(target):
        raise UserError(f"A width rule belongs to an operator such as torch.ops.aten.relu.default, not to {target!r}.")
    _RULES[target] = rule


def rule_of(target: Any) -> Rule | None:
    """The rule of an operator, or None."""
    return _RULES.get(target)


def register(rule: Rule, *names: str) -> None:
    """Give ATen operators a rule; a name without overload (``"relu"``) means all its overloads that return a new tensor."""
    for name in names:
        packet = getattr(aten, name.partition(".")[0])
        wanted = [name.partition(".")[2]] if "." in name else packet.overloads()
        for overload in wanted:
            if overload != "out" and not overload.endswith("_out"):
                _RULES[getattr(packet, overload)] = rule


def broadcast_width(context: WidthContext, node: Node, aligned: list[Width], result: Width) -> Width:
    """The width of one dimension of a broadcast; ``result`` is its present size."""
    full = [width for width in aligned if context.size(width) != 1 or (not result.dynamic and result.constant == 1)]
    for width in aligned:
        if width not in full:
            context.pin(width, f"{place(node)} stretches it")
    for width in full[1:]:
        context.unify(full[0], width, node)
    return context.resolved(full[0]) if full else result


def frozen(context: WidthContext, node: Node) -> Any:
    """Nothing that goes in or comes out may grow: always consistent."""
    for each in node.all_input_nodes:
        context.pin(context.of(each), f"{place(node)} keeps its sizes")
        context.pin(context.parameter(context.tensor(each)), f"{place(node)} keeps its sizes")
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return tuple(context.sizes(each) if isinstance(each, Tensor) else () for each in value)
    return context.result(node) if isinstance(value, Tensor) else ()
