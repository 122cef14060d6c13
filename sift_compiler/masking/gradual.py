"""Methods whose sparsity rises: gradual magnitude pruning, and GraNet, which regrows what it should not have pruned.

Slots whose weight was pruned stay empty (see ir/pattern.py): tensors keep their length, and nothing is traced again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.ir.entries import Entries
from sift_compiler.ir.mask_structure import NM, TransposableNM, Unstructured
from sift_compiler.ir.pattern import kept_entries
from sift_compiler.masking import criteria, needed, schedules
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import DynamicMethod, Kinds, MovingMethod, Target, replacing


@dataclass(frozen=True, kw_only=True)
class GMP(MovingMethod):
    """Gradual magnitude pruning (Zhu and Gupta 2017): the smallest magnitudes of every layer go, nothing comes.

    Every layer's sparsity rises from what it is to ``final_sparsity`` by their cubic law (Eq. 1), s_f + (s_i - s_f)(1 - p)³; the last update
    before ``end_step`` reaches it exactly.
    """

    final_sparsity: float
    """Share of a layer's dense weight that is removed at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("final_sparsity")

    def begin(self, layer: LayerView) -> None:
        """Remember where the layer starts."""
        _remember_start(layer)
        if layer.structure.kept(layer.shape, self.final_sparsity) > layer.active:
            raise UserError(
                f"GMP(final_sparsity={self.final_sparsity}) would have to add weights to layer {layer.name!r}, whose sparsity is "
                f"{1 - layer.active / layer.numel:.4f} already. Choose a larger final_sparsity."
            )

    def targets(self, layers: Sequence[LayerView], step: int) -> list[Target]:
        """What the cubic law leaves of each layer."""
        found = []
        for layer in layers:
            initial = 1 - int(layer.memory["initial"]) / layer.numel
            sparsity = _cubic(self, step, initial, self.final_sparsity)
            active = min(layer.active, layer.structure.kept(layer.shape, sparsity))
            found.append(Target(active, active))
        return found


@dataclass(frozen=True, kw_only=True)
class GraNet(DynamicMethod):
    """GraNet (Liu et al. 2021): prune by magnitude over all layers to the cubic law, then replace ``drop_fraction`` of every layer as RigL.

    Moves weights between layers, so FLOPs do not stay balanced. The paper's ``delta_t`` is 1000 (CIFAR) or 4000 (ImageNet).
    """

    final_sparsity: float
    """Share of all layers' dense weights together that is removed at the end, in [0, 1]."""
    delta_t: int = 1000
    """Optimizer steps between two mask updates, at least 1."""
    drop_fraction: float = 0.5
    """Share of a layer's weights that is regenerated (dropped and grown) at the first update, in [0, 1]."""
    needs_dense_gradient: ClassVar[bool] = True
    uses_gradient_size: ClassVar[bool] = False
    structures: ClassVar[Kinds] = (Unstructured, NM, TransposableNM)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("final_sparsity")

    def begin(self, layer: LayerView) -> None:
        """Remember where the layer starts."""
        _remember_start(layer)

    def targets(self, layers: Sequence[LayerView], step: int) -> list[Target]:
        """How many of the largest magnitudes of all layers are in each, and the share of them to regenerate."""
        if not layers:
            return []
        numel = sum(layer.numel for layer in layers)
        initial = 1 - sum(int(layer.memory["initial"]) for layer in layers) / numel
        total = kept_entries(numel, _cubic(self, step, initial, self.final_sparsity))
        counts = shares_of_largest([criteria.magnitude(layer.values) for layer in layers], total)
        fraction = self.fraction(step)
        return [replacing(layer, count, fraction) for layer, count in zip(layers, counts, strict=True)]

    def grow_scores(self, layer: LayerView, candidates: Tensor) -> Tensor:
        """|g| at each candidate."""
        return criteria.magnitude(layer.gradient_at(candidates))

    def reduces(self, layer: LayerView) -> bool:
        """All structures but the transposable one."""
        return not isinstance(layer.structure, TransposableNM)

    def needed(self, layer: LayerView, gradient: Tensor) -> Entries:
        """As for RigL, if pruning took nothing from this layer: then most would come."""
        target = replacing(layer, layer.active, self.fraction(layer.step))
        return needed.by_magnitude(layer, gradient, target.active - target.survivors)


def shares_of_largest(scores: Sequence[Tensor], total: int) -> list[int]:
    """How many of the ``total`` largest of all scores are in each tensor [n]; among equals those of earlier tensors count first."""
    sizes = [len(each) for each in scores]
    total = min(total, sum(sizes))
    if total == 0:
        return [0] * len(sizes)
    threshold = torch.topk(torch.cat([each.float() for each in scores]), total, sorted=False).values.min()
    counts = [int((each.float() > threshold).sum()) for each in scores]
    left = total - sum(counts)
    for place, each in enumerate(scores):
        tied = min(left, int((each.float() == threshold).sum()))
        counts[place] += tied
        left -= tied
    return counts


def _remember_start(layer: LayerView) -> None:
    layer.memory["initial"] = torch.tensor(layer.active)


def _cubic(method: GMP | GraNet, step: int, initial: float, final: float) -> float:
    last = schedules.last_update(method)
    return schedules.cubic(step, begin=method.begin_step, last=last, initial=initial, final=final)
