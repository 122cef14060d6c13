"""Low rank: the dense baseline Sparse-IFT is compared with  (Sparse-IFT, App. B.3.2).

    W [out, in]  →  widened to [k out, k in]  →  V U,  U [r, k in], V [k out, r],   r = in · out / (k (in + out)),   k = (1 - s)^(-1/2)

Widths grow as in Sparse Wide; then every hidden layer becomes a dense product that costs what the layer did. What the first layer
and the classifier cost more is taken from all ranks in proportion. Ranks are whole numbers: the model costs what it did to within
one rank of its cheapest layer, and never more.
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.errors import UserError
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.ir.inputs import Inputs
from sift_compiler.options import LowRank as Options
from sift_compiler.passes.assign_rules import RULES_ASSIGNED, layers_of
from sift_compiler.passes.balance_flops import infeasible
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED, SHAPES_KNOWN
from sift_compiler.passes.ranks import affordable_ranks
from sift_compiler.passes.replace_layer import Replacement, replace_layers
from sift_compiler.passes.sparse_factorized import product


class LowRank(Pass):
    """Replace the layers of a rule, widened before, by dense products.

    Args:
        options: the transformation.
        rule: pattern under which it takes layers.
        dense: FLOPs of the model given.
        inputs: the example that was counted.

    Raises:
        UserError: what is not factorised already costs as much as the model given, a layer cannot pay for a rank of 1, or σ
            does not fit a layer.
    """

    requires = (LAYERS_DECIDED, RULES_ASSIGNED, SHAPES_KNOWN)
    ensures = (LAYERS_DECIDED, SHAPES_KNOWN)

    def __init__(self, options: Options, rule: str, dense: FlopCount, inputs: Inputs) -> None:
        self.options, self.rule, self.dense, self.inputs = options, rule, dense, inputs

    def call(self, graph_module: GraphModule) -> PassResult:
        """Spend on ranks what the rest of the widened model leaves, and replace layer by layer."""
        layers = {each.path: graph_module.get_submodule(each.path) for each in layers_of(graph_module, self.rule)}
        wide = count_flops(graph_module, self.inputs)
        budget = self.dense.total - (wide.total - sum(wide.of(path) for path in layers))
        if budget <= 0:
            raise infeasible(self.dense, wide, set(layers), self.options.widening)
        ranks = affordable_ranks(layers, self.dense, wide, budget)
        if not all(ranks.values()):
            path = next(path for path, rank in ranks.items() if not rank)
            raise UserError(
                f"Widened by {self.options.widening:.4f}, layer {path!r} cannot be factorised: a rank of 1 already costs more than its share. "
                f"Use a smaller sparsity, or keep its width with pin=({path!r},) and dense=({path!r},)."
            )

        def make(decision: LayerDecision, layer: nn.Module, calls: list[Node]) -> Replacement | str:
            return product(layer, calls, ranks[decision.path], self.options.sigma, sparse=False, name=self.options.name)

        return replace_layers(graph_module, self.rule, make)
