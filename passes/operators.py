"""Reading a call of a torch operator by the names of its schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node


def is_operator(node: Node) -> bool:
    """Whether the node calls a torch operator (not a module, nor a Python function)."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def arguments(node: Node) -> dict[str, Any]:
    """Every argument of an operator call by its name, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    bound: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            bound[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            bound[argument.name] = argument.default_value
    return bound


def attribute(graph_module: GraphModule, node: object) -> Any:
    """What a ``get_attr`` node stands for; None for anything else."""
    if not (isinstance(node, Node) and node.op == "get_attr"):
        return None
    value: Any = graph_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def parameter_paths(graph_module: GraphModule) -> dict[int, list[str]]:
    """The qualified names of every parameter and buffer by the identity of its tensor; tied ones have several."""
    paths: dict[int, list[str]] = {}
    named: list[tuple[str, Tensor]] = [
        *graph_module.named_parameters(remove_duplicate=False),
        *graph_module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in named:
        paths.setdefault(id(tensor), []).append(name)
    return paths


def module_path(node: Node) -> str:
    """Path of the module whose forward made this node, ``""`` for the model itself or where it is not known."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    return str(entries[-1][0]) if entries else ""


def module_type(node: Node) -> str:
    """Class name of the module whose forward made this node, or ``""``."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return ""
    kind = entries[-1][1]
    return str(kind.__name__ if isinstance(kind, type) else kind).rsplit(".", 1)[-1]


def place(node: Node) -> str:
    """Where a node is, for error messages: its name, what it calls and the module it comes from."""
    path = module_path(node)
    return f"node {node.name!r} ({node.target})" + (f" in module {path!r}" if path else "")


def lengthened(sizes: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One number per dimension, from one number for all or from a list."""
    values = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return values * rank if len(values) == 1 else values
