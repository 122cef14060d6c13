"""Which entries of a dense gradient a choice can depend on, known before the optimizer's step.

When a layer's dense gradient is there the weights that will be dropped are not known: the step comes first. What grows is
known well enough: an entry without a weight can come only if it is among the best of its group that have none, as many of
them as grow at most. Whatever is dropped may come again. So the choice from these entries alone is the choice from all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sift_compiler.ir.mask_structure import TransposableNM, Unstructured, best_units
from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView


def by_magnitude(layer: LayerView, gradient: Tensor, count: int) -> Tensor:
    """Entries from which :func:`selection.newcomers` grows up to ``count`` weights where |g| is largest.

    Args:
        layer: the layer; no transposable structure, whose masks can depend on all entries.
        gradient: [numel].
        count: the most that grow.

    Returns:
        int64 [n]: the active weights, then others.
    """
    assert not isinstance(layer.structure, TransposableNM)
    seed = layer.stream("grow")
    if isinstance(layer.structure, Unstructured):
        return torch.cat([layer.positions, largest_elsewhere(gradient, layer.positions, count, seed)])
    layout = layer.structure.layout(layer.shape).to(gradient.device)
    free = ~layer.mask()[layout].all(-1)
    units = count // layout.shape[2]
    if layer.structure.equal:
        # As many come in every output that keeps any.
        living = (~free).any(1)
        rooms = living * (units // max(1, int(living.sum())))
    else:
        rooms = torch.full((len(layout),), min(units, layer.structure.most(layer.shape)), device=gradient.device)
    # As newcomers ranks them: sums of float64, ties by the first entry of a unit.
    scores = criteria.magnitude(gradient).double()[layout].sum(-1)
    ties = criteria.priority(layout[..., 0], seed)
    best = best_units(scores, free, rooms, free.numel(), ties)
    return torch.cat([layer.positions, layout[best].reshape(-1)])


def largest_elsewhere(gradient: Tensor, known: Tensor, count: int, seed: int) -> Tensor:
    """The ``count`` entries, or all if there are fewer, with the largest |g| that are not ``known`` [n]; int64."""
    scores = criteria.magnitude(gradient).index_fill_(0, known, -1.0)
    count = min(count, scores.numel() - known.numel())
    places = criteria.in_reach(scores, count)
    return places[criteria.largest(scores[places], places, count, seed)]
