"""Which nodes stand in the place of one layer: found again in a graph that was read from a file.

A file keeps the paths of layers that became several (``conv1``, with children ``conv1.u``, ``conv1.v``), but notes on nodes are lost.
Calls of those children tell by their path. What else belongs, a σ between them or the sum of branches, follows from the graph:
what stands for a layer has one value, so everything up to the node where the children's values meet is part of it.
"""

from __future__ import annotations

from collections import Counter

from torch.fx import GraphModule, Node

from sift_compiler.ir import annotations as notes


def mark_replaced_nodes(graph_module: GraphModule) -> None:
    """Note on every node that stands in the place of a layer the path of that layer (``annotations.REPLACEMENTS``)."""
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    for path in notes.replacements(graph_module):
        for seeds in _calls(graph_module, path):
            for node in _up_to_one_value(seeds, order, path):
                node.meta[notes.REPLACEMENTS] = path


def _calls(graph_module: GraphModule, path: str) -> list[set[Node]]:
    """The children's calls, one set for each time the layer was called: every child is called once in each."""
    seen: Counter[str] = Counter()
    sets: list[set[Node]] = []
    for node in graph_module.graph.nodes:
        if node.op == "call_module" and str(node.target).startswith(f"{path}."):
            target = str(node.target)
            if seen[target] == len(sets):
                sets.append(set())
            sets[seen[target]].add(node)
            seen[target] += 1
    return sets


def _up_to_one_value(seeds: set[Node], order: dict[Node, int], path: str) -> set[Node]:
    """``seeds`` and what follows them, until a single node is used by others; then what adds the layer's own bias."""
    part = set(seeds)
    exits = _exits(part)
    while len(exits) > 1:
        following = {user for node in exits for user in node.users if user not in part and user.op != "output"}
        if not following:
            return part
        part.add(min(following, key=order.__getitem__))
        exits = _exits(part)
    for value in exits:
        for user in value.users:
            others = [node for node in user.all_input_nodes if node is not value]
            if others and all(_of_bias(node, path) for node in others):
                part |= {user, *(node for node in others if node.op != "get_attr")}
    return part


def _exits(part: set[Node]) -> list[Node]:
    """The nodes whose values are used outside."""
    return [node for node in part if any(user not in part for user in node.users)]


def _of_bias(node: Node, path: str) -> bool:
    """Whether a node is the parameter of the layer's container, or that one reshaped."""
    if node.op == "get_attr":
        return str(node.target) == f"{path}.bias"
    inputs = node.all_input_nodes
    return node.op == "call_function" and len(inputs) == 1 and _of_bias(inputs[0], path)
