"""Time a training step of a sparse-wide network against its dense ancestor and against the wide network with masked dense weights.

    python benchmarks/training.py [--network block|resnet18] [--sparsity 0.5,0.75,0.9] [--batch 32] [--rounds 5] [--no-layer]

For every sparsity s the wide network has 1 / sqrt(1 - s) times the ancestor's channels, so that both have as many weights to multiply.
A step is forward, cross entropy, backward and SGD with momentum. All three run under torch.compile: the sparse network with backend
"sift" (its dense rest with inductor), the two others with inductor. The masked network computes weight · mask in its forward pass.
``layer`` holds one 3×3 convolution of the network's widest stage alone: forward, gradient of the input, gradient of the values, each
beside the reference operator.

Rounds go round robin over everything that is compared; a ratio is the median over rounds of the ratios within a round. Times are the
processor time of one thread, which leaves out what other processes took of a shared core, but not what they did to its caches.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sift_compiler import nn as sift_nn
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import reference

Conv = Callable[[int, int, int, int], nn.Module]
"""A convolution of so many input and output channels, kernel size and stride."""


class Masked(nn.Conv2d):
    """A dense convolution whose weight is multiplied by a fixed random mask."""

    def __init__(self, inward: int, outward: int, kernel: int, stride: int, sparsity: float) -> None:
        super().__init__(inward, outward, kernel, stride, kernel // 2, bias=False)
        self.register_buffer("mask", (torch.rand_like(self.weight) >= sparsity).float())

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, None)


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, conv: Conv, inward: int, outward: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = conv(inward, outward, 3, stride), conv(outward, outward, 3, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(outward), nn.BatchNorm2d(outward)])
        self.short: nn.Module = nn.Identity()
        if inward != outward or stride != 1:
            self.short = nn.Sequential(conv(inward, outward, 1, stride), nn.BatchNorm2d(outward))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(y + self.short(x))


def network(kind: str, conv: Conv, widen: float) -> nn.Module:
    """A block between dense stem and head (64 channels at 16 × 16), or ResNet-18 for CIFAR; channels times ``widen``."""
    stages = [64] if kind == "block" else [64, 128, 256, 512]
    widths = [max(1, round(width * widen)) for width in stages]
    stem = nn.Conv2d(3, widths[0], 3, 2 if kind == "block" else 1, 1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(widths[0]), nn.ReLU()]
    inward = widths[0]
    for stage, width in enumerate(widths):
        for turn in range(1 if kind == "block" else 2):
            layers.append(Block(conv, inward, width, 2 if stage and not turn else 1))
            inward = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inward, 10))


def _seconds(run: Callable[[], object]) -> float:
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


def _rounds(runs: dict[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    for _ in range(warm):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds(run))
    return times


def _summary(times: dict[str, list[float]], ratios: dict[str, tuple[str, str]]) -> dict[str, Any]:
    result: dict[str, Any] = {f"{name}_ms": round(1e3 * statistics.median(t), 2) for name, t in times.items()}
    for name, (over, under) in ratios.items():
        result[name] = round(statistics.median(a / b for a, b in zip(times[over], times[under], strict=True)), 3)
    return result


def _step(model: nn.Module, backend: str, x: Tensor, target: Tensor) -> Callable[[], None]:
    options: dict[str, Any] = {"runtime": "tvm", "threads": 1} if backend == "sift" else {}
    compiled = torch.compile(model, backend=backend, dynamic=False, options=options or None)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(compiled(x), target).backward()
        optimizer.step()

    return step


def measure_step(kind: str, sparsity: float, batch: int, rounds: int) -> dict[str, Any]:
    """One training step of the three networks."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    widen = 1 / math.sqrt(1 - sparsity)
    x, target = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def dense(a: int, b: int, k: int, s: int) -> nn.Module:
        return nn.Conv2d(a, b, k, s, k // 2, bias=False)

    def sparse(a: int, b: int, k: int, s: int) -> nn.Module:
        return sift_nn.SparseConv2d(a, b, k, s, k // 2, bias=False, sparsity=sparsity)

    def masked(a: int, b: int, k: int, s: int) -> nn.Module:
        return Masked(a, b, k, s, sparsity)

    runs = {
        "ancestor": _step(network(kind, dense, 1.0), "inductor", x, target),
        "masked": _step(network(kind, masked, widen), "inductor", x, target),
        "sparse": _step(network(kind, sparse, widen), "sift", x, target),
    }
    ratios = {"sparse_over_ancestor": ("sparse", "ancestor"), "masked_over_sparse": ("masked", "sparse")}
    return _summary(_rounds(runs, rounds), ratios)


def measure_layer(kind: str, sparsity: float, batch: int, rounds: int) -> dict[str, Any]:
    """Forward and both gradients of one convolution, beside the reference."""
    from sift_compiler.runtimes.tvm.runtime import TvmRuntime

    torch.manual_seed(0)
    width, size = (64, 16) if kind == "block" else (256, 8)
    width = round(width / math.sqrt(1 - sparsity))
    shape = (width, width, 3, 3)
    entries = math.prod(shape)
    index = torch.randperm(entries)[: entries - int(sparsity * entries)].int()
    spec = LayerSpec(kind="conv2d", weight_shape=shape, padding=(1, 1), nnz=index.numel())
    values, x = torch.randn(index.numel()), torch.randn(batch, width, size, size)
    dy = torch.randn_like(x)
    kernel = TvmRuntime().build(spec, "layer", 1)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    runs: dict[str, Callable[[], object]] = {
        "forward": lambda: kernel(x, values, index, None),
        "forward_reference": lambda: reference.conv2d(x, values, index, None, shape, *geometry),
        "dx": lambda: kernel.input_gradient(dy, values, index, x.shape),
        "dx_reference": lambda: reference.conv2d_input_gradient(dy, values, index, shape, x.shape, *geometry),
        "dv": lambda: kernel.values_gradient(dy, x, index),
        "dv_reference": lambda: reference.gather(reference.conv2d_weight_gradient(dy, x, shape, *geometry), index),
    }
    names = ("forward", "dx", "dv")
    ratios = {f"{name}_faster_than_reference": (f"{name}_reference", name) for name in names}
    return {"channels": width, "size": size} | _summary(_rounds(runs, rounds), ratios)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=("block", "resnet18"), default="block")
    parser.add_argument("--sparsity", default="0.5,0.75,0.9", help="comma-separated")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-layer", action="store_true", help="leave out the single convolution")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    results = []
    for sparsity in (float(part) for part in chosen.sparsity.split(",")):
        result: dict[str, Any] = {"sparsity": sparsity}
        if not chosen.no_layer:
            result["layer"] = measure_layer(chosen.network, sparsity, chosen.batch, chosen.rounds)
        result["step"] = measure_step(chosen.network, sparsity, chosen.batch, chosen.rounds)
        results.append(result)
    about = {"network": chosen.network, "batch": chosen.batch, "clock": "thread", "machine": platform.machine()}
    json.dump({**about, "torch": torch.__version__, "results": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
