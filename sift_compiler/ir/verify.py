"""Check that a graph is a sound sparse graph."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from sift_compiler.errors import PassError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.structure import SparseWeight


def problems(graph_module: GraphModule) -> list[str]:
    """Everything that is wrong with a graph, one line each; empty for a sound one.

    Checked: nodes are well formed; every tensor has values; every sparse layer has a valid pattern, as many values as entries, a bias
    as long as its output and the count its decision names; the shape of every call's result fits the layer.
    """
    found: list[str] = []
    try:
        graph_module.graph.lint()
    except (RuntimeError, ValueError) as error:
        found.append(f"the graph is not well formed: {error}")
    for name, tensor in graph_module.state_dict().items():
        if tensor.is_meta:
            found.append(f"{name} has no values")
    for path, module in graph_module.named_modules():
        if isinstance(module, SparseWeight):
            found += [f"layer {path!r}: {problem}" for problem in _layer_problems(module)]
    for path, decision in notes.decisions(graph_module).items():
        layer = _submodule(graph_module, path)
        if isinstance(layer, SparseWeight) != decision.sparse:
            found.append(f"layer {path!r} is {type(layer).__name__}, against its decision ({decision.reason})")
        elif isinstance(layer, SparseWeight) and layer.values.numel() != decision.kept:
            found.append(f"layer {path!r} keeps {layer.values.numel()} weights, its decision says {decision.kept}")
    return found + _call_problems(graph_module)


def verify(graph_module: GraphModule) -> None:
    """Raise PassError with all problems of a graph."""
    found = problems(graph_module)
    if found:
        raise PassError("The sparse graph is not sound: " + "; ".join(found) + ".")


def _submodule(graph_module: GraphModule, path: str) -> object:
    try:
        return graph_module.get_submodule(path)
    except AttributeError:
        return None


def _layer_problems(layer: SparseWeight) -> list[str]:
    found = []
    try:
        layer.pattern.check()
    except UserError as error:
        found.append(str(error))
    if layer.values.shape != layer.index.shape:
        found.append(f"{tuple(layer.values.shape)} values for {tuple(layer.index.shape)} entries")
    if layer.bias is not None and layer.bias.shape[0] != layer.weight_shape[0]:
        found.append(f"a bias of {layer.bias.shape[0]} for {layer.weight_shape[0]} outputs")
    return found


def _call_problems(graph_module: GraphModule) -> list[str]:
    found = []
    for node in graph_module.graph.nodes:
        layer = _submodule(graph_module, str(node.target)) if node.op == "call_module" else None
        value = node.meta.get("val")
        if isinstance(layer, SparseWeight) and isinstance(value, Tensor):
            channels = value.shape[1] if len(layer.weight_shape) == 4 and value.dim() == 4 else value.shape[-1]
            if len(layer.weight_shape) in (2, 4) and channels != layer.weight_shape[0]:
                found.append(f"node {node.name!r} has {channels} channels, its layer gives {layer.weight_shape[0]}")
    return found
