"""What a rewrite made of one layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer, before and after.

    Attributes:
        path: module path, the same in both models.
        kind: class of the layer after the rewrite.
        shape_before: shape of the dense weight in the dense model, outputs first, or None if the dense model has no such layer.
        shape_after: shape of the dense weight in the sparse model (what the mask chooses from).
        sparsity: removed share of ``shape_after``, in [0, 1].
        kept: weights the layer has, bias excluded.
        flops_before: FLOPs of the layer's calls in one forward pass of the dense model.
        flops_after: the same in the sparse model, of kept weights only.
        reason: why the layer is sparse or dense; empty where the model does not tell.
        origin: path of the layer of the dense model in whose place it stands with others; empty for a layer that is one itself.
        member: the transformation that made it, e.g. ``"SparseWide"``; empty for a layer that none took, which may have grown with its
            neighbours all the same.
        structure: what its mask must look like, empty if anything is allowed.
        multiply_adds: those that a sparse layer executed when the example ran; None for a dense layer and where nothing was run.
        on_padding: those of them whose input was a zero of the padding.
    """

    path: str
    kind: str
    shape_before: tuple[int, ...] | None
    shape_after: tuple[int, ...]
    sparsity: float
    kept: int
    flops_before: int
    flops_after: int
    reason: str
    origin: str = ""
    member: str = ""
    structure: str = ""
    multiply_adds: int | None = None
    on_padding: int | None = None

    @property
    def sparse(self) -> bool:
        """Whether it has a mask."""
        return self.kind.startswith("Sparse")

    @property
    def search_space(self) -> int:
        """Weights a mask may choose from: all of a sparse layer's, none of a dense one's."""
        return math.prod(self.shape_after) if self.sparse else 0

    @property
    def weights_before(self) -> int:
        """Weights of the layer in the dense model, bias excluded; 0 if it has no such layer."""
        return 0 if self.shape_before is None else math.prod(self.shape_before)


@dataclass(frozen=True)
class ReplacementReport:
    """One layer of the dense model, and the several that stand in its place.

    Attributes:
        path: module path of the layer, of their container now.
        summary: what stands in its place.
        shape_before: shape of the dense weight, outputs first, or None if the dense model has no such layer.
        flops_before: FLOPs of the layer's calls in one forward pass of the dense model.
        parts: the layers in its place, each with its path.
    """

    path: str
    summary: str
    shape_before: tuple[int, ...] | None
    flops_before: int
    parts: tuple[LayerReport, ...]

    @property
    def flops_after(self) -> int:
        """FLOPs of all parts."""
        return sum(part.flops_after for part in self.parts)

    @property
    def kept(self) -> int:
        """Weights of all parts, biases excluded."""
        return sum(part.kept for part in self.parts)

    @property
    def search_space(self) -> int:
        """Weights the masks of the parts may choose from (the cardinality of Sparse-IFT, Sec. 3.1)."""
        return sum(part.search_space for part in self.parts)

    @property
    def sparsity(self) -> float:
        """Removed share of the parts that have a mask, in [0, 1]; 0 if none has."""
        kept = sum(part.kept for part in self.parts if part.sparse)
        return 1 - kept / self.search_space if self.search_space else 0.0

    @property
    def weights_before(self) -> int:
        """Weights of the layer in the dense model, bias excluded; 0 if it has no such layer."""
        return 0 if self.shape_before is None else math.prod(self.shape_before)

    @property
    def member(self) -> str:
        """The transformation that made it, e.g. ``"SparseParallel"``."""
        return self.summary.partition(",")[0]

    @property
    def detail(self) -> str:
        """The summary without the transformation's name."""
        return self.summary.partition(", ")[2]

    def to_plain(self) -> dict[str, Any]:
        """Everything but the parts' own numbers, as plain data."""
        return {
            "path": self.path, "summary": self.summary, "shape_before": self.shape_before, "flops_before": self.flops_before,
            "flops_after": self.flops_after, "kept": self.kept, "search_space": self.search_space,
            "sparsity": self.sparsity, "parts": [part.path for part in self.parts],
        }  # fmt: skip
