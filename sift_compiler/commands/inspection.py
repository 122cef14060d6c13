"""``sift inspect``: what a model is made of, layer by layer, dense or sparse."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import fx, nn
from torch.export import ExportedProgram

from sift_compiler.capture import raise_exported
from sift_compiler.ir.annotations import Balance, balance
from sift_compiler.report import LayerReport, Report, report


@dataclass(frozen=True)
class Inspection:
    """A model as it is.

    Attributes:
        report: FLOPs, parameters and memory of the model; its two sides are the same model.
        balance: the FLOPs it was balanced for, if it is the result of a rewrite.
    """

    report: Report
    balance: Balance | None

    def to_plain(self) -> dict[str, Any]:
        """Everything, as plain data."""
        return {
            "flops": self.report.sparse_flops,
            "parameters": self.report.sparse_parameters,
            "bytes": self.report.sparse_bytes,
            "sparsity": self.report.sparsity,
            "search_space": self.report.search_space,
            "balance": None if self.balance is None else dataclasses.asdict(self.balance),
            "layers": [_plain(layer) for layer in self.report.layers],
        }


def inspect_model(
    model: nn.Module | ExportedProgram, inputs: tuple[Any, ...], name: str | None = None, execute: bool = False
) -> Inspection:
    """Count ``model`` for ``inputs``.

    Args:
        model: dense or sparse.
        inputs: its positional arguments.
        name: what to call it; the name of its class without one.
        execute: run it, to compare the FLOPs of its sparse layers with what they execute; without it nothing is computed.
    """
    module = raise_exported(model) if isinstance(model, ExportedProgram) else model
    struck = balance(module) if isinstance(module, fx.GraphModule) else None
    return Inspection(report(module, module, inputs, name=name, execute=execute), struck)


def _plain(layer: LayerReport) -> dict[str, Any]:
    return {
        "path": layer.path, "kind": layer.kind, "weight_shape": list(layer.shape_after), "sparsity": layer.sparsity,
        "kept": layer.kept, "flops": layer.flops_after, "reason": layer.reason,
        "search_space": layer.search_space, "origin": layer.origin,
    }  # fmt: skip
