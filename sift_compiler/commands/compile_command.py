"""``sift compile``: its options, and what it prints."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from sift_compiler.commands.arguments import Input, Json, Model, threads_of
from sift_compiler.commands.console import busy, show_table
from sift_compiler.errors import unknown_name
from sift_compiler.option_values import TUNING


def compile_(
    model: Model,
    input_: Input = None,
    tune: Annotated[str, typer.Option(help="quick: time a handful of tiles per layer and keep the fastest; full: up to two dozen; off: take what is kept, else the rules'.")] = "quick",
    threads: Annotated[int | None, typer.Option(help="Threads of the kernels, which measured tiles hold for; torch's own choice without it.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Compile MODEL for inference on this machine.

    Its code and measured tiles are kept on disk: whoever runs it next on inputs of these shapes waits less.
    """
    if tune not in TUNING:
        raise unknown_name("--tune", tune, TUNING)
    with busy("Compiling"):
        from sift_compiler.commands.compiling import compile_model
        from sift_compiler.commands.input_spec import inputs_of
        from sift_compiler.commands.model_source import find_model, sparse_module

        found = find_model(model)
        inputs = inputs_of(found, input_)
        made = compile_model(sparse_module(found), inputs, tune=tune, threads=threads_of(threads))
    if as_json:
        typer.echo(json.dumps(made.to_plain(), indent=2))
        return
    show_table(("layer", "input", "tile", "µs", "why"), [each.row() for each in made.layers])
    typer.echo(f"\nThreads {made.threads}. Kernels and tiles are in {made.folder}")
