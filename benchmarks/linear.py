"""Time the linear layers of transformers: fraction of the multiply-add peak for many tokens, of the copy bandwidth for one; prints JSON.

    python benchmarks/linear.py [--models vit-small gpt2-small] [--widths wide same] [--sparsity 0.75 0.9] [--tokens 1 128 512 1024 2048]
                                [--layers fc1] [--rounds 5] [--freeze] [--markdown]

The layers are the projections of attention and the two layers of an MLP, at the widths that Sparse Wide gives them (``wide``: 1/√(1 - s) times as
wide, a multiple of the number of heads, so that sparse FLOPs equal those of the dense model) and at the original ones (``same``). A call
is a whole call of the layer: contiguous tokens in, contiguous tokens out. Everything runs on one thread, in turns; a time is the median over
rounds of the thread's processor time, which leaves out what other processes took of a shared core, but not what they did to caches
and memory. ``of_peak`` is the median over rounds of FLOPs of kept weights over those of multiply-adds in registers timed beside them.
``equal_flops_milliseconds`` is the share of kept weights times torch's dense time: the same FLOPs at torch's speed. With ``--freeze`` values are
brought into the order of the program once (see ``CompileOptions.freeze``), as in deployment; without, at every call.

With one token, weights come from memory as in a model that does not fit the caches: enough copies of a layer to hold ``--stream`` MB are run
one after the other. ``of_copy`` is what the kernel must read of them (values and columns, two bytes each or four, and beginnings of
rows) per second, over the bytes that a large copy reads and writes per second; ``dense_of_copy`` is the same for torch's dense weights.
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
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.lowering.row_program import SHORT_COLUMNS
from sift_compiler.lowering.specification import LayerSpec


@dataclass(frozen=True)
class Model:
    """Widths of a transformer."""

    width: int
    hidden: int
    heads: int


@dataclass(frozen=True)
class Case:
    """One layer to time."""

    model: str
    layer: str
    widths: str
    inputs: int
    outputs: int
    sparsity: float

    @property
    def kept(self) -> int:
        return round(self.inputs * self.outputs * (1 - self.sparsity))


MODELS = {"vit-small": Model(384, 1536, 6), "gpt2-small": Model(768, 3072, 12)}
LAYERS = {"qkv": ("width", 3, "width", 1), "proj": ("width", 1, "width", 1), "fc1": ("hidden", 1, "width", 1),
          "fc2": ("width", 1, "hidden", 1)}  # fmt: skip
COPY_BYTES = 256 * 1024 * 1024


def cases(model: str, widths: str, sparsity: float) -> list[Case]:
    """The layers of one model."""
    base = MODELS[model]
    factor = 1 / math.sqrt(1 - sparsity) if widths == "wide" else 1.0
    sizes = {
        name: base.heads * round(getattr(base, name) * factor / base.heads) for name in ("width", "hidden")
    }  # fmt: skip
    return [
        Case(model, layer, widths, sizes[into] * b, sizes[out] * a, sparsity) for layer, (out, a, into, b) in LAYERS.items()
    ]  # fmt: skip


def _seconds(run: Callable[[], object]) -> float:
    begin = time.thread_time()
    run()
    return time.thread_time() - begin


class Layer:
    """A sparse layer and its kernel."""

    def __init__(self, case: Case, index: Tensor, values: Tensor, bias: Tensor, freeze: bool) -> None:
        from sift_compiler.runtimes.tvm.runtime import TvmRuntime

        self.shape, self.index, self.values, self.bias = (case.outputs, case.inputs), index, values, bias
        self.freeze = freeze
        spec = LayerSpec(kind="linear", weight_shape=(case.outputs, case.inputs), nnz=case.kept, bias=True)
        self.kernel = TvmRuntime().build(spec, case.layer, 1, freeze=freeze)

    @classmethod
    def random(cls, case: Case, freeze: bool) -> Layer:
        """A layer with as many weights as ``case`` says, anywhere."""
        index = torch.randperm(case.inputs * case.outputs)[: case.kept].sort().values.int()
        return cls(case, index, torch.randn(case.kept), torch.randn(case.outputs), freeze)

    def copy(self, case: Case) -> Layer:
        """The same in other memory."""
        return Layer(case, self.index.clone(), self.values.clone(), self.bias, self.freeze)

    def dense(self) -> Tensor:
        """The dense weight [out, in]."""
        return torch.zeros(math.prod(self.shape)).index_copy_(0, self.index.long(), self.values).view(self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        return self.kernel(x, self.values, self.index, self.bias)


def many_tokens(case: Case, tokens: int, rounds: int, freeze: bool) -> dict[str, Any]:
    """Times for ``tokens`` tokens, beside the peak."""
    from sift_compiler.runtimes.tvm.peak import peak_loop

    layer, x = Layer.random(case, freeze), torch.randn(tokens, case.inputs)
    weight = layer.dense()
    peak, peak_flops = peak_loop(1)
    flops = 2 * case.kept * tokens
    y, expected = layer(x), F.linear(x, weight, layer.bias)
    peaks, sparse, dense, shares = [], [], [], []
    for _ in range(rounds):
        peaks.append(_seconds(peak) / peak_flops)
        repeats = max(1, int(0.02 * 1e11 / flops))
        sparse.append(_seconds(lambda: [layer(x) for _ in range(repeats)]) / repeats)  # noqa: B023
        peaks.append(_seconds(peak) / peak_flops)
        dense.append(_seconds(lambda: F.linear(x, weight, layer.bias)))
        shares.append(statistics.mean(peaks[-2:]) * flops / sparse[-1])
    times = 1e3 * statistics.median(sparse), 1e3 * statistics.median(dense)
    return {
        "milliseconds": times[0], "dense_milliseconds": times[1], "equal_flops_milliseconds": times[1] * (1 - case.sparsity),
        "times_faster_than_dense": times[1] / times[0], "of_peak": statistics.median(shares), "best_of_peak": max(shares),
        "peak_gflops": 1e-9 / statistics.median(peaks), "error": _error(y, expected),
        "tile": str(layer.kernel.plan(tuple(x.shape)).tile),
    }  # fmt: skip


def one_token(case: Case, rounds: int, stream: int, freeze: bool) -> dict[str, Any]:
    """Times for one token with weights that come from memory, beside the copy."""
    column = 2 if case.inputs <= SHORT_COLUMNS else 4
    sparse_bytes = case.kept * (4 + column) + 4 * (case.outputs + 1)
    dense_bytes = 4 * case.inputs * case.outputs
    x = torch.randn(1, case.inputs)
    first = Layer.random(case, freeze)
    layers = [first.copy(case) for _ in range(max(2, -(-stream * 1024 * 1024 // sparse_bytes)))]
    # Dense weights take more room: fewer of them hold as many bytes.
    weights = [first.dense() for _ in range(max(2, -(-stream * 1024 * 1024 // dense_bytes)))]
    y, expected = first(x), F.linear(x, weights[0], first.bias)
    runs = {
        "sparse": (lambda: [layer(x) for layer in layers], len(layers)),
        "dense": (lambda: [F.linear(x, weight, first.bias) for weight in weights], len(weights)),
        "resident": (lambda: [first(x) for _ in range(20)], 20),
    }
    source = torch.zeros(COPY_BYTES // 4)
    target = torch.ones_like(source)
    for run, _ in runs.values():
        run()
    copies, times = [], {name: [] for name in runs}  # type: ignore[var-annotated]
    for _ in range(rounds):
        copies.append(_seconds(lambda: target.copy_(source)))
        for name, (run, count) in runs.items():
            times[name].append(_seconds(run) / count)
    copy = 2 * COPY_BYTES / statistics.median(copies)
    middle = {name: statistics.median(each) for name, each in times.items()}
    return {
        "milliseconds": 1e3 * middle["sparse"], "dense_milliseconds": 1e3 * middle["dense"],
        "equal_flops_milliseconds": 1e3 * middle["dense"] * (1 - case.sparsity),
        "times_faster_than_dense": middle["dense"] / middle["sparse"],
        "of_copy": sparse_bytes / middle["sparse"] / copy, "dense_of_copy": dense_bytes / middle["dense"] / copy,
        "copy_gigabytes_per_second": 1e-9 * copy, "resident_milliseconds": 1e3 * middle["resident"],
        "error": _error(y, expected), "tile": str(first.kernel.plan(tuple(x.shape)).tile),
    }  # fmt: skip


def _error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).abs().max() / expected.abs().max())


def _rounded(value: Any) -> Any:
    return value if not isinstance(value, float) else float(f"{value:.3g}")


def markdown(results: list[dict[str, Any]]) -> str:
    """The results as a table."""
    lines = [
        "| layer | in → out | sparsity | tokens | ms | dense torch, ms | equal FLOPs, ms | of peak | of copy bandwidth |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        name = f"{r['model']} {r['layer']}, {r['widths']}"
        shares = [f"{r[key]:.2f}" if key in r else "" for key in ("of_peak", "of_copy")]
        times = [f"{r[key]:.3g}" for key in ("milliseconds", "dense_milliseconds", "equal_flops_milliseconds")]
        lines.append(
            f"| {name} | {r['in']} → {r['out']} | {r['sparsity']:.2f} | {r['tokens']} | {' | '.join(times + shares)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    import tvm

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--widths", nargs="+", choices=["wide", "same"], default=["wide", "same"])
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.75, 0.9])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 128, 512, 1024, 2048])
    parser.add_argument("--layers", nargs="+", choices=list(LAYERS), default=list(LAYERS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--stream", type=int, default=192, help="MB of weights that stream by with one token")
    parser.add_argument("--freeze", action="store_true", help="bring values into the order of the program once")
    parser.add_argument("--markdown", action="store_true", help="print a table, not JSON")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    from sift_compiler.runtimes.tvm.target import host_cpu

    results = []
    for model in chosen.models:
        for widths in chosen.widths:
            for sparsity in chosen.sparsity:
                for case in cases(model, widths, sparsity):
                    for tokens in chosen.tokens if case.layer in chosen.layers else ():
                        known = {
                            "model": model, "layer": case.layer, "widths": widths, "in": case.inputs, "out": case.outputs,
                            "sparsity": sparsity, "tokens": tokens,
                        }  # fmt: skip
                        measured = (
                            one_token(case, chosen.rounds, chosen.stream, chosen.freeze)
                            if tokens == 1
                            else many_tokens(case, tokens, chosen.rounds, chosen.freeze)
                        )
                        results.append({**known, **{key: _rounded(value) for key, value in measured.items()}})
    if chosen.markdown:
        sys.stdout.write(markdown(results) + "\n")
        return
    machine = {
        "cpu": host_cpu().name,
        "lanes": host_cpu().lanes,
        "machine": platform.machine(),
        "threads": 1,
        "freeze": chosen.freeze,
    }
    versions = {"torch": torch.__version__, "tvm": tvm.__version__, "python": platform.python_version()}
    json.dump({"machine": machine, "versions": versions, "layers": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
