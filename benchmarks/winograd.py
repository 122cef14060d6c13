"""Winograd's convolution beside the sparse kernels, layer by layer; prints JSON.

    python benchmarks/winograd.py [--sparsity 0.5 0.75] [--batch 64 1] [--threads 2] [--rounds 7]

Layers of a Sparse Wide ResNet-18 at 224²: its first, dense one (7 × 7, stride 2) and one 3 × 3 layer of each size, with random masks. Images of a batch
of whole vectors lie side by side, as they do between sparse layers. Each layer runs on its kept weights alone and by tiles that read 4 × 4 and 6 × 6
inputs (2 × 2 and 4 × 4 outputs of a 3 × 3 kernel), values frozen, turn by turn: medians of wall time, and the largest error against float64 over the
largest output. ``chosen`` is what the rules take.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.demo.machine import this_machine
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.choose_winograd import of_image_vectors, of_positions
from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.image_vectors import from_image_vectors, to_image_vectors
from sift_compiler.runtimes.tvm.prepare import prepare_live
from sift_compiler.runtimes.tvm.target import ensure_pool, host_cpu

_WIDTHS, _SIZES = (64, 128, 256, 512), (56, 28, 14, 7)
_LARGEST = 4


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer and the size of its input."""

    spec: LayerSpec
    size: int


def layers(sparsity: float) -> list[Layer]:
    """Those of a Sparse Wide ResNet-18; widths are multiples of eight."""
    widths = [8 * round(width * (1 - sparsity) ** -0.5 / 8) for width in _WIDTHS]
    first = LayerSpec(
        kind="conv2d", weight_shape=(widths[0], 3, 7, 7), nnz=widths[0] * 147, stride=(2, 2), padding=(3, 3), bias=False
    )
    others = [
        LayerSpec(
            kind="conv2d", weight_shape=(width, width, 3, 3), nnz=round(9 * width**2 * (1 - sparsity)), padding=(1, 1), bias=False
        )
        for width in widths
    ]  # fmt: skip
    return [Layer(first, 224), *(Layer(spec, size) for spec, size in zip(others, _SIZES, strict=True))]


def _choices(layer: Layer, shape: tuple[int, ...], batch: int) -> dict[str, Choice]:
    """What to time, by name: kept weights alone, and tiles of either reach if the layer is given to them."""
    spec, cpu = layer.spec, host_cpu()
    (sparse,) = choose(spec, shape, cpu)
    found = {"kept weights": sparse}
    best = of_image_vectors if len(shape) == 5 else of_positions
    for name, largest in (("4 inputs", 2), ("6 inputs", _LARGEST)):
        dense = best(spec, spec.output_size(layer.size, layer.size), batch, largest, True, cpu)
        if dense is not None and dense.tile not in [choice.tile for choice in found.values()]:
            found[name] = dataclasses.replace(sparse, tile=dense.tile, first=0, count=batch)
    return found


def measure(layer: Layer, batch: int, threads: int, rounds: int) -> dict[str, Any]:
    """Time and error of every choice."""
    spec, lanes = layer.spec, host_cpu().lanes
    entries = spec.weight_shape[0] * spec.weight_shape[1] * spec.kernel_size[0] * spec.kernel_size[1]
    index = torch.randperm(entries)[: spec.nnz].sort().values.int()
    values, bias = torch.randn(spec.nnz), torch.zeros(spec.out_channels)
    x = torch.randn(batch, spec.in_channels, layer.size, layer.size).relu_()
    side_by_side = batch % lanes == 0
    given = to_image_vectors(x, lanes) if side_by_side else x
    runs: dict[str, Callable[[], None]] = {}
    results: dict[str, Any] = {}
    output = (batch, spec.out_channels, *spec.output_size(layer.size, layer.size))
    y = torch.empty((batch // lanes, *output[1:], lanes) if side_by_side else output)
    expected = _expected(spec, x[:1], values, index)
    for name, choice in _choices(layer, tuple(given.shape), batch).items():
        part = prepare_live(
            spec, choice, (layer.size, layer.size), host_cpu(), threads, Epilogue(activation="relu"), True, side_by_side
        )
        part.repack(index.numpy())
        runs[name] = lambda part=part: part.run(given, values, bias, y)  # type: ignore[misc]
        runs[name]()
        first = (from_image_vectors(y[:1]) if side_by_side else y)[:1].double()
        results[name] = {
            "tile": str(choice.tile),
            "error": float(f"{float((first - expected).abs().max() / expected.abs().max()):.1e}"),
        }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - begin))
    for name, taken in times.items():
        results[name]["median_ms"] = round(statistics.median(taken), 3)
    kept = results["kept weights"]["median_ms"]
    for result in results.values():
        result["of_kept_weights"] = round(result["median_ms"] / kept, 3)
    (chosen, *_) = choose(spec, tuple(given.shape), host_cpu(), largest=_LARGEST, frozen=True)
    return {
        "weight": list(spec.weight_shape), "stride": spec.stride[0], "input": layer.size, "sparsity": round(spec.sparsity, 4), "batch": batch,
        "chosen": str(chosen.tile), "runs": results,
    }  # fmt: skip


def _expected(spec: LayerSpec, x: Tensor, values: Tensor, index: Tensor) -> Tensor:
    dense = torch.zeros(spec.weight_shape, dtype=torch.float64)
    dense.view(-1)[index.long()] = values.double()
    return F.conv2d(x.double(), dense, None, spec.stride, spec.padding).relu()


@torch.no_grad()
def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 1])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    if options.threads > 1:
        ensure_pool(options.threads)
    results = [
        measure(layer, batch, options.threads, options.rounds)
        for batch in options.batch
        for sparsity in options.sparsity
        for layer in layers(sparsity)
    ]
    machine = dataclasses.asdict(this_machine())
    print(json.dumps({"machine": machine, "threads": options.threads, "results": results}, indent=2))


if __name__ == "__main__":
    main()
