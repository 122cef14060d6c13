"""A sparse graph as text, one line per node, made to be read and compared."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sift_compiler.ir import annotations as notes
from sift_compiler.ir.structure import SparseWeight


def printed(graph_module: GraphModule) -> str:
    """The graph, line by line: ``%name: [shape] = what(%arguments)  # why``.

    Sparse layers show their dense weight shape and how much of it they keep; a free batch shows as its symbol. What stands in the
    place of one layer is indented under a line with that layer's path.
    """
    lines: list[str] = []
    before = ""
    for node in graph_module.graph.nodes:
        origin = _origin(node)
        if origin and origin != before:
            lines.append(f"{origin}:  # {notes.replacements(graph_module).get(origin, '')}")
        lines.append(f"{'    ' if origin else ''}{_line(graph_module, node)}")
        before = origin
    return "\n".join(lines)


def _origin(node: Node) -> str:
    """The layer in whose place the node stands, or nothing."""
    return str(node.meta.get(notes.REPLACEMENTS, ""))


def _line(graph_module: GraphModule, node: Node) -> str:
    if node.op == "output":
        return f"return {_value(node.args[0])}"
    shape = _shape(node.meta.get("val"))
    name = f"%{node.name}{': ' + shape if shape else ''}"
    if node.op == "placeholder":
        return f"{name} = input"
    if node.op == "get_attr":
        return f"{name} = self.{node.target}"
    arguments = [_value(each) for each in node.args] + [f"{key}={_value(each)}" for key, each in node.kwargs.items()]
    decision = node.meta.get(notes.DECISIONS)
    why = f"  # {decision.reason}" if isinstance(decision, notes.LayerDecision) else ""
    return f"{name} = {_callee(graph_module, node)}({', '.join(arguments)}){why}"


def _callee(graph_module: GraphModule, node: Node) -> str:
    if node.op != "call_module":
        return str(node.target)
    return f"{node.target}<{_module(graph_module.get_submodule(str(node.target)))}>"


def _module(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, SparseWeight):
        size = "x".join(str(each) for each in module.weight_shape)
        return f"{kind} {size}, {module.pattern.nnz} kept, sparsity {module.pattern.sparsity:.4f}"
    weight = module._parameters.get("weight")
    return f"{kind} {'x'.join(str(each) for each in weight.shape)}" if weight is not None else kind


def _value(value: Any) -> str:
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, (tuple, list)):
        inner = ", ".join(_value(each) for each in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner})"
    return str(value)


def _shape(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"[{', '.join(str(size) for size in value.shape)}]"
    return ""
