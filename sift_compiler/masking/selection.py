"""Dropping and growing so that a layer's mask keeps its structure and its exact count."""

from __future__ import annotations

import torch
from torch import Tensor

from sift_compiler.ir.mask_structure import TransposableNM, Unstructured, best_units, scattered
from sift_compiler.masking import criteria
from sift_compiler.masking.layer import LayerView
from sift_compiler.masking.order_statistics import where


def survivors(layer: LayerView, scores: Tensor, count: int) -> Tensor:
    """The ``count`` active weights with the largest scores, whole units at a time.

    Args:
        layer: the layer.
        scores: [active], finite; a unit's score is the sum of its entries'.
        count: at most as many as are active, a multiple of what is dropped at a time.

    Returns:
        bool [active].
    """
    seed = layer.stream("drop")
    if isinstance(layer.structure, Unstructured | TransposableNM):
        return ~criteria.smallest(scores, layer.positions, layer.active - count, seed)
    layout, by_unit, kept = _units(layer, scores)
    groups, units, entries = layout.shape
    rooms = torch.full((groups,), units, device=layout.device)
    if layer.structure.equal:
        rooms = (kept.any(1) * (count // max(1, int(kept.any(1).sum()) * entries))).long()
    chosen = best_units(by_unit, kept, rooms, count // entries, criteria.priority(layout[..., 0], seed))
    return scattered(chosen, layout, layer.shape).reshape(-1)[layer.positions]


def newcomers(
    layer: LayerView, kept: Tensor, count: int, score: criteria.Score, *, exclude_just_dropped: bool = False
) -> Tensor:
    """Where ``count`` weights grow: the largest scores the structure has room for.

    Args:
        layer: the layer.
        kept: bool [active], what is not dropped.
        count: how many grow.
        score: gives the scores [n] of candidates, positions int64 [n].
        exclude_just_dropped: only where there was no weight.

    Returns:
        int64 [count], positions; those of weights that are dropped now may be among them.
    """
    seed = layer.stream("grow")
    taken = torch.zeros(layer.numel, dtype=torch.bool, device=layer.index.device)
    if exclude_just_dropped:
        taken.index_fill_(0, layer.positions, True)
    else:
        taken.index_copy_(0, layer.positions, kept)
    if isinstance(layer.structure, Unstructured):
        if layer.growable is None:
            candidates = where(~taken)
            scores = score(candidates)
        else:
            free = where(~taken.index_select(0, layer.growable))
            candidates, scores = layer.growable[free], score(layer.growable)[free]
        return candidates[where(criteria.largest(scores, candidates, count, seed))]
    candidates = where(~taken)
    scores = score(candidates)
    dense = torch.zeros(layer.numel, dtype=torch.float64, device=taken.device)
    dense[candidates] = scores.double()
    layout = layer.structure.layout(layer.shape).to(taken.device)
    entries = layout.shape[2]
    before = taken[layout].all(-1)
    rooms = layer.structure.most(layer.shape) - before.sum(1)
    if layer.structure.equal:
        living = layer.mask()[layout].any(-1).any(1)
        rooms = (living * (count // max(1, int(living.sum()) * entries))).long()
    ties = criteria.priority(layout[..., 0], seed)
    chosen = best_units(dense[layout].sum(-1), ~before, rooms, count // entries, ties)
    return layout[chosen].reshape(-1)


def reprojected(layer: LayerView, kept: Tensor, count: int, score: criteria.Score) -> Tensor:
    """The mask of ``count`` entries, bool [numel], that keeps as many of the kept weights as a transposable structure allows and fills up
    with the largest scores: there not every choice can be completed, so what is kept may have to give way."""
    dense = torch.zeros(layer.numel, dtype=torch.float64, device=layer.index.device)
    taken = torch.zeros_like(dense, dtype=torch.bool)
    taken[layer.positions[kept]] = True
    candidates = (~taken).nonzero().squeeze(1)
    dense[candidates] = ranks(score(candidates), candidates, layer.stream("grow"))
    # Every kept weight outweighs all candidates of its square.
    dense[taken] = 1.0 + layer.structure.layout(layer.shape).shape[1]
    return layer.structure.project(dense.view(layer.shape), count, layer.ties("grow")).reshape(-1)


def ranks(scores: Tensor, positions: Tensor, seed: int) -> Tensor:
    """Scores as ranks in (0, 1], ties broken; sums of them stay comparable whatever the range of the scores."""
    order = criteria.priority(positions, seed).argsort(stable=True)
    order = order[scores[order].argsort(stable=True)]
    ranks = torch.empty(len(scores), dtype=torch.float64, device=scores.device)
    ranks[order] = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device) / max(1, len(scores))
    return ranks


def _units(layer: LayerView, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layout, score of every unit, and whether it is kept, bool [groups, units]."""
    layout = layer.structure.layout(layer.shape).to(layer.index.device)
    dense = torch.zeros(layer.numel, dtype=torch.float64, device=layout.device)
    dense[layer.positions] = scores.double()
    return layout, dense[layout].sum(-1), layer.mask()[layout].all(-1)
