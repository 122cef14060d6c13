"""Which entries of a dense gradient a choice can depend on, known before the optimizer's step.

When a layer's dense gradient is there the weights that will be dropped are not known: the step comes first. What grows is
known well enough: an entry without a weight can come only if it is among the best of its group that have none, as many of
them as grow at most. Whatever is dropped may come again. So the choice from these entries alone is the choice from all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sift_compiler.ir.entries import Entries
from sift_compiler.ir.mask_structure import TransposableNM, Unstructured, best_units
from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.order_statistics import nth_largest, reaching, where


def by_magnitude(layer: LayerView, gradient: Tensor, count: int) -> Entries:
    """Entries from which :func:`selection.newcomers` grows up to ``count`` weights where |g| is largest.

    Args:
        layer: the layer; no transposable structure, whose masks can depend on all entries.
        gradient: [numel].
        count: the most that grow.

    Returns:
        In a layer without structure, all with the largest |g|, of active weights, too; otherwise the active weights, then others.
    """
    assert not isinstance(layer.structure, TransposableNM)
    if isinstance(layer.structure, Unstructured):
        return _unstructured(layer, gradient, count)
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
    ties = criteria.priority(layout[..., 0], layer.stream("grow"))
    best = best_units(scores, free, rooms, free.numel(), ties)
    return Entries.of(gradient, torch.cat([layer.positions, layout[best].reshape(-1)]))


_SAMPLED = 61
"""Of long gradients every so manieth number is looked at first. Prime, so that it meets all columns of a weight."""


def _unstructured(layer: LayerView, gradient: Tensor, count: int) -> Entries:
    """All entries whose |g| reaches that of the ``count``-th largest without a weight: what is below it grows nowhere, dropped or not."""
    count = min(count, layer.numel - layer.active)
    if count == 0:
        return Entries.of(gradient, layer.positions[:0])
    active = layer.mask()
    entries = reaching(gradient, _sampled(gradient, active, count))
    if not entries.finite:
        return entries
    free = ~active.index_select(0, entries.places)
    if int(free.count_nonzero()) < count:
        # What was sampled misled.
        size = criteria.magnitude(gradient).masked_fill_(active, -1.0)
        entries = reaching(gradient, float(nth_largest(size, count)))
        free = ~active.index_select(0, entries.places)
    return entries if int(free.count_nonzero()) <= 2 * count else _fewer(entries, free, count, layer.stream("grow"))


def _sampled(gradient: Tensor, active: Tensor, count: int) -> float:
    """A threshold that probably ``count`` entries without a weight reach, and few more; 0 for short gradients."""
    size = criteria.magnitude(gradient[::_SAMPLED]).masked_fill_(active[::_SAMPLED], -1.0)
    expected = count / _SAMPLED
    rank = int(expected + 4 * expected**0.5 + 16)
    return max(0.0, float(nth_largest(size, rank))) if rank <= size.numel() else 0.0


def _fewer(entries: Entries, free: Tensor, count: int, seed: int) -> Entries:
    """Of those that are ``free`` only the ``count`` largest: where many are equal, their order is known now."""
    free = where(free)
    keep = torch.ones(entries.places.numel(), dtype=torch.bool, device=free.device)
    keep[free] = criteria.largest(criteria.magnitude(entries.numbers[free]), entries.places[free], count, seed)
    kept = where(keep)
    return Entries(places=entries.places[kept], numbers=entries.numbers[kept], numel=entries.numel)


def largest_elsewhere(gradient: Tensor, known: Tensor, count: int, seed: int) -> Tensor:
    """The ``count`` entries, or all if there are fewer, with the largest |g| that are not ``known`` [n]; int64."""
    scores = criteria.magnitude(gradient).index_fill_(0, known, -1.0)
    count = min(count, scores.numel() - known.numel())
    return where(criteria.largest(scores, torch.arange(scores.numel(), device=scores.device), count, seed))
