"""``sift export``: its options, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sift_compiler.commands.arguments import Input, Json
from sift_compiler.commands.console import busy
from sift_compiler.errors import unknown_name


def export(
    file: Annotated[str, typer.Argument(help="A sparse model that sift rewrite or sift.save wrote (.pt2).")],
    runtime: Annotated[str, typer.Option(help="onnx: a portable ONNX model; tvm: a shared library for one machine.")],
    out: Annotated[Path, typer.Option(help="Where it goes, e.g. model.onnx or model.so.")],
    target: Annotated[str | None, typer.Option(help="What tvm compiles for; this machine by default.")] = None,
    input_: Input = None,
    as_json: Json = False,
) -> None:
    """Write a sparse model for another runtime. Without --input it is made for a batch of 1, or any batch where the runtime can."""
    from sift_compiler.export import export as export_model
    from sift_compiler.export import runtimes

    if runtime not in runtimes():
        raise unknown_name("runtime", runtime, runtimes())
    with busy("Exporting"):
        from sift_compiler.commands.input_spec import inputs_of
        from sift_compiler.commands.model_source import find_saved

        module = find_saved(file)
        path = export_model(module, inputs_of(module, input_), out, runtime=runtime, target=target)
    size = path.stat().st_size
    if as_json:
        typer.echo(json.dumps({"file": str(path), "bytes": size, "runtime": runtime, "target": target}))
    else:
        typer.echo(f"Wrote {path} ({size / 1e6:.2f} MB)")
