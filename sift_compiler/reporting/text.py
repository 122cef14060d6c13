"""A report as an aligned table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sift_compiler.reporting.layers import LayerReport, ReplacementReport

if TYPE_CHECKING:
    from sift_compiler.reporting.model import Report

_HEAD = (
    "layer", "kind", "weight before", "weight after", "sparsity", "kept", "chosen from", "MFLOPs before", "after", "why",
)  # fmt: skip
_RIGHT = {4, 5, 6, 7, 8}


def as_text(report: Report) -> str:
    """One row per layer, its parts indented below a layer that became several; totals below."""
    wholes = {each.path: each for each in report.replacements}
    rows: list[tuple[str, ...]] = []
    for layer in report.layers:
        whole = wholes.pop(layer.origin, None)
        rows += [_whole_cells(whole)] if whole is not None else []
        rows.append(_cells(layer))
    return f"{_table(_HEAD, rows)}\n\n" + "\n".join(_totals(report))


def shape(sizes: Sequence[int] | None) -> str:
    """Sizes of a weight: ``64x32x3x3``."""
    return "-" if sizes is None else "x".join(str(size) for size in sizes)


def _totals(report: Report) -> list[str]:
    lines = [
        _total("FLOPs", report.dense_flops, report.sparse_flops, f"   ratio {report.ratio:.6f}"),
        _total("parameters", report.dense_parameters, report.sparse_parameters),
        _total("bytes", report.dense_bytes, report.sparse_bytes),
    ]
    dense, sparse = report.activations.dense, report.activations.sparse
    if dense is not None and sparse is not None:
        lines.append(_total("activation memory, bytes", dense.bytes, sparse.bytes))
    else:
        lines.append(f"activation memory: not known ({report.activations.reason})")
    for name, states in report.training.items():
        lines.append(_total(f"training state, {name}, bytes", states.dense.total, states.sparse.total))
    lines.append(
        f"sparsity of the sparse layers {report.sparsity:.6f}; masks choose from {report.search_space:,} weights"
    )
    if report.check is not None:
        lines.append(
            f"FLOPs of the sparse layers by formula {report.check.formula_flops:,}; 2 x executed multiply-adds "
            f"{2 * report.check.multiply_adds:,}; difference {report.check.difference:,}"
        )
    return lines


def _total(name: str, dense: int, sparse: int, more: str = "") -> str:
    return f"{name:<38}{dense:>18,} → {sparse:>18,}{more}"


def _cells(layer: LayerReport) -> tuple[str, ...]:
    return (
        _indented(layer), layer.kind, shape(layer.shape_before), shape(layer.shape_after), f"{layer.sparsity:.4f}",
        f"{layer.kept:,}", f"{layer.search_space:,}", f"{layer.flops_before / 1e6:.3f}", f"{layer.flops_after / 1e6:.3f}",
        layer.reason,
    )  # fmt: skip


def _indented(layer: LayerReport) -> str:
    return f"  {layer.path.removeprefix(layer.origin)}" if layer.origin else layer.path


def _whole_cells(whole: ReplacementReport) -> tuple[str, ...]:
    return (
        whole.path, "", shape(whole.shape_before), "", "", f"{whole.kept:,}", f"{whole.search_space:,}",
        f"{whole.flops_before / 1e6:.3f}", f"{whole.flops_after / 1e6:.3f}", whole.summary,
    )  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if column in _RIGHT else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])
