"""Draw every parameter that has no values yet.

``init="paper"`` (Sparse-IFT, App. A; torchvision's ResNet): convolutions Kaiming normal with fan-out, of the *dense* shape and without
correction for density; the last norm of every residual branch starts at zero, so that a block starts as its shortcut. Linear layers,
and convolutions of a network with attention, are drawn as the model given draws them (ir/scheme.py): GPT-2's keep their deviation of
.02, or of .02 / (2 · layers)^½ at the end of a residual branch. What started as one number (biases of zero, norms of one) does so again.
Of a layer that became a product V U, U is drawn as the layer was and V with a deviation of d'^-½, so that V U has the layer's deviation.
``init="sparse_aware"`` (Evci et al. 2022, "Gradient flow in sparse neural networks"): as ``"paper"``, but a sparse layer counts the
connections that each of its outputs keeps: convolutions normal with deviation (2 / kept)^½; what follows the model's own scheme with its
deviation times (dense inputs / kept)^½, so that signals keep the size they had however sparse the layer is.
``init="default"``: each module's own ``reset_parameters``. A sparse layer draws only the weights it keeps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.ir.scheme import Scheme
from sift_compiler.nn import SparseConv2d, SparseLayer
from sift_compiler.options import Initialisation
from sift_compiler.passes.base import Pass, PassResult
from sift_compiler.passes.conditions import VALUES_PRESENT
from sift_compiler.passes.module_kinds import aten

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Initialise(Pass):
    """Give values to parameters and buffers on the meta device; all others stay as they are.

    Args:
        init: ``"paper"``, ``"sparse_aware"`` or ``"default"``.
        seed: of everything that is drawn; the global random state is left alone.
        device: where the new tensors go.
    """

    ensures = (VALUES_PRESENT,)

    def __init__(self, init: Initialisation = "paper", seed: int = 0, device: torch.device | None = None) -> None:
        self.init, self.seed, self.device = init, seed, device or torch.device("cpu")

    def call(self, graph_module: GraphModule) -> PassResult:
        """Draw module by module, in the order of the graph module's tree."""
        own = self.init != "default"
        last_norms = residual_norms(graph_module) if own else set()
        schemes, decisions = notes.schemes(graph_module) if own else {}, notes.decisions(graph_module)
        drawn: dict[int, Tensor] = {}
        changes = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(self.seed)
            for path, module in graph_module.named_modules():
                missing = [name for name, tensor in _own_tensors(module).items() if tensor.is_meta]
                if missing:
                    found = schemes_of(path, decisions.get(path), schemes)
                    self._draw(module, missing, drawn, found, decisions.get(path))
                    zero = path in last_norms and "weight" in missing
                    if zero:
                        _own_tensors(module)["weight"].zero_()
                    changes.append(f"{path}: {', '.join(missing)}{' (zero)' if zero else ''}")
        graph_module.meta.pop(notes.SCHEMES, None)
        return PassResult(graph_module, tuple(changes))

    def _draw(
        self, module: nn.Module, missing: list[str], drawn: dict[int, Tensor], schemes: Mapping[str, Scheme],
        decision: LayerDecision | None,
    ) -> None:  # fmt: skip
        kept = {name: tensor for name, tensor in _own_tensors(module).items() if name not in missing}
        hollow = {name: _own_tensors(module)[name] for name in missing}
        for name, tensor in _own_tensors(module).items():
            if id(tensor) not in drawn:
                _put(module, name, _filled_like(tensor, self.device))
        self._reset(module)
        for name, tensor in kept.items():
            _put(module, name, tensor)
        for name in missing:  # after the module's own: they may read the index, which is in its place again
            self._redraw(module, name, schemes.get(name), decision)
        for name, tensor in hollow.items():
            drawn.setdefault(id(tensor), _own_tensors(module)[name])
            _put(module, name, drawn[id(tensor)])

    def _reset(self, module: nn.Module) -> None:
        reset: Any = getattr(module, "reset_parameters", None)
        assert reset is not None, f"{type(module).__name__} cannot draw its own parameters"
        reset()
        if self.init != "default" and isinstance(module, (*_CONVOLUTIONS, SparseConv2d)):
            weight = module.values if isinstance(module, SparseLayer) else module.weight
            nn.init.normal_(weight, 0.0, kaiming_deviation(_weight_shape(module)))

    def _redraw(self, module: nn.Module, name: str, scheme: Scheme | None, decision: LayerDecision | None) -> None:
        """Draw one tensor again by the model's own scheme, or by the connections kept."""
        tensor, weight = _own_tensors(module)[name], name in ("weight", "values")
        if weight and isinstance(module, SparseLayer) and self.init == "sparse_aware":
            _draw_for_kept(module, scheme, decision)
        elif scheme is not None and (weight or scheme.constant):
            scheme.fill(tensor, scheme.deviation_of(_weight_shape(module)) if not scheme.constant else 0.0)


