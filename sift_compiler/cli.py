"""The ``sift`` command: rewrite, inspect, compile, export, bench, demo and doctor."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from sift_compiler.commands.transform_options import STRUCTURES, transform_of
from sift_compiler.errors import SiftError, UserError, unknown_name
from sift_compiler.observe.settings import from_environment
from sift_compiler.options import (
    DISTRIBUTIONS,
    INITIALISATIONS,
    SIGMAS,
    TRANSFORMATIONS,
    TUNING,
    Attention,
    Depthwise,
    Groups,
    Transformation,
)

if TYPE_CHECKING:
    from sift_compiler.commands.inspection import Inspection
    from sift_compiler.commands.mask_history import MaskHistory
    from sift_compiler.commands.timing import LayerTime

# torch, TVM and the model are imported by the command that needs them: sift --help is instant, and sift doctor runs without them.

_DEBUG = "debug"
_Transform = Transformation | dict[str, Transformation | None]


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


class _Commands(TyperGroup):
    """Shows a SiftError as one message on standard error and exits with 2; everything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SiftError as error:
            if ctx.meta.get(_DEBUG):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=_Commands, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)

_Model = Annotated[str, typer.Argument(help="A file.pt2, package.module:factory or path/to/file.py:factory.")]
_Input = Annotated[
    list[str] | None,
    typer.Option("--input", help="Element type and sizes, batch first: 'f32[16,3,224,224]'. Once per input."),
]
_Report = Annotated[
    Path | None,
    typer.Option("--report", help="Where the report goes: .html one page that needs no other file, .json or .txt."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def _settings(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error was raised (or SIFT_DEBUG=1).")] = False,
) -> None:
    """Rewrite dense models into iso-FLOP sparse ones, train and run them on mask-specialised code."""
    from sift_compiler.observe.log import configure_logging

    context.meta[_DEBUG] = debug
    settings = from_environment()
    context.meta[_DEBUG] = debug or settings.debug
    configure_logging(settings)


@app.command()
def rewrite(
    model: _Model,
    sparsity: Annotated[float, typer.Option(help="Share of weights removed, in [0, 1); it sets how much wider or deeper layers become.")],
    input_: _Input = None,
    transform: Annotated[str | None, typer.Option(help=f"One of {_names(TRANSFORMATIONS)}; wide by default. With --member: of the layers no member names, which else stay as they are.")] = None,
    member: Annotated[list[str] | None, typer.Option(help="PATTERN=NAME[,option=value...]: the transformation of some layers by module path, or dense, e.g. 'layer1.*=parallel,sparsity=0.75,sigma=relu'. The first that fits has a layer. Repeatable.")] = None,
    dense: Annotated[list[str] | None, typer.Option(help="Layers that stay dense, e.g. 'layer1.*'. Repeatable.")] = None,
    init: Annotated[str | None, typer.Option(help=f"New weights: {_names(INITIALISATIONS)}; paper by default. sparse_aware counts kept connections.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of masks and new weights.")] = 0,
    distribution: Annotated[str | None, typer.Option(help=f"How densities differ between layers: {_names(DISTRIBUTIONS)}, or sparsities by pattern: 'block1.*=0.9,block2.*=0.5'. Not of low-rank.")] = None,
    structure: Annotated[str | None, typer.Option(help=f"What masks look like: {STRUCTURES}. Not of low-rank.")] = None,
    sigma: Annotated[str | None, typer.Option(help=f"Non-linearity inside: {_names(SIGMAS)}. Not of wide.")] = None,
    round_to: Annotated[int | None, typer.Option(help="Widths are multiples of this, 8 by default; 1 rounds down. wide, low-rank.")] = None,
    pin: Annotated[list[str] | None, typer.Option(help="Modules or nodes whose sizes stay. Repeatable. wide, low-rank.")] = None,
    attention: Annotated[str | None, typer.Option(help=f"What grows in attention: {_names(get_args(Attention))}; heads get wider by default. wide.")] = None,
    depthwise: Annotated[str | None, typer.Option(help=f"Depthwise convolutions: {_names(get_args(Depthwise))}; sparse, at a density of (1 - sparsity)^0.5, by default. wide.")] = None,
    groups: Annotated[str | None, typer.Option(help=f"What grows in grouped convolutions: {_names(get_args(Groups))}; groups get wider by default. wide.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the sparse model goes (.pt2); without it only the report is shown.")] = None,
    report: _Report = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would become of every layer, and why.")] = False,
    as_json: _Json = False,
) -> None:  # fmt: skip
    """Make MODEL an iso-FLOP sparse one and show what changed."""
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
    with _busy("Rewriting"):
        from sift_compiler.commands.model_source import find_model
        from sift_compiler.report import report as report_on
        from sift_compiler.reporting.model import check_suffix
        from sift_compiler.rewrite import rewrite as rewrite_model
        from sift_compiler.storage import save

        if report is not None:
            check_suffix(report)
        found = find_model(model)
        inputs = _inputs(found, input_)
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
        _tell_report(report)


@app.command()
def inspect(
    model: _Model,
    input_: _Input = None,
    times: Annotated[bool, typer.Option("--times", help="Time the sparse layers on this machine.")] = False,
    threads: Annotated[int | None, typer.Option(help="Threads for --times; torch's own choice without it.")] = None,
    report: _Report = None,
    as_json: _Json = False,
) -> None:
    """Show the layers of MODEL, dense or sparse: sizes, sparsity, FLOPs; with --times also tiles, times and break-even."""
    from sift_compiler.commands.mask_history import is_mask_report, read_report, saved_history

    if is_mask_report(model):
        _show_masks(read_report(Path(model)), as_json)
        return
    with _busy("Reading"):
        from sift_compiler.commands.inspection import inspect_model
        from sift_compiler.commands.model_source import find_model
        from sift_compiler.reporting.model import check_suffix

        if report is not None:
            check_suffix(report)
        found = find_model(model)
        inputs = _inputs(found, input_)
        inspection = inspect_model(found, inputs, name=Path(model).name, execute=report is not None)
        if report is not None:
            inspection.report.save(report)
        timed = _timed(found, inputs, threads) if times else ()
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
        _show_table(
            ("layer", "input", "tile", "µs", "of peak", "dense µs", "break-even", "why"),
            [_time_row(each) for each in timed],
        )
    _tell_report(report)


@app.command("compile")
def compile_(
    model: _Model,
    input_: _Input = None,
    tune: Annotated[str, typer.Option(help="quick: time a handful of tiles per layer and keep the fastest; full: up to two dozen; off: take what is kept, else the rules'.")] = "quick",
    threads: Annotated[int | None, typer.Option(help="Threads of the kernels, which measured tiles hold for; torch's own choice without it.")] = None,
    as_json: _Json = False,
) -> None:  # fmt: skip
    """Compile MODEL for inference on these inputs and keep its code and tiles on this machine: whoever runs it next waits less."""
    if tune not in TUNING:
        raise unknown_name("--tune", tune, TUNING)
    with _busy("Compiling"):
        from sift_compiler.commands.compiling import compile_model
        from sift_compiler.commands.model_source import find_model

        found = find_model(model)
        inputs = _inputs(found, input_)
        made = compile_model(_sparse_module(found), inputs, tune=tune, threads=_threads(threads))
    if as_json:
        typer.echo(json.dumps(made.to_plain(), indent=2))
        return
    _show_table(("layer", "input", "tile", "µs", "why"), [each.row() for each in made.layers])
    typer.echo(f"\nThreads {made.threads}. Kernels and tiles are in {made.folder}")


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="A sparse model that sift rewrite or sift.save wrote (.pt2).")],
    runtime: Annotated[str, typer.Option(help="onnx: a portable ONNX model; tvm: a shared library for one machine.")],
    out: Annotated[Path, typer.Option(help="Where it goes, e.g. model.onnx or model.so.")],
    target: Annotated[str | None, typer.Option(help="What tvm compiles for; this machine by default.")] = None,
    input_: _Input = None,
    as_json: _Json = False,
) -> None:
    """Write a sparse model for another runtime. Without --input it is made for a batch of 1, or any batch where the runtime can."""
    from sift_compiler.export import export as export_model
    from sift_compiler.export import runtimes

    if runtime not in runtimes():
        raise unknown_name("runtime", runtime, runtimes())
    with _busy("Exporting"):
        from sift_compiler.commands.model_source import find_saved

        module = find_saved(file)
        path = export_model(module, _inputs(module, input_), out, runtime=runtime, target=target)
    size = path.stat().st_size
    if as_json:
        typer.echo(json.dumps({"file": str(path), "bytes": size, "runtime": runtime, "target": target}))
    else:
        typer.echo(f"Wrote {path} ({size / 1e6:.2f} MB)")


