"""Bytes that training keeps from one step to the next, and those it needs for a moment when masks move."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from sift_compiler.ir.training_state import TrainingState, present_training_state
from sift_compiler.nn import SparseLayer


@dataclass(frozen=True, kw_only=True)
class TrainingMemory(TrainingState):
    """Bytes of a network in training. Activations are not counted.

    Attributes:
        update_step: dense gradients of all sparse layers, not in ``total``; they exist only from the backward pass to the end of a step
            that moves masks by gradient.
    """

    update_step: int


def training_memory(model: nn.Module, optimizer: Optimizer) -> TrainingMemory:
    """Add up the tensors of ``model`` and ``optimizer``; call it after a step, while gradients are there."""
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    return TrainingMemory(
        **dataclasses.asdict(present_training_state(model, optimizer)),
        update_step=sum(layer.pattern.numel * layer.values.element_size() for layer in layers),
    )
