"""Time the sparse kernels against the machine's own multiply-add peak; prints JSON.

    python benchmarks/kernels.py [--threads 1] [--layers conv360] [--rounds 7] [--no-dense]

A call is everything a layer does: contiguous NCHW (tokens) in, values gathered into program order, packing, kernel, contiguous NCHW
out. The peak is a loop of multiply-adds in registers, timed next to every call, because machines are shared and clocks change;
``of_peak`` is the median over rounds of kernel over peak, ``best_of_peak`` compares the best of both. FLOPs are 2 per kept weight
and output position. With one thread all times are the thread's processor time, which leaves out what other processes took of a shared
core, but not what they did to caches and memory; with more threads they are wall time.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.reference import densify


@dataclass(frozen=True)
class Case:
    """A layer and the input it is timed on."""

    weight: tuple[int, ...]
    input: tuple[int, ...]
    sparsity: float
    stride: int = 1

    @property
    def spec(self) -> LayerSpec:
        entries = torch.Size(self.weight).numel()
        conv = len(self.weight) == 4
        pad = self.weight[2] // 2 if conv else 0
        return LayerSpec(
            kind="conv2d" if conv else "linear", weight_shape=self.weight, bias=True, padding=(pad, pad),
            stride=(self.stride, self.stride), nnz=entries - int(entries * self.sparsity),
        )  # fmt: skip


CASES = {
    "conv360-28-s50-b16": Case((360, 360, 3, 3), (16, 360, 28, 28), 0.5),
    "conv512-28-s75-b16": Case((512, 512, 3, 3), (16, 512, 28, 28), 0.75),
    "conv808-28-s90-b16": Case((808, 808, 3, 3), (16, 808, 28, 28), 0.9),
    "conv360-28-s50-b1": Case((360, 360, 3, 3), (1, 360, 28, 28), 0.5),
    "conv808-14-s90-b1": Case((808, 808, 3, 3), (1, 808, 14, 14), 0.9),
    "conv360-32-s75-b16": Case((360, 360, 3, 3), (16, 360, 32, 32), 0.75),
    "conv728-8-s75-b16": Case((728, 728, 3, 3), (16, 728, 8, 8), 0.75),
    "conv728-4-s75-b64": Case((728, 728, 3, 3), (64, 728, 4, 4), 0.75),
    "conv360-28-s50-b16-stride2": Case((360, 360, 3, 3), (16, 360, 28, 28), 0.5, 2),
    "point512-28-s50-b16": Case((512, 512, 1, 1), (16, 512, 28, 28), 0.5),
    "point1024-14-s90-b16": Case((1024, 1024, 1, 1), (16, 1024, 14, 14), 0.9),
    "linear1536-512-s50": Case((1536, 1536), (512, 1536), 0.5),
    "linear1536-512-s75": Case((1536, 1536), (512, 1536), 0.75),
    "linear1536-512-s90": Case((1536, 1536), (512, 1536), 0.9),
    "linear1024-256-s90": Case((1024, 1024), (256, 1024), 0.9),
    "linear1536-1-s90": Case((1536, 1536), (1, 1536), 0.9),
}


def _seconds(run: Callable[[], object], threads: int = 1) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    begin = clock()
    run()
    return clock() - begin


def _peak_loop(threads: int) -> tuple[Callable[[], object], float]:
    """A call that multiplies and adds in registers for about a millisecond, and its FLOPs."""
    from sift_compiler.runtimes.tvm import kernels
    from sift_compiler.runtimes.tvm.build import compiled
    from sift_compiler.runtimes.tvm.target import host_cpu

    cpu, chains, turns = host_cpu(), 12, 300_000
    loop = compiled(kernels.peak, cpu.name, lanes=cpu.lanes, chains=chains, parallel=threads > 1)
    numbers = torch.full((threads * chains * cpu.lanes,), 0.5)
    return lambda: loop(numbers, threads, turns), 2.0 * threads * chains * cpu.lanes * turns


def measure(name: str, case: Case, threads: int, rounds: int, dense: bool) -> dict[str, Any]:
    """Time one layer; see the module's text."""
    from sift_compiler.runtimes.tvm.runtime import TvmRuntime

    torch.manual_seed(0)
    spec = case.spec
    entries = torch.Size(case.weight).numel()
    index = torch.randperm(entries)[: spec.nnz].int()
    values, bias, x = torch.randn(spec.nnz), torch.randn(case.weight[0]), torch.randn(case.input)
    kernel = TvmRuntime().build(spec, name, threads)
    y = kernel(x, values, index, bias)
    weight = densify(values, index, case.weight)

    def run_dense() -> torch.Tensor:
        if spec.kind == "linear":
            return torch.nn.functional.linear(x, weight, bias)
        return torch.nn.functional.conv2d(x, weight, bias, spec.stride, spec.padding)

    expected = run_dense()
    error = float((y - expected).abs().max() / expected.abs().max())
    positions = y.numel() // spec.out_channels
    flops = spec.flops(positions)
    peak, peak_flops = _peak_loop(threads)
    times: dict[str, list[float]] = {"peak": [], "kernel": [], "dense": []}
    repeats = max(1, int(0.03 * 1e11 * threads / flops))
    for _ in range(rounds):
        times["peak"].append(_seconds(peak, threads) / peak_flops)
        for _ in range(repeats):
            times["kernel"].append(_seconds(lambda: kernel(x, values, index, bias), threads) / flops)
        times["peak"].append(_seconds(peak, threads) / peak_flops)
        if dense:
            times["dense"].append(_seconds(run_dense, threads))
    for _ in range(3):
        index.copy_(torch.randperm(entries)[: spec.nnz].int())
        kernel(x, values, index, bias)
    middle = {key: statistics.median(value) for key, value in times.items() if value}
    result = {
        "layer": name, "threads": threads, "clock": "thread" if threads == 1 else "wall", "milliseconds": 1e3 * middle["kernel"] * flops,
        "gflops": 1e-9 / middle["kernel"], "peak_gflops": 1e-9 / middle["peak"],
        "of_peak": middle["peak"] / middle["kernel"],
        "best_of_peak": min(times["peak"]) / min(times["kernel"]),
        "repack_milliseconds": kernel.specialisations.repack_ms / kernel.specialisations.repacks,
        "error_relative_to_largest": error, "tile": str(kernel.plan(case.input).tile),
    }  # fmt: skip
    if dense:
        result["dense_milliseconds"] = 1e3 * middle["dense"]
        result["times_faster_than_dense"] = 1e3 * middle["dense"] / result["milliseconds"]
    return {
        key: round(value, 7 if key.startswith("error") else 3) if isinstance(value, float) else value
        for key, value in result.items()
    }


def main() -> None:
    """Parse, measure, print."""
    import tvm

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--layers", default="", help="part of the names of the layers to time; comma-separated; all by default"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-dense", action="store_true", help="leave out torch's dense layer")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    from sift_compiler.runtimes.tvm.target import host_cpu

    wanted = chosen.layers.split(",")
    results = []
    for name, case in CASES.items():
        if any(part in name for part in wanted):
            results.append(measure(name, case, chosen.threads, chosen.rounds, not chosen.no_dense))
    machine = {"cpu": host_cpu().name, "lanes": host_cpu().lanes, "machine": platform.machine()}
    versions = {"torch": torch.__version__, "tvm": tvm.__version__, "python": platform.python_version()}
    json.dump({"machine": machine, "versions": versions, "layers": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
