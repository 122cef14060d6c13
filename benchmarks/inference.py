"""Sparse Wide ResNet-18 on mask-specialised code beside other engines that get the same weights; prints JSON.

    python benchmarks/inference.py --against onnxruntime,deepsparse --peer-python deepsparse=venv/bin/python \\
        --sparsity 0.5 0.75 0.9 --batch 16 1 --threads 2
    python benchmarks/inference.py --against onnxruntime --sparsity 0.9 --structure block4x1 --batch 16 64 --dense-peer --threads 2

The network is what sift.rewrite makes of ResNet-18 for 224x224 images, with random masks and weights; batch norms get random scales and
statistics, because a scale of zero would let an engine drop a whole branch. Sparsity 0 is the dense ResNet-18; with --dense-peer the engines
run it as well, in the same turns ("NAME, ancestor"): it has the FLOPs of the sparse ones. Engines run turn by turn, each in its own process
but sift and inductor; see sift_compiler/commands/bench.py.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sift_compiler as sift
from sift_compiler.commands.bench import bench
from sift_compiler.commands.peers import peer_pythons
from sift_compiler.ir.mask_structure import UNSTRUCTURED, Structure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from models import resnet18


def structure(text: str) -> Structure:
    """``unstructured``, or ``block4x1`` for blocks of 4 outputs × 1 input."""
    if text == "unstructured":
        return UNSTRUCTURED
    found = re.fullmatch(r"block(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"expected unstructured or blockRxC, such as block4x1, got {text!r}")
    return sift.Block(int(found[1]), int(found[2]))


def network(sparsity: float, masks: Structure = UNSTRUCTURED) -> nn.Module:
    """ResNet-18 as wide as ``sparsity`` asks for, with random ``masks``, weights and norms."""
    torch.manual_seed(0)
    model: nn.Module = resnet18()
    if sparsity:
        wide = sift.SparseWide(sparsity=sparsity, init="default", structure=masks)
        model = sift.rewrite(model, (torch.zeros(1, 3, 224, 224),), wide)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--against", default="inductor,onnxruntime")
    parser.add_argument("--peer-python", nargs="*", default=[], help="NAME=PATH: the Python that has an engine")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.75, 0.9])
    parser.add_argument("--structure", type=structure, default=UNSTRUCTURED, help="unstructured or blockRxC")
    parser.add_argument("--dense-peer", action="store_true", help="engines run the dense ResNet-18, too")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 1])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    results: list[dict[str, Any]] = []
    machine: dict[str, Any] = {}
    for sparsity in chosen.sparsity:
        made = bench(
            network(sparsity, chosen.structure), (torch.zeros(1, 3, 224, 224),), chosen.against.split(","), batches=chosen.batch,
            threads=chosen.threads, rounds=chosen.rounds, pythons=peer_pythons(chosen.peer_python),
            ancestor=network(0.0, UNSTRUCTURED) if chosen.dense_peer else None,
        ).to_plain()  # fmt: skip
        machine = made["machine"]
        results += [{"sparsity": sparsity, "structure": str(chosen.structure), **each} for each in made["times"]]
    json.dump({"machine": machine, "times": results}, sys.stdout, indent=2)
    sys.stdout.write("\n")


if __name__ == "__main__":
    main()
