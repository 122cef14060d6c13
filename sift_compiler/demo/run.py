"""The demo from beginning to end: data, dense network, sparse networks, measurements, files."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from sift_compiler.demo import datasets, networks, output
from sift_compiler.demo.datasets import Dataset
from sift_compiler.demo.figure import draw
from sift_compiler.demo.formats import need
from sift_compiler.demo.latency import ForwardTime, interleaved
from sift_compiler.demo.machine import this_machine
from sift_compiler.demo.masked import masked_training_memory, refresh
from sift_compiler.demo.networks import Candidate, Dense
from sift_compiler.demo.options import DemoOptions, Recipe
from sift_compiler.demo.report import DemoReport, NetworkResult, Saved, SparseResult
from sift_compiler.demo.table import table
from sift_compiler.demo.train import EVALUATION_BATCH, Forward, TrainingRun, filled
from sift_compiler.errors import UserError
from sift_compiler.storage import save

log = logging.getLogger(__name__)

TIMED_RUNS = 15
"""Timed forward passes of every network."""


def run(options: DemoOptions, console: Console) -> DemoReport:
    """Train the dense network and its Sparse Wide versions, measure them, write the files, print the table.

    Args:
        options: what was chosen.
        console: shows progress (on a terminal only) and the table.

    Returns:
        What was also written to ``report.json``.

    Raises:
        UserError: a package or a data set is missing, an option does not fit the data, or the folder cannot be written to;
            raised before anything is trained.
    """
    begin = time.perf_counter()
    need("matplotlib")
    datasets.check_folder(options.dataset, options.data)
    folder = output.prepare_folder(options.out)
    with _threads(options.threads), _progress(console) as progress:
        report = _measure(options, folder, progress, begin)
    draw(report, folder / output.FIGURE)
    (folder / output.REPORT).write_text(report.to_json() + "\n", encoding="utf-8")
    console.print(table(report))
    console.print(
        f"{report.seconds:.0f} s. Written to {folder}: {', '.join(Path(file).name for file in report.files.values())}"
    )
    return report


def _measure(options: DemoOptions, folder: Path, progress: Progress, begin: float) -> DemoReport:
    recipe, stages = options.recipe, _Stages(begin)
    data = _load(options, recipe)
    chosen = [networks.candidate(data, options, sparsity) for sparsity in options.sparsity]
    stages.end("data and rewrite")
    dense = networks.train_dense(data, recipe, _bar(progress, "dense", recipe))
    stages.end("train dense")
    runs = []
    for one in chosen:
        on_epoch = _bar(progress, one.name, recipe)
        runs.append(networks.train_candidate(one, data, recipe, options.method, on_epoch))
        stages.end(f"train {one.name}")
    results = _results(dense, chosen, runs, data, progress)
    stages.end("compile for inference and measure")
    saved = _save(chosen[-1], runs[-1][-1], data, folder)
    stages.end("save")
    return DemoReport(
        options=options, recipe=recipe, machine=this_machine(), threads=options.threads,
        train_images=len(data.train_labels), test_images=len(data.test_labels), image_shape=data.image_shape,
        batch=EVALUATION_BATCH, networks=tuple(results),
        files={"figure": str(folder / output.FIGURE), "report": str(folder / output.REPORT), "network": saved.file},
        saved=saved, seconds=time.perf_counter() - begin, stages=stages.seconds,
    )  # fmt: skip


def _load(options: DemoOptions, recipe: Recipe) -> Dataset:
    data = datasets.load_dataset(options.dataset, options.data)
    limit = recipe.train_limit
    # A recipe's own limit must not refuse a smaller set; a limit that was given must.
    if options.train_limit is None and limit is not None:
        limit = min(limit, len(data.train_labels))
    data = data.limited(limit)
    if len(data.train_labels) < recipe.batch_size:
        raise UserError(
            f"{len(data.train_labels)} training images do not fill one batch of {recipe.batch_size}. "
            "Lower --batch-size or raise --train-limit."
        )
    return data


def _results(
    dense: Dense, chosen: Sequence[Candidate], runs: Sequence[tuple[TrainingRun, ...]], data: Dataset, progress: Progress
) -> list[NetworkResult]:  # fmt: skip
    task = progress.add_task("measuring", total=None)
    times, compiler = _forward_times(dense, chosen, data)
    results = [
        NetworkResult(
            name=dense.name, flops=networks.flops_of(dense.model, data), parameters=networks.parameters_of(dense.model),
            widths=networks.widths_of(dense.model), runs=dense.runs, forward=times[dense.name],
        )
    ]  # fmt: skip
    for one, its_runs in zip(chosen, runs, strict=True):
        model, masked = one.compiled.module, times[_masked(one)]
        results.append(
            NetworkResult(
                name=one.name, flops=networks.flops_of(model, data), parameters=networks.parameters_of(model),
                widths=networks.widths_of(model), runs=its_runs, forward=times[one.name],
                sparse=_sparse_result(one, data, masked, compiler),
            )
        )  # fmt: skip
    progress.update(task, total=1, completed=1)
    return results


def _sparse_result(one: Candidate, data: Dataset, masked: ForwardTime, compiler: str) -> SparseResult:
    return SparseResult(
        sparsity=one.sparsity,
        applied_sparsity=networks.applied_sparsity(one.compiled.module),
        respecialisation=one.compiled.respecialisation(),
        graphs=one.compiled.graphs(),
        compiled_difference=one.compiled.difference(_batch(data)),
        masked_forward=masked,
        masked_by=compiler,
        masked_memory=masked_training_memory(one.compiled.module, networks.example_of(data)),
    )


def _forward_times(
    dense: Dense, chosen: Sequence[Candidate], data: Dataset
) -> tuple[dict[str, ForwardTime], str]:  # fmt: skip
    """Times of all networks and of the dense twins, and who compiled the dense ones."""
    # Without a C++ compiler the backend runs the dense rest in eager mode and says why; dense networks then do as well.
    compiler = chosen[0].compiled.graphs().rest[-1]
    compiled = compiler == "inductor"
    forwards: dict[str, Forward] = {dense.name: networks.inference(dense.model, compiled)}
    for one in chosen:
        refresh(one.twin, one.compiled.module)
        one.compiled.module.eval()
        forwards[one.name] = one.compiled.network.evaluate
        forwards[_masked(one)] = networks.inference(one.twin, compiled)
    return interleaved(forwards, _batch(data), rounds=TIMED_RUNS), compiler


def _masked(one: Candidate) -> str:
    return f"{one.name}, dense and masked"


def _batch(data: Dataset) -> torch.Tensor:
    return filled(data.test_images[:EVALUATION_BATCH])


def _save(one: Candidate, last: TrainingRun, data: Dataset, folder: Path) -> Saved:
    path = folder / output.NETWORK
    save(one.compiled.module.eval(), path, example_inputs=(networks.example_of(data),))
    return Saved(file=str(path), network=one.name, seed=last.seed, accuracy=last.accuracy)


class _Stages:
    """A stop watch with laps."""

    def __init__(self, begin: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = begin

    def end(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now
        log.info("%s: %.1f s", name, self.seconds[name])


def _bar(progress: Progress, name: str, recipe: Recipe) -> Callable[[], None]:
    task = progress.add_task(f"training {name}", total=recipe.seeds * recipe.epochs)
    return lambda: progress.advance(task)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield progress
