"""Replace the chosen dense layers by sparse ones with a random mask of exact count and of the structure that was chosen.

    call_module[conv] (nn.Conv2d, weight [out, in, kh, kw])  →  call_module[conv] (SparseConv2d, values [kept], index [kept])

A layer whose dense weight has no values (meta device) becomes a sparse layer whose values have none either: the initialise pass
draws only what is kept, and the wide dense weight never exists. A depthwise or grouped convolution keeps a weight of every output where
its count allows it (ir/initial_mask.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from sift_compiler.errors import PassError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.ir.initial_mask import initial_pattern
from sift_compiler.ir.pattern import Pattern
from sift_compiler.nn import SparseConv2d, SparseLayer, SparseLinear
from sift_compiler.passes.base import Condition, Pass, PassResult
from sift_compiler.passes.conditions import COUNTS_KNOWN, LAYERS_DECIDED


def _unmasked(graph_module: GraphModule) -> str | None:
    for path, decision in notes.decisions(graph_module).items():
        layer = graph_module.get_submodule(path)
        if decision.sparse and not (isinstance(layer, SparseLayer) and layer.values.numel() == decision.kept):
            return f"layer {path!r} is {type(layer).__name__}"
    return None


MASKED = Condition("every chosen layer is sparse with its exact count", _unmasked)


class AttachMasks(Pass):
    """Give every chosen layer its mask.

    Args:
        seed: of the random masks; each layer draws from it in the order of the graph.
        device: where sparse layers without values are put.
    """

    requires = (LAYERS_DECIDED, COUNTS_KNOWN)
    ensures = (MASKED,)

    def __init__(self, seed: int = 0, device: torch.device | None = None) -> None:
        self.seed, self.device = seed, device

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace layer by layer."""
        generator = torch.Generator().manual_seed(self.seed)
        changes = []
        for path, decision in notes.decisions(graph_module).items():
            if not decision.sparse:
                continue
            dense = graph_module.get_submodule(path)
            if isinstance(dense, SparseLayer):
                continue
            _refuse_tied(graph_module, path, dense)
            assert decision.kept is not None
            groups = dense.groups if isinstance(dense, nn.Conv2d) else 1
            pattern = initial_pattern(decision.structure, decision.widened_shape, decision.kept, groups, generator)
            with torch.random.fork_rng(devices=[]):
                layer = _sparse(dense, pattern, decision, self.device)
            layer.train(dense.training)
            parent, _, name = path.rpartition(".")
            graph_module.get_submodule(parent)._modules[name] = layer
            changes.append(f"{path}: {decision.kept} of {pattern.numel} weights")
        return PassResult(graph_module, tuple(changes))


def _refuse_tied(graph_module: GraphModule, path: str, dense: nn.Module) -> None:
    names = [
        name for name, parameter in graph_module.named_parameters(remove_duplicate=False) if parameter is dense.weight
    ]
    if len(names) > 1:
        raise PassError(
            f"The weight of layer {path!r} is shared ({', '.join(names)}) and cannot become sparse on its own."
        )


def _sparse(dense: nn.Module, pattern: Pattern, decision: LayerDecision, device: torch.device | None) -> SparseLayer:
    weight: Any = dense.weight
    layer: SparseLayer
    if not weight.is_meta:
        layer = (
            SparseConv2d.like(dense, pattern, decision.structure)
            if isinstance(dense, nn.Conv2d)
            else SparseLinear.like(_linear(dense), pattern, decision.structure)
        )
    elif isinstance(dense, nn.Conv2d):
        layer = SparseConv2d(
            dense.in_channels, dense.out_channels, dense.kernel_size, dense.stride, dense.padding, dense.dilation,  # type: ignore[arg-type]
            dense.groups, dense.bias is not None, pattern=pattern, device=device, dtype=weight.dtype,
            structure=decision.structure,
        )  # fmt: skip
    else:
        assert isinstance(dense, nn.Linear)
        layer = SparseLinear(
            dense.in_features,
            dense.out_features,
            dense.bias is not None,
            pattern=pattern,
            device=device,
            dtype=weight.dtype,
            structure=decision.structure,
        )
    if weight.is_meta:
        layer.values = nn.Parameter(torch.empty(pattern.nnz, dtype=weight.dtype, device="meta"))
    layer.values.requires_grad_(weight.requires_grad)
    bias: Any = dense.bias
    if bias is not None and weight.is_meta:
        layer.bias = bias
    return layer


def _linear(dense: nn.Module) -> nn.Linear:
    assert isinstance(dense, nn.Linear)
    return dense
