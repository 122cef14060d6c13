"""Put several layers in the place of one, in the module tree and in the graph.

    %y = call_module[conv](%x)   →   %a = call_module[conv.u](%x)  …  %y = call_module[conv.v](%c)

What was a layer at a module path becomes a plain container there; its parts are its children. A layer called twice has its
calls written twice, on the same parts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.passes.base import PassResult
from sift_compiler.passes.propagate_shapes import propagate_shapes


class Subgraph:
    """Writes the nodes that stand for one call of a layer, in front of that call."""

    def __init__(self, graph_module: GraphModule, path: str, call: Node) -> None:
        self._graph_module, self._path, self._call = graph_module, path, call

    def module(self, part: str, value: Node) -> Node:
        """A call of the part ``part``."""
        with self._graph_module.graph.inserting_before(self._call):
            return self._noted(self._graph_module.graph.call_module(f"{self._path}.{part}", (value,)))

    def operator(self, target: Callable[..., Any], *values: Any) -> Node:
        """A call of an operator."""
        with self._graph_module.graph.inserting_before(self._call):
            return self._noted(self._graph_module.graph.call_function(target, values))

    def parameter(self, name: str) -> Node:
        """The container's own parameter ``name``."""
        with self._graph_module.graph.inserting_before(self._call):
            return self._noted(self._graph_module.graph.get_attr(f"{self._path}.{name}"))

    def _noted(self, node: Node) -> Node:
        node.meta["nn_module_stack"] = dict(self._call.meta.get("nn_module_stack") or {})
        node.meta[notes.REPLACEMENTS] = self._path
        return node


def calls_of(graph_module: GraphModule, path: str) -> list[Node]:
    """Every call of the module at ``path``."""
    return [node for node in graph_module.graph.nodes if node.op == "call_module" and node.target == path]


@dataclass(frozen=True)
class Replacement:
    """What stands in the place of one layer.

    Attributes:
        parts: its modules by name.
        write: writes the nodes of one call, from its input, and returns the one with its value.
        decided: of every part with a weight, whether it becomes sparse, and why.
        summary: all of it, as a clause.
        bias: a parameter of the container, named ``bias``.
    """

    parts: Mapping[str, nn.Module]
    write: Callable[[Subgraph, Node], Node]
    decided: Mapping[str, tuple[bool, str]]
    summary: str
    bias: nn.Parameter | None = None


Maker = Callable[[LayerDecision, nn.Module, list[Node]], Replacement | str]
"""From a decision, its layer and the layer's calls: what stands in the layer's place, or why it stays dense."""


def replace_layers(graph_module: GraphModule, rule: str, make: Maker) -> PassResult:
    """Replace every layer that the transformation of ``rule`` takes, decide on its parts and propagate shapes."""
    made: dict[str, LayerDecision] = {}
    summaries: dict[str, str] = {}
    for path, decision in notes.decisions(graph_module).items():
        if not decision.sparse or decision.rule != rule:
            made[path] = decision
            continue
        layer, calls = graph_module.get_submodule(path), calls_of(graph_module, path)
        replacement = make(decision, layer, calls)
        if isinstance(replacement, str):
            made[path] = dataclasses.replace(decision, sparse=False, reason=replacement)
            continue
        _put(graph_module, path, replacement, calls)
        made.update(_decided(decision, replacement))
        summaries[path] = replacement.summary
    graph_module.meta[notes.REPLACEMENTS] = {**notes.replacements(graph_module), **summaries}
    notes.set_decisions(graph_module, made)
    if summaries:
        propagate_shapes(graph_module)
    return PassResult(graph_module, tuple(f"{path}: {summary}" for path, summary in summaries.items()))


def _put(graph_module: GraphModule, path: str, replacement: Replacement, calls: list[Node]) -> None:
    container = nn.Module()
    for name, part in replacement.parts.items():
        container.add_module(name, part)
    if replacement.bias is not None:
        container.register_parameter("bias", replacement.bias)
    container.train(graph_module.get_submodule(path).training)
    parent, _, name = path.rpartition(".")
    graph_module.get_submodule(parent)._modules[name] = container
    for call in calls:
        value = call.args[0]
        assert isinstance(value, Node)
        call.replace_all_uses_with(replacement.write(Subgraph(graph_module, path, call), value))
        graph_module.graph.erase_node(call)


def _decided(decision: LayerDecision, replacement: Replacement) -> dict[str, LayerDecision]:
    made = {}
    for part, (sparse, reason) in replacement.decided.items():
        path, weight = f"{decision.path}.{part}", replacement.parts[part].weight
        assert isinstance(weight, nn.Parameter)
        shape = tuple(weight.shape)
        made[path] = LayerDecision(
            path, decision.kind, sparse, reason, shape, shape, rule=decision.rule, origin=decision.path,
            structure=decision.structure,
        )  # fmt: skip
    return made


def like(
    layer: nn.Module, size_in: int, size_out: int, *, pointwise: bool = False, bias: nn.Parameter | None = None
) -> nn.Module:
    """A dense layer without values, of other sizes than ``layer`` and otherwise the same.

    Args:
        layer: nn.Conv2d or nn.Linear.
        size_in, size_out: channels or features.
        pointwise: a convolution becomes a 1x1 one of stride 1; groups stay.
        bias: the parameter that becomes its bias.
    """
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    new: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Conv2d):
        kernel, stride, padding, dilation = (
            (1, 1, 0, 1) if pointwise else (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
        )
        new = nn.Conv2d(
            size_in, size_out, kernel, stride, padding, dilation, layer.groups, False,  # type: ignore[arg-type]
            device="meta", dtype=weight.dtype,
        )  # fmt: skip
    else:
        new = nn.Linear(size_in, size_out, False, device="meta", dtype=weight.dtype)
    new.weight.requires_grad_(weight.requires_grad)
    new.bias = bias
    return new


def sizes(layer: nn.Module) -> tuple[int, int, int]:
    """Inputs, outputs and groups of nn.Conv2d or nn.Linear."""
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels, layer.groups
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features, 1
