"""Where a mask scheduler listens: pairs of sparse layers and the hooks that carry their dense gradients.

In a graph the hooks are nodes, put there by the schedule-masks pass. In an ordinary module a hook is a child of the sparse layer and
reaches it through a forward pre-hook. Neither holds parameters or buffers, so a state dict has the same keys with and without.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.optim import Optimizer

from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.ir.entries import Entries
from sift_compiler.nn import MaskHook, SparseLayer
from sift_compiler.nn.growth import Reduce
from sift_compiler.passes.manager import run_passes
from sift_compiler.passes.schedule_masks import HOOKED, ScheduleMasks, hook_of, sparse_calls

_CHILD = "mask_hook"


@dataclass(frozen=True, eq=False)
class Attachment:
    """A sparse layer and where its dense gradient arrives.

    Attributes:
        name: module path of the layer.
        layer: the layer.
        hook: receives the gradients of all calls of the layer, which add up; None if the method needs none.
    """

    name: str
    layer: SparseLayer
    hook: MaskHook | None

    def arm(self, reduce: Reduce | None = None, *, passes: int = 0, strict: bool = False) -> None:
        """Ask the next backward passes for the dense gradient, or for what ``reduce`` makes of it; see :meth:`GrowthProbe.arm`."""
        if self.hook is not None:
            self.hook.probe.arm(reduce, passes=passes, strict=strict)

    def disarm(self) -> None:
        """Ask for nothing more."""
        if self.hook is not None:
            self.hook.probe.disarm()

    def take(self) -> Tensor | Entries | None:
        """The dense gradient since arming, of the dense weight's shape or reduced, or None if no backward pass came by. Disarms."""
        return self.hook.probe.take() if self.hook is not None else None

    def claim(self) -> None:
        """Count this layer's backward passes from now on."""
        if self.hook is not None:
            layer = self.layer
            self.hook.probe.claim(lambda: layer.values.grad)

    def release(self) -> None:
        """Let go of the hook."""
        if self.hook is not None:
            self.hook.probe.release()

    @property
    def claimed(self) -> bool:
        """Whether somebody listens at the hook."""
        return self.hook is not None and self.hook.probe.claimed

    def end_step(self) -> None:
        """The optimizer has stepped."""
        if self.hook is not None:
            self.hook.probe.end_step()

    @property
    def passes(self) -> tuple[int, int]:
        """The least and the most backward passes of a step there have been."""
        return (0, 0) if self.hook is None else (self.hook.probe.least, self.hook.probe.most)


def attach(module: nn.Module, optimizer: Optimizer, *, with_hooks: bool) -> tuple[Attachment, ...]:
    """Find the sparse layers of ``module`` that are trained, in the module's order, and give them hooks.

    Args:
        module: a graph, or any module; wrappers of torch.compile and DistributedDataParallel are looked through.
        optimizer: holds the values of those layers.
        with_hooks: whether dense gradients are needed; layers that have no hook yet get one then.

    Raises:
        UserError: there is no sparse layer, or its values are not among the optimizer's parameters.
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
    check_optimized(trained, optimizer)
    if not with_hooks:
        return tuple(Attachment(name, layer, None) for name, layer in trained.items())
    hooks = _hooks_in_graphs(module)
    return tuple(Attachment(name, layer, hooks.get(layer) or _hook_of(layer)) for name, layer in trained.items())


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers of torch.compile and DistributedDataParallel."""
    while True:
        if isinstance(inner := getattr(module, "_orig_mod", None), nn.Module) or (
            isinstance(module, nn.parallel.DistributedDataParallel) and isinstance(inner := module.module, nn.Module)
        ):
            module = inner
        else:
            return module


def optimizer_inside(optimizer: object) -> Optimizer:
    """The optimizer of torch inside the wrappers of Accelerate and Lightning: the one whose step() is called.

    Raises:
        UserError: there is none.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}.")
    return optimizer


def check_optimized(layers: Mapping[str, SparseLayer], optimizer: Optimizer) -> None:
    """Raise UserError unless the values of all ``layers``, by name, are parameters of ``optimizer``."""
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    lost = [name for name, layer in layers.items() if id(layer.values) not in known]
    if lost:
        raise UserError(
            f"The values of {len(lost)} sparse layer(s) are not parameters of the optimizer: {', '.join(lost[:5])}"
            f"{' …' if len(lost) > 5 else ''}. Make the optimizer from the rewritten module's parameters, after the "
            "rewrite; or freeze those layers with layer.values.requires_grad_(False), which fixes their masks."
        )


def shared_values(layers: Mapping[str, SparseLayer]) -> tuple[str, str] | None:
    """The names of the first two of ``layers`` that own the same values, if any do."""
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.values), name)
        if other != name:
            return other, name
    return None


def _check_unshared(layers: Mapping[str, SparseLayer]) -> None:
    shared = shared_values(layers)
    if shared is not None:
        raise UnsupportedError(
            f"The sparse layers {shared[0]!r} and {shared[1]!r} share their values; a mask can move only where every layer "
            "has its own. Untie them before the rewrite, or train with sift.Static() and no scheduler."
        )


def _hooks_in_graphs(module: nn.Module) -> dict[SparseLayer, MaskHook]:
    """Those of ``module`` if it is a graph, else of the graphs it is made of: a rewritten model inside a module of the user's."""
    if isinstance(module, fx.GraphModule):
        return _hooks_in_graph(module)
    graphs: list[tuple[str, fx.GraphModule]] = []
    for name, part in module.named_modules():
        if isinstance(part, fx.GraphModule) and not any(name.startswith(f"{outer}.") for outer, _ in graphs):
            graphs.append((name, part))
    return {layer: hook for _, graph in graphs for layer, hook in _hooks_in_graph(graph).items()}


def _hooks_in_graph(graph_module: fx.GraphModule) -> dict[SparseLayer, MaskHook]:
    """The hook that the schedule-masks pass gave each layer the graph calls; the pass runs now if it has not."""
    if HOOKED.problem(graph_module) is not None:
        # Not otherwise: a pass regenerates the graph's code, and what torch.compile made of the old code would be traced again.
        run_passes(graph_module, (ScheduleMasks(),))
    found = ((layer, hook_of(graph_module, call)) for call, _, layer in sparse_calls(graph_module))
    return {layer: hook for layer, hook in found if hook is not None}


def _hook_of(layer: SparseLayer) -> MaskHook:
    """The hook that is a child of ``layer``, made if there is none."""
    existing = getattr(layer, _CHILD, None)
    if isinstance(existing, MaskHook):
        return existing
    hook = MaskHook()
    layer.add_module(_CHILD, hook)
    layer.register_forward_pre_hook(_pass_hook, with_kwargs=True)
    return hook


def drop_hook(layer: SparseLayer) -> None:
    """Undo :func:`_hook_of`; a hook in a graph is removed by the strip-hooks pass."""
    layer._modules.pop(_CHILD, None)
    for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is _pass_hook]:
        del layer._forward_pre_hooks[key]
        layer._forward_pre_hooks_with_kwargs.pop(key, None)


def _pass_hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    # A function of the module, not a closure: a deep copy of the layer then passes its own hook.
    return args, {**kwargs, "hook": getattr(layer, _CHILD)()}
