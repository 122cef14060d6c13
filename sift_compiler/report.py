"""report: what a rewrite changed, in FLOPs, parameters and memory, layer by layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sift_compiler.capture import raise_exported
from sift_compiler.errors import UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.ir.inputs import Inputs, as_inputs
from sift_compiler.nn import SparseLayer

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, SparseLayer)


@dataclass(frozen=True)
class LayerReport:
    """One convolution or linear layer, before and after.

    Attributes:
        path: module path, the same in both models.
        kind: class of the layer after the rewrite.
        shape_before: shape of the dense weight in the dense model, or None if the dense model has no such layer.
        shape_after: shape of the dense weight in the sparse model (what the mask chooses from).
        sparsity: removed share of ``shape_after``, in [0, 1].
        kept: weights the layer has, bias excluded.
        flops_before: FLOPs of the layer's calls in one forward pass of the dense model.
        flops_after: the same in the sparse model, of kept weights only.
        reason: why the layer is sparse or dense; empty where the model does not tell (a saved model).
        origin: path of the layer of the dense model in whose place it stands with others; empty for a layer that is one itself.
    """

    path: str
    kind: str
    shape_before: tuple[int, ...] | None
    shape_after: tuple[int, ...]
    sparsity: float
    kept: int
    flops_before: int
    flops_after: int
    reason: str
    origin: str = ""

    @property
    def search_space(self) -> int:
        """Weights a mask may choose from: all of a sparse layer's, none of a dense one's."""
        return _numel(self.shape_after) if self.kind.startswith("Sparse") else 0


@dataclass(frozen=True)
class ReplacementReport:
    """One layer of the dense model, and the several that stand in its place.

    Attributes:
        path: module path of the layer, of their container now.
        summary: what stands in its place.
        shape_before: shape of the dense weight, or None if the dense model has no such layer.
        flops_before: FLOPs of the layer's calls in one forward pass of the dense model.
        parts: the layers in its place, each with its path.
    """

    path: str
    summary: str
    shape_before: tuple[int, ...] | None
    flops_before: int
    parts: tuple[LayerReport, ...]

    @property
    def flops_after(self) -> int:
        """FLOPs of all parts."""
        return sum(part.flops_after for part in self.parts)

    @property
    def kept(self) -> int:
        """Weights of all parts, biases excluded."""
        return sum(part.kept for part in self.parts)

    @property
    def search_space(self) -> int:
        """Weights the masks of the parts may choose from (the cardinality of Sparse-IFT, Sec. 3.1)."""
        return sum(part.search_space for part in self.parts)

    def to_plain(self) -> dict[str, Any]:
        """Everything but the parts' own numbers, as plain data."""
        return {
            "path": self.path, "summary": self.summary, "shape_before": self.shape_before, "flops_before": self.flops_before,
            "flops_after": self.flops_after, "kept": self.kept, "search_space": self.search_space,
            "parts": [part.path for part in self.parts],
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """A dense model and the sparse one made of it.

    FLOPs are those of one forward pass of the example inputs by ``torch.utils.flop_counter``: 2 per multiply-add of convolutions,
    linear layers and matrix products, of kept weights only.

    Attributes:
        dense_flops: of the dense model.
        sparse_flops: of the sparse model.
        dense_parameters: numbers of parameters of the dense model, shared ones counted once.
        sparse_parameters: the same of the sparse model; of a sparse layer, its kept weights.
        dense_bytes: memory of parameters and buffers of the dense model.
        sparse_bytes: the same of the sparse model, positions of kept weights included.
        layers: every convolution and linear layer of the sparse model.
        replacements: the layers of the dense model that became several.
    """

    dense_flops: int
    sparse_flops: int
    dense_parameters: int
    sparse_parameters: int
    dense_bytes: int
    sparse_bytes: int
    layers: tuple[LayerReport, ...]
    replacements: tuple[ReplacementReport, ...] = ()

    @property
    def ratio(self) -> float:
        """FLOPs of the sparse model over those of the dense one; 1 is iso-FLOP."""
        return self.sparse_flops / self.dense_flops

    @property
    def sparsity(self) -> float:
        """Removed share of the dense weights of all sparse layers together, in [0, 1]."""
        available = sum(_numel(layer.shape_after) for layer in self._sparse)
        return 1 - sum(layer.kept for layer in self._sparse) / available if available else 0.0

    @property
    def search_space(self) -> int:
        """Weights the masks may choose from, over all sparse layers (the cardinality of Sparse-IFT, Sec. 3.1)."""
        return sum(layer.search_space for layer in self.layers)

    @property
    def _sparse(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.kind.startswith("Sparse"))

    def to_json(self) -> str:
        """Everything, as a JSON object."""
        totals = {"ratio": self.ratio, "sparsity": self.sparsity, "search_space": self.search_space}
        plain = {
            **dataclasses.asdict(self),
            "layers": [{**dataclasses.asdict(layer), "search_space": layer.search_space} for layer in self.layers],
            "replacements": [each.to_plain() for each in self.replacements],
        }
        return json.dumps({**totals, **plain}, indent=2)

    def __str__(self) -> str:
        """An aligned table, totals below."""
        head = (
            "layer",
            "kind",
            "weight before",
            "weight after",
            "sparsity",
            "kept",
            "chosen from",
            "MFLOPs before",
            "after",
            "why",
        )
        wholes = {each.path: each for each in self.replacements}
        rows: list[tuple[str, ...]] = []
        for layer in self.layers:
            whole = wholes.pop(layer.origin, None)
            rows += [_whole_cells(whole)] if whole is not None else []
            rows.append(_cells(layer))
        totals = (
            f"FLOPs       {self.dense_flops:>16,} → {self.sparse_flops:>16,}   ratio {self.ratio:.6f}\n"
            f"parameters  {self.dense_parameters:>16,} → {self.sparse_parameters:>16,}\n"
            f"bytes       {self.dense_bytes:>16,} → {self.sparse_bytes:>16,}\n"
            f"sparsity of the sparse layers {self.sparsity:.6f}; masks choose from {self.search_space:,} weights"
        )
        return f"{_table(head, rows)}\n\n{totals}"


def report(
    model: nn.Module | ExportedProgram,
    sparse: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any],
) -> Report:
    """Compare ``model`` with ``sparse``, its rewrite.

    Args:
        model: the dense model, or the program it was exported to.
        sparse: what ``rewrite`` made of it, or ``load`` brought back.
        example_inputs: positional arguments of both, the only one, or a dict of keyword arguments; nothing is computed with
            them but sizes.

    Raises:
        UserError: one of the models does not run on the example inputs, or the dense model costs nothing.
    """
    inputs = as_inputs(example_inputs)
    dense = raise_exported(model) if isinstance(model, ExportedProgram) else model
    before, after = _counted(dense, inputs, "model"), _counted(sparse, inputs, "sparse")
    if not before.total:
        raise UserError(
            "The dense model has no convolution, linear layer or matrix product, so there is no ratio of FLOPs."
        )
    layers = _layers(dense, sparse, before, after)
    return Report(
        before.total, after.total, _parameters(dense), _parameters(sparse), _bytes(dense), _bytes(sparse),
        tuple(layers), _replacements(dense, sparse, before, layers),
    )  # fmt: skip


