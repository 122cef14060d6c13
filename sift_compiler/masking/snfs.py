"""Sparse networks from scratch (Dettmers and Zettlemoyer 2019): connections come where the momentum of the dense gradient is largest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.rule import DynamicMethod


@dataclass(frozen=True, kw_only=True)
class SNFS(DynamicMethod):
    """Drop the smallest magnitudes, grow where the momentum of the dense gradient is largest.

    The method needs the dense gradient of *every* step until ``end_step`` and keeps a dense momentum of every layer, in float32: use it for
    comparison. The paper also moves weights from layer to layer; here every layer keeps its count, or FLOPs would not stay balanced.
    """

    momentum: float = 0.9
    """m ← momentum · m + g, in [0, 1]."""
    needs_dense_gradient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_share("momentum")

    def watches(self, step: int) -> bool:
        """Until masks rest."""
        return step < self.end_step

    def watch(self, layer: LayerView) -> None:
        """Go on with the momentum."""
        gradient = layer.dense_gradient.float()
        known = layer.memory.get("momentum")
        layer.memory["momentum"] = gradient.clone() if known is None else known.mul_(self.momentum).add_(gradient)

    def grow_scores(self, layer: LayerView, candidates: Tensor) -> Tensor:
        """|m| at each candidate."""
        return criteria.magnitude(layer.memory["momentum"][candidates])
