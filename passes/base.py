"""What a pass is: one class with one ``call``, and a base that holds it to what it declares."""

from __future__ import annotations

import abc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import GraphModule

from sift_compiler.errors import PassError, SiftError
from sift_compiler.passes.snapshot import Snapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Condition:
    """A checkable fact about a graph.

    Attributes:
        name: the fact, as a clause: ``"every parameter has values"``.
        problem: returns what is wrong with a graph, or None where the fact holds.
    """

    name: str
    problem: Callable[[GraphModule], str | None]


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        graph_module: the graph to go on with.
        changes: one line per change, naming what was changed; empty where the pass found nothing to do.
    """

    graph_module: GraphModule
    changes: tuple[str, ...] = ()

    @property
    def applied(self) -> int:
        """How often the pass applied."""
        return len(self.changes)


class Pass(abc.ABC):
    """One rewrite of a graph.

    A child declares ``in_place``, ``requires`` and ``ensures`` and writes ``call``. Calling the pass checks the requirements on
    the graph given, and on the *result*: that the graph is well formed, that everything in ``ensures`` holds and that a pass
    declared in place returned the graph it was given, and any other left that graph alone. Whatever fails, the graph given is
    as it was before.
    """

    in_place: ClassVar[bool] = True
    requires: ClassVar[tuple[Condition, ...]] = ()
    ensures: ClassVar[tuple[Condition, ...]] = ()

    @property
    def name(self) -> str:
        """The pass's name in logs, dumps and errors."""
        return type(self).__name__

    @abc.abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult:
        """Do the rewrite; replace modules, parameters and nodes, never write into a tensor of the graph given."""

    def __call__(self, graph_module: GraphModule) -> PassResult:
        """Run the pass and hold it to its declarations.

        Raises:
            PassError: a requirement or a promise does not hold.
            SiftError: the pass refuses the graph.
        """
        for condition in self.requires:
            self._check(condition, graph_module, "requires")
        snapshot = Snapshot(graph_module)
        try:
            result = self.call(graph_module)
            self._check_place(snapshot, graph_module, result)
            self._check_form(result.graph_module)
            for condition in self.ensures:
                self._check(condition, result.graph_module, "promises")
        except BaseException:
            snapshot.restore(graph_module)
            raise
        logger.debug("%s applied %d times", self.name, result.applied)
        return result

    def _check(self, condition: Condition, graph_module: GraphModule, verb: str) -> None:
        problem = condition.problem(graph_module)
        if problem is not None:
            raise PassError(f"The pass {self.name} {verb} that {condition.name}, but: {problem}.")

    def _check_place(self, snapshot: Snapshot, given: GraphModule, result: PassResult) -> None:
        if self.in_place and result.graph_module is not given:
            raise PassError(f"The pass {self.name} is declared in place, but returned another graph module.")
        if not self.in_place and (result.graph_module is given or not snapshot.unchanged(given)):
            raise PassError(
                f"The pass {self.name} is declared to return a new graph module, but changed the one given."
            )

    def _check_form(self, graph_module: GraphModule) -> None:
        try:
            graph_module.graph.lint()
            graph_module.recompile()
        except SiftError:
            raise
        except Exception as error:
            raise PassError(f"The pass {self.name} left a graph that is not well formed: {error}") from error
