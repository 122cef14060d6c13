"""``sift rewrite``: its options, and what it prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from sift_compiler.commands.arguments import STRUCTURE_FORMS, Input, Json, Model, ReportFile, names
from sift_compiler.commands.console import busy, show_table, tell_report
from sift_compiler.errors import UserError
from sift_compiler.option_values import (
    DISTRIBUTIONS,
    INITIALISATIONS,
    SIGMAS,
    TRANSFORMATION_NAMES,
    Attention,
    Depthwise,
    Groups,
)

if TYPE_CHECKING:
    from sift_compiler.options import Transformation


def rewrite(
    model: Model,
    sparsity: Annotated[float, typer.Option(help="Share of weights removed, in [0, 1); it sets how much wider or deeper layers become.")],
    input_: Input = None,
    transform: Annotated[str | None, typer.Option(help=f"One of {names(TRANSFORMATION_NAMES)}; wide by default. With --member: of the layers no member names, which else stay as they are.")] = None,
    member: Annotated[list[str] | None, typer.Option(help="PATTERN=NAME[,option=value...]: the transformation of some layers by module path, or dense, e.g. 'layer1.*=parallel,sparsity=0.75,sigma=relu'. The first that fits has a layer. Repeatable.")] = None,
    dense: Annotated[list[str] | None, typer.Option(help="Layers that stay dense, e.g. 'layer1.*'. Repeatable.")] = None,
    init: Annotated[str | None, typer.Option(help=f"New weights: {names(INITIALISATIONS)}; paper by default. sparse_aware counts kept connections.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of masks and new weights.")] = 0,
    distribution: Annotated[str | None, typer.Option(help=f"How densities differ between layers: {names(DISTRIBUTIONS)}, or sparsities by pattern: 'block1.*=0.9,block2.*=0.5'. Not of low-rank.")] = None,
    structure: Annotated[str | None, typer.Option(help=f"What masks look like: {STRUCTURE_FORMS}. Not of low-rank.")] = None,
    sigma: Annotated[str | None, typer.Option(help=f"Non-linearity inside: {names(SIGMAS)}. Not of wide.")] = None,
    round_to: Annotated[int | None, typer.Option(help="Widths are multiples of this, 8 by default; 1 rounds down. wide, low-rank.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="Modules or nodes whose sizes stay. Repeatable. wide, low-rank.")] = None,
    attention: Annotated[str | None, typer.Option(help=f"What grows in attention: {names(get_args(Attention))}; heads get wider by default. wide.")] = None,
    depthwise: Annotated[str | None, typer.Option(help=f"Depthwise convolutions: {names(get_args(Depthwise))}; sparse, at a density of (1 - sparsity)^0.5, by default. wide.")] = None,
    groups: Annotated[str | None, typer.Option(help=f"What grows in grouped convolutions: {names(get_args(Groups))}; groups get wider by default. wide.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the sparse model goes (.pt2); without it only the report is shown.")] = None,
    report: ReportFile = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would become of every layer, and why.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Make MODEL an iso-FLOP sparse one and show what changed."""
    from sift_compiler.commands.transform_options import transform_of

    options = transform_of(transform, member or (), {
        "sparsity": sparsity, "dense": tuple(dense or ()), "init": init, "seed": seed, "distribution": distribution, "structure": structure,
        "sigma": sigma, "round_to": round_to, "pin": tuple(pin) if pin else None, "attention": attention, "depthwise": depthwise,
        "groups": groups,
    })  # fmt: skip
    if dry_run:
        if out is not None:
            raise UserError("--dry-run makes nothing that could go to --out; leave one of them out.")
        if report is not None:
            raise UserError("--dry-run makes nothing that --report could tell of; leave one of them out.")
        _show_plan(model, input_, options, as_json)
        return
    with busy("Rewriting"):
        from sift_compiler.commands.input_spec import inputs_of
        from sift_compiler.commands.model_source import find_model
        from sift_compiler.report import report as report_on
        from sift_compiler.reporting.model import check_suffix
        from sift_compiler.rewrite import rewrite as rewrite_model
        from sift_compiler.storage import save

        if report is not None:
            check_suffix(report)
        found = find_model(model)
        inputs = inputs_of(found, input_)
        sparse = rewrite_model(found, inputs, options)
        made = report_on(found, sparse, inputs, name=Path(model).name)
        if out is not None:
            save(sparse, out)
        if report is not None:
            made.save(report)
    if as_json:
        files = {"file": None if out is None else str(out), "report": None if report is None else str(report)}
        typer.echo(json.dumps({**json.loads(made.to_json()), **files}, indent=2))
    else:
        typer.echo(str(made))
        typer.echo(f"\nSaved {out}" if out is not None else "\nNothing was saved: give --out FILE.pt2.")
        tell_report(report)


def _show_plan(
    model: str, given: Sequence[str] | None, transformation: Transformation | dict[str, Transformation | None], as_json: bool
) -> None:  # fmt: skip
    with busy("Planning"):
        from sift_compiler.commands.input_spec import inputs_of
        from sift_compiler.commands.model_source import find_model
        from sift_compiler.commands.planning import plan_rewrite

        found = find_model(model)
        made = plan_rewrite(found, inputs_of(found, given), transformation)
    if as_json:
        typer.echo(json.dumps(made.to_plain(), indent=2))
        return
    show_table(("layer", "weight", "sparsity", "kept", "why"), made.rows())
    balance = made.balance
    typer.echo(
        f"\nFLOPs {balance.dense_flops:,}, of which {balance.kept_dense_flops:,} go to what is dense after the rewrite\n"
        f"Sparsity that balances them: {balance.sparsity:.6f}\nNothing was made: this was a dry run."
    )
