"""Insert an update hook in front of every sparse layer, where a mask method listens.

    %y = call_module[conv](%x)   →   %hook = call_module[mask_hooks.conv]()
                                     %y = call_module[conv](%x, %hook)

One hook per layer, however often the layer is called. Running the pass again changes nothing.
"""

from __future__ import annotations

from torch import nn
from torch.fx import GraphModule, Node

from sift_compiler.nn import MaskHook, SparseLayer
from sift_compiler.passes.base import Condition, Pass, PassResult

HOOKS = "mask_hooks"
"""The submodule that holds all hooks."""


def sparse_calls(graph_module: GraphModule) -> list[tuple[Node, str, SparseLayer]]:
    """Every call of a sparse layer: the node, the layer's module path and the layer."""
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module":
            module = graph_module.get_submodule(str(node.target))
            if isinstance(module, SparseLayer):
                found.append((node, str(node.target), module))
    return found


def hook_of(graph_module: GraphModule, call: Node) -> MaskHook | None:
    """The hook whose value a call of a sparse layer takes, or None."""
    hook = call.args[1] if len(call.args) > 1 else call.kwargs.get("hook")
    if isinstance(hook, Node) and hook.op == "call_module":
        module = graph_module.get_submodule(str(hook.target))
        return module if isinstance(module, MaskHook) else None
    return None


def _unhooked(graph_module: GraphModule) -> str | None:
    for call, path, _ in sparse_calls(graph_module):
        if hook_of(graph_module, call) is None:
            return f"a call of layer {path!r} ({call.name}) has none"
    return None


HOOKED = Condition("every call of a sparse layer takes the value of a mask hook", _unhooked)


class ScheduleMasks(Pass):
    """Give every sparse layer its hook."""

    ensures = (HOOKED,)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Insert the hooks that are missing."""
        hooks: dict[SparseLayer, str] = {}
        for call, _, layer in sparse_calls(graph_module):
            if hook_of(graph_module, call) is not None:
                hooks[layer] = str(call.args[1].target)  # type: ignore[union-attr]
        changes = []
        for call, path, layer in sparse_calls(graph_module):
            if hook_of(graph_module, call) is not None:
                continue
            if layer not in hooks:
                hooks[layer] = _new_hook(graph_module, path)
            with graph_module.graph.inserting_before(call):
                node = graph_module.graph.call_module(hooks[layer])
            node.meta["val"] = graph_module.get_submodule(hooks[layer])()
            node.meta["nn_module_stack"] = dict(call.meta.get("nn_module_stack") or {})
            call.args = (call.args[0], node)
            changes.append(f"{call.name} takes {hooks[layer]}")
        return PassResult(graph_module, tuple(changes))


def _new_hook(graph_module: GraphModule, path: str) -> str:
    if not hasattr(graph_module, HOOKS):
        graph_module.add_submodule(HOOKS, nn.Module())
    wanted = path.replace(".", "_")
    taken, name, number = graph_module.get_submodule(HOOKS)._modules, wanted, 1
    while name in taken:
        number += 1
        name = f"{wanted}_{number}"
    hook = MaskHook()
    hook.train(graph_module.training)
    graph_module.add_submodule(f"{HOOKS}.{name}", hook)
    return f"{HOOKS}.{name}"
