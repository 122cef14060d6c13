"""A graph module as it was, without copying a tensor."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

_TABLES = ("_modules", "_parameters", "_buffers")


class Snapshot:
    """Remembers a graph module's nodes, metadata and module tree; tensors are remembered by identity, not by content."""

    def __init__(self, graph_module: GraphModule) -> None:
        self._graph = copied(graph_module.graph)
        self._text = str(graph_module.graph)
        self._meta = dict(graph_module.meta)
        self._tables = [(module, _tables(module)) for module in graph_module.modules()]

    def restore(self, graph_module: GraphModule) -> None:
        """Make ``graph_module`` what it was."""
        for module, tables in self._tables:
            for name, entries in tables.items():
                table = getattr(module, name)
                table.clear()
                table.update(entries)
        graph_module.meta.clear()
        graph_module.meta.update(self._meta)
        graph_module.graph = self._graph

    def unchanged(self, graph_module: GraphModule) -> bool:
        """Whether nodes and module tree are as remembered."""
        modules = [module for module, _ in self._tables]
        now = list(graph_module.modules())
        same_tree = len(now) == len(modules) and all(a is b for a, b in zip(now, modules, strict=True))
        same_tables = same_tree and all(_same(_tables(module), tables) for module, tables in self._tables)
        return same_tables and str(graph_module.graph) == self._text


def copied(graph: Graph) -> Graph:
    """A graph with new nodes and the same calling convention."""
    new, nodes = Graph(), dict[Node, Node]()
    result = new.graph_copy(graph, nodes)
    output = new.output(result)
    old = next(iter(reversed(graph.nodes)))
    output.meta = dict(old.meta)
    new.set_codegen(graph._codegen)
    return new


def _tables(module: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: dict(getattr(module, name)) for name in _TABLES}


def _same(now: dict[str, dict[str, Any]], then: dict[str, dict[str, Any]]) -> bool:
    return all(
        list(now[name]) == list(then[name]) and all(now[name][key] is then[name][key] for key in then[name])
        for name in _TABLES
    )
