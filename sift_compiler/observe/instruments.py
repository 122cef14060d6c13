"""Observers around passes: how long each took, and what the graph was after it."""

from __future__ import annotations

import collections
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch.fx import GraphModule

logger = logging.getLogger(__name__)


class Observer(Protocol):
    """Watches passes; must not change a graph."""

    def before(self, name: str, graph_module: GraphModule) -> None:
        """Called with the graph the pass ``name`` is about to get."""

    def after(self, name: str, graph_module: GraphModule, changes: tuple[str, ...]) -> None:
        """Called with the graph the pass ``name`` returned and one line per change."""


@dataclass(frozen=True)
class PassTime:
    """One run of a pass.

    Attributes:
        name: the pass.
        milliseconds: wall-clock time, checks included.
        nodes: operators in the graph after the pass, less those before, by target; unchanged ones are left out.
    """

    name: str
    milliseconds: float
    nodes: dict[str, int]


class Timer:
    """Measures every pass and counts the operators it added or removed."""

    def __init__(self) -> None:
        self.times: list[PassTime] = []
        self._start = 0.0
        self._operators: collections.Counter[str] = collections.Counter()

    def before(self, name: str, graph_module: GraphModule) -> None:
        """Start the clock."""
        self._operators = _operators(graph_module)
        self._start = time.perf_counter()

    def after(self, name: str, graph_module: GraphModule, changes: tuple[str, ...]) -> None:
        """Stop the clock and log one line."""
        milliseconds = (time.perf_counter() - self._start) * 1e3
        now = _operators(graph_module)
        difference = {
            key: now[key] - self._operators[key] for key in now | self._operators if now[key] != self._operators[key]
        }
        self.times.append(PassTime(name, milliseconds, difference))
        logger.info("%s: %d changes in %.1f ms", name, len(changes), milliseconds)


class Dump:
    """Writes the graph after every pass to ``NNN-name.txt`` in a folder; numbering goes on where the folder's files end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def before(self, name: str, graph_module: GraphModule) -> None:
        """Nothing to do: the graph before a pass is the one after its predecessor."""

    def after(self, name: str, graph_module: GraphModule, changes: tuple[str, ...]) -> None:
        """Write one file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        taken = [int(file.name[:3]) for file in self.folder.glob("[0-9][0-9][0-9]-*.txt")]
        path = self.folder / f"{max(taken, default=-1) + 1:03d}-{name}.txt"
        lines = [f"# {name}: {len(changes)} changes", *(f"# {change}" for change in changes)]
        path.write_text("\n".join([*lines, "", str(graph_module.graph), "", graph_module.code]), encoding="utf-8")


def _operators(graph_module: GraphModule) -> collections.Counter[str]:
    return collections.Counter(f"{node.op} {node.target}" for node in graph_module.graph.nodes if node.op != "get_attr")
