"""Training state: what training keeps from one step to the next, for the optimizers that models are usually trained with.

Counted over tensors, not by formula: the module's own parameters, indices and buffers, and the state that torch's optimizer makes in a
step on parameters of the same shapes without numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sift_compiler.ir.structure import SparseWeight

OPTIMIZERS: Mapping[str, Callable[[list[Tensor]], Optimizer]] = {
    "SGD momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}
"""The optimizers whose state is counted, by name."""


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Bytes. A tensor that is used twice counts once; activations and the dense gradients of a mask update do not count.

    Attributes:
        values: parameters; of a sparse layer, its slots.
        gradients: of the parameters that train.
        optimizer: what the optimizer remembers of them.
        indices: where kept weights sit.
        buffers: other buffers, such as running statistics.
    """

    values: int
    gradients: int
    optimizer: int
    indices: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.values + self.gradients + self.optimizer + self.indices + self.buffers


def training_state(module: nn.Module, optimizer: Callable[[list[Tensor]], Optimizer]) -> TrainingState:
    """Tell the training state that ``module`` will have under an optimizer.

    Args:
        module: any module, sparse or dense; it may be on the meta device.
        optimizer: makes the optimizer of a list of parameters, e.g. one of :data:`OPTIMIZERS`.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return _counted(module, trained, _state_to_come(trained, optimizer))


def present_training_state(module: nn.Module, optimizer: Optimizer) -> TrainingState:
    """Count the training state that is there: call it after a step, while gradients are kept.

    Args:
        module: any module, sparse or dense.
        optimizer: of its parameters.
    """
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return _counted(module, gradients, _state(optimizer))


def _counted(module: nn.Module, gradients: Iterable[Tensor], state: Iterable[Tensor]) -> TrainingState:
    indices = [layer.index for layer in module.modules() if isinstance(layer, SparseWeight)]
    buffers = [buffer for buffer in module.buffers() if all(buffer is not index for index in indices)]
    return TrainingState(
        values=_bytes(module.parameters()), gradients=_bytes(gradients), optimizer=_bytes(state),
        indices=_bytes(indices), buffers=_bytes(buffers),
    )  # fmt: skip


def _state_to_come(parameters: list[nn.Parameter], optimizer: Callable[[list[Tensor]], Optimizer]) -> list[Tensor]:
    """What the optimizer keeps of ``parameters`` after a step."""
    if not parameters:
        return []
    stand_ins: list[Tensor] = [nn.Parameter(torch.empty_like(each, device="meta")) for each in parameters]
    for each in stand_ins:
        each.grad = torch.empty_like(each)
    made = optimizer(stand_ins)
    made.step()
    return _state(made)


def _state(optimizer: Optimizer) -> list[Tensor]:
    """Every tensor that ``optimizer`` keeps."""
    state: Any = list(optimizer.state.values())
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    kept = {id(tensor): tensor for tensor in tensors}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
