"""Low rank: the dense baseline Sparse-IFT is compared with  (Sparse-IFT, App. B.3.2).

    W [out, in]  →  widened to [k out, k in]  →  V U,  U [r, k in], V [k out, r],   r = in · out / (k (in + out)),   k = (1 - s)^(-1/2)

Widths grow as in Sparse Wide; then every hidden layer becomes a dense product that costs what the layer did. What the first layer
and the classifier cost more is taken from all ranks in proportion. Ranks are whole numbers: the model costs what it did to within
one rank of its cheapest layer, and never more.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.errors import InfeasibleError
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.ir.inputs import Inputs
from sift_compiler.options import LowRank as Options
from sift_compiler.passes.assign_rules import RULES_ASSIGNED, layers_of
from sift_compiler.passes.balance_flops import infeasible, largest_feasible_widening
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED, SHAPES_KNOWN
from sift_compiler.passes.ranks import affordable_ranks, price_of_rank
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
        InfeasibleError: what is not factorised already costs as much as the model given, or leaves a layer no rank of 1.
        UserError: σ does not fit a layer.
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
            raise self._no_rank(layers, wide)

        def make(decision: LayerDecision, layer: nn.Module, calls: list[Node]) -> Replacement | str:
            return product(layer, calls, ranks[decision.path], self.options.sigma, sparse=False, name=self.options.name)

        return replace_layers(graph_module, self.rule, make)

    def _no_rank(self, layers: Mapping[str, nn.Module], wide: FlopCount) -> InfeasibleError:
        """The refusal where the budget has no rank of 1 for some layer; it names the layer that needs the largest."""
        whole = sum(self.dense.of(path) for path in layers)
        needed = {
            path: price_of_rank(layer, wide.of(path)) * whole / self.dense.of(path) for path, layer in layers.items()
        }
        path = max(needed, key=lambda each: needed[each])
        limit = largest_feasible_widening(self.dense, wide, set(layers), self.options.widening, needed[path])
        return InfeasibleError(
            f"Widened by {self.options.widening:.4f}, layer {path!r} cannot be factorised: a rank of 1 already costs more than its share "
            f"of what the rest of the widened model leaves. The largest feasible widening is about {limit:.3f}, so use a sparsity below "
            f"{1 - limit**-2:.3f}, or keep the layer as it is: pin=({path!r},) and dense=({path!r},)."
        )
