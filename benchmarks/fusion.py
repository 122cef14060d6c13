"""Time a Sparse Wide ResNet-18 in evaluation, with and without fused epilogues; prints JSON.

    python benchmarks/fusion.py [--sparsity 0.75] [--batch 16] [--size 32] [--rounds 5]

Wide at equal FLOPs, compiled for inference (``torch.no_grad()``), the rest of the graph on inductor, one thread. Rounds alternate
between the two, because machines are shared; times are medians of processor time.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import sift_compiler
from sift_compiler import dynamo
from sift_compiler.lowering.fuse import Chain


def _model(sparsity: float, x: torch.Tensor) -> torch.nn.Module:
    path = Path(__file__).resolve().parent.parent / "examples" / "models.py"
    specification = importlib.util.spec_from_file_location("example_models", path)
    assert specification is not None
    assert specification.loader is not None
    models = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(models)
    dense = models.resnet18_cifar().eval()
    return sift_compiler.rewrite(dense, (x,), sift_compiler.SparseWide(sparsity=sparsity)).eval()  # type: ignore[no-any-return]


def _compiled(call: Any, x: torch.Tensor) -> Any:
    run = torch.compile(call, backend="sift", options={"threads": 1, "prune_threshold": None})
    run(x)
    return run


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(chosen.batch, 3, chosen.size, chosen.size)
    model = _model(chosen.sparsity, x)
    times: dict[str, list[float]] = {"plain": [], "fused": []}
    # Two functions with code of their own: Dynamo keeps what it compiled with the code.
    with torch.no_grad():
        with mock.patch.object(dynamo, "find_chain", return_value=Chain()):
            plain = _compiled(lambda x: model(x), x)
        fused = _compiled(lambda x: model(x), x)
        error = float((plain(x) - fused(x)).abs().max() / plain(x).abs().max())
        for _ in range(chosen.rounds):
            for name, run in (("plain", plain), ("fused", fused)):
                begin = time.thread_time()
                run(x)
                times[name].append(1e3 * (time.thread_time() - begin))
    middle = {f"{name}_milliseconds": round(statistics.median(values), 2) for name, values in times.items()}
    layers = sorted(len(made.fused) for made in dynamo.compilations())
    json.dump({**vars(chosen), "layers_fused": layers, **middle, "relative_difference": error}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
