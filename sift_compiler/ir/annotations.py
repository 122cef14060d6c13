"""What the passes know about a graph, kept in ``graph_module.meta`` and ``node.meta`` as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule

from sift_compiler.ir.mask_structure import UNSTRUCTURED, Structure
from sift_compiler.ir.scheme import Scheme
from sift_compiler.ir.width import WidthTable

DECISIONS = "sift_decisions"
"""``graph_module.meta``: LayerDecision by module path. ``node.meta`` of a layer's calls holds its own decision under it."""
WIDTHS = "sift_widths"
"""``graph_module.meta``: the WidthTable. ``node.meta``: the widths of the node's value."""
REPLACEMENTS = "sift_replacements"
"""``graph_module.meta``: what stands in place of a layer, as a clause, by the layer's path. ``node.meta`` of its nodes: that path."""
BALANCE = "sift_balance"
"""``graph_module.meta``: the Balance."""
SCHEMES = "sift_schemes"
"""``graph_module.meta``: by what Scheme the model given draws a parameter, by the parameter's name, until new values are drawn."""


@dataclass(frozen=True)
class LayerDecision:
    """What becomes of one layer, and why.

    Attributes:
        path: module path.
        kind: ``"conv2d"``, ``"linear"`` and the like.
        sparse: whether the layer gets a mask.
        reason: why, as a clause.
        weight_shape: shape of its dense weight in the model given.
        widened_shape: shape of its dense weight after widening; as ``weight_shape`` before.
        kept: weights it keeps; None until FLOPs are balanced.
        rule: the pattern of module paths whose transformation takes it; empty for one that none takes.
        origin: path of the layer of the model given that it is a part of; empty for a layer that is one itself.
        density: share to keep before FLOPs are balanced, in (0, 1], where layers differ.
        structure: what its mask must look like.
    """

    path: str
    kind: str
    sparse: bool
    reason: str
    weight_shape: tuple[int, ...]
    widened_shape: tuple[int, ...]
    kept: int | None = None
    rule: str = ""
    origin: str = ""
    density: float | None = None
    structure: Structure = UNSTRUCTURED


@dataclass(frozen=True)
class Balance:
    """The FLOPs of one forward pass of the example, and the sparsity that balances them.

    Attributes:
        dense_flops: F, of the model given.
        kept_dense_flops: D, of everything that stays dense in the widened model.
        sparsifiable_flops: S, of the layers that get a mask, at density 1.
        sparsity: s* = 1 - (F - D) / S.
    """

    dense_flops: int
    kept_dense_flops: int
    sparsifiable_flops: int
    sparsity: float


def decisions(graph_module: GraphModule) -> Mapping[str, LayerDecision]:
    """The decision on every layer by module path; empty before layers are selected."""
    found: Mapping[str, LayerDecision] = graph_module.meta.get(DECISIONS, {})
    return found


def set_decisions(graph_module: GraphModule, made: Mapping[str, LayerDecision]) -> None:
    """Replace all decisions, on the graph and on the nodes that call the layers."""
    graph_module.meta[DECISIONS] = dict(made)
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and node.target in made:
            node.meta[DECISIONS] = made[node.target]


def replacements(graph_module: GraphModule) -> Mapping[str, str]:
    """What stands in place of every layer that became several, by its path."""
    found: Mapping[str, str] = graph_module.meta.get(REPLACEMENTS, {})
    return found


def widths(graph_module: GraphModule) -> WidthTable | None:
    """The solved widths, or None before they are inferred."""
    table: Any = graph_module.meta.get(WIDTHS)
    return table if isinstance(table, WidthTable) else None


def balance(graph_module: GraphModule) -> Balance | None:
    """The FLOP balance, or None before it is struck."""
    struck: Any = graph_module.meta.get(BALANCE)
    return struck if isinstance(struck, Balance) else None


def schemes(graph_module: GraphModule) -> Mapping[str, Scheme]:
    """By what scheme the model given draws its parameters, by name; empty where that was not read."""
    found: Mapping[str, Scheme] = graph_module.meta.get(SCHEMES, {})
    return found
