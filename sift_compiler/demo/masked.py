"""The dense twin of a sparse network: what simulates sparsity with a mask computes, and what sparse kernels are timed against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sift_compiler.demo.memory import TrainingMemory, training_memory
from sift_compiler.densify import dense_state_dict, to_dense
from sift_compiler.nn import SparseLayer


def masked_twin(sparse: nn.Module) -> nn.Module:
    """A copy of ``sparse`` with dense layers, their weights zero where the mask is; its time is that of a masked network
    whose mask was multiplied in beforehand. Call :func:`refresh` when the masks have moved.

    Raises:
        UnsupportedError: a kind of sparse layer for which no dense one is known.
    """
    return to_dense(sparse)


@torch.no_grad()
def refresh(twin: nn.Module, sparse: nn.Module) -> None:
    """Give ``twin`` the weights, masks and buffers that ``sparse`` has now."""
    twin.load_state_dict(dense_state_dict(sparse.state_dict(), twin))


def masked_training_memory(sparse: nn.Module, example: Tensor) -> TrainingMemory:
    """Training state of the dense twin under SGD with momentum, one boolean mask per layer included.

    Args:
        sparse: the sparse network; it is left as it is.
        example: a batch of at least two images for the one step that makes the tensors exist, [N, C, H, W].
    """
    twin = to_dense(sparse).train()
    for path, layer in sparse.named_modules():
        if isinstance(layer, SparseLayer):
            twin.get_submodule(path).register_buffer("mask", layer.pattern.mask())
    optimizer = torch.optim.SGD(twin.parameters(), 1e-3, momentum=0.9)
    twin(example).sum().backward()
    optimizer.step()
    return training_memory(twin, optimizer)
