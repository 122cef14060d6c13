"""Remove the mask hooks: the same function, with masks that rest. What a model is saved, exported or deployed as.

%y = call_module[conv](%x, %hook)   →   %y = call_module[conv](%x)
"""

from __future__ import annotations

from torch.fx import GraphModule

from sift_compiler.nn import MaskHook
from sift_compiler.passes.base import Condition, Pass, PassResult
from sift_compiler.passes.schedule_masks import HOOKS, hook_of, sparse_calls


def _hooked(graph_module: GraphModule) -> str | None:
    found = [name for name, module in graph_module.named_modules() if isinstance(module, MaskHook)]
    return f"{found[0]!r} is one" if found else None


UNHOOKED = Condition("the graph has no mask hook", _hooked)


class StripHooks(Pass):
    """Undo :class:`sift_compiler.passes.schedule_masks.ScheduleMasks`."""

    ensures = (UNHOOKED,)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Remove every hook, its nodes and its module."""
        changes = []
        for call, path, _ in sparse_calls(graph_module):
            if hook_of(graph_module, call) is not None:
                call.args = call.args[:1]
                changes.append(f"{call.name} ({path}) takes no hook")
        for node in reversed(list(graph_module.graph.nodes)):
            if (
                node.op == "call_module"
                and isinstance(graph_module.get_submodule(str(node.target)), MaskHook)
                and not node.users
            ):
                graph_module.graph.erase_node(node)
        if HOOKS in graph_module._modules:
            del graph_module._modules[HOOKS]
        return PassResult(graph_module, tuple(changes))