@app.command()
def bench(
    model: _Model,
    input_: _Input = None,
    against: Annotated[str, typer.Option(help="Comma-separated: inductor, onnxruntime, openvino, deepsparse.")] = "inductor,onnxruntime",
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; the input's without it. Repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every engine; torch's own choice without it.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs of every engine.")] = 9,
    peer_python: Annotated[list[str] | None, typer.Option(help="NAME=PATH: the Python that has an engine. Repeatable.")] = None,
    as_json: _Json = False,
) -> None:  # fmt: skip
    """Time MODEL on sparse code beside other engines that get the same weights in dense layers, turn by turn."""
    with _busy("Measuring"):
        import torch

        from sift_compiler.capture import raise_exported
        from sift_compiler.commands.bench import bench as measure
        from sift_compiler.commands.model_source import find_model
        from sift_compiler.commands.peers import peer_pythons

        found = find_model(model)
        inputs = _inputs(found, input_)
        made = measure(
            found if isinstance(found, torch.nn.Module) else raise_exported(found), inputs,
            [name for name in against.split(",") if name], batches=batch or [inputs[0].shape[0]],
            threads=threads or torch.get_num_threads(), rounds=rounds, pythons=peer_pythons(peer_python or ()),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(made.to_plain(), indent=2))
        return
    rows = [
        (each.engine, each.version, str(each.batch), str(each.threads), f"{each.median_ms:.2f}", f"{each.fastest_ms:.2f}",
         f"{each.slowest_ms:.2f}", f"{each.times_sift:.2f}", f"{each.processor_ms:.2f}", f"{each.processor_times_sift:.2f}")
        for each in made.times
    ]  # fmt: skip
    _show_table(
        (
            "engine",
            "version",
            "batch",
            "threads",
            "median ms",
            "fastest",
            "slowest",
            "times sift",
            "processor ms",
            "times sift ",
        ),
        rows,
    )


