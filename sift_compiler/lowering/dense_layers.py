"""Dense convolutions and linear layers of a graph whose weight is one of its inputs: candidates for sparse code if it holds zeros."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from sift_compiler.lowering.partition import plain_module_path
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import pruned as pruned  # registers the operators

# Function in Dynamo's graph → names of its arguments in order.
_ARGUMENTS = {
    torch.conv2d: ("x", "weight", "bias", "stride", "padding", "dilation", "groups"),
    torch._C._nn.linear: ("x", "weight", "bias"),
}
_NAMES = {"input": "x"}
_DEFAULTS: dict[str, Any] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}


@dataclass(frozen=True)
class DenseLayer:
    """A call of conv2d or linear, and the parameter it is called with."""

    node: fx.Node
    name: str
    """The module path where the graph knows it, else the node's name."""
    spec: LayerSpec
    """``nnz`` is the whole weight."""
    weight: Tensor
    """The parameter itself."""
    refusal: str | None
    """Why it cannot be taken whatever its weight; None if it can."""


def dense_layers(graph: fx.Graph, example_inputs: Sequence[Any]) -> tuple[DenseLayer, ...]:
    """Every dense layer of ``graph`` whose weight is a real tensor among ``example_inputs`` (Dynamo passes parameters as inputs)."""
    given = dict(zip(graph.find_nodes(op="placeholder"), example_inputs, strict=False))
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _ARGUMENTS:
            bound = _bound(node)
            weight = given.get(bound["weight"])
            if isinstance(weight, torch.nn.Parameter) and not isinstance(weight, FakeTensor):
                found.append(_layer(node, bound, weight))
    return tuple(found)


def call_kernel(layer: DenseLayer, handle: int) -> None:
    """Make the node call the kernel behind ``handle`` (see nn.live)."""
    bound, spec, node = _bound(layer.node), layer.spec, layer.node
    if spec.kind == "linear":
        node.target = torch.ops.sift.pruned_linear.default
        node.args = (bound["x"], bound["weight"], bound["bias"], handle)
    else:
        node.target = torch.ops.sift.pruned_conv2d.default
        geometry = (list(spec.stride), list(spec.padding), list(spec.dilation), spec.groups)
        node.args = (bound["x"], bound["weight"], bound["bias"], *geometry, handle)
    node.kwargs = {}


def _bound(node: fx.Node) -> dict[str, Any]:
    bound = dict(_DEFAULTS)
    bound.update(zip(_ARGUMENTS[node.target], node.args, strict=False))  # type: ignore[index]
    bound.update({_NAMES.get(name, name): value for name, value in node.kwargs.items()})
    return bound


def _layer(node: fx.Node, bound: dict[str, Any], weight: Tensor) -> DenseLayer:
    conv = weight.dim() == 4
    padding = bound["padding"]
    geometry: dict[str, Any] = {}
    if conv:
        given = {
            "stride": bound["stride"],
            "padding": 0 if isinstance(padding, str) else padding,
            "dilation": bound["dilation"],
        }
        geometry = {name: _pair(value) for name, value in given.items()}
    spec = LayerSpec(
        kind="conv2d" if conv else "linear", weight_shape=tuple(weight.shape), groups=int(bound["groups"]),
        bias=bound["bias"] is not None, dtype=str(weight.dtype).removeprefix("torch."), nnz=weight.numel(), **geometry,
    )  # fmt: skip
    return DenseLayer(node, _path(node), spec, weight, _refusal(node, bound, weight))


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))


def _refusal(node: fx.Node, bound: dict[str, Any], weight: Tensor) -> str | None:
    x, y = (each.meta.get("example_value") for each in (bound["x"], node))
    if isinstance(bound["padding"], str):
        return f"its padding is {bound['padding']!r}; sparse kernels pad by numbers"
    if not isinstance(x, Tensor) or not isinstance(y, Tensor):
        return "the shape of its input is not known"
    if y.dtype != weight.dtype or x.dtype != weight.dtype:
        return f"it computes in {y.dtype} with a weight in {weight.dtype}"
    if node.target is torch.conv2d and x.dim() != 4:
        return "its input has no batch dimension"
    if weight.is_inference():
        return "its weight was made in inference mode, where changes of it leave no trace"
    return None


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack")
    return (plain_module_path(str(next(reversed(stack.values()))[0])) if stack else "") or node.name
