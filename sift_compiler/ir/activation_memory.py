"""Activation memory: what a forward pass in train mode keeps for the backward pass.

Measured, not estimated: the module runs on fake tensors, and autograd hands over every tensor it saves
(``torch.autograd.graph.saved_tensors_hooks``). What is measured is eager mode; a compiler may keep less and compute it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sift_compiler.ir.inputs import Inputs, called
from sift_compiler.ir.shadow import device_of, fake_inputs, shadowed


@dataclass(frozen=True)
class ActivationMemory:
    """What is kept from the forward to the backward pass.

    Attributes:
        bytes: of all storages that hold a saved tensor, each counted once and in full, whatever views of it were saved. The model's
            input is one of them where a layer saves it; parameters and buffers are none.
        tensors: number of these storages.
    """

    bytes: int
    tensors: int


def activation_memory(module: nn.Module, inputs: Inputs) -> ActivationMemory:
    """Measure ``module(*inputs)`` in train mode, without computing it; a real batch size counts as given.

    Args:
        module: any module; its parameters may be on the meta device. It is left as it is, running statistics included.
        inputs: positional arguments, or keyword arguments by name.
    """
    mode = FakeTensorMode()
    arguments = fake_inputs(inputs, mode)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        """Remember what autograd saves, by storage."""
        storage = tensor.untyped_storage()
        # The storage itself is held: an address is unique only while what it points to lives.
        kept[storage._cdata] = storage
        return tensor

    with shadowed(module, mode, device_of(inputs), training=True) as state:
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            called(module, arguments)
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in own]
    return ActivationMemory(sum(sizes), len(sizes))