@app.command()
def demo(
    dataset: Annotated[str, typer.Option(help="digits, fashion-mnist or cifar100.")] = "digits",
    data: Annotated[Path | None, typer.Option(help="Folder of the data set; digits need none.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the figure, the report and the sparse network.")] = Path(
        "sift-demo"
    ),
    epochs: Annotated[int | None, typer.Option(help="Passes over the training images.")] = None,
    seeds: Annotated[int | None, typer.Option(help="How often every network is trained.")] = None,
    sparsity: Annotated[list[float] | None, typer.Option(help="One Sparse Wide network each. Repeatable.")] = None,
    method: Annotated[str | None, typer.Option(help="How masks move: rigl, set or static.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Who runs the sparse layers: tvm or eager.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Images per step.")] = None,
    train_limit: Annotated[int | None, typer.Option(help="Use only so many training images.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch and of the sparse kernels.")] = None,
    as_json: _Json = False,
) -> None:
    """Train a dense network and its sparse versions, and compare accuracy, time and memory."""
    from sift_compiler.demo.options import DemoOptions
    from sift_compiler.demo.run import run

    given: dict[str, Any] = {
        "dataset": dataset, "data": data, "out": out, "epochs": epochs, "seeds": seeds,
        "sparsity": None if sparsity is None else tuple(sparsity), "method": method, "runtime": runtime,
        "batch_size": batch_size, "train_limit": train_limit, "threads": threads,
    }  # fmt: skip
    options = DemoOptions(**{name: value for name, value in given.items() if value is not None})
    made = run(options, Console(stderr=as_json))
    if as_json:
        typer.echo(made.to_json())