def _counted(module: object, inputs: Inputs, name: str) -> FlopCount:
    if not isinstance(module, nn.Module):
        raise UserError(f"{name} must be a torch.nn.Module, not {type(module).__name__}.")
    try:
        return count_flops(module, inputs)
    except Exception as error:
        raise UserError(f"{name} ({type(module).__name__}) does not run on the example inputs: {error}") from error


def _layers(dense: nn.Module, sparse: nn.Module, before: FlopCount, after: FlopCount) -> list[LayerReport]:
    decisions = notes.decisions(sparse) if isinstance(sparse, fx.GraphModule) else {}
    found = []
    for path, layer in sparse.named_modules():
        if not isinstance(layer, _WEIGHTED):
            continue
        if isinstance(layer, SparseLayer):
            shape, kept = layer.weight_shape, layer.pattern.nnz
        else:
            shape, kept = tuple(layer.weight.shape), layer.weight.numel()
        decision = decisions.get(path)
        reason, origin = ("", "") if decision is None else (decision.reason, decision.origin)
        found.append(
            LayerReport(
                path, type(layer).__name__, _weight_shape(dense, path), shape,
                1 - kept / _numel(shape), kept, before.of(path), after.of(path), reason, origin,
            )
        )  # fmt: skip
    return found


def _replacements(
    dense: nn.Module, sparse: nn.Module, before: FlopCount, layers: Sequence[LayerReport]
) -> tuple[ReplacementReport, ...]:
    summaries = notes.replacements(sparse) if isinstance(sparse, fx.GraphModule) else {}
    return tuple(
        ReplacementReport(
            path, summary, _weight_shape(dense, path), before.of(path),
            tuple(layer for layer in layers if layer.origin == path),
        )
        for path, summary in summaries.items()
    )  # fmt: skip


def _weight_shape(dense: nn.Module, path: str) -> tuple[int, ...] | None:
    module = dict(dense.named_modules(remove_duplicate=False)).get(path)
    weight: Any = getattr(module, "weight", None)
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _numel(shape: Sequence[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        _indented(layer), layer.kind, _shape(layer.shape_before), _shape(layer.shape_after), f"{layer.sparsity:.4f}",
        f"{layer.kept:,}", f"{layer.search_space:,}", f"{layer.flops_before / 1e6:.3f}", f"{layer.flops_after / 1e6:.3f}",
        layer.reason,
    )  # fmt: skip


def _indented(layer: LayerReport) -> str:
    return f"  {layer.path.removeprefix(layer.origin)}" if layer.origin else layer.path


def _whole_cells(whole: ReplacementReport) -> tuple[str, ...]:
    return (
        whole.path, "", _shape(whole.shape_before), "", "", f"{whole.kept:,}", f"{whole.search_space:,}",
        f"{whole.flops_before / 1e6:.3f}", f"{whole.flops_after / 1e6:.3f}", whole.summary,
    )  # fmt: skip


def _shape(shape: Sequence[int] | None) -> str:
    return "-" if shape is None else "x".join(str(size) for size in shape)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    right = {4, 5, 6, 7, 8}

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])
