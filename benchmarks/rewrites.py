"""Rewrite every architecture with every member of Sparse-IFT and train a few steps; prints a table, or JSON.

    python benchmarks/rewrites.py [--architectures mlp,small_cnn] [--members wide,doped] [--sparsities 0.5,0.75,0.9] [--steps 20] [--json]

Of every rewrite: FLOPs over those of the dense model, the sparsity that balances them, kept weights, weights the masks choose from,
seconds the rewrite took, and the loss on one random batch before and after so many steps of SGD in eager mode. A rewrite that is
refused shows its reason. Nothing here is a measure of accuracy or of speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import sift_compiler as sift
from sift_compiler.options import TRANSFORMATIONS
from sift_compiler.report import Report

Inputs = dict[str, Any]
Build = Callable[[], tuple[nn.Module, Inputs]]


def example(name: str) -> ModuleType:
    """A file of examples/, loaded by its path."""
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


MODELS = example("models")

ARCHITECTURES: dict[str, Build] = {
    "mlp": lambda: (MODELS.mlp(), {"input": torch.randn(32, 64)}),
    "small_cnn": lambda: (MODELS.small_cnn(), {"x": torch.randn(16, 1, 8, 8)}),
    "resnet18_cifar": lambda: (MODELS.resnet18_cifar(), {"x": torch.randn(4, 3, 32, 32)}),
    "resnet18": lambda: (MODELS.resnet18(), {"x": torch.randn(2, 3, 64, 64)}),
    **example("architectures").ARCHITECTURES,
}
"""What is rewritten, by name: makes a dense model and its inputs. One line each; those of examples/architectures.py are small."""


@dataclass(frozen=True)
class Result:
    """One rewrite."""

    architecture: str
    member: str
    sparsity: float
    refused: str = ""
    flop_ratio: float = 0.0
    balanced_sparsity: float = 0.0
    parameters: int = 0
    search_space: int = 0
    rewrite_seconds: float = 0.0
    train_seconds: float = 0.0
    loss_before: float = 0.0
    loss_after: float = 0.0

    @property
    def learns(self) -> bool:
        """Whether the loss fell."""
        return self.loss_after < self.loss_before


def measure(name: str, member: str, sparsity: float, steps: int, rate: float) -> Result:
    """Rewrite and train one architecture."""
    torch.manual_seed(0)
    model, inputs = ARCHITECTURES[name]()
    start = time.perf_counter()
    try:
        sparse = sift.rewrite(model, inputs, TRANSFORMATIONS[member](sparsity=sparsity))
    except sift.SiftError as error:
        return Result(name, member, sparsity, refused=str(error))
    rewritten = time.perf_counter()
    made: Report = sift.report(model, sparse, inputs)
    begin = time.perf_counter()
    before, after = train(sparse, inputs, steps, rate)
    return Result(
        name, member, sparsity, "", made.ratio, made.sparsity, made.sparse_parameters, made.search_space,
        rewritten - start, time.perf_counter() - begin, before, after,
    )  # fmt: skip


def train(model: nn.Module, inputs: Inputs, steps: int, rate: float) -> tuple[float, float]:
    """The loss on random labels of one batch, before and after ``steps`` of SGD with momentum."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    labels: Tensor | None = None
    losses = []
    for _ in range(steps + 1):
        optimizer.zero_grad()
        scores = logits(model(**inputs))
        labels = torch.randint(0, scores.shape[-1], scores.shape[:-1]) if labels is None else labels
        loss = functional.cross_entropy(scores.flatten(0, -2), labels.flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    return losses[0], losses[-1]


def logits(output: object) -> Tensor:
    """The first tensor of a model's output, classes last."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def line(result: Result) -> str:
    """One row of the table."""
    head = f"{result.architecture:<21}{result.member:<12}{result.sparsity:<9}"
    if result.refused:
        return f"{head}refused: {result.refused}"
    return (
        f"{head}{result.flop_ratio:<10.6f}{result.balanced_sparsity:<10.4f}{result.parameters:>13,}{result.search_space:>14,}"
        f"{result.rewrite_seconds:>10.1f}{result.train_seconds:>9.1f}   {result.loss_before:.3f} → {result.loss_after:.3f}"
        f"{'' if result.learns else '   does not fall'}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", default=",".join(ARCHITECTURES))
    parser.add_argument("--members", default=",".join(TRANSFORMATIONS))
    parser.add_argument("--sparsities", default="0.5,0.75,0.9")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    results = []
    if not chosen.json:
        sys.stdout.write(
            f"{'architecture':<21}{'member':<12}{'sparsity':<9}{'FLOPs':<10}{'balanced':<10}{'parameters':>13}{'chosen from':>14}"
            f"{'rewrite s':>10}{'train s':>9}   loss\n"
        )
    for name in chosen.architectures.split(","):
        for member in chosen.members.split(","):
            for sparsity in chosen.sparsities.split(","):
                results.append(measure(name, member, float(sparsity), chosen.steps, chosen.rate))
                if not chosen.json:
                    sys.stdout.write(line(results[-1]) + "\n")
                    sys.stdout.flush()
    if chosen.json:
        machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        plain = [{**asdict(result), "learns": result.learns} for result in results]
        sys.stdout.write(json.dumps({**machine, "steps": chosen.steps, "results": plain}, indent=2) + "\n")


if __name__ == "__main__":
    main()
