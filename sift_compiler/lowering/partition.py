"""Which sparse nodes of a graph a runtime takes, and why the others are left to the reference."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from sift_compiler.lowering.specification import Kind, LayerSpec
from sift_compiler.nn import operators as operators  # registers torch.ops.sift

Refuse = Callable[[LayerSpec, str], str | None]
"""Given a layer and a device, the reason for not taking it, or None."""

# Operator → (kind, names of its arguments in order).
_ARGUMENTS: dict[str, tuple[Kind, tuple[str, ...]]] = {
    "sift::conv2d": (
        "conv2d",
        ("x", "values", "index", "bias", "shape", "stride", "padding", "dilation", "groups", "probe", "kernel_handle"),
    ),
    "sift::linear": ("linear", ("x", "values", "index", "bias", "shape", "probe", "kernel_handle")),
}


@dataclass(frozen=True)
class SparseNode:
    """One sparse operator call in a graph, and the runtime's answer to it."""

    node: fx.Node
    name: str
    """The module path where the graph knows it, else the node's name."""
    spec: LayerSpec
    device: str
    refusal: str | None
    """Why the runtime does not take it; None if it does."""


def partition(graph: fx.Graph, refuse: Refuse) -> tuple[SparseNode, ...]:
    """Every sparse node of ``graph`` in order, each with the answer of ``refuse``.

    The nodes must carry fake tensors in ``meta["example_value"]`` (Dynamo) or ``meta["val"]`` (torch.export).
    """
    found = []
    for node in graph.nodes:
        if _operator(node) is not None:
            spec, device = _specification(node)
            found.append(SparseNode(node, _module_path(node), spec, device, refuse(spec, device)))
    return tuple(found)


def assign_handle(sparse: SparseNode, handle: int) -> None:
    """Make the node call the kernel behind ``handle`` (see nn.live)."""
    names = _ARGUMENTS[_operator(sparse.node) or ""][1]
    values = bound_arguments(sparse.node)
    values["kernel_handle"] = handle
    sparse.node.args = tuple(values[name] for name in names)
    sparse.node.kwargs = {}


def _operator(node: fx.Node) -> str | None:
    if node.op != "call_function":
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        name: str = target._qualified_op_name
    elif isinstance(target, torch._ops.OpOverload):
        name = target._schema.name
    else:
        return None
    return name if name in _ARGUMENTS else None


def bound_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a sparse node by name."""
    names = _ARGUMENTS[_operator(node) or ""][1]
    bound: dict[str, Any] = {"probe": 0, "kernel_handle": 0}
    bound.update(zip(names, node.args, strict=False))
    bound.update(node.kwargs)
    return bound


def fake(node: fx.Node) -> torch.Tensor:
    """The fake tensor of a node."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        raise AssertionError(f"node {node.name} carries no fake tensor")
    return value


def _specification(node: fx.Node) -> tuple[LayerSpec, str]:
    kind = _ARGUMENTS[_operator(node) or ""][0]
    bound = bound_arguments(node)
    x, values = fake(bound["x"]), fake(bound["values"])
    geometry = {}
    if kind == "conv2d":
        geometry = {
            name: (_number(bound[name][0]), _number(bound[name][1])) for name in ("stride", "padding", "dilation")
        }
    spec = LayerSpec(
        kind=kind,
        weight_shape=tuple(_number(size) for size in bound["shape"]),
        groups=_number(bound.get("groups", 1)),
        bias=bound["bias"] is not None,
        # Kernels see one dtype; mixed ones show the input's and are refused by their name.
        dtype=str((x if x.dtype == values.dtype else values).dtype).removeprefix("torch."),
        nnz=int(values.shape[0]),
        **geometry,
    )
    return spec, x.device.type


def _number(argument: int | fx.Node) -> int:
    """A size of the layer. Dynamo makes numbers of modules that FSDP manages symbols; taking one as an int guards it."""
    if not isinstance(argument, fx.Node):
        return int(argument)
    symbol: int | torch.SymInt = argument.meta["example_value" if "example_value" in argument.meta else "val"]
    return int(symbol)


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return node.name
    return plain_module_path(str(next(reversed(stack.values()))[0])) or node.name


def plain_module_path(source: str) -> str:
    """``layer1.0.conv1`` from the ways Dynamo and torch.export write it.

    Dynamo writes where it found the module: ``L['self'].layer1.0.conv1``, ``L['fn']._modules['layer1']._modules['0']``,
    ``getattr(L.self.layer1, '0').conv1``.
    """
    text, found = source, 1
    while found:
        text, found = re.subn(r"getattr\(([^()]*), '([^']*)'\)", r"\1.\2", text)
    text = re.sub(r"^L(\['\w+'\]|\.\w+)\.?", "", text)
    text = re.sub(r"\.?_modules\['([^']*)'\]", r".\1", text)
    text = re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", text)
    return text.strip(".")
