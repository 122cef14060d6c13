"""One training run: a network, a data set and a seed become a trained network and its curves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD, Optimizer

from sift_compiler.demo.datasets import Dataset
from sift_compiler.demo.memory import TrainingMemory, training_memory
from sift_compiler.demo.options import Recipe
from sift_compiler.options import MaskMethod
from sift_compiler.schedule import schedule

EVALUATION_BATCH = 256
"""Images of every forward pass in evaluation; fixed, so that a compiled network sees one shape."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Network:
    """A network and how it is called.

    Attributes:
        model: owns the parameters; switched between training and evaluation.
        forward: called in training, [N, C, H, W] → [N, classes].
        evaluate: called in evaluation; always with :data:`EVALUATION_BATCH` images.
    """

    model: nn.Module
    forward: Forward
    evaluate: Forward


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What one training gave."""

    seed: int
    accuracy: float
    """Share of all test images classified rightly after the last epoch, in [0, 1]."""
    accuracies: tuple[float, ...]
    """After each epoch, on the first test images (``Recipe.curve_images``)."""
    losses: tuple[float, ...]
    """Mean training loss (cross-entropy, nats) of each epoch."""
    mask_updates: int
    skipped_updates: int
    """Mask updates left out because a gradient was not finite or did not come."""
    mask_update_ms: float
    """Mean time to choose and apply a new mask for all layers, without re-specialisation; 0 without updates."""
    steps: int
    step_ms: float
    """Mean wall-clock time of an optimizer step, mask updates and re-specialisation included, without the first step, which compiles (unless it is the only one)."""
    memory: TrainingMemory


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups for an optimizer: weights decay, norms and biases do not.

    The compact ``values`` of a sparse layer have one dimension and are weights all the same.
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            weight = name in ("weight", "values") and not isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm)
            (decayed if weight else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def steps_of(data: Dataset, recipe: Recipe) -> int:
    """Optimizer steps of a training; the last, incomplete batch of an epoch is left out."""
    return recipe.epochs * (len(data.train_labels) // recipe.batch_size)


def train(
    network: Network, data: Dataset, recipe: Recipe, seed: int, method: MaskMethod | None, on_epoch: Callable[[], None]
) -> TrainingRun:  # fmt: skip
    """Train ``network`` in place.

    Args:
        network: with fresh weights.
        data: at least one batch of training images.
        recipe: how.
        seed: of the order of the images.
        method: how its masks move; None for a dense network.
        on_epoch: called after each epoch.
    """
    optimizer = SGD(
        parameter_groups(network.model, recipe.weight_decay),
        recipe.learning_rate,
        momentum=recipe.momentum,
        nesterov=True,
    )
    masks = None if method is None else schedule(network.model, optimizer, method)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps_of(data, recipe))
    generator = torch.Generator().manual_seed(seed)
    losses, accuracies, durations = [], [], []
    for _ in range(recipe.epochs):
        network.model.train()
        order = torch.randperm(len(data.train_labels), generator=generator)
        total, batches = torch.zeros(()), _batches(order, recipe.batch_size)[: len(order) // recipe.batch_size]
        for chosen in batches:
            begin = time.perf_counter()
            total += _step(network.forward, optimizer, data.train_images[chosen], data.train_labels[chosen])
            rate.step()
            durations.append(time.perf_counter() - begin)
        losses.append(float(total) / len(batches))
        accuracies.append(accuracy(network, data, recipe.curve_images))
        on_epoch()
    if masks is not None:
        masks.remove()
    updates = [] if masks is None else masks.updates
    return TrainingRun(
        seed=seed,
        accuracy=accuracy(network, data),
        accuracies=tuple(accuracies),
        losses=tuple(losses),
        mask_updates=len(updates),
        skipped_updates=0 if masks is None else masks.skipped["not finite"] + masks.skipped["missing"],
        mask_update_ms=sum(update.milliseconds for update in updates) / max(1, len(updates)),
        steps=len(durations),
        step_ms=1e3 * statistics.fmean(durations[1:] or durations),
        memory=training_memory(network.model, optimizer),
    )


def _step(forward: Forward, optimizer: Optimizer, images: Tensor, labels: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(forward(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _batches(order: Tensor, size: int) -> tuple[Tensor, ...]:
    return torch.split(order, size)


@torch.no_grad()
def accuracy(network: Network, data: Dataset, images: int | None = None) -> float:
    """Share of the first ``images`` test images (None: all) that are classified rightly, in [0, 1]. Leaves evaluation mode on."""
    network.model.eval()
    labels = data.test_labels[:images]
    right = 0
    for chosen in _batches(torch.arange(len(labels)), EVALUATION_BATCH):
        logits = network.evaluate(filled(data.test_images[chosen]))[: len(chosen)]
        right += int((logits.argmax(1) == labels[chosen]).sum())
    return right / len(labels)


def filled(x: Tensor) -> Tensor:
    """``x`` with its images repeated up to :data:`EVALUATION_BATCH`."""
    missing = EVALUATION_BATCH - len(x)
    return x if missing <= 0 else torch.cat([x, x[torch.arange(missing) % len(x)]])
