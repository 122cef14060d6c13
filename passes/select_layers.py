"""Decide which layers get a mask; every layer gets a decision with its reason.

The first convolution and the classifier stay dense for quality (Sparse-IFT, Sec. 4.1), as does what the user names. A network that
starts with a linear layer has that layer sparsified: unlike a first convolution it holds a large part of the FLOPs.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.nn import SparseLayer
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED
from sift_compiler.passes.operators import parameter_paths

aten = torch.ops.aten
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_PRODUCTS = (
    aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.baddbmm.default,
    aten.scaled_dot_product_attention.default,
)  # fmt: skip


class SelectLayers(Pass):
    """Choose the layers of a transformation.

    Args:
        dense: shell patterns of module paths that stay dense.
        depthwise: whether depthwise convolutions get a mask too.

    Raises:
        UserError: a pattern that names no layer, or no layer is left to sparsify.
    """

    ensures = (LAYERS_DECIDED,)

    def __init__(self, dense: Sequence[str] = (), depthwise: bool = False) -> None:
        self.dense, self.depthwise = tuple(dense), depthwise

    def call(self, graph_module: GraphModule) -> PassResult:
        """Decide on every layer."""
        layers = weighted_layers(graph_module)
        for pattern in self.dense:
            if not any(_within(path, pattern) for path in layers):
                raise UserError(
                    f"dense={pattern!r} names no layer of the model. Its layers: {', '.join(layers) or 'none'}."
                )
        first, last = _first(graph_module), _last(graph_module)
        shared = _shared(graph_module)
        made = {path: self._decide(path, module, first, last, shared) for path, module in layers.items()}
        if made and not any(decision.sparse for decision in made.values()):
            reasons = "; ".join(f"{path}: {decision.reason}" for path, decision in made.items())
            raise UserError(f"No layer of the model can become sparse ({reasons}).")
        if not made:
            raise UserError(
                "The model has no convolution and no linear layer of its own, so there is nothing to make sparse."
            )
        notes.set_decisions(graph_module, made)
        return PassResult(graph_module, tuple(f"{path}: {decision.reason}" for path, decision in made.items()))

    def _decide(self, path: str, module: nn.Module, first: set[str], last: set[str], shared: set[str]) -> LayerDecision:
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        reason = "its weight is shared" if path in shared else self._reason_to_stay_dense(path, module, first, last)
        shape = tuple(weight.shape)
        return LayerDecision(path, _kind(module), reason is None, reason or "hidden layer", shape, shape)

    def _reason_to_stay_dense(self, path: str, module: nn.Module, first: set[str], last: set[str]) -> str | None:
        if path in last:
            return "classifier (writes an output of the model)"
        if path in first and not isinstance(module, nn.Linear):
            return "first convolution"
        if any(_within(path, pattern) for pattern in self.dense):
            return "kept dense on request"
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            return f"there is no sparse {_kind(module)}"
        if isinstance(module, nn.Conv2d):
            if isinstance(module.padding, str) or module.padding_mode != "zeros":
                return "a sparse convolution pads with zeros, in numbers"
            if module.groups > 1 and module.weight.shape[1] == 1 and not self.depthwise:
                return "depthwise"
        return None


def weighted_layers(graph_module: GraphModule) -> dict[str, nn.Module]:
    """The dense convolutions and linear layers a graph calls, by module path, in the order of their first call."""
    found: dict[str, nn.Module] = {}
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, _WEIGHTED):
                found[str(node.target)] = module
    return found


def _within(path: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(path, pattern)


def _kind(module: nn.Module) -> str:
    return type(module).__name__.lower()


def _is_layer(graph_module: GraphModule, node: Node) -> bool:
    return node.op == "call_module" and isinstance(
        graph_module.get_submodule(str(node.target)), (*_WEIGHTED, SparseLayer)
    )


def _shared(graph_module: GraphModule) -> set[str]:
    """Modules whose weight another module or the graph itself reads too."""
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    names = parameter_paths(graph_module).values()
    return {name.rpartition(".")[0] for tied in names for name in tied if len(tied) > 1 or name in read}


def _first(graph_module: GraphModule) -> set[str]:
    """Layers that some graph input reaches without passing another layer."""
    reached: set[Node] = set()
    found: set[str] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or any(each in reached for each in node.all_input_nodes):
            if _is_layer(graph_module, node):
                found.add(str(node.target))
            elif isinstance(node.meta.get("val"), Tensor):
                reached.add(node)
    return found


def _last(graph_module: GraphModule) -> set[str]:
    """Layers that reach some graph output without passing another layer or product (the weights of attention are no logits)."""
    reaching: set[Node] = set()
    found: set[str] = set()
    for node in reversed(list(graph_module.graph.nodes)):
        if node.op == "output" or any(user in reaching for user in node.users):
            if _is_layer(graph_module, node):
                found.add(str(node.target))
            elif node.target not in _PRODUCTS:
                reaching.add(node)
    return found
