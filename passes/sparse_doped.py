"""Sparse Doped: a layer becomes sparse, beside a dense factorisation that costs what was removed  (Sparse-IFT, Sec. 3.2.4).

    y = W x + b   →   y = V σ(U x) + σ(W_s x) + b,   U [d', in], V [out, d'] dense,   d' = s · in · out / (in + out), rounded down

Of a convolution, U has the K = kh · kw kernel, the stride, the padding and the dilation, V is 1x1, and
d' = s · K · in · out / (K · in + out); groups stay in all three. W_s has the shape, and where it is kept the values, of W; the FLOPs
that rounding d' down leaves over go to its mask. Weights a mask may choose from: out · in. At s = 0 it is the layer itself.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.options import SparseDoped as Options
from sift_compiler.passes.assign_rules import RULES_ASSIGNED
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED, SHAPES_KNOWN
from sift_compiler.passes.nonlinearity import apply_sigma, chosen_sigma, norms
from sift_compiler.passes.ranks import doped_rank
from sift_compiler.passes.replace_layer import Replacement, Subgraph, like, replace_layers, sizes

aten = torch.ops.aten


class SparseDoped(Pass):
    """Replace the layers of a rule by a sparse one and a dense product.

    Args:
        options: the transformation.
        rule: pattern under which it takes layers.

    Raises:
        UserError: σ does not fit a layer.
    """

    requires = (LAYERS_DECIDED, RULES_ASSIGNED, SHAPES_KNOWN)
    ensures = (LAYERS_DECIDED, SHAPES_KNOWN)

    def __init__(self, options: Options, rule: str) -> None:
        self.options, self.rule = options, rule

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace layer by layer."""
        return replace_layers(graph_module, self.rule, self._replacement)

    def _replacement(self, decision: LayerDecision, layer: nn.Module, calls: list[Node]) -> Replacement | str:
        size_in, size_out, groups = sizes(layer)
        rank = doped_rank(decision.weight_shape, self.options.sparsity, groups)
        if not rank:
            return "too small: what the sparsity removes does not pay for a rank of 1"
        sigma = chosen_sigma(self.options.sigma, layer)
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        sparse = like(layer, size_in, size_out)
        assert isinstance(layer.weight, nn.Parameter)
        sparse.weight = layer.weight
        parts: dict[str, nn.Module] = {
            "u": like(layer, size_in, rank),
            "v": like(layer, rank, size_out, pointwise=True, bias=bias),
            "w": sparse,
            **norms(sigma, layer, calls, {"u": rank, "w": size_out}),
        }

        def write(subgraph: Subgraph, x: Node) -> Node:
            low = subgraph.module("v", apply_sigma(subgraph, sigma, "u", subgraph.module("u", x)))
            return subgraph.operator(aten.add.Tensor, low, apply_sigma(subgraph, sigma, "w", subgraph.module("w", x)))

        return Replacement(
            parts, write,
            {
                "u": (False, f"dense U of rank {rank}"),
                "v": (False, f"dense V of rank {rank}"),
                "w": (True, f"doped with a product of rank {rank}"),
            },
            f"SparseDoped, rank {rank}, σ {sigma}",
        )  # fmt: skip
