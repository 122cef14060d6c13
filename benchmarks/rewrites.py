"""Rewrite every architecture with every member of Sparse-IFT and train a few steps; prints a table, Markdown or JSON.

    python benchmarks/rewrites.py [--architectures mlp,small_cnn] [--members wide,doped] [--sparsities 0.5,0.75,0.9] [--steps 20]
                                  [--keep FOLDER] [--markdown | --json]
    python benchmarks/rewrites.py --published [--markdown | --json]

Of every rewrite: FLOPs over those of the dense model, the sparsity that balances them, kept weights, weights the masks choose from,
seconds the rewrite took, and the loss on one random batch before and after so many steps of SGD in eager mode. A rewrite that is
refused shows its reason; one without any FLOPs to spare is called infeasible. With --keep every result is written to the folder as soon
as it is there, and a later call measures only what is missing. Nothing here is a measure of accuracy or of speed.

--published takes architectures at the sizes they were published with, and plans rewrites only: FLOPs and sparsities, no weights.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import sift_compiler as sift
from sift_compiler.demo.machine import this_machine
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.flops import count_flops
from sift_compiler.options import TRANSFORMATIONS
from sift_compiler.report import Report
from sift_compiler.rewrite import plan
from sift_compiler.whole_file import appearing_whole

Inputs = dict[str, Any]
Build = Callable[[], tuple[nn.Module, Inputs]]

TOLERANCE = 1e-3
"""Of the FLOP ratio around 1."""


def example(name: str) -> ModuleType:
    """A file of examples/, loaded by its path."""
    path = Path(__file__).resolve().parent.parent / "examples" / f"{name}.py"
    specification = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


MODELS, SMALL = example("models"), example("architectures")

ARCHITECTURES: dict[str, Build] = {
    "mlp": lambda: (MODELS.mlp(), {"input": torch.randn(32, 64)}),
    "small_cnn": lambda: (MODELS.small_cnn(), {"x": torch.randn(16, 1, 8, 8)}),
    **SMALL.ARCHITECTURES,
    "resnet18_cifar": lambda: (MODELS.resnet18_cifar(), {"x": torch.randn(4, 3, 32, 32)}),
    "resnet18": lambda: (MODELS.resnet18(), {"x": torch.randn(2, 3, 64, 64)}),
}
"""What is rewritten and trained, by name: makes a dense model and its inputs. Those of examples/architectures.py are small."""

PUBLISHED: dict[str, Build] = {
    "resnet18": lambda: (MODELS.resnet18(), {"x": torch.randn(1, 3, 224, 224)}),
    **SMALL.PUBLISHED,
}
"""What is only planned: the sizes of the publications."""


@dataclass(frozen=True)
class Result:
    """One rewrite."""

    architecture: str
    member: str
    sparsity: float
    refused: str = ""
    infeasible: bool = False
    flop_ratio: float = 0.0
    balanced_sparsity: float = 0.0
    parameters: int = 0
    search_space: int = 0
    dense_flops: int = 0
    rewrite_seconds: float = 0.0
    train_seconds: float = 0.0
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def trained(self) -> bool:
        """Whether it was trained, not only planned."""
        return self.loss_after is not None

    @property
    def learns(self) -> bool:
        """Whether the loss fell."""
        return self.loss_before is not None and self.loss_after is not None and self.loss_after < self.loss_before

    @property
    def verdict(self) -> str:
        """``"yes"``, or what is not as it should be. A dense product of whole ranks costs up to a rank of its cheapest layer less."""
        if self.infeasible:
            return "infeasible"
        if self.refused:
            return "refused"
        if abs(self.flop_ratio - 1) > TOLERANCE and not (self.member == "low-rank" and self.flop_ratio < 1):
            return "not iso-FLOP"
        return "yes" if self.learns or not self.trained else "loss does not fall"


def measure(name: str, member: str, sparsity: float, steps: int, rate: float) -> Result:
    """Rewrite and train one architecture."""
    torch.manual_seed(0)
    model, inputs = ARCHITECTURES[name]()
    start = time.perf_counter()
    try:
        sparse = sift.rewrite(model, inputs, TRANSFORMATIONS[member](sparsity=sparsity))
    except sift.SiftError as error:
        return _refusal(name, member, sparsity, error)
    rewritten = time.perf_counter()
    made: Report = sift.report(model, sparse, inputs)
    begin = time.perf_counter()
    before, after = train(sparse, inputs, steps, rate)
    return Result(
        name, member, sparsity, "", False, made.ratio, made.sparsity, made.sparse_parameters, made.search_space,
        made.dense_flops, rewritten - start, time.perf_counter() - begin, before, after,
    )  # fmt: skip


def measure_plan(name: str, model: nn.Module, inputs: Inputs, member: str, sparsity: float) -> Result:
    """Plan the rewrite of one architecture: what every layer would cost with the weights it would keep."""
    start = time.perf_counter()
    try:
        graph_module = plan(model, inputs, TRANSFORMATIONS[member](sparsity=sparsity))
    except sift.SiftError as error:
        return _refusal(name, member, sparsity, error)
    struck, layers = notes.balance(graph_module), notes.decisions(graph_module)
    assert struck is not None
    now = count_flops(graph_module, tuple(inputs.values()))
    sizes = {path: math.prod(each.widened_shape) for path, each in layers.items()}
    kept = {path: sizes[path] if each.kept is None else each.kept for path, each in layers.items()}
    cost = sum(flops * kept.get(path, 1) // sizes.get(path, 1) for path, flops in now.modules.items())
    masked = [path for path, each in layers.items() if each.sparse]
    others = sum(p.numel() for p in graph_module.parameters()) - sum(sizes[path] for path in masked)
    removed = 1 - sum(kept[path] for path in masked) / sum(sizes[path] for path in masked) if masked else 0.0
    return Result(
        name, member, sparsity, "", False, cost / struck.dense_flops, removed, others + sum(kept[path] for path in masked),
        sum(sizes[path] for path in masked), struck.dense_flops, time.perf_counter() - start,
    )  # fmt: skip


def _refusal(name: str, member: str, sparsity: float, error: sift.SiftError) -> Result:
    return Result(name, member, sparsity, refused=str(error), infeasible=isinstance(error, sift.InfeasibleError))


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


# --- what is printed --------------------------------------------------------------------------------------------------

HEAD = (
    f"{'architecture':<21}{'member':<12}{'sparsity':<9}{'FLOPs':<10}{'removed':<10}{'parameters':>13}{'chosen from':>14}"
    f"{'rewrite s':>10}{'train s':>9}   loss"
)


def line(result: Result) -> str:
    """One row of the table."""
    head = f"{result.architecture:<21}{result.member:<12}{result.sparsity:<9}"
    if result.refused:
        return f"{head}{result.verdict}: {result.refused}"
    loss = (
        f"{result.train_seconds:>9.1f}   {result.loss_before:.3f} → {result.loss_after:.3f}" if result.trained else ""
    )
    return (
        f"{head}{result.flop_ratio:<10.6f}{result.balanced_sparsity:<10.4f}{result.parameters:>13,}{result.search_space:>14,}"
        f"{result.rewrite_seconds:>10.1f}{loss}{'' if result.verdict == 'yes' else '   ' + result.verdict}"
    )


def markdown(results: Sequence[Result]) -> str:
    """A Markdown table, one row per architecture and member, with the sparsities side by side; reasons of refusals beneath it."""
    sparsities = sorted({result.sparsity for result in results})
    cells: dict[tuple[str, str], dict[float, Result]] = {}
    for result in results:
        cells.setdefault((result.architecture, result.member), {})[result.sparsity] = result
    rows = ["| architecture | member | " + " | ".join(f"{sparsity:g}" for sparsity in sparsities) + " |"]
    rows.append("|---" * (2 + len(sparsities)) + "|")
    for (architecture, member), found in cells.items():
        texts = [cell(found[sparsity]) if sparsity in found else "–" for sparsity in sparsities]
        rows.append(f"| {architecture} | {member} | {' | '.join(texts)} |")
    reasons = [
        f"- {each.architecture}, {each.member}, {each.sparsity:g}: {each.refused}" for each in results if each.refused
    ]
    return "\n".join([*rows, *(["", *reasons] if reasons else [])])


def cell(result: Result) -> str:
    """FLOP ratio, sparsity of the masks, and the loss before and after."""
    if result.refused:
        return result.verdict
    parts = [f"{result.flop_ratio:.6f}", f"{result.balanced_sparsity:.3f}" if result.balanced_sparsity else "dense"]
    if result.trained:
        parts.append(f"{result.loss_before:.2f} → {result.loss_after:.2f}")
    return ", ".join(parts) + ("" if result.verdict == "yes" else f" (**{result.verdict}**)")


def conditions() -> dict[str, Any]:
    """Where and how it was measured."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {**asdict(this_machine()), "threads": torch.get_num_threads(), "load": load}


