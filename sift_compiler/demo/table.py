"""The report as a table: a row per quantity, a column per network."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sift_compiler.demo.report import DemoReport, NetworkResult, SparseResult

Cell = Callable[[NetworkResult], str]


def table(report: DemoReport) -> Table:
    """The table that ``sift demo`` prints; it fits 80 columns with two sparse networks."""
    made = Table(
        title=_title(report), caption=_caption(report), title_justify="left", caption_justify="left", box=SIMPLE_HEAD
    )
    made.add_column("", no_wrap=True)
    for network in report.networks:
        made.add_column(network.name.replace("Wide ", "Wide\n").replace(" %", "\u00a0%"), justify="right")
    for name, cell in _rows(report.dense, report.batch):
        made.add_row(name, *(cell(network) for network in report.networks))
    return made


def _title(report: DemoReport) -> str:
    shape = " × ".join(str(size) for size in report.image_shape[1:])
    return (
        f"{report.options.dataset}: {report.train_images} training images of {shape}, {report.recipe.epochs} epochs, "
        f"masks {report.options.method}, runtime {report.options.runtime}, {report.threads} thread{'s' * (report.threads > 1)}"
    )


def _caption(report: DemoReport) -> str:
    seeds = len(report.dense.runs)
    return (
        f"accuracy: {f'mean ± std of {seeds} seeds' if seeds > 1 else 'one seed'}; training memory: values, gradients, "
        "optimizer state, indices, buffers; forward: medians over interleaved runs; masked dense: the same widened network, "
        "dense, its weights zero where the mask is"
    )


def _rows(dense: NetworkResult, batch: int) -> list[tuple[str, Cell]]:
    return [
        ("test accuracy", _accuracy),
        ("channels of the stages", lambda n: " / ".join(str(width) for width in n.widths)),
        ("FLOPs per image", lambda n: f"{n.flops / 1e6:.3f} M"),
        ("  over dense", lambda n: f"{n.flops / dense.flops:.4f}×"),
        ("trained parameters", lambda n: f"{n.parameters:,}"),
        ("training memory", lambda n: _size(n.memory.total)),
        ("  of masked dense", _sparse(lambda s: _size(s.masked_memory.total))),
        ("mask updates per run", lambda n: "" if n.sparse is None else str(n.runs[0].mask_updates)),
        ("re-specialisation", lambda n: "" if n.sparse is None else _repack(n, n.sparse)),
        ("graphs / recompiles", _sparse(lambda s: f"{s.graphs.traced} / {s.graphs.recompiles}")),
        ("compiled against eager", _sparse(lambda s: f"{s.compiled_difference:.1e}")),
        ("training step", lambda n: f"{_mean_step(n):.1f} ms"),
        (f"forward, {batch} images", lambda n: f"{n.forward.median_ms:.1f} ms"),
        ("  of masked dense", _sparse(lambda s: f"{s.masked_forward.median_ms:.1f} ms")),
        ("  speed-up over it", lambda n: "" if n.sparse is None else f"{_speedup(n, n.sparse):.2f}×"),
        ("  over dense", lambda n: f"{n.forward.median_ms / dense.forward.median_ms:.2f}×"),
    ]  # fmt: skip


def _sparse(cell: Callable[[SparseResult], str]) -> Cell:
    return lambda network: "" if network.sparse is None else cell(network.sparse)


def _accuracy(network: NetworkResult) -> str:
    spread = f" ± {100 * network.accuracy_std:.2f}" if len(network.runs) > 1 else ""
    return f"{100 * network.accuracy_mean:.2f}{spread} %"


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _repack(network: NetworkResult, sparse: SparseResult) -> str:
    if not network.runs[0].mask_updates:
        return "masks at rest"
    found = sparse.respecialisation
    return "none needed" if found is None else f"{found.ms_per_update:.1f} ms/update"


def _mean_step(network: NetworkResult) -> float:
    return sum(run.step_ms for run in network.runs) / len(network.runs)


def _speedup(network: NetworkResult, sparse: SparseResult) -> float:
    return sparse.masked_forward.median_ms / network.forward.median_ms
