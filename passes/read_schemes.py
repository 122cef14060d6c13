"""Read by what scheme the model given draws its layers, while their values are there.

Linear layers of any model, and convolutions of one with attention, are drawn by their own scheme when they are made anew; convolutions
of other networks by the paper's (see passes/initialise.py). Biases and norms that start as one number do so again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from sift_compiler.ir import annotations as notes
from sift_compiler.ir.scheme import Scheme, read_scheme
from sift_compiler.nn.attention import ScaledDotProductAttention
from sift_compiler.passes.adopt_layers import given_as
from sift_compiler.passes.attention_heads import head_splits
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.module_kinds import aten

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_DRAWING = (*_LAYERS, nn.LayerNorm, nn.modules.batchnorm._NormBase)
"""Modules with a ``reset_parameters`` that a rewrite may call."""


class ReadSchemes(Pass):
    """Note the scheme of every parameter that its own scheme is to draw again.

    Args:
        fresh: tensors of the same model as its author's initialiser makes them, by name; where the model is trained and they are known.
            A trained model without them has no schemes to read.
    """

    def __init__(self, fresh: Mapping[str, Tensor] | None = None) -> None:
        self.fresh = fresh

    def call(self, graph_module: GraphModule) -> PassResult:
        """Read tensor by tensor."""
        schemes: dict[str, Scheme] = {}
        if self.fresh is not None or not is_trained(graph_module):
            own = (nn.Linear, *(_CONVOLUTIONS if _has_attention(graph_module) else ()))
            for name, parameter in graph_module.named_parameters(remove_duplicate=False):
                owner = graph_module.get_submodule(name.rpartition(".")[0])
                tensor = self._fresh(graph_module, name, parameter)
                if tensor.is_meta or not tensor.is_floating_point():
                    continue
                scheme = read_scheme(tensor, fans=isinstance(owner, _LAYERS))
                if scheme.constant or isinstance(owner, own) or not isinstance(owner, _DRAWING):
                    schemes[name] = scheme
        graph_module.meta[notes.SCHEMES] = schemes
        return PassResult(graph_module, tuple(f"{name}: {scheme}" for name, scheme in schemes.items()))

    def _fresh(self, graph_module: GraphModule, name: str, given: Tensor) -> Tensor:
        if self.fresh is None:
            return given
        original, transposed = given_as(graph_module, name)
        found = self.fresh.get(original, given)
        return found.t() if transposed else found


def is_trained(graph_module: GraphModule) -> bool:
    """Whether a step of training has left its trace: a norm that scales its channels differently, or that has seen a batch."""
    for module in graph_module.modules():
        seen: Any = getattr(module, "num_batches_tracked", None)
        if isinstance(seen, Tensor) and not seen.is_meta and int(seen):
            return True
        weight: Any = getattr(module, "weight", None)
        vector = isinstance(weight, Tensor) and weight.dim() == 1 and weight.numel() and not weight.is_meta
        if vector and bool((weight != weight[0]).any()):
            return True
    return False


def _has_attention(graph_module: GraphModule) -> bool:
    written_out = bool(head_splits(graph_module))
    return written_out or any(
        node.target is aten.scaled_dot_product_attention.default
        or (
            node.op == "call_module"
            and isinstance(graph_module.get_submodule(str(node.target)), ScaledDotProductAttention)
        )
        for node in graph_module.graph.nodes
    )
