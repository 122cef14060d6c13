"""Runs passes in order, knowing none of them by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from sift_compiler.observe.instruments import Observer
from sift_compiler.passes.base import PassResult


@dataclass(frozen=True)
class Outcome:
    """What a sequence of passes did.

    Attributes:
        graph_module: the final graph.
        results: each pass's name and result, in order.
    """

    graph_module: GraphModule
    results: tuple[tuple[str, PassResult], ...]


def run_passes(
    graph_module: GraphModule, passes: Sequence[Callable[[GraphModule], PassResult]], observers: Sequence[Observer] = ()
) -> Outcome:
    """Apply ``passes`` in order, each to the result of the one before; ``observers`` watch and change nothing.

    Raises:
        SiftError: what the failing pass raised. The graph is then as the last successful pass left it.
    """
    results: list[tuple[str, PassResult]] = []
    for each in passes:
        name = str(getattr(each, "name", type(each).__name__))
        for observer in observers:
            observer.before(name, graph_module)
        result = each(graph_module)
        graph_module = result.graph_module
        results.append((name, result))
        for observer in reversed(observers):
            observer.after(name, graph_module, result.changes)
    return Outcome(graph_module, tuple(results))
