"""Records of mask updates, as frozen data that can be written to JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class LayerUpdate:
    """What a mask update did to one layer."""

    name: str
    """Module path."""
    active: int
    """Kept weights after the update."""
    dropped: int
    grown: int
    regrown: int
    """Weights that were dropped and grown again at once; they are counted in both."""
    numel: int | None = None
    """Entries of the dense weight; None in records of earlier versions."""
    explored: int | None = None
    """This and the following only with Recorder(exploration=True), see :class:`sift_compiler.masking.exploration.Exploration`."""
    oscillated: int | None = None
    revisited: int | None = None
    iou_initial: float | None = None

    @property
    def density(self) -> float | None:
        """Kept share of the dense weight, in [0, 1]."""
        return self.active / self.numel if self.numel else None

    @property
    def iou(self) -> float:
        """Intersection over union of the masks before and after, in [0, 1]."""
        common, union = self.common_and_union
        return common / union if union else 1.0

    @property
    def common_and_union(self) -> tuple[int, int]:
        """Weights in both masks, and weights in either."""
        gone, come = self.dropped - self.regrown, self.grown - self.regrown
        return self.active - come, self.active + gone


@dataclass(frozen=True, kw_only=True)
class MaskUpdate:
    """One mask update."""

    step: int
    """The optimizer step it belongs to, counted from 0."""
    drop_fraction: float
    layers: tuple[LayerUpdate, ...]
    milliseconds: float
    """Time the update took, without bringing compiled kernels up to date."""

    @property
    def dropped(self) -> int:
        """Weights dropped in all layers."""
        return sum(layer.dropped for layer in self.layers)

    @property
    def grown(self) -> int:
        """Weights grown in all layers."""
        return sum(layer.grown for layer in self.layers)

    @property
    def regrown(self) -> int:
        """Weights that were dropped and grown again at once, in all layers."""
        return sum(layer.regrown for layer in self.layers)

    def total(self, name: str) -> int | None:
        """The sum of a number of the layers, e.g. ``"oscillated"``; None where one of them does not have it."""
        found = [getattr(layer, name) for layer in self.layers]
        return None if not found or any(each is None for each in found) else sum(found)

    @property
    def density(self) -> float | None:
        """Kept share of the entries of all layers that took part, in [0, 1]."""
        numel = self.total("numel")
        return sum(layer.active for layer in self.layers) / numel if numel else None

    @property
    def explored_fraction(self) -> float | None:
        """R_s of Liu et al. 2021 over all layers that took part, in [0, 1]; None if it was not measured."""
        explored, numel = self.total("explored"), self.total("numel")
        return explored / numel if explored is not None and numel else None

    @property
    def iou(self) -> float:
        """Intersection over union of all masks before and after, in [0, 1]."""
        pairs = [layer.common_and_union for layer in self.layers]
        union = sum(either for _, either in pairs)
        return sum(both for both, _ in pairs) / union if union else 1.0

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings, lists and dictionaries only."""
        return dataclasses.asdict(self) | {"layers": [dataclasses.asdict(layer) for layer in self.layers]}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> MaskUpdate:
        """The inverse of :meth:`to_plain`; TypeError or KeyError if it is not one."""
        return cls(**{**plain, "layers": tuple(LayerUpdate(**layer) for layer in plain["layers"])})
