"""Accuracy of Sparse Wide networks whose masks rest or move, beside the dense network of equal FLOPs; a small study.

    python benchmarks/accuracy.py --dataset fashion-mnist --data DIR --output results.jsonl
    python benchmarks/accuracy.py --output results.jsonl --table

Every method trains with every seed, by the recipe of the data set (accuracy_study/settings.py), which is the same for all methods and
was chosen on the dense network with --held-out. For one seed all methods see the same images in the same order. A finished run is one
line of the output file; a run that is there already is not repeated, so the program can be stopped and started again. Progress goes to
standard error, the table to standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accuracy_study import results, settings, training
from accuracy_study.compiled import Compiled
from accuracy_study.table import table

from sift_compiler.demo.datasets import load_dataset
from sift_compiler.demo.machine import this_machine
from sift_compiler.errors import SiftError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, train what is missing, print the table if asked for; returns the exit code."""
    chosen = _parser().parse_args(arguments)
    try:
        if chosen.dataset:
            study(chosen)
        elif not chosen.table:
            raise UserError("Nothing to do: give --dataset to train, or --table to print what is there.")
        if chosen.table:
            print(table(results.read(chosen.output)))
    except SiftError as error:
        print(f"accuracy.py: {error}", file=sys.stderr)
        return 2
    return 0


def study(chosen: argparse.Namespace) -> None:
    """Train the runs that the file of results does not hold."""
    torch.set_num_threads(chosen.threads)
    recipe = _recipe(chosen)
    cells = settings.cells(
        chosen.dataset, chosen.methods.split(","), _numbers(chosen.seeds), chosen.sparsity, chosen.run, recipe
    )
    missing = [cell for cell in cells if not results.finished(results.read(chosen.output), cell)]
    _say(f"{len(cells)} runs, {len(cells) - len(missing)} finished before")
    if not missing:
        return
    data = training.prepared(load_dataset(chosen.dataset, chosen.data), recipe)
    compiled = Compiled()
    machine = asdict(this_machine()) | {"threads": chosen.threads}
    for number, cell in enumerate(missing, 1):
        if results.finished(results.read(chosen.output), cell):
            continue  # by another process meanwhile
        name = f"{number}/{len(missing)} {cell.dataset} {cell.method} {cell.sparsity:g} seed {cell.seed}"
        result = training.run(cell, data, compiled, lambda line, name=name: _say(f"{name}: {line}"))
        results.append(chosen.output, cell, result, machine)
        _say(f"{name}: finished in {result['seconds']} s, FLOPs {result['flop_ratio']:.4f}×, masks {result['masks']}")


def _recipe(chosen: argparse.Namespace) -> settings.Recipe:
    if chosen.dataset not in settings.RECIPES:
        raise settings.unknown_name("data set", chosen.dataset, settings.RECIPES)
    fields = ("epochs", "batch_size", "learning_rate", "train_limit", "held_out", "mask_updates", "group")
    changed: dict[str, Any] = {name: value for name in fields if (value := getattr(chosen, name)) is not None}
    if chosen.widths:
        changed["widths"] = tuple(_numbers(chosen.widths))
    return dataclasses.replace(settings.RECIPES[chosen.dataset], **changed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help=" or ".join(settings.RECIPES))
    parser.add_argument("--data", help="folder of the data set, or its parent")
    parser.add_argument("--methods", default=",".join(m for m in settings.METHODS if m != "dense-wide"),
                        help=f"comma-separated; of {', '.join(settings.METHODS)}")  # fmt: skip
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--run", choices=("compiled", "eager"), default="compiled",
                        help='compiled: torch.compile, sparse networks with backend="sift"')  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results.jsonl"))
    parser.add_argument("--table", action="store_true", help="print the results as Markdown")
    recipe = parser.add_argument_group("instead of the recipe's value")
    for name in ("epochs", "batch-size", "train-limit", "held-out", "mask-updates", "group"):
        recipe.add_argument(f"--{name}", type=int)
    recipe.add_argument("--learning-rate", type=float)
    recipe.add_argument("--widths", help="channels of the dense network's stages, comma-separated")
    return parser


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{text!r} is not a list of whole numbers such as 0,1,2.") from error


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
