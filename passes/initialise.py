"""Draw every parameter that has no values yet.

``init="paper"`` (Sparse-IFT, App. A; torchvision's ResNet): convolutions Kaiming normal with fan-out, of the *dense* shape and without
correction for density; the last norm of every residual branch starts at zero, so that a block starts as its shortcut.
``init="sparse_aware"`` (Evci et al. 2022, "Gradient flow in sparse neural networks"): as ``"paper"``, but a sparse layer counts the
connections that each of its outputs keeps: convolutions normal with deviation (2 / kept)^½, linear layers uniform within kept^-½, so
that signals keep their size however sparse the layer is.
``init="default"``: each module's own ``reset_parameters``. A sparse layer draws only the weights it keeps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

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
        last_norms = residual_norms(graph_module) if self.init != "default" else set()
        drawn: dict[int, Tensor] = {}
        changes = []
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            torch.manual_seed(self.seed)
            for path, module in graph_module.named_modules():
                missing = [name for name, tensor in _own_tensors(module).items() if tensor.is_meta]
                if missing:
                    self._draw(module, missing, drawn, zero=path in last_norms)
                    changes.append(f"{path}: {', '.join(missing)}{' (zero)' if path in last_norms else ''}")
        return PassResult(graph_module, tuple(changes))

    def _draw(self, module: nn.Module, missing: list[str], drawn: dict[int, Tensor], zero: bool) -> None:
        kept = {name: tensor for name, tensor in _own_tensors(module).items() if name not in missing}
        hollow = {name: _own_tensors(module)[name] for name in missing}
        for name, tensor in _own_tensors(module).items():
            if id(tensor) not in drawn:
                _put(module, name, _filled_like(tensor, self.device))
        self._reset(module, zero)
        for name, tensor in kept.items():
            _put(module, name, tensor)
        if self.init == "sparse_aware" and isinstance(module, SparseLayer) and "values" in missing:
            _draw_for_kept(module)  # it reads the index, which is in its place again
        for name, tensor in hollow.items():
            drawn.setdefault(id(tensor), _own_tensors(module)[name])
            _put(module, name, drawn[id(tensor)])

    def _reset(self, module: nn.Module, zero: bool) -> None:
        reset: Any = getattr(module, "reset_parameters", None)
        assert reset is not None, f"{type(module).__name__} cannot draw its own parameters"
        reset()
        if self.init != "default" and isinstance(module, (*_CONVOLUTIONS, SparseConv2d)):
            weight = module.values if isinstance(module, SparseLayer) else module.weight
            shape = module.weight_shape if isinstance(module, SparseLayer) else tuple(module.weight.shape)
            nn.init.normal_(weight, 0.0, kaiming_deviation(shape))
        if zero and isinstance(module.weight, Tensor):
            nn.init.zeros_(module.weight)


def _draw_for_kept(layer: SparseLayer) -> None:
    """Values by the number of connections that each output keeps; the bias is drawn already."""
    fan = math.prod(layer.weight_shape[1:])
    in_use = layer.index >= 0
    rows = layer.index.long().clamp(min=0) // fan
    kept = torch.bincount(rows[in_use], minlength=layer.weight_shape[0])[rows].clamp(min=1).to(layer.values.dtype)
    if isinstance(layer, SparseConv2d):
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
