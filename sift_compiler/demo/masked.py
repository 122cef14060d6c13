"""The dense twin of a sparse network: what simulates sparsity with a mask computes, and what sparse kernels are timed against."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from sift_compiler.demo.memory import TrainingMemory, training_memory
from sift_compiler.errors import UnsupportedError
from sift_compiler.nn import SparseConv2d, SparseLayer, SparseLinear


class DenseConv2d(nn.Conv2d):
    """A convolution that may stand where a sparse one stood; the mask hook has nothing to say to it."""

    def forward(self, x: Tensor, hook: int = 0) -> Tensor:
        """x [N, C, H, W] → [N, M, H', W']."""
        return super().forward(x)


class DenseLinear(nn.Linear):
    """A linear layer that may stand where a sparse one stood."""

    def forward(self, x: Tensor, hook: int = 0) -> Tensor:
        """x [..., in] → [..., out]."""
        return super().forward(x)


def masked_twin(sparse: nn.Module) -> nn.Module:
    """A copy of ``sparse`` with dense layers, their weights zero where the mask is; its time is that of a masked network
    whose mask was multiplied in beforehand. Call :func:`refresh` when the masks have moved."""
    twin = copy.deepcopy(sparse)
    for path, layer in [(path, layer) for path, layer in twin.named_modules() if isinstance(layer, SparseLayer)]:
        parent, _, name = path.rpartition(".")
        setattr(twin.get_submodule(parent), name, _dense(layer))
    refresh(twin, sparse)
    return twin


@torch.no_grad()
def refresh(twin: nn.Module, sparse: nn.Module) -> None:
    """Give ``twin`` the weights, masks and buffers that ``sparse`` has now."""
    state = sparse.state_dict()
    for path, layer in sparse.named_modules():
        if isinstance(layer, SparseLayer):
            prefix = f"{path}." if path else ""
            del state[f"{prefix}values"], state[f"{prefix}index"]
            state[f"{prefix}weight"] = layer.dense_weight()
    twin.load_state_dict(state)


def _dense(layer: SparseLayer) -> nn.Module:
    bias = layer.bias is not None
    if isinstance(layer, SparseLinear):
        return DenseLinear(layer.weight_shape[1], layer.weight_shape[0], bias)
    if isinstance(layer, SparseConv2d):
        return DenseConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation,
            layer.groups, bias,
        )  # fmt: skip
    raise UnsupportedError(f"No dense layer is known that computes what {type(layer).__name__} does.")


def masked_training_memory(sparse: nn.Module, example: Tensor) -> TrainingMemory:
    """Training state of the dense twin under SGD with momentum, one boolean mask per layer included.

    Args:
        sparse: the sparse network; it is left as it is.
        example: a batch of at least two images for the one step that makes the tensors exist, [N, C, H, W].
    """
    twin = masked_twin(sparse).train()
    for path, layer in sparse.named_modules():
        if isinstance(layer, SparseLayer):
            twin.get_submodule(path).register_buffer("mask", layer.pattern.mask())
    optimizer = torch.optim.SGD(twin.parameters(), 1e-3, momentum=0.9)
    twin(example).sum().backward()
    optimizer.step()
    return training_memory(twin, optimizer)