# --- results kept between calls ---------------------------------------------------------------------------------------


def kept_file(folder: Path, *parts: object) -> Path:
    """Where one result is kept."""
    return folder / ("-".join(map(str, parts)) + ".json")


def kept_or_measured(folder: Path | None, settings: tuple[object, ...], make: Callable[[], Result]) -> Result:
    """The result that a former call with the same settings left in ``folder``, or a new one, which is left there."""
    if folder is None:
        return make()
    path = kept_file(folder, *settings)
    if path.exists():
        return Result(**json.loads(path.read_text(encoding="utf-8")))
    result = make()
    folder.mkdir(parents=True, exist_ok=True)
    with appearing_whole(path) as unfinished:
        Path(unfinished).write_text(json.dumps(asdict(result)), encoding="utf-8")
    return result


def results_of(chosen: argparse.Namespace) -> Iterable[Result]:
    """What the command line asks for, one after the other."""
    built = PUBLISHED if chosen.published else ARCHITECTURES
    names = (chosen.architectures or ",".join(built)).split(",")
    cells = [
        (member, float(sparsity)) for member in chosen.members.split(",") for sparsity in chosen.sparsities.split(",")
    ]
    for name in names:
        published = built[name]() if chosen.published else None
        for member, sparsity in cells:
            if published is not None:
                settings: tuple[object, ...] = ("published", name, member, sparsity)
                make = functools.partial(measure_plan, name, *published, member, sparsity)
            else:
                settings = (name, member, sparsity, chosen.steps, chosen.rate)
                make = functools.partial(measure, name, member, sparsity, chosen.steps, chosen.rate)
            yield kept_or_measured(chosen.keep, settings, make)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", help="comma-separated; all without it")
    parser.add_argument("--members", default=",".join(TRANSFORMATIONS))
    parser.add_argument("--sparsities", default="0.5,0.75,0.9")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--published", action="store_true", help="plan architectures of published sizes, train nothing")
    parser.add_argument("--keep", type=Path, help="folder of results, kept between calls")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true")
    form.add_argument("--markdown", action="store_true")
    chosen = parser.parse_args()
    results: list[Result] = []
    for result in results_of(chosen):
        if not (chosen.json or chosen.markdown):
            sys.stdout.write((HEAD + "\n" if not results else "") + line(result) + "\n")
            sys.stdout.flush()
        results.append(result)
    if chosen.markdown:
        sys.stdout.write(markdown(results) + "\n")
    if chosen.json:
        plain = [{**asdict(result), "learns": result.learns, "verdict": result.verdict} for result in results]
        sys.stdout.write(json.dumps({**conditions(), "steps": chosen.steps, "results": plain}, indent=2) + "\n")


if __name__ == "__main__":
    main()
