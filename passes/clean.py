"""Remove what nothing uses: dead nodes and submodules that no node calls or reads."""

from __future__ import annotations

from torch.fx import GraphModule

from sift_compiler.passes.base import Pass, PassResult


class Clean(Pass):
    """Drop dead code and unused submodules."""

    def call(self, graph_module: GraphModule) -> PassResult:
        """Remove nodes first, then the submodules that lost their last use."""
        before_nodes = {node.name for node in graph_module.graph.nodes}
        before_modules = {name for name, _ in graph_module.named_modules()}
        graph_module.graph.eliminate_dead_code()
        graph_module.delete_all_unused_submodules()
        gone = before_nodes - {node.name for node in graph_module.graph.nodes}
        gone_modules = before_modules - {name for name, _ in graph_module.named_modules()}
        return PassResult(graph_module, tuple(f"removed {name}" for name in sorted(gone) + sorted(gone_modules)))
