"""Give every layer that becomes sparse the share it would keep if FLOPs did not matter; balancing scales all shares together.

Uniform gives all the same; Erdős–Rényi and Erdős–Rényi–Kernel more to small layers (masking/distributions.py); a map gives sparsities
by pattern of module paths, of a part or of the layer it is a part of.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.masking.distributions import erdos_renyi, erdos_renyi_kernel, uniform
from sift_compiler.options import Distribution
from sift_compiler.passes.assign_rules import RULES_ASSIGNED, layers_of
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED

_DENSITIES = {"uniform": uniform, "er": erdos_renyi, "erk": erdos_renyi_kernel}


class DistributeSparsity(Pass):
    """Note the densities of the layers of a rule.

    Args:
        sparsity: of all the rule's layers together, in [0, 1).
        distribution: a name, or sparsities by pattern.
        rule: pattern under which a transformation takes the layers.

    Raises:
        UserError: a pattern of the map names none of the rule's layers.
    """

    requires = (LAYERS_DECIDED, RULES_ASSIGNED)

    def __init__(self, sparsity: float, distribution: Distribution | Mapping[str, float], rule: str) -> None:
        self.sparsity, self.distribution, self.rule = sparsity, distribution, rule

    def call(self, graph_module: GraphModule) -> PassResult:
        """Decide on all the rule's layers together."""
        layers = layers_of(graph_module, self.rule)
        if isinstance(self.distribution, Mapping):
            densities = [1 - sparsity for sparsity in self._mapped(layers, self.distribution)]
        else:
            shapes = [each.widened_shape for each in layers]
            densities = _DENSITIES[self.distribution](shapes, self.sparsity) if layers else []
            if self.distribution == "uniform":
                densities = [
                    density**0.5 if _more_groups(graph_module, each) else density
                    for each, density in zip(layers, densities, strict=True)
                ]
        made = dict(notes.decisions(graph_module))
        for each, density in zip(layers, densities, strict=True):
            made[each.path] = dataclasses.replace(each, density=density)
        notes.set_decisions(graph_module, made)
        return PassResult(graph_module, tuple(f"{each.path}: {density:.4f}" for each, density in zip(layers, densities, strict=True)))  # fmt: skip

    def _mapped(self, layers: tuple[LayerDecision, ...], chosen: Mapping[str, float]) -> list[float]:
        for pattern in chosen:
            if not any(_fits(each, pattern) for each in layers):
                names = ", ".join(dict.fromkeys(each.origin or each.path for each in layers))
                raise UserError(
                    f"The pattern {pattern!r} of distribution= names no layer that becomes sparse. Those are: {names}."
                )
        return [
            next((sparsity for pattern, sparsity in chosen.items() if _fits(each, pattern)), self.sparsity)
            for each in layers
        ]


def _more_groups(graph_module: GraphModule, decision: LayerDecision) -> bool:
    """Whether a convolution was widened by more groups of the same width, as a depthwise one is: its FLOPs grow as the widening, not as
    its square, so that it is iso-FLOP at a density of 1 / k = (1 - s)^(1/2)  (derived)."""
    layer = graph_module.get_submodule(decision.path)
    grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
    before, after = decision.weight_shape, decision.widened_shape
    return grouped and before[0] < after[0] and before[1] == after[1]


def _fits(decision: LayerDecision, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for path in (decision.path, decision.origin) if path)
