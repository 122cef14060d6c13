"""Bytes that training keeps from one step to the next, added up over the tensors that exist."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sift_compiler.nn import SparseLayer


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes of a network in training. Activations are not counted, nor are dense gradients on mask updates (see ``update_step``)."""

    values: int
    """Parameters."""
    gradients: int
    optimizer: int
    """Optimizer state."""
    indices: int
    """Where the kept weights sit."""
    buffers: int
    """Other buffers, such as running statistics and masks."""
    update_step: int
    """Dense gradients of all sparse layers; they exist only from the backward pass to the end of a step that moves masks by gradient."""

    @property
    def total(self) -> int:
        """What is kept all the time: everything but ``update_step``."""
        return self.values + self.gradients + self.optimizer + self.indices + self.buffers


def training_memory(model: nn.Module, optimizer: Optimizer) -> TrainingMemory:
    """Add up the tensors of ``model`` and ``optimizer``; call it after a step, while gradients are there.

    A tensor that is used twice counts once.
    """
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    indices = [layer.index for layer in layers]
    known = {index.data_ptr() for index in indices}
    parameters = list(model.parameters())
    return TrainingMemory(
        values=_bytes(parameters),
        gradients=_bytes(parameter.grad for parameter in parameters if parameter.grad is not None),
        optimizer=_bytes(_tensors(optimizer.state.values())),
        indices=_bytes(indices),
        buffers=_bytes(buffer for buffer in model.buffers() if buffer.data_ptr() not in known),
        update_step=sum(layer.pattern.numel * layer.values.element_size() for layer in layers),
    )


def _bytes(tensors: Iterable[Tensor]) -> int:
    # A list first: an id is unique only while its object lives.
    kept = list(tensors)
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in kept}.values())


def _tensors(found: Any) -> Iterator[Tensor]:
    """Every tensor in nested dictionaries and sequences."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for value in found.values():
            yield from _tensors(value)
    elif not isinstance(found, str) and isinstance(found, Iterable):
        for value in found:
            yield from _tensors(value)
