"""``sift bench``: its options, and what it prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from sift_compiler.commands.arguments import Input, Json, Model, threads_of
from sift_compiler.commands.console import busy, show_table

if TYPE_CHECKING:
    from sift_compiler.commands.bench import EngineTime

_HEADS = (
    "engine", "version", "batch", "threads", "median ms", "fastest", "slowest", "times sift", "processor ms", "times sift ",
)  # fmt: skip


def bench(
    model: Model,
    input_: Input = None,
    against: Annotated[str, typer.Option(help="Comma-separated: inductor, onnxruntime, openvino, deepsparse.")] = "inductor,onnxruntime",
    batch: Annotated[list[int] | None, typer.Option(help="Batch size; the input's without it. Repeatable.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of every engine; torch's own choice without it.")] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs of every engine.")] = 9,
    peer_python: Annotated[list[str] | None, typer.Option(help="NAME=PATH: the Python that has an engine. Repeatable.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Time MODEL on sparse code beside other engines.

    They get the same weights in dense layers and run turn by turn.
    """
    with busy("Measuring"):
        import torch

        from sift_compiler.capture import raise_exported
        from sift_compiler.commands.bench import bench as measure
        from sift_compiler.commands.input_spec import inputs_of
        from sift_compiler.commands.model_source import find_model
        from sift_compiler.commands.peers import peer_pythons

        found = find_model(model)
        inputs = inputs_of(found, input_)
        made = measure(
            found if isinstance(found, torch.nn.Module) else raise_exported(found), inputs,
            [name for name in against.split(",") if name], batches=batch or [inputs[0].shape[0]],
            threads=threads_of(threads), rounds=rounds, pythons=peer_pythons(peer_python or ()),
        )  # fmt: skip
    if as_json:
        typer.echo(json.dumps(made.to_plain(), indent=2))
        return
    show_table(_HEADS, [_row(each) for each in made.times])


def _row(time: EngineTime) -> tuple[str, ...]:
    return (
        time.engine, time.version, str(time.batch), str(time.threads), f"{time.median_ms:.2f}", f"{time.fastest_ms:.2f}",
        f"{time.slowest_ms:.2f}", f"{time.times_sift:.2f}", f"{time.processor_ms:.2f}", f"{time.processor_times_sift:.2f}",
    )  # fmt: skip
