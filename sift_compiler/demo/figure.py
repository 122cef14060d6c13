"""The curves of a demo as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sift_compiler.demo.formats import need
from sift_compiler.demo.report import DemoReport, NetworkResult

# Okabe and Ito's palette: told apart with every kind of colour vision. The first is the dense network's.
_COLOURS = ("#3b3b3b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(report: DemoReport, path: Path) -> None:
    """Write a PNG: test accuracy and training loss by epoch, a line per network (mean of the seeds) in a band from worst to best."""
    need("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for network, colour in zip(report.networks, _colours(len(report.networks)), strict=True):
        label = f"{network.name}: {_percent(network)}"
        _curve(left, [[100 * value for value in run.accuracies] for run in network.runs], label, colour)
        _curve(right, [run.losses for run in network.runs], network.name, colour)
    _dress(left, "test accuracy (%)", report.recipe.epochs)
    _dress(right, "training loss (cross-entropy, nats)", report.recipe.epochs)
    _fit_accuracy(left, report.networks)
    low, high = right.get_ylim()
    if high > 5 * max(low, 0.0):
        right.set_yscale("log")
    left.legend(frameon=False, loc="lower right", fontsize=9)
    figure.suptitle(_title(report), x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(_caption(report), x=0.01, ha="left", fontsize=8.5, color="#555555")
    figure.savefig(path, dpi=150)


def _colours(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def _curve(axes: Any, runs: Sequence[Sequence[float]], label: str, colour: str) -> None:
    values = np.asarray(runs)
    epochs = np.arange(1, values.shape[1] + 1)
    marker = "o" if len(epochs) == 1 else None
    if len(values) > 1:
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.14, linewidth=0)
    axes.plot(epochs, values.mean(0), color=colour, linewidth=2, label=label, marker=marker)


def _dress(axes: Any, name: str, epochs: int) -> None:
    axes.set_xlabel("epoch")
    axes.set_ylabel(name)
    axes.set_xlim((1, epochs) if epochs > 1 else (0.5, 1.5))
    if epochs > 1:
        axes.xaxis.get_major_locator().set_params(integer=True)
    else:
        axes.set_xticks([1])
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _fit_accuracy(axes: Any, networks: Sequence[NetworkResult]) -> None:
    """Leave out the first climb, which would flatten the differences at the end."""
    curves = np.concatenate([np.asarray([run.accuracies for run in network.runs]) for network in networks]) * 100
    later = curves[:, curves.shape[1] // 3 :]
    room = max(1.0, 0.08 * float(later.max() - later.min()))
    axes.set_ylim(max(0.0, float(later.min()) - room), min(100.0, float(later.max()) + room))


def _percent(network: NetworkResult) -> str:
    spread = f" ± {100 * network.accuracy_std:.1f}" if len(network.runs) > 1 else ""
    return f"{100 * network.accuracy_mean:.1f}{spread} %"


def _title(report: DemoReport) -> str:
    masks = {"rigl": "masks moved by RigL", "set": "masks moved by SET", "static": "masks at rest"}[
        report.options.method
    ]
    return f"Dense and Sparse Wide at equal FLOPs ({report.options.dataset}, {masks})"


def _caption(report: DemoReport) -> str:
    seeds = len(report.dense.runs)
    band = f"lines: mean of {seeds} seeds, bands: worst to best" if seeds > 1 else "one seed"
    ratios = ", ".join(f"{n.flops / report.dense.flops:.4f}" for n in report.networks[1:])
    shown = min(report.recipe.curve_images, report.test_images)
    return (
        f"{report.train_images} training images; accuracy curves on {shown} test images, legend on all {report.test_images} "
        f"after the last epoch (mean ± std);\n{band}; FLOPs over dense: {ratios}"
    )
