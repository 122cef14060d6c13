"""The random mask a layer starts with.

A layer with few weights per output, as a depthwise or grouped convolution, would often draw an output without any: its channel would be
dead from the start, and nothing that follows could tell. Such a layer keeps at least one weight of every output where the count allows it,
else one of as many outputs as it keeps weights. Outputs of other layers have so many inputs that this does not happen.
"""

from __future__ import annotations

import math

import torch

from sift_compiler.ir.mask_structure import NM, Shape, Structure, Unstructured
from sift_compiler.ir.pattern import Pattern


def initial_pattern(
    structure: Structure, shape: Shape, nnz: int, groups: int = 1, generator: torch.Generator | None = None
) -> Pattern:
    """Exactly ``nnz`` entries of a weight of ``shape`` at random, of ``structure``.

    Args:
        structure: what the mask must look like. Structures other than unstructured and N:M decide on outputs themselves.
        shape: of the dense weight, outputs first.
        nnz: entries to keep.
        groups: of a convolution; with more than one, every output keeps a weight where ``nnz`` allows it.
        generator: the random state.

    Raises:
        UserError: the structure cannot keep exactly ``nnz`` of a weight of ``shape``.
    """
    if groups == 1 or not isinstance(structure, (Unstructured, NM)):
        return structure.random(shape, nnz, generator)
    scores = torch.rand(shape[0], math.prod(shape[1:]), generator=generator)
    best = scores.argmax(1, keepdim=True)
    scores.scatter_add_(1, best, torch.ones_like(best, dtype=scores.dtype))  # above every other: chosen first
    return Pattern.from_mask(structure.project(scores.view(shape), nnz))
