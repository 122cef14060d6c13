"""Transposable masks: of an m × m square keep n in every row and n in every column, so that the scores kept add up to the most.

Greedy (Hubara et al. 2021, Alg. 1): entries by falling score, each taken if its row and its column have room. It reaches at least half
of the best; where it leaves rows and columns that cannot meet, the mask is completed along alternating paths, which costs some of that.
Exact: the assignment problem with capacities n, by successive cheapest augmenting paths (Bellman–Ford on the residual graph). All squares
of a layer are solved at once, so the loops below run over the steps of one square.
"""

from __future__ import annotations

import torch
from torch import Tensor


def transposable(scores: Tensor, n: int, *, exact: bool) -> Tensor:
    """The mask of every square, bool [squares, m, m], with exactly ``n`` per row and per column.

    Args:
        scores: [squares, m, m], finite.
        n: at most m.
        exact: the best mask; otherwise the greedy one.
    """
    squares, m, _ = scores.shape
    mask = torch.zeros(squares, m, m, dtype=torch.bool, device=scores.device)
    if not squares:
        return mask
    if exact:
        # Whole numbers, of which doubles hold every sum exactly: rounding could make a cycle look cheap.
        largest = scores.abs().amax((1, 2), keepdim=True).double()
        costs = -(scores.double() / torch.where(largest > 0, largest, 1.0) * 2.0**40).round()
        for _ in range(n * m):
            _augment(mask, costs, n)
        return mask
    mask = greedy(scores, n)
    flat = torch.zeros_like(scores, dtype=torch.float64)
    while True:
        lacking = mask.sum((1, 2)) < n * m
        if not bool(lacking.any()):
            return mask
        some = mask[lacking]
        _augment(some, flat[: len(some)], n)
        mask[lacking] = some


def greedy(scores: Tensor, n: int) -> Tensor:
    """As :func:`transposable`, with *at most* ``n`` per row and per column, and at least half of the best sum of scores that are not negative."""
    squares, m, _ = scores.shape
    mask = torch.zeros(squares, m, m, dtype=torch.bool, device=scores.device)
    which = torch.arange(squares, device=scores.device)
    rows, columns = (torch.full((squares, m), n, device=scores.device) for _ in range(2))
    for place in scores.flatten(1).argsort(dim=1, descending=True, stable=True).unbind(1):
        i, j = place // m, place % m
        taken = (rows[which, i] > 0) & (columns[which, j] > 0)
        mask[which, i, j] = taken
        rows[which, i] -= taken.long()
        columns[which, j] -= taken.long()
    return mask


def _augment(mask: Tensor, costs: Tensor, n: int) -> None:
    """Add one entry to every square along the cheapest path from a row with room to a column with room.

    An entry that is not kept leads from its row to its column at its cost; one that is kept leads back and gives its cost back.
    """
    squares, m, _ = costs.shape
    which = torch.arange(squares, device=costs.device)
    there = costs.masked_fill(mask, torch.inf)
    back = (-costs).masked_fill(~mask, torch.inf)
    rows = torch.where(mask.sum(2) < n, 0.0, torch.inf).double()
    columns = torch.full_like(rows, torch.inf)
    from_row, from_column = torch.zeros_like(rows, dtype=torch.long), torch.full_like(rows, -1, dtype=torch.long)
    for _ in range(m):
        reached, origin = (rows[:, :, None] + there).min(1)
        better = reached < columns
        columns, from_row = torch.where(better, reached, columns), torch.where(better, origin, from_row)
        reached, origin = (columns[:, None, :] + back).min(2)
        better = reached < rows
        if not bool(better.any()):
            break
        rows, from_column = torch.where(better, reached, rows), torch.where(better, origin, from_column)
    column = columns.masked_fill(mask.sum(1) >= n, torch.inf).argmin(1)
    going = torch.ones_like(column, dtype=torch.bool)
    for _ in range(m):
        row = from_row[which, column]
        mask[which, row, column] |= going
        origin = from_column[which, row]
        going = going & (origin >= 0)
        column = torch.where(going, origin, column)
        mask[which, row, column] &= ~going
        if not bool(going.any()):
            return
