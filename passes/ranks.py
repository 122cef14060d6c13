"""Inner widths d' of the transformations that write a layer as a product V U (Sparse-IFT, Sec. 3.2.3 and 3.2.4).

A layer of weight [out, in / g, kernel] with g groups has out · fan weights, fan = kernel · in / g. One unit of inner width costs
fan + out / g: a filter of U [d', in / g, kernel] and a column of V [out, d' / g]. The width that costs what the layer does is

    full = out · fan / (fan + out / g)                  ( = K c_in c_out / (K c_in + c_out) whatever g is )

Sparse Factorized has full / (1 - s), rounded up; Sparse Doped s · full, rounded down. With groups all are multiples of g.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from sift_compiler.ir.flops import FlopCount

Shape = tuple[int, ...]

_EXACT = 1e-9
"""1 - .9 is not a tenth in binary: a width within this share of a whole number is that number."""


def weights_per_rank(shape: Shape, groups: int = 1) -> int:
    """Weights of U and V per unit of inner width, for a layer whose weight has ``shape`` [out, in / groups, ...]."""
    return math.prod(shape[1:]) + shape[0] // groups


def full_rank(shape: Shape, groups: int = 1) -> float:
    """The inner width at which U and V together have as many weights as the layer."""
    return math.prod(shape) / weights_per_rank(shape, groups)


def factorized_rank(shape: Shape, sparsity: float, groups: int = 1) -> int:
    """Inner width of Sparse Factorized; the smallest multiple of ``groups`` that reaches the budget at ``sparsity``."""
    exact = full_rank(shape, groups) / (1 - sparsity) / groups
    return groups * math.ceil(exact * (1 - _EXACT))


def doped_rank(shape: Shape, sparsity: float, groups: int = 1) -> int:
    """Inner width of the dense product in Sparse Doped; the largest multiple of ``groups`` within the budget, 0 where none is."""
    exact = full_rank(shape, groups) * sparsity / groups
    return groups * math.floor(exact * (1 + _EXACT))


def price_of_rank(layer: nn.Module, flops: int) -> int:
    """FLOPs of the smallest product in the place of nn.Conv2d or nn.Linear, of a rank of 1 per group, for a layer that costs ``flops``."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    assert isinstance(weight, nn.Parameter)
    shape = tuple(weight.shape)
    return int(flops // math.prod(shape) * weights_per_rank(shape, groups) * groups)


def affordable_ranks(
    layers: Mapping[str, nn.Module], dense: FlopCount, present: FlopCount, budget: int
) -> dict[str, int]:
    """Inner widths of dense products for a budget of FLOPs, shared in proportion to what each layer costs in the model given.

    Args:
        layers: nn.Conv2d and nn.Linear by path.
        dense: FLOPs of the model given.
        present: FLOPs of the graph as it is, with ``layers`` in it.
        budget: FLOPs that all products together may cost.

    Returns:
        Multiples of each layer's groups, possibly 0; rounded down, and what that leaves over spent on one more at a time, largest
        remainder first, as long as something fits.
    """
    units, prices, wanted = {}, {}, {}
    share = budget / sum(dense.of(path) for path in layers)
    for path, layer in layers.items():
        units[path] = getattr(layer, "groups", 1)
        prices[path] = price_of_rank(layer, present.of(path))
        wanted[path] = share * dense.of(path) / prices[path]
    counts = {path: math.floor(count * (1 + _EXACT)) for path, count in wanted.items()}
    left = budget - sum(counts[path] * prices[path] for path in layers)
    while any(price <= left for price in prices.values()):
        for path in sorted(layers, key=lambda each: counts[each] - wanted[each]):
            if prices[path] <= left:
                counts[path] += 1
                left -= prices[path]
                break
    return {path: count * units[path] for path, count in counts.items()}