def schemes_of(path: str, decision: LayerDecision | None, schemes: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The schemes of the tensors of the module at ``path``, by their names in it.

    A part of a layer has that of the layer; but V of a product V U, of inner width d', has a deviation of d'^-½, and where the layer's
    weight starts at zero only V does.
    """
    origin = decision.origin if decision is not None and decision.origin else path
    found = {name: schemes[f"{origin}.{name}"] for name in ("weight", "bias") if f"{origin}.{name}" in schemes}
    part = path.removeprefix(f"{origin}.") if origin != path else ""
    own = found.get("weight")
    if own is not None and part == "u" and own.constant:
        del found["weight"]
    elif own is not None and part == "v" and not own.constant:
        found["weight"] = Scheme(deviation=1.0, uniform=own.uniform, fan="in")
    if "weight" in found:
        found["values"] = found["weight"]
    return found


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, SparseLayer):
        return module.weight_shape
    assert isinstance(module.weight, Tensor)
    return tuple(module.weight.shape)


def _draw_for_kept(layer: SparseLayer, scheme: Scheme | None, decision: LayerDecision | None) -> None:
    """Values by the number of connections that each output keeps."""
    fan = math.prod(layer.weight_shape[1:])
    in_use = layer.index >= 0
    rows = layer.index.long().clamp(min=0) // fan
    kept = torch.bincount(rows[in_use], minlength=layer.weight_shape[0])[rows].clamp(min=1).to(layer.values.dtype)
    if scheme is not None:
        given = layer.weight_shape if decision is None else decision.weight_shape
        scheme.fill(layer.values, scheme.deviation_of(given) * (math.prod(given[1:]) / kept).sqrt())
    elif isinstance(layer, SparseConv2d):
        layer.values.normal_().mul_((2 / kept).sqrt())
    else:
        layer.values.uniform_(-1, 1).mul_(kept.rsqrt())


def kaiming_deviation(shape: tuple[int, ...]) -> float:
    """Standard deviation of Kaiming normal, fan-out, for ReLU, of a convolution with a dense weight of ``shape`` (out first)."""
    return math.sqrt(2 / (shape[0] * math.prod(shape[2:])))


def residual_norms(graph_module: GraphModule) -> set[str]:
    """Module paths of the last norm of every residual branch.

    It is the norm that feeds an addition from the side with more layers on its way from the input; the side with fewer is the
    shortcut, whose norm (of a projection) keeps its ones. Where both have the same number there is no telling, and none is chosen.
    """
    depth: dict[Node, int] = {}
    found: set[str] = set()
    for node in graph_module.graph.nodes:
        module = graph_module.get_submodule(str(node.target)) if node.op == "call_module" else None
        layer = isinstance(module, (*_CONVOLUTIONS, nn.Linear, SparseLayer))
        depth[node] = max((depth[each] for each in node.all_input_nodes), default=0) + layer
        operands = [each for each in node.args[:2] if isinstance(each, Node)]
        if node.target is aten.add.Tensor and len(operands) == 2 and depth[operands[0]] != depth[operands[1]]:
            deeper = max(operands, key=lambda each: depth[each])
            if deeper.op == "call_module":
                norm = graph_module.get_submodule(str(deeper.target))
                if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.affine:
                    found.add(str(deeper.target))
    return found


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def _filled_like(tensor: Tensor, device: torch.device) -> Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    table: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    table[name] = tensor
