"""σ, the non-linearity inside a transformed layer. Without one the paper loses most of the gain (Sparse-IFT, Table 9)."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import Node

from sift_compiler.errors import UserError
from sift_compiler.options import Sigma
from sift_compiler.passes.operators import place
from sift_compiler.passes.replace_layer import Subgraph

aten = torch.ops.aten


def chosen_sigma(sigma: Sigma | None, layer: nn.Module) -> Sigma:
    """``sigma``, or where it is left open ``"bn_relu"`` for a convolution and ``"gelu"`` for a linear layer."""
    if sigma is not None:
        return sigma
    return "bn_relu" if isinstance(layer, nn.Conv2d) else "gelu"


def norms(sigma: Sigma, layer: nn.Module, calls: list[Node], widths: dict[str, int]) -> dict[str, nn.Module]:
    """The batch norms that ``sigma`` needs behind the parts of ``layer``, without values.

    Args:
        sigma: the non-linearity.
        layer: the layer that is replaced.
        calls: its calls.
        widths: channels of what is normalised, by the name of the part that gives it.

    Returns:
        ``part_norm`` for every part, or nothing.

    Raises:
        UserError: a linear layer that sees more than a batch of vectors.
    """
    if sigma != "bn_relu":
        return {}
    kind: type[nn.BatchNorm1d] | type[nn.BatchNorm2d] = nn.BatchNorm2d
    if isinstance(layer, nn.Linear):
        kind = nn.BatchNorm1d
        for call in calls:
            if call.meta["val"].dim() != 2:
                raise UserError(
                    f"sigma='bn_relu' needs a batch of vectors [N, features], but the {place(call)} gives "
                    f"{tuple(call.meta['val'].shape)}. Use sigma='gelu' or 'relu', or leave sigma open."
                )
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)
    return {f"{part}_norm": kind(width, device="meta", dtype=weight.dtype) for part, width in widths.items()}


def apply_sigma(subgraph: Subgraph, sigma: Sigma, part: str, value: Node) -> Node:
    """σ of ``value``, which the part ``part`` gave."""
    if sigma == "identity":
        return value
    if sigma == "gelu":
        return subgraph.operator(aten.gelu.default, value)
    if sigma == "bn_relu":
        value = subgraph.module(f"{part}_norm", value)
    return subgraph.operator(aten.relu.default, value)
