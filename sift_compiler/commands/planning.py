"""``sift rewrite --dry-run``: what would become of every layer, and why; no mask is drawn and no weight made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from sift_compiler.ir import annotations as notes
from sift_compiler.ir.annotations import Balance, LayerDecision
from sift_compiler.options import Transformation
from sift_compiler.rewrite import plan


@dataclass(frozen=True)
class Plan:
    """A rewrite before it is made.

    Attributes:
        decisions: every layer of the rewritten model.
        replacements: what stands in the place of a layer that becomes several, by its path.
        balance: the FLOPs.
    """

    decisions: tuple[LayerDecision, ...]
    replacements: dict[str, str]
    balance: Balance

    def to_plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "balance": dataclasses.asdict(self.balance),
            "replacements": self.replacements,
            "layers": [{**dataclasses.asdict(each), "sparsity": _sparsity(each)} for each in self.decisions],
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Path, weight, sparsity, weights kept and reason, as text; the parts of a layer are indented below it."""
        rows: list[tuple[str, str, str, str, str]] = []
        named: set[str] = set()
        for each in self.decisions:
            if each.origin and each.origin not in named:
                named.add(each.origin)
                rows.append((each.origin, "", "", "", self.replacements.get(each.origin, "")))
            path = f"  {each.path.removeprefix(each.origin)}" if each.origin else each.path
            kept = math.prod(each.widened_shape) if each.kept is None else each.kept
            sparsity = f"{_sparsity(each):.4f}" if each.sparse else "dense"
            rows.append((path, "x".join(map(str, each.widened_shape)), sparsity, f"{kept:,}", each.reason))
        return rows


def plan_rewrite(
    model: nn.Module | ExportedProgram,
    inputs: Tensor | tuple[Any, ...],
    transformation: Transformation | Mapping[str, Transformation | None],
) -> Plan:
    """What ``rewrite`` would make of ``model``; it raises what ``rewrite`` does."""
    graph_module = plan(model, inputs, transformation)
    struck = notes.balance(graph_module)
    assert struck is not None
    return Plan(tuple(notes.decisions(graph_module).values()), dict(notes.replacements(graph_module)), struck)


def _sparsity(decision: LayerDecision) -> float:
    return 0.0 if decision.kept is None else 1 - decision.kept / math.prod(decision.widened_shape)
