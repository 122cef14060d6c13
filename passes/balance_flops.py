"""Strike the FLOP balance: how sparse layers must be so that the model costs what it did.

With F the FLOPs of the model given, D those of all that is dense in the rewritten model and S those of the layers that get a mask, at
density 1:

    s* = 1 - (F - D) / S            (derived; it also pays for what a wider first layer and classifier, which stay dense, cost more)

Where layers have densities ρ_l of their own, all are scaled by (F - D) / Σ ρ_l S_l; one that would exceed 1 stays dense and the others
make up for it. In a mix every transformation first gets the densities at which it costs what its own layers did. Solved from the actual integer sizes, 1x1 convolutions that a rewrite added included. Every layer keeps
floor(density · numel) weights; the FLOPs that rounding down leaves over buy at most one weight more per layer, largest remainder
first, so that small models balance too. Where a structure keeps weights in larger steps (a fan-in for all outputs, whole blocks) these
take the place of single weights, and what it cannot keep the others do.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping

from torch.fx import GraphModule

from sift_compiler.errors import InfeasibleError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import Balance, LayerDecision
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.ir.inputs import Inputs
from sift_compiler.ir.mask_structure import UNSTRUCTURED
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import COUNTS_KNOWN, LAYERS_DECIDED

logger = logging.getLogger(__name__)


class BalanceFlops(Pass):
    """Give every layer that becomes sparse the number of weights it keeps.

    Args:
        dense: FLOPs of the model given.
        inputs: the example that was counted.
        widening: factor that was applied to widths, for the message of a refusal; None where no width grew.

    Raises:
        InfeasibleError: what is dense already costs as much as the model given.
        UserError: a structure lets layers keep less than the balance needs, or does not fit one.
    """

    requires = (LAYERS_DECIDED,)
    ensures = (COUNTS_KNOWN,)

    def __init__(self, dense: FlopCount, inputs: Inputs, widening: float | None = None) -> None:
        self.dense, self.inputs, self.widening = dense, inputs, widening

    def call(self, graph_module: GraphModule) -> PassResult:
        """Count, solve, and note the balance and the counts."""
        made = dict(notes.decisions(graph_module))
        chosen = [path for path, decision in made.items() if decision.sparse]
        now = count_flops(graph_module, self.inputs)
        costs = {path: now.of(path) for path in chosen}
        sparsifiable = sum(costs.values())
        kept_dense = now.total - sparsifiable
        budget = self.dense.total - kept_dense
        if budget < 0 or (chosen and not (budget and sparsifiable)):
            raise infeasible(self.dense, now, set(chosen), self.widening)
        sizes = {path: math.prod(made[path].widened_shape) for path in chosen}
        steps = {path: steps_of(made[path]) for path in chosen}
        limits = {path: most / sizes[path] for path, (_, most) in steps.items()}
        if sum(limits[path] * costs[path] for path in chosen) < budget and min(limits.values(), default=1.0) < 1:
            raise _too_strict(made, limits, budget / sparsifiable)
        densities = scaled_densities(self._densities(made, now), costs, budget, limits)
        prices = {path: costs[path] // sizes[path] for path in chosen}
        for path, kept in kept_weights(sizes, prices, densities, steps).items():
            made[path] = _decided(made[path], kept, sizes[path])
        notes.set_decisions(graph_module, made)
        struck = Balance(
            self.dense.total, kept_dense, sparsifiable, 1 - min(1.0, budget / sparsifiable) if chosen else 0.0
        )
        graph_module.meta[notes.BALANCE] = struck
        logger.info("FLOPs balance at a sparsity of %.6f", struck.sparsity)
        return PassResult(
            graph_module, tuple(f"{path} keeps {each.kept}" for path, each in made.items() if each.sparse)
        )

    def _densities(self, made: Mapping[str, LayerDecision], now: FlopCount) -> dict[str, float]:
        """Densities at which every transformation costs what its own layers did, so that in a mix none pays for another."""
        found: dict[str, float] = {}
        for rule in {decision.rule for decision in made.values()}:
            own = [decision for decision in made.values() if decision.rule == rule]
            nominal = {each.path: each.density or 1.0 for each in own if each.sparse}
            given = sum(self.dense.of(path) for path in {each.origin or each.path for each in own})
            left = given - sum(now.of(each.path) for each in own if not each.sparse)
            asked = sum(density * now.of(path) for path, density in nominal.items())
            scale = left / asked if left > 0 and asked else 1.0
            found.update({path: scale * density for path, density in nominal.items()})
        return found


def _decided(decision: LayerDecision, kept: int, numel: int) -> LayerDecision:
    if kept == numel:
        return dataclasses.replace(decision, sparse=False, reason="it keeps all its weights when FLOPs balance")
    return dataclasses.replace(decision, kept=kept)


def steps_of(decision: LayerDecision) -> tuple[int, int]:
    """In what steps the number of a layer's kept weights can change, and the most it can be: what its structure allows.

    Raises:
        UserError: the layer's weight cannot have its structure.
    """
    structure, shape = decision.structure, decision.widened_shape
    if structure == UNSTRUCTURED:
        return 1, math.prod(shape)
    try:
        return structure.granule(shape), structure.largest(shape)
    except UserError as error:
        raise UserError(
            f"Layer {decision.path!r}: {error} Or keep the layer dense: dense=({decision.path!r},)."
        ) from error


def _too_strict(made: Mapping[str, LayerDecision], limits: Mapping[str, float], needed: float) -> UserError:
    tightest = min(limits, key=lambda path: limits[path])
    return UserError(
        f"FLOPs balance where layers keep {needed:.2%} of their weights, but {made[tightest].structure} lets layer {tightest!r} keep at most "
        f"{limits[tightest]:.2%}: the model would cost less than the one given. Choose a sparsity of at least {1 - limits[tightest]:.4f}, "
        "or a structure that keeps more."
    )


def scaled_densities(
    densities: Mapping[str, float], costs: Mapping[str, int], budget: float, limits: Mapping[str, float] | None = None
) -> dict[str, float]:
    """``min(limit, c · density)`` of every layer, with c such that all layers together cost ``budget``.

    Args:
        densities: above 0, by layer.
        costs: FLOPs at density 1, by layer.
        budget: FLOPs; with more than all layers cost at their limits, all are at them.
        limits: the largest density of every layer, 1 by default.
    """
    limit = {path: 1.0 if limits is None else limits[path] for path in densities}
    full: set[str] = set()
    while len(full) < len(densities):
        free = [path for path in densities if path not in full]
        left = budget - sum(limit[path] * costs[path] for path in full)
        scale = left / sum(densities[path] * costs[path] for path in free)
        over = {path for path in free if scale * densities[path] >= limit[path]}
        if not over:
            return {path: limit[path] if path in full else scale * density for path, density in densities.items()}
        full |= over
    return limit


def kept_weights(
    sizes: Mapping[str, int], prices: Mapping[str, int], density: float | Mapping[str, float],
    steps: Mapping[str, tuple[int, int]] | None = None,
) -> dict[str, int]:  # fmt: skip
    """Weights kept per layer, for a budget of ``density`` times the FLOPs of all.

    Args:
        sizes: weights of every layer's dense weight.
        prices: FLOPs of one weight of every layer.
        density: kept share, in [0, 1]; of all layers or of each.
        steps: in what steps each layer's count can change, and its most; 1 and all by default.
    """
    step = {path: 1 if steps is None else steps[path][0] for path in sizes}
    most = {path: numel if steps is None else steps[path][1] for path, numel in sizes.items()}
    wanted = {
        path: numel * (density[path] if isinstance(density, Mapping) else density) for path, numel in sizes.items()
    }
    kept = {path: min(most[path], math.floor(wanted[path] * (1 + 1e-12)) // step[path] * step[path]) for path in sizes}
    left = sum(wanted[path] * prices[path] for path in sizes) - sum(kept[path] * prices[path] for path in sizes)
    for path in sorted(sizes, key=lambda each: (kept[each] - wanted[each]) / step[each]):
        cost = prices[path] * step[path]
        if kept[path] + step[path] <= most[path] and cost <= left * (1 + 1e-12):
            kept[path] += step[path]
            left -= cost
    return kept


def infeasible(dense: FlopCount, now: FlopCount, sparse: set[str], widening: float | None) -> InfeasibleError:
    """The refusal of a rewrite whose dense part costs as much as the model given.

    Args:
        dense: FLOPs of the model given.
        now: FLOPs of the rewritten model at density 1.
        sparse: paths of the layers that may cost less.
        widening: factor that was applied to widths, if any.
    """
    staying = {path: flops for path, flops in now.modules.items() if path not in sparse}
    largest = sorted(staying.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{path or 'the model itself'} ({flops:,})" for path, flops in largest)
    cost = f"costs {sum(staying.values()):,}, the model given costs {dense.total:,}. The largest of it: {named}."
    if widening is None or widening == 1:
        return InfeasibleError(
            f"The rewrite cannot cost the same FLOPs: what is dense in it {cost} Keep the smallest of the layers it takes dense."
        )
    limit = largest_feasible_widening(dense, now, sparse, widening)
    return InfeasibleError(
        f"Widening by {widening:.4f} cannot cost the same FLOPs: what stays dense then {cost} The largest feasible widening is "
        f"about {limit:.3f}, so use a sparsity below {1 - limit**-2:.3f}."
    )


def largest_feasible_widening(
    dense: FlopCount, wide: FlopCount, sparse: set[str], widening: float, least: float = 0.0
) -> float:
    """The widening k at which all that stays dense costs as much as the model given, at least 1.

    A module's FLOPs grow as k^e, with e (0, 1 or 2 before rounding) from its FLOPs before and after the given widening.

    Args:
        dense: FLOPs of the model given.
        wide: FLOPs of the widened model.
        sparse: paths of the layers that may cost less.
        widening: the factor between them.
        least: what the layers of ``sparse`` cost at least at that widening; it grows as k.
    """
    terms = []
    for path, flops in wide.modules.items():
        if path not in sparse and dense.of(path):
            terms.append((dense.of(path), math.log(flops / dense.of(path)) / math.log(widening)))

    def excess(k: float) -> float:
        return float(sum(flops * k**exponent for flops, exponent in terms)) + least * k / widening - dense.total

    low, high = 1.0, widening
    if excess(high) < 0:
        return high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    return low
