"""The report as a table: a row per quantity, a column per network."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from sift_compiler.demo.report import DemoReport, NetworkResult, SparseResult

Cell = Callable[[NetworkResult], str]


def table(report: DemoReport) -> Table:
    """The table that ``sift demo`` prints."""
    shape = " × ".join(str(size) for size in report.image_shape[1:])
    seeds = len(report.dense.runs)
    made = Table(
        title=f"{report.options.dataset}, {report.train_images} training images of {shape}, {report.recipe.epochs} epochs, "
        f"masks {report.options.method}, runtime {report.options.runtime}, {report.threads} thread{'s' * (report.threads > 1)}",
        caption="times are medians over interleaved runs; training memory is values, gradients, optimizer state and indices",
        title_justify="left",
        caption_justify="left",
    )
    made.add_column("")
    for network in report.networks:
        made.add_column(network.name, justify="right")
    for name, cell in _rows(report.dense, report.batch, seeds):
        made.add_row(name, *(cell(network) for network in report.networks))
    return made


def _rows(dense: NetworkResult, batch: int, seeds: int) -> list[tuple[str, Cell]]:
    spread = f"mean ± std of {seeds} seeds" if seeds > 1 else "one seed"
    return [
        (f"test accuracy, {spread}", lambda n: _accuracy(n)),
        ("channels of the stages", lambda n: " / ".join(str(width) for width in n.widths)),
        ("FLOPs per image, forward", lambda n: f"{n.flops / 1e6:.3f} M  ({n.flops / dense.flops:.4f}×)"),
        ("trained parameters", lambda n: f"{n.parameters:,}  ({n.parameters / dense.parameters:.2f}×)"),
        ("training memory", lambda n: f"{_size(n.memory.total)}  ({n.memory.total / dense.memory.total:.2f}×)"),
        ("  the same network, dense and masked", _sparse(lambda s: _size(s.masked_memory.total))),
        ("mask updates per run", lambda n: "" if n.sparse is None else str(n.runs[0].mask_updates)),
        ("re-specialisation per update", _sparse(_repack)),
        ("graphs traced / recompiles", _sparse(lambda s: f"{s.graphs.traced} / {s.graphs.recompiles}")),
        ("compiled against eager, relative", _sparse(lambda s: f"{s.compiled_difference:.1e}")),
        ("training step", lambda n: f"{_mean_step(n):.1f} ms"),
        (f"forward, {batch} images", lambda n: f"{n.forward.median_ms:.1f} ms"),
        ("  the same network, dense and masked", _sparse(lambda s: f"{s.masked_forward.median_ms:.1f} ms")),
        ("  faster than dense and masked", lambda n: "" if n.sparse is None else f"{_speedup(n, n.sparse):.2f}×"),
        ("  time over the dense ancestor's", lambda n: f"{n.forward.median_ms / dense.forward.median_ms:.2f}×"),
    ]  # fmt: skip


def _sparse(cell: Callable[[SparseResult], str]) -> Cell:
    return lambda network: "" if network.sparse is None else cell(network.sparse)


def _accuracy(network: NetworkResult) -> str:
    spread = f" ± {100 * network.accuracy_std:.2f}" if len(network.runs) > 1 else ""
    return f"{100 * network.accuracy_mean:.2f}{spread} %"


def _size(count: int) -> str:
    return f"{count / 2**20:.2f} MiB"


def _repack(sparse: SparseResult) -> str:
    found = sparse.respecialisation
    return "none needed" if found is None else f"{found.ms_per_update:.2f} ms" if found.repacks else "masks at rest"


def _mean_step(network: NetworkResult) -> float:
    return sum(run.step_ms for run in network.runs) / len(network.runs)


def _speedup(network: NetworkResult, sparse: SparseResult) -> float:
    return sparse.masked_forward.median_ms / network.forward.median_ms
