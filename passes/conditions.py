"""The facts that passes require and ensure."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule

from sift_compiler.ir import annotations as notes
from sift_compiler.passes.base import Condition


def _unknown_shape(graph_module: GraphModule) -> str | None:
    for node in graph_module.graph.nodes:
        if node.op in ("placeholder", "call_function", "call_module") and "val" not in node.meta:
            return f"node {node.name!r} has no example value; capture the model with sift_compiler.capture.capture"
    return None


def _no_decision(graph_module: GraphModule) -> str | None:
    return None if notes.DECISIONS in graph_module.meta else "no layer has been selected"


def _no_widths(graph_module: GraphModule) -> str | None:
    return None if notes.widths(graph_module) is not None else "widths have not been inferred"


def _no_counts(graph_module: GraphModule) -> str | None:
    for path, decision in notes.decisions(graph_module).items():
        if decision.sparse and decision.kept is None:
            return f"layer {path!r} has no count of kept weights"
    return None


def _without_values(graph_module: GraphModule) -> str | None:
    tensors: list[tuple[str, Tensor]] = [*graph_module.named_parameters(), *graph_module.named_buffers()]
    for name, tensor in tensors:
        if tensor.is_meta:
            return f"{name} has no values"
    return None


SHAPES_KNOWN = Condition("the shape of every value is known", _unknown_shape)
LAYERS_DECIDED = Condition("every layer has a decision", _no_decision)
WIDTHS_KNOWN = Condition("the width of every dimension is known", _no_widths)
COUNTS_KNOWN = Condition("every layer that becomes sparse knows how many weights it keeps", _no_counts)
VALUES_PRESENT = Condition("every parameter and buffer has values", _without_values)
