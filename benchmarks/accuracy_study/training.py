"""One run: a network is made, trained and tested."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import sift_compiler as sift
from sift_compiler.demo.datasets import Dataset
from sift_compiler.demo.train import Network, accuracy, parameter_groups

from .compiled import Compiled
from .masks import MaskWatch, mask_method
from .networks import build
from .settings import BY_WIDTH, Cell, Recipe

from cifar100 import augment  # isort: skip  (networks put examples/ on the path)

Progress = Callable[[str], None]


def prepared(data: Dataset, recipe: Recipe) -> Dataset:
    """The images of a recipe: the last ones held out for testing if it says so, then the first ``train_limit`` of the rest."""
    if recipe.held_out:
        images, labels = data.train_images, data.train_labels
        data = replace(
            data, train_images=images[: -recipe.held_out], train_labels=labels[: -recipe.held_out],
            test_images=images[-recipe.held_out :], test_labels=labels[-recipe.held_out :],
        )  # fmt: skip
    return data.limited(recipe.train_limit)


def learning_rate(step: int, steps: int, recipe: Recipe) -> float:
    """At ``step`` of ``steps``, over its highest: a straight rise, then half a cosine down to 0."""
    rising = max(1, round(recipe.warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2


def evaluation_steps(steps: int, last: int) -> list[int]:
    """Numbers of optimizer steps after which the network is tested: the middle, and ``last`` times towards the end."""
    return sorted({max(1, steps // 2), *(max(1, round(steps * (1 - 0.03 * i))) for i in range(last))})


def run(cell: Cell, data: Dataset, compiled: Compiled, progress: Progress) -> dict[str, Any]:
    """Train and test.

    Args:
        cell: the run.
        data: what :func:`prepared` returned.
        compiled: networks of earlier runs.
        progress: gets a line now and then.

    Returns:
        Accuracies in [0, 1] of all test images; ``diverged`` tells of a loss that was not finite.
    """
    start, busy, recipe = time.perf_counter(), time.process_time(), cell.recipe
    fresh, ratio = build(cell, data.train_images[:2], data.classes)
    model = compiled.network(cell, fresh)
    optimizer = torch.optim.SGD(
        parameter_groups(model, recipe.weight_decay), recipe.learning_rate, momentum=recipe.momentum, nesterov=True
    )
    per_epoch = len(data.train_labels) // recipe.batch_size
    steps = recipe.epochs * per_epoch
    masks = None if cell.method in BY_WIDTH else sift.schedule(model, optimizer, mask_method(cell, steps))
    watch = None if masks is None else MaskWatch(model, masks)
    forward = compiled.forward(cell)
    losses, curve = _train(cell, Network(model, forward, forward), optimizer, data, steps, progress)
    if masks is not None:
        masks.remove()
    last = [point["accuracy"] for point in curve[-recipe.last :]]
    return {
        "accuracy": last[-1],
        "last_mean": sum(last) / len(last),
        "curve": curve,
        "loss": losses,
        "diverged": not all(math.isfinite(loss) for loss in losses),
        "flop_ratio": ratio,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "train_images": len(data.train_labels),
        "test_images": len(data.test_labels),
        "masks": None if watch is None else watch.statistics(),
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(time.process_time() - busy, 1),
    }


def _train(
    cell: Cell, network: Network, optimizer: torch.optim.Optimizer, data: Dataset, steps: int, progress: Progress
) -> tuple[list[float], list[dict[str, Any]]]:
    """Mean training loss between evaluations, and the evaluations."""
    recipe = cell.recipe
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, steps, recipe))
    batches = _batches(data, cell)
    tests = evaluation_steps(steps, recipe.last)
    losses: list[float] = []
    curve: list[dict[str, Any]] = []
    total, since = torch.zeros(()), 0
    network.model.train()
    for step in range(1, steps + 1):
        images, labels = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(network.forward(images), labels)
        loss.backward()
        optimizer.step()
        rate.step()
        total, since = total + loss.detach(), since + 1
        if step in tests:
            losses.append(float(total) / since)
            curve.append({"step": step, "accuracy": accuracy(network, data)})
            progress(f"step {step}/{steps}: loss {losses[-1]:.4f}, accuracy {curve[-1]['accuracy']:.4f}")
            total, since = torch.zeros(()), 0
            network.model.train()
    return losses, curve


def _batches(data: Dataset, cell: Cell) -> Any:
    """Batches without end, the same for every method: an epoch is a permutation, without its last, incomplete batch."""
    order = torch.Generator().manual_seed(cell.seed)
    shifts = torch.Generator().manual_seed(cell.seed)
    size = cell.recipe.batch_size
    while True:
        shuffled = torch.randperm(len(data.train_labels), generator=order)
        for chosen in shuffled[: len(shuffled) // size * size].split(size):
            images = data.train_images[chosen]
            yield (augment(images, shifts) if cell.recipe.augment else images), data.train_labels[chosen]
