"""Sparse Parallel: a layer becomes a sum of sparse branches, each with a non-linearity  (Sparse-IFT, Sec. 3.2.2).

    y = W x + b   →   y = Σ_j σ(θ_j x) + b,   j = 1 … k,   k = 1 / (1 - s)

Every θ_j has the shape [out, in] of W and keeps (1 - s) of it, so all together cost what W did. k is rounded to the nearest whole
number, halves up, and the sparsity balanced for it. The bias stands outside, once, so that the sum can be negative.
Weights a mask may choose from: k · out · in. At s = 0 there is one branch and no σ: the layer itself.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.errors import UserError
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.options import SparseParallel as Options
from sift_compiler.passes.assign_rules import RULES_ASSIGNED
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED, SHAPES_KNOWN
from sift_compiler.passes.nonlinearity import apply_sigma, chosen_sigma, norms
from sift_compiler.passes.replace_layer import Replacement, Subgraph, like, replace_layers, sizes

aten = torch.ops.aten


def branches(sparsity: float) -> int:
    """The number of branches, 1 / (1 - sparsity) to the nearest whole number, halves up: 2, 4, 10 at .5, .75, .9."""
    return math.floor(1 / (1 - sparsity) + 0.5 + 1e-9)


class SparseParallel(Pass):
    """Replace the layers of a rule by branches.

    Args:
        options: the transformation.
        rule: pattern under which it takes layers.

    Raises:
        UserError: the sparsity gives a single branch, which would change nothing; or σ does not fit a layer.
    """

    requires = (LAYERS_DECIDED, RULES_ASSIGNED, SHAPES_KNOWN)
    ensures = (LAYERS_DECIDED, SHAPES_KNOWN)

    def __init__(self, options: Options, rule: str) -> None:
        self.options, self.rule = options, rule
        self.count = branches(options.sparsity)
        if self.count == 1 and not options.identity:
            raise UserError(
                f"SparseParallel(sparsity={options.sparsity!r}) is not possible: it stands for {1 / (1 - options.sparsity):.3f} "
                "branches, and with one there is nothing to remove. Use a sparsity of at least 0.3334 (two branches)."
            )

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace layer by layer."""
        return replace_layers(graph_module, self.rule, self._replacement)

    def _replacement(self, decision: LayerDecision, layer: nn.Module, calls: list[Node]) -> Replacement:
        sigma = chosen_sigma(self.options.sigma, layer)
        size_in, size_out, _ = sizes(layer)
        names = [f"branch{number}" for number in range(self.count)]
        parts = {name: like(layer, size_in, size_out) for name in names}
        bias = layer.bias
        assert bias is None or isinstance(bias, nn.Parameter)

        def write(subgraph: Subgraph, x: Node) -> Node:
            """The sum of the branches, then the bias, once."""
            total = None
            for name in names:
                branch = apply_sigma(subgraph, sigma, name, subgraph.module(name, x))
                total = branch if total is None else subgraph.operator(aten.add.Tensor, total, branch)
            assert total is not None
            if bias is None:
                return total
            shift = subgraph.parameter("bias")
            if isinstance(layer, nn.Conv2d):
                shift = subgraph.operator(aten.reshape.default, shift, [-1, 1, 1])
            return subgraph.operator(aten.add.Tensor, total, shift)

        return Replacement(
            parts | norms(sigma, layer, calls, dict.fromkeys(names, size_out)), write,
            {name: (True, f"branch {number} of {self.count}") for number, name in enumerate(names, 1)},
            f"SparseParallel, {self.count} branches, σ {sigma}", bias,
        )  # fmt: skip
