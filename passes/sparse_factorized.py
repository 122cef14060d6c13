"""Sparse Factorized: a layer becomes two sparse ones with an inner width beyond full rank  (Sparse-IFT, Sec. 3.2.3).

    y = W x + b   →   y = V σ(U x) + b,   U [d', in], V [out, d'],   d' = in · out / ((in + out)(1 - s)), rounded up

Of a convolution, U has the K = kh · kw kernel, the stride, the padding and the dilation, V is 1x1, and
d' = K · in · out / ((K · in + out)(1 - s)); groups stay in both. U and V keep about (1 - s) of their weights and cost what W did; the
excess of rounding up is balanced. Weights a mask may choose from: d'(in + out). At s = 0 it is a dense factorisation of rank d'
within the budget, not the identity.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.ir.flops import FlopCount
from sift_compiler.options import Sigma
from sift_compiler.options import SparseFactorized as Options
from sift_compiler.passes.assign_rules import RULES_ASSIGNED, layers_of
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED, SHAPES_KNOWN
from sift_compiler.passes.nonlinearity import apply_sigma, chosen_sigma, norms
from sift_compiler.passes.ranks import affordable_ranks, factorized_rank
from sift_compiler.passes.replace_layer import Replacement, Subgraph, like, replace_layers, sizes


class SparseFactorized(Pass):
    """Replace the layers of a rule by two.

    Args:
        options: the transformation.
        rule: pattern under which it takes layers.
        dense: FLOPs of the model given; what its layers cost is the budget of the factorisation at sparsity 0.

    Raises:
        UserError: σ does not fit a layer.
    """

    requires = (LAYERS_DECIDED, RULES_ASSIGNED, SHAPES_KNOWN)
    ensures = (LAYERS_DECIDED, SHAPES_KNOWN)

    def __init__(self, options: Options, rule: str, dense: FlopCount) -> None:
        self.options, self.rule, self.dense = options, rule, dense

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace layer by layer."""
        layers = {each.path: graph_module.get_submodule(each.path) for each in layers_of(graph_module, self.rule)}
        sparse = self.options.sparsity > 0
        ranks = (
            {path: factorized_rank(_shape(layer), self.options.sparsity, sizes(layer)[2]) for path, layer in layers.items()}
            if sparse
            else affordable_ranks(layers, self.dense, self.dense, sum(self.dense.of(path) for path in layers))
        )  # fmt: skip
        sigma = self.options.sigma

        def make(decision: LayerDecision, layer: nn.Module, calls: list[Node]) -> Replacement | str:
            return product(layer, calls, ranks[decision.path], sigma, sparse=sparse, name=self.options.name)

        return replace_layers(graph_module, self.rule, make)


def product(
    layer: nn.Module, calls: list[Node], rank: int, sigma: Sigma | None, *, sparse: bool, name: str
) -> Replacement | str:
    """V σ(U x) + b in the place of W x + b; the reason to stay dense where the rank is 0."""
    if not rank:
        return "too small: not even a rank of 1 costs as little"
    chosen = chosen_sigma(sigma, layer)
    size_in, size_out, _ = sizes(layer)
    bias = layer.bias
    assert bias is None or isinstance(bias, nn.Parameter)
    parts: Mapping[str, nn.Module] = {
        "u": like(layer, size_in, rank),
        **norms(chosen, layer, calls, {"u": rank}),
        "v": like(layer, rank, size_out, pointwise=True, bias=bias),
    }

    def write(subgraph: Subgraph, x: Node) -> Node:
        return subgraph.module("v", apply_sigma(subgraph, chosen, "u", subgraph.module("u", x)))

    return Replacement(
        parts, write, {"u": (sparse, f"U of inner width {rank}"), "v": (sparse, f"V of inner width {rank}")},
        f"{name}, inner width {rank}, σ {chosen}",
    )  # fmt: skip


def _shape(layer: nn.Module) -> tuple[int, ...]:
    assert isinstance(layer.weight, nn.Parameter)
    return tuple(layer.weight.shape)