@app.command()
def doctor(as_json: _Json = False) -> None:
    """Check this machine: packages, processor, C++ compiler, caches, threads. Exit code 1 if something essential is missing."""
    with _busy("Looking"):
        from sift_compiler.commands.doctor import examine, healthy

        checks = examine()
    well = healthy(checks)
    if as_json:
        typer.echo(json.dumps({"ok": well, "checks": [dataclasses.asdict(check) for check in checks]}, indent=2))
    else:
        for check in checks:
            state = "ok     " if check.ok else "MISSING" if check.essential else "warning"
            typer.echo(f"{state}  {check.name:<13} {check.found}")
            if check.advice:
                typer.echo(f"{'':9}{check.advice}")
        typer.echo("Everything essential is here." if well else "Something essential is missing, see above.")
    if not well:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``sift`` command."""
    app()


def _show_plan(model: str, given: Sequence[str] | None, transformation: _Transform, as_json: bool) -> None:
    with _busy("Planning"):
        from sift_compiler.commands.model_source import find_model
        from sift_compiler.commands.planning import plan_rewrite

        found = find_model(model)
        made = plan_rewrite(found, _inputs(found, given), transformation)
    if as_json:
        typer.echo(json.dumps(made.to_plain(), indent=2))
        return
    _show_table(("layer", "weight", "sparsity", "kept", "why"), made.rows())
    balance = made.balance
    typer.echo(
        f"\nFLOPs {balance.dense_flops:,}, of which {balance.kept_dense_flops:,} go to what is dense after the rewrite\n"
        f"Sparsity that balances them: {balance.sparsity:.6f}\nNothing was made: this was a dry run."
    )


_NUMBERS = (
    "sparsity", "kept", "MFLOPs", "batch", "threads", "median ms", "fastest", "slowest", "times sift",
    "processor ms", "times sift's",
    "µs", "of peak", "dense µs", "break-even",
)  # fmt: skip


def _show_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(box=None, pad_edge=False)
    for head in heads:
        right = head in _NUMBERS
        table.add_column(head, justify="right" if right else "left", no_wrap=head != "why")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    # A pipe has no width: the table is then as wide as it needs.
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _inputs(model: object, given: Sequence[str] | None) -> tuple[Any, ...]:
    """The inputs given, or those that the model's file remembers."""
    from torch import fx
    from torch.export import ExportedProgram

    from sift_compiler.commands.input_spec import example_inputs, remembered_inputs

    if given:
        return example_inputs(given)
    if isinstance(model, fx.GraphModule):
        return remembered_inputs(model)
    if isinstance(model, ExportedProgram) and model.example_inputs is not None and not model.example_inputs[1]:
        return tuple(model.example_inputs[0])
    raise UserError(
        "The shapes of the model's inputs are not known. Give every one of them: --input 'f32[16,3,224,224]'."
    )


def _timed(found: Any, inputs: tuple[Any, ...], threads: int | None) -> tuple[LayerTime, ...]:
    from sift_compiler.commands.timing import time_layers

    workers = _threads(threads)
    return time_layers(_sparse_module(found), inputs, workers)


def _threads(given: int | None) -> int:
    import torch

    if given is not None and given < 1:
        raise UserError(f"--threads {given}: there must be at least 1.")
    return given or torch.get_num_threads()


def _sparse_module(found: Any) -> Any:
    import torch

    if not isinstance(found, torch.nn.Module):
        raise UserError(
            "Only sparse layers run on compiled code; an exported dense program has none. Make it sparse: sift rewrite MODEL."
        )
    return found


def _time_row(layer: LayerTime) -> tuple[str, ...]:
    numbers = (
        (layer.microseconds, ".0f"), (layer.of_peak, ".2f"), (layer.dense_microseconds, ".0f"), (layer.break_even, ".2f"),
    )  # fmt: skip
    shown = ("-" if value is None else format(value, form) for value, form in numbers)
    return layer.path, "x".join(map(str, layer.input_shape)), layer.tile, *shown, layer.reason


def _show_masks(history: MaskHistory, as_json: bool) -> None:
    from sift_compiler.commands.mask_history import HEADS

    if as_json:
        typer.echo(json.dumps(history.to_plain(), indent=2))
        return
    if history.updates:
        _show_table(HEADS, history.rows())
    typer.echo(history.summary())


def _show_inspection(inspection: Inspection) -> None:
    _show_table(
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


def _tell_report(path: Path | None) -> None:
    if path is not None:
        typer.echo(f"Report {path}")


def _busy(what: str) -> AbstractContextManager[object]:
    """A spinner on a terminal, nothing in a pipe."""
    return Console(stderr=True).status(f"{what} …")


if __name__ == "__main__":
    main()
