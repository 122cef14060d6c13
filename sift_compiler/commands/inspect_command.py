"""``sift inspect``: its options, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sift_compiler.commands.arguments import Input, Json, Model, ReportFile, threads_of
from sift_compiler.commands.console import busy, show_table, tell_report

if TYPE_CHECKING:
    from sift_compiler.commands.inspection import Inspection
    from sift_compiler.commands.mask_history import MaskHistory
    from sift_compiler.commands.tile_candidates import Candidate
    from sift_compiler.commands.timing import LayerTime


def inspect(
    model: Model,
    input_: Input = None,
    times: Annotated[bool, typer.Option("--times", help="Time the sparse layers on this machine.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads for --times; torch's own choice without it.")] = None,
    report: ReportFile = None,
    as_json: Json = False,
) -> None:
    """Show the layers of MODEL, dense or sparse.

    Their sizes, sparsity and FLOPs; with --times also tiles, candidates, times, share of the peak and break-even. MODEL may also be the
    report of a sift.Recorder (.json, .jsonl): then how its masks moved.
    """
    from sift_compiler.commands.mask_history import is_mask_report, read_report, saved_history

    if is_mask_report(model):
        _show_masks(read_report(Path(model)), as_json)
        return
    with busy("Reading"):
        from sift_compiler.commands.input_spec import inputs_of
        from sift_compiler.commands.inspection import inspect_model
        from sift_compiler.commands.model_source import find_model, sparse_module
        from sift_compiler.reporting.model import check_suffix

        if report is not None:
            check_suffix(report)
        found = find_model(model)
        inputs = inputs_of(found, input_)
        inspection = inspect_model(found, inputs, name=Path(model).name, execute=report is not None)
        if report is not None:
            inspection.report.save(report)
        timed: tuple[LayerTime, ...] = ()
        if times:
            from sift_compiler.commands.timing import time_layers

            timed = time_layers(sparse_module(found), inputs, threads_of(threads))
        history = saved_history(model)
    if as_json:
        plain = inspection.to_plain()
        if history is not None:
            plain["masks"] = history.to_plain()
        typer.echo(json.dumps({**plain, "times": [each.to_plain() for each in timed]} if times else plain, indent=2))
        return
    _show_inspection(inspection)
    if history is not None:
        typer.echo()
        _show_masks(history, as_json)
    if times:
        typer.echo()
        _show_times(timed)
    tell_report(report)


def _show_inspection(inspection: Inspection) -> None:
    show_table(
        ("layer", "kind", "weight", "sparsity", "kept", "MFLOPs", "why"),
        [
            (
                layer.path, layer.kind, "x".join(str(size) for size in layer.shape_after), f"{layer.sparsity:.4f}",
                f"{layer.kept:,}", f"{layer.flops_after / 1e6:.3f}", layer.reason,
            )
            for layer in inspection.report.layers
        ],
    )  # fmt: skip
    made = inspection.report
    typer.echo(f"\nFLOPs {made.sparse_flops:,}   parameters {made.sparse_parameters:,}   bytes {made.sparse_bytes:,}")
    if made.search_space:
        typer.echo(
            f"sparsity of the sparse layers {made.sparsity:.6f}; masks choose from {made.search_space:,} weights"
        )
    if inspection.balance is not None:
        typer.echo(f"balanced for {inspection.balance.dense_flops:,} FLOPs of the dense model's example")


def _show_masks(history: MaskHistory, as_json: bool) -> None:
    from sift_compiler.commands.mask_history import HEADS

    if as_json:
        typer.echo(json.dumps(history.to_plain(), indent=2))
        return
    if history.updates:
        show_table(HEADS, history.rows())
    typer.echo(history.summary())


def _show_times(timed: tuple[LayerTime, ...]) -> None:
    show_table(
        ("layer", "input", "tile", "µs", "of peak", "dense µs", "break-even", "why"), [_row(each) for each in timed]
    )
    measured = [(layer, each) for layer in timed for each in layer.candidates if each.microseconds is not None]
    if measured:
        typer.echo("\nTiles that were measured, input packed beforehand:")
        show_table(("layer", "images", "tile", "µs", "taken"), [_candidate_row(*each) for each in measured])
    elif any(layer.candidates for layer in timed):
        typer.echo("\nNo other tile of these layers was measured here; sift compile --tune quick does that.")


def _candidate_row(layer: LayerTime, candidate: Candidate) -> tuple[str, ...]:
    first, count = candidate.images
    images = f"{first} to {first + count - 1}{', side by side' if candidate.side_by_side else ''}"
    return layer.path, images, candidate.tile, f"{candidate.microseconds:.1f}", "yes" if candidate.taken else ""


def _row(layer: LayerTime) -> tuple[str, ...]:
    numbers = (
        (layer.microseconds, ".0f"), (layer.of_peak, ".2f"), (layer.dense_microseconds, ".0f"), (layer.break_even, ".2f"),
    )  # fmt: skip
    shown = ("-" if value is None else format(value, form) for value, form in numbers)
    return layer.path, "x".join(map(str, layer.input_shape)), layer.tile, *shown, layer.reason
