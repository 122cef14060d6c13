"""``sift demo``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from sift_compiler.commands.arguments import Json


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
    as_json: Json = False,
) -> None:
    """Train a network dense and sparse, and compare.

    Accuracy, time and memory, as a table, a figure and a report.
    """
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
