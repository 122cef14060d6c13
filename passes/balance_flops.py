"""Strike the FLOP balance: how sparse the widened layers must be so that the model costs what it did.

With F the FLOPs of the model given, D those of all that stays dense in the widened model and S those of the layers that get a mask, at
density 1:

    s* = 1 - (F - D) / S            (derived; it also pays for the wider first layer and classifier, which stay dense)

Solved from the actual integer widths. Every layer keeps floor((1 - s*) numel) weights; the FLOPs that rounding down leaves over buy
at most one weight more per layer, largest remainder first, so that small models balance too.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping

from torch.fx import GraphModule

from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import Balance
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.ir.inputs import Inputs
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import COUNTS_KNOWN, LAYERS_DECIDED

logger = logging.getLogger(__name__)


class BalanceFlops(Pass):
    """Give every layer that becomes sparse the number of weights it keeps.

    Args:
        dense: FLOPs of the model given.
        inputs: the example that was counted.
        widening: factor that was applied to widths, for the message of a refusal.

    Raises:
        UserError: what stays dense already costs as much as the model given.
    """

    requires = (LAYERS_DECIDED,)
    ensures = (COUNTS_KNOWN,)

    def __init__(self, dense: FlopCount, inputs: Inputs, widening: float) -> None:
        self.dense, self.inputs, self.widening = dense, inputs, widening

    def call(self, graph_module: GraphModule) -> PassResult:
        """Count, solve, and note the balance and the counts."""
        if self.widening == 1:
            return self._nothing_to_remove(graph_module)
        made = dict(notes.decisions(graph_module))
        wide = count_flops(graph_module, self.inputs)
        sparsifiable = sum(wide.of(path) for path, decision in made.items() if decision.sparse)
        kept_dense = wide.total - sparsifiable
        if kept_dense >= self.dense.total or not sparsifiable:
            raise UserError(self._infeasible(wide, {path for path, decision in made.items() if decision.sparse}))
        density = min(1.0, (self.dense.total - kept_dense) / sparsifiable)
        sizes = {path: math.prod(decision.widened_shape) for path, decision in made.items() if decision.sparse}
        prices = {path: wide.of(path) // numel for path, numel in sizes.items()}
        for path, kept in kept_weights(sizes, prices, density).items():
            made[path] = dataclasses.replace(made[path], kept=kept)
        notes.set_decisions(graph_module, made)
        struck = Balance(self.dense.total, kept_dense, sparsifiable, 1 - density)
        graph_module.meta[notes.BALANCE] = struck
        logger.info("FLOPs balance at a sparsity of %.6f", struck.sparsity)
        return PassResult(
            graph_module, tuple(f"{path} keeps {each.kept}" for path, each in made.items() if each.sparse)
        )

    def _nothing_to_remove(self, graph_module: GraphModule) -> PassResult:
        made = {
            path: dataclasses.replace(decision, sparse=False, reason="sparsity 0: nothing to remove")
            if decision.sparse
            else decision
            for path, decision in notes.decisions(graph_module).items()
        }
        notes.set_decisions(graph_module, made)
        graph_module.meta[notes.BALANCE] = Balance(self.dense.total, self.dense.total, 0, 0.0)
        return PassResult(graph_module)

    def _infeasible(self, wide: FlopCount, sparse: set[str]) -> str:
        staying = {path: flops for path, flops in wide.modules.items() if path not in sparse}
        largest = sorted(staying.items(), key=lambda item: -item[1])[:3]
        named = ", ".join(f"{path or 'the model itself'} ({flops:,})" for path, flops in largest)
        kept_dense = sum(staying.values())
        limit = largest_feasible_widening(self.dense, wide, sparse, self.widening)
        sparsity = 1 - limit**-2
        return (
            f"Widening by {self.widening:.4f} cannot cost the same FLOPs: what stays dense then costs {kept_dense:,}, the model "
            f"given costs {self.dense.total:,}. The largest of it: {named}. The largest feasible widening is about {limit:.3f}, "
            f"so use a sparsity below {sparsity:.3f}."
        )


def kept_weights(sizes: Mapping[str, int], prices: Mapping[str, int], density: float) -> dict[str, int]:
    """Weights kept per layer, for a budget of ``density`` times the FLOPs of all.

    Args:
        sizes: weights of every layer's dense weight.
        prices: FLOPs of one weight of every layer.
        density: kept share, in [0, 1].
    """
    kept = {path: min(numel, math.floor(density * numel * (1 + 1e-12))) for path, numel in sizes.items()}
    left = density * sum(sizes[path] * prices[path] for path in sizes) - sum(
        kept[path] * prices[path] for path in sizes
    )
    for path in sorted(sizes, key=lambda each: kept[each] - density * sizes[each]):
        if kept[path] < sizes[path] and prices[path] <= left * (1 + 1e-12):
            kept[path] += 1
            left -= prices[path]
    return kept


def largest_feasible_widening(dense: FlopCount, wide: FlopCount, sparse: set[str], widening: float) -> float:
    """The widening k at which all that stays dense costs as much as the model given, at least 1.

    A module's FLOPs grow as k^e, with e (0, 1 or 2 before rounding) from its FLOPs before and after the given widening.
    """
    terms = []
    for path, flops in wide.modules.items():
        if path not in sparse and dense.of(path):
            terms.append((dense.of(path), math.log(flops / dense.of(path)) / math.log(widening)))

    def excess(k: float) -> float:
        return float(sum(flops * k**exponent for flops, exponent in terms)) - dense.total

    low, high = 1.0, widening
    if excess(high) < 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return low
