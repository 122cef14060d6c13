"""Decide which transformation takes each layer, by patterns of module paths.

The first pattern that fits a layer's path has it. A layer that no pattern names, or whose pattern says None, stays as it is.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Mapping

from torch.fx import GraphModule

from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.options import Transformation
from sift_compiler.passes.base import Condition, Pass, PassResult
from sift_compiler.passes.conditions import LAYERS_DECIDED

Rules = Mapping[str, Transformation | None]
"""Transformations by pattern of module paths; None keeps dense."""

_UNNAMED = "no pattern names it"
_EXCEPTED = "its pattern keeps it as it is"
_NOTHING = "sparsity 0: nothing to remove"


def _unassigned(graph_module: GraphModule) -> str | None:
    for path, decision in notes.decisions(graph_module).items():
        if decision.sparse and not decision.rule:
            return f"layer {path!r} has none"
    return None


RULES_ASSIGNED = Condition("every layer that becomes sparse has a transformation", _unassigned)


class AssignRules(Pass):
    """Give every layer that may become sparse its transformation.

    Args:
        rules: transformations by pattern of module paths.

    Raises:
        UserError: a pattern names no layer, only layers of earlier patterns, or only layers that stay dense anyway.
    """

    requires = (LAYERS_DECIDED,)
    ensures = (RULES_ASSIGNED,)

    def __init__(self, rules: Rules) -> None:
        self.rules = dict(rules)

    def call(self, graph_module: GraphModule) -> PassResult:
        """Assign layer by layer."""
        decided = notes.decisions(graph_module)
        for pattern in self.rules:
            self._refuse_idle(pattern, decided)
        made = {path: self._assigned(decision) if decision.sparse else decision for path, decision in decided.items()}
        notes.set_decisions(graph_module, made)
        return PassResult(graph_module, tuple(f"{path}: {each.rule}" for path, each in made.items() if each.rule))

    def _pattern(self, path: str) -> str | None:
        return next((pattern for pattern in self.rules if fnmatch.fnmatchcase(path, pattern)), None)

    def _assigned(self, decision: LayerDecision) -> LayerDecision:
        pattern = self._pattern(decision.path)
        if pattern is None:
            return dataclasses.replace(decision, sparse=False, reason=_UNNAMED)
        transformation = self.rules[pattern]
        if transformation is None:
            return dataclasses.replace(decision, sparse=False, reason=_EXCEPTED)
        if transformation.identity:
            return dataclasses.replace(decision, sparse=False, reason=_NOTHING)
        structure = getattr(transformation, "structure", decision.structure)
        return dataclasses.replace(decision, rule=pattern, structure=structure)

    def _refuse_idle(self, pattern: str, decided: Mapping[str, LayerDecision]) -> None:
        fitting = [path for path in decided if fnmatch.fnmatchcase(path, pattern)]
        if not fitting:
            raise UserError(f"The pattern {pattern!r} names no layer of the model. Its layers: {', '.join(decided)}.")
        own = [path for path in fitting if self._pattern(path) == pattern]
        if not own:
            raise UserError(
                f"Every layer that the pattern {pattern!r} names is named by an earlier one ({self._pattern(fitting[0])!r} "
                f"has {fitting[0]!r}). The first pattern that fits a layer has it: write the narrower ones first."
            )
        if self.rules[pattern] is not None and not any(decided[path].sparse for path in own):
            reasons = "; ".join(f"{path}: {decided[path].reason}" for path in own)
            raise UserError(f"Every layer that the pattern {pattern!r} names stays dense ({reasons}).")


def layers_of(graph_module: GraphModule, rule: str) -> tuple[LayerDecision, ...]:
    """The layers that the transformation of pattern ``rule`` takes."""
    return tuple(each for each in notes.decisions(graph_module).values() if each.sparse and each.rule == rule)


def untouched(graph_module: GraphModule, rule: str) -> tuple[str, ...]:
    """Layers whose sizes the transformation of ``rule`` must leave: those of other patterns, and those kept as they are."""
    return tuple(
        path
        for path, each in notes.decisions(graph_module).items()
        if (each.sparse and each.rule != rule) or each.reason in (_UNNAMED, _EXCEPTED)
    )
