"""Give every dimension of every tensor a width and solve which of them grow together (see ir/width.py).

A forward walk over the graph: one rule per operator ties the widths of its arguments and returns those of its value. Sizes of graph
inputs, of graph outputs and of what the user pins never grow.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sift_compiler.errors import PassError, UnsupportedError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.width import Width, WidthTable
from sift_compiler.nn import MaskHook, SparseLayer
from sift_compiler.nn.attention import ScaledDotProductAttention
from sift_compiler.passes import width_rules as rules
from sift_compiler.passes import (
    width_rules_elementwise,
    width_rules_indexing,
    width_rules_joining,
    width_rules_reductions,
    width_rules_shapes,
)
from sift_compiler.passes import width_rules_products as products
from sift_compiler.passes.assign_rules import untouched
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import SHAPES_KNOWN, WIDTHS_KNOWN
from sift_compiler.passes.operators import module_path, place
from sift_compiler.passes.width_context import WidthChoices, WidthContext, flat
from sift_compiler.passes.width_registry import frozen, rule_of

logger = logging.getLogger(__name__)

RULES = (
    rules, products, width_rules_elementwise, width_rules_indexing, width_rules_joining, width_rules_reductions, width_rules_shapes,
)  # fmt: skip
"""The files that hold the rules; importing them fills the registry."""


class InferWidths(Pass):
    """Solve the widths of a graph.

    Args:
        pin: shell patterns of module paths or node names whose sizes, in and out, stay as they are.
        rule: pattern under which a transformation takes layers; those of other transformations are pinned. None pins no layer.

        choices: which factor of a width grows where it is a product (heads, groups).

    Raises:
        UnsupportedError: an operator has no width rule.
    """

    requires = (SHAPES_KNOWN,)
    ensures = (WIDTHS_KNOWN,)

    def __init__(self, pin: Sequence[str] = (), rule: str | None = None, choices: WidthChoices | None = None) -> None:
        self.pin, self.rule, self.choices = tuple(pin), rule, choices or WidthChoices()

    def call(self, graph_module: GraphModule) -> PassResult:
        """Walk, solve, and note the widths on the graph and its nodes."""
        context = self._walk(graph_module, self.choices)
        more_heads = _heads_of_fixed_width(context)
        if more_heads:
            logger.info(
                "Heads of fixed width (rotary positions, say) grow in number: %s", ", ".join(sorted(more_heads))
            )
            context = self._walk(graph_module, dataclasses.replace(self.choices, more_heads=more_heads))
        for node in graph_module.graph.nodes:
            if node.op != "output":
                node.meta[notes.WIDTHS] = context.of(node)
        table = _table(context)
        graph_module.meta[notes.WIDTHS] = table
        return PassResult(graph_module, tuple(f"{origin} is free" for origin in table.origins.values()))

    def _walk(self, graph_module: GraphModule, choices: WidthChoices) -> WidthContext:
        context = WidthContext(graph_module, choices)
        foreign = () if self.rule is None else untouched(graph_module, self.rule)
        for node in graph_module.graph.nodes:
            if node.op == "output":
                for each in node.all_input_nodes:
                    context.pin(context.of(each), f"{each.name} is an output of the model")
            elif node.op != "get_attr":
                widths = frozen(context, node) if node.target in foreign else self._widths(context, node)
                _check(context, node, widths)
                context.record(node, widths)
        return context

    def _widths(self, context: WidthContext, node: Node) -> Any:
        if node.op == "placeholder":
            return context.result(node)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in self.pin for name in _names(node)):
            return frozen(context, node)
        if node.op == "call_module":
            return _of_module(context, node, context.graph_module.get_submodule(str(node.target)))
        rule = rule_of(node.target)
        if rule is not None:
            return rule(context, node)
        if _nothing_grows(context, node):
            return frozen(context, node)
        raise _no_rule(node)


def _heads_of_fixed_width(context: WidthContext) -> frozenset[str]:
    """Splits into heads whose width turned out fixed, and the others of the same attention, which have the same number of heads."""
    places = {module_path(node) for node, part in context.head_parts if context.resolved(part).fixed}
    return frozenset(node.name for node, _ in context.head_parts if module_path(node) in places)


def _nothing_grows(context: WidthContext, node: Node) -> bool:
    """Whether all that goes in has fixed sizes already (positions, masks): then what comes out has too, whatever the operator."""
    return all(width.fixed for each in node.all_input_nodes for width in flat(context.of(each)))


def _names(node: Node) -> tuple[str, ...]:
    return tuple(
        name for name in (node.name, module_path(node), str(node.target) if node.op == "call_module" else "") if name
    )


def _of_module(context: WidthContext, node: Node, module: nn.Module) -> Any:
    if isinstance(module, MaskHook):
        return ()
    x = node.args[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return rules.convolution(context, node, x, module.weight, module.bias, module.groups)
    if isinstance(module, nn.Linear):
        return rules.linear(context, node, x, module.weight, module.bias)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return rules.channel_norm(
            context, node, x, [module.weight, module.bias, module.running_mean, module.running_var]
        )
    if isinstance(module, nn.LayerNorm):
        return rules.trailing_norm(context, node, x, [module.weight, module.bias], len(module.normalized_shape))
    if isinstance(module, nn.Embedding):
        return rules.embedding(context, node, x, module.weight)
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)):
        return context.of(x)
    if isinstance(module, ScaledDotProductAttention):
        return products.attention(context, node)
    if isinstance(module, SparseLayer):
        return frozen(context, node)
    raise _no_rule(node)


def _no_rule(node: Node) -> UnsupportedError:
    return UnsupportedError(
        f"The {place(node)} has no width rule, so it is not known how widening passes through it. Three ways out: pin it "
        f"(pin=({_names(node)[-1]!r},): its sizes stay as they are); write a rule "
        "(sift_compiler.passes.width_registry.register_width_rule, three lines for most operators); or use a transformation that "
        "changes single layers and needs no widths."
    )


def _check(context: WidthContext, node: Node, widths: Any) -> None:
    """A rule that returns sizes other than the graph's is wrong; say so where it happens."""
    value = node.meta.get("val")
    values, given = (value, widths) if isinstance(value, (tuple, list)) else ((value,), (widths,))
    for each, widths_of_one in zip(values, given, strict=False):
        if isinstance(each, Tensor):
            expected = [width.constant for width in context.sizes(each)]
            found = [context.size(width) for width in widths_of_one]
            if expected != found:
                raise PassError(
                    f"The width rule of the {place(node)} returns sizes {found} where the graph has {expected}."
                )


def _table(context: WidthContext) -> WidthTable:
    solver = context.solver
    used: set[int] = set()
    tensors: dict[str, tuple[Width, ...]] = {}
    for name, found in context.tensors.items():
        tensors[name] = context.resolved(found)
        used.update(key for width in tensors[name] for key, _ in width.terms)
    literals = [dataclasses.replace(each, width=solver.resolve(each.width)) for each in context.literals]
    return WidthTable(
        sizes={key: solver.sizes[key] for key in sorted(used)},
        origins={key: solver.origins[key] for key in sorted(used)},
        tensors=tensors,
        literals=tuple(each for each in literals if not each.width.fixed),
        pins=dict(solver.pins),
        head_widths=_classes(context, [part for _, part in context.head_parts]) & used,
        counts=_classes(context, context.counts) & used,
    )


def _classes(context: WidthContext, widths: Sequence[Width]) -> frozenset[int]:
    return frozenset(key for width in widths for key, _ in context.resolved(width).terms)
