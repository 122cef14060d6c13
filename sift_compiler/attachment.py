"""Where a mask scheduler listens: pairs of sparse layers and the hooks that carry their dense gradients.

In a graph the hooks are nodes, put there by the schedule-masks pass. In an ordinary module a hook is a child of the sparse layer and
reaches it through a forward pre-hook. Neither holds parameters or buffers, so a state dict has the same keys with and without.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.nn import MaskHook, SparseLayer

_CHILD = "mask_hook"


@dataclass(frozen=True, eq=False)
class Attachment:
    """A sparse layer and where its dense gradient arrives.

    Attributes:
        name: module path of the layer.
        layer: the layer.
        hooks: one per place where the layer is called; their gradients add up.
    """

    name: str
    layer: SparseLayer
    hooks: tuple[MaskHook, ...]

    def arm(self) -> None:
        """Ask the next backward passes for the dense gradient."""
        for hook in self.hooks:
            hook.probe.arm()

    def disarm(self) -> None:
        """Ask for nothing more."""
        for hook in self.hooks:
            hook.probe.disarm()

    def take(self) -> Tensor | None:
        """The dense gradient since arming, of the dense weight's shape, or None if no backward pass came by. Disarms."""
        parts = [part for hook in self.hooks if (part := hook.probe.take()) is not None]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0] if parts else None


def attach(module: nn.Module, *, with_hooks: bool) -> tuple[Attachment, ...]:
    """Find the sparse layers of ``module`` that are trained, in the order of their names in the module.

    Args:
        module: a graph, or any module; wrappers of torch.compile and DistributedDataParallel are looked through.
        with_hooks: whether dense gradients are needed; layers that have no hook yet get one then.

    Raises:
        UserError: there is no sparse layer.
        UnsupportedError: two layers share their values.
    """
    module = unwrapped(module)
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, SparseLayer)}
    if not layers:
        raise UserError(
            f"{type(module).__name__} holds no sparse layer (SparseLinear, SparseConv2d), so there is no mask to "
            "schedule. Rewrite the model first: sparse = sift.rewrite(model, example_inputs, sift.SparseWide(sparsity=0.9))."
        )
    _check_unshared(layers)
    trained = {name: layer for name, layer in layers.items() if layer.values.requires_grad}
    if not with_hooks:
        return tuple(Attachment(name, layer, ()) for name, layer in trained.items())
    hooks = _hooks_in_graph(module) if isinstance(module, fx.GraphModule) else {}
    return tuple(
        Attachment(name, layer, tuple(hooks.get(layer, ())) or (_hook_of(layer),)) for name, layer in trained.items()
    )


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module) or (
            isinstance(module, nn.parallel.DistributedDataParallel) and isinstance(inner := module.module, nn.Module)
        ):
            module = inner
        else:
            return module


def check_optimized(attachments: tuple[Attachment, ...], optimizer: Optimizer) -> None:
    """Raise UserError if a layer's values are not among the optimizer's parameters."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lost = [one.name for one in attachments if id(one.layer.values) not in known]
    if lost:
        raise UserError(
            f"The values of {len(lost)} sparse layer(s) are not parameters of the optimizer: {', '.join(lost[:5])}"
            f"{' …' if len(lost) > 5 else ''}. Make the optimizer from the rewritten module's parameters, after the "
            "rewrite; or freeze those layers with layer.values.requires_grad_(False), which fixes their masks."
        )


def _check_unshared(layers: dict[str, SparseLayer]) -> None:
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.values), name)
        if other != name:
            raise UnsupportedError(
                f"The sparse layers {other!r} and {name!r} share their values; a mask can move only where every layer "
                "has its own. Untie them before the rewrite, or train with sift.Static() and no scheduler."
            )


def _hooks_in_graph(module: fx.GraphModule) -> dict[SparseLayer, list[MaskHook]]:
    """The hooks of the nodes ``%y = layer(%x, %hook)``, by layer."""
    found: dict[SparseLayer, list[MaskHook]] = {}
    for node in module.graph.find_nodes(op="call_module"):
        layer = module.get_submodule(str(node.target))
        source = node.kwargs.get("hook", node.args[1] if len(node.args) > 1 else None)
        if not isinstance(layer, SparseLayer) or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        hook = module.get_submodule(str(source.target))
        if isinstance(hook, MaskHook) and hook not in found.setdefault(layer, []):
            found[layer].append(hook)
    return found


def _hook_of(layer: SparseLayer) -> MaskHook:
    """The hook that is a child of ``layer``, made if there is none."""
    existing = getattr(layer, _CHILD, None)
    if isinstance(existing, MaskHook):
        return existing
    hook = MaskHook()
    layer.add_module(_CHILD, hook)
    layer.register_forward_pre_hook(_pass_hook, with_kwargs=True)
    return hook


def _pass_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # A function of the module, not a closure: a deep copy of the layer then passes its own hook.
    return args, {**kwargs, "hook": getattr(layer, _CHILD)()}
