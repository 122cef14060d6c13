"""Compact and dense storage of sparse layers.

Compact: a layer holds the weights of its mask. Dense: it holds a value for every entry of the dense weight; those outside the mask are
asleep (see ir/pattern.py). Both are the same layers and the same operators. Convert before the optimizer is made: ``values`` is another
Parameter afterwards.
"""

from __future__ import annotations

import torch
from torch import nn

from sift_compiler.errors import UserError
from sift_compiler.ir.pattern import asleep
from sift_compiler.nn.layer import SparseLayer


@torch.no_grad()
def dense_storage(module: nn.Module, seed: int = 0) -> nn.Module:
    """Give all sparse layers of ``module`` a value for every entry; masks and what the module computes stay.

    Values outside a mask are drawn from a normal distribution with the deviation of those inside. SRSTE, TopKAST and snip need this; it
    takes 8 bytes per entry (value and index) and as much optimizer state as a dense layer.

    Args:
        module: holds sparse layers; it is changed in place and returned.
        seed: of the new values.

    Raises:
        UserError: there is no sparse layer.
    """
    generator = torch.Generator().manual_seed(seed)
    for layer in _layers(module):
        values, numel = layer.values, layer.pattern.numel
        kept = layer.index >= 0
        positions = layer.index[kept].long()
        deviation = float(values[kept].float().std(correction=0)) if positions.numel() else 0.0
        drawn = torch.randn(numel, generator=generator) * deviation
        drawn = drawn.to(device=values.device, dtype=values.dtype)
        drawn[positions] = values[kept]
        index = asleep(torch.arange(numel, device=layer.index.device))
        index[positions] = positions.to(torch.int32)
        _replace(layer, drawn, index)
    return module


@torch.no_grad()
def compact(module: nn.Module) -> nn.Module:
    """Keep of all sparse layers of ``module`` only the weights in their masks; what the module computes stays.

    Also removes the empty slots that GMP, GraNet, MEST and SRigL leave, and brings weights that masks have moved between slots into the
    order of the dense weight: kernels for few tokens then read them where they are. A layer without either stays as it is.

    Args:
        module: holds sparse layers; it is changed in place and returned.

    Raises:
        UserError: there is no sparse layer.
    """
    for layer in _layers(module):
        index = layer.index
        if not bool((index >= 0).all()) or not bool((index[1:] > index[:-1]).all()):
            order = index.argsort()
            order = order[index[order] >= 0]
            _replace(layer, layer.values[order], index[order])
    return module


def _layers(module: nn.Module) -> list[SparseLayer]:
    found = [each for each in module.modules() if isinstance(each, SparseLayer)]
    if not found:
        raise UserError(
            f"{type(module).__name__} holds no sparse layer (SparseLinear, SparseConv2d), so there is no storage to change."
        )
    return found


def _replace(layer: SparseLayer, values: torch.Tensor, index: torch.Tensor) -> None:
    layer.values = nn.Parameter(values, requires_grad=layer.values.requires_grad)
    layer.index = index
