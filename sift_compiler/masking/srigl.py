"""SRigL (Lasby et al. 2024): RigL with the same fan-in for all outputs, and outputs that are ablated when little of them is salient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sift_compiler.ir.mask_structure import ConstantFanIn, best_units, scattered
from sift_compiler.masking import criteria, selection
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import Choice, DynamicMethod, Kinds, Target, chosen


@dataclass(frozen=True, kw_only=True)
class SRigL(DynamicMethod):
    """Constant fan-in, with ablation (its Alg. 1).

    An update ranks as RigL does over the whole layer: the survivors by magnitude, then the largest dense gradients. An output of whose
    weights fewer than ``ablation`` · fan-in are among these is ablated for good. The layer's weights are shared out evenly over the
    outputs that are left, rounded down; each keeps its survivors, then takes its largest gradients. The last output is never ablated.
    """

    delta_t: int = 800
    """Optimizer steps between two mask updates, at least 1."""
    ablation: float = 0.3
    """Share of its fan-in that must be salient or an output is ablated, in [0, 1]; 0 ablates none."""
    needs_dense_gradient: ClassVar[bool] = True
    uses_gradient_size: ClassVar[bool] = False
    structures: ClassVar[Kinds] = (ConstantFanIn,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("ablation")

    def choose(self, layer: LayerView, target: Target) -> Choice:
        """Rank over the layer, ablate, and fill every output that is left."""
        outputs = layer.shape[0]
        survivors = layer.positions[self._survivors(layer, target.survivors)]
        living = layer.mask().view(outputs, -1).any(1)
        salient = self._salient(layer, survivors, living, target.active)
        fan_in = target.active // max(1, int(living.sum()))
        left = living & (salient >= self.ablation * fan_in)
        if not bool(left.any()):
            left = living & (torch.arange(outputs, device=living.device) == salient.argmax())
        count = int(left.sum())
        fan_in = min(layer.numel // outputs, layer.slots // max(1, count))
        scores = self._order(layer, survivors).view(outputs, -1)
        mask = best_units(scores, left[:, None].expand_as(scores), left * fan_in, count * fan_in)
        return chosen(layer, scattered(mask, layer.structure.layout(layer.shape).to(mask.device), layer.shape))

    def _survivors(self, layer: LayerView, count: int) -> Tensor:
        scores = criteria.magnitude(layer.values)
        return ~criteria.smallest(scores, layer.positions, layer.active - count, layer.stream("drop"))

    def _salient(self, layer: LayerView, survivors: Tensor, living: Tensor, active: int) -> Tensor:
        """Salient entries of every output: survivors, and the largest gradients elsewhere in outputs that live."""
        width = layer.numel // layer.shape[0]
        taken = torch.zeros(layer.numel, dtype=torch.bool, device=living.device)
        taken[survivors] = True
        candidates = (~taken & living.repeat_interleave(width)).nonzero().squeeze(1)
        scores = criteria.magnitude(layer.dense_gradient[candidates])
        count = min(active - survivors.numel(), candidates.numel())
        best = candidates[criteria.largest(scores, candidates, count, layer.stream("grow"))]
        taken[best] = True
        return taken.view(layer.shape[0], -1).sum(1)

    def _order(self, layer: LayerView, survivors: Tensor) -> Tensor:
        """[numel]: survivors by magnitude above all others by gradient."""
        everywhere = torch.arange(layer.numel, device=survivors.device)
        order = selection.ranks(criteria.magnitude(layer.dense_gradient), everywhere, layer.stream("fill"))
        magnitudes = torch.zeros(layer.numel, dtype=layer.values.dtype, device=survivors.device)
        magnitudes[layer.positions] = criteria.magnitude(layer.values)
        order[survivors] = 1 + selection.ranks(magnitudes[survivors], survivors, layer.stream("keep"))
        return order
