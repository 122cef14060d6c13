"""Running a module without its numbers: every parameter, buffer and input a fake tensor of the same shape.

Works whatever the module holds: real tensors, none (meta), hundreds of millions of weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from sift_compiler.ir.modes import training_mode


@contextlib.contextmanager
def shadowed(
    module: nn.Module, mode: FakeTensorMode, device: torch.device, *, training: bool = False
) -> Iterator[dict[str, Tensor]]:
    """In the block all tensors of ``module`` are fake, on ``device``; afterwards it is as it was.

    Without ``training`` it is in eval mode and records no gradients; with it, it is in train mode and records them for what trains.
    The block gets the fake parameters and buffers by name.
    """
    state = _fake_state(module, mode, device, training)
    # A fused encoder layer, which torch may choose in eval mode, is opaque to the FLOP counter.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            training_mode(module, training),
            _reparametrize_module(module, state),
            mode,
            torch.set_grad_enabled(training),
        ):
            yield state
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _fake_state(module: nn.Module, mode: FakeTensorMode, device: torch.device, training: bool) -> dict[str, Tensor]:
    """A fake tensor for every parameter and buffer of every module; those that are tied share one, a shared module is named once."""
    fakes: dict[int, Tensor] = {}
    state = {}
    for path, each in module.named_modules():
        for name, tensor in [*each._parameters.items(), *each._buffers.items()]:
            if tensor is None:
                continue
            if id(tensor) not in fakes:
                gradient = training and tensor.requires_grad
                with mode:
                    fakes[id(tensor)] = torch.empty(
                        tensor.shape, dtype=tensor.dtype, device=device, requires_grad=gradient
                    )
            state[f"{path}.{name}" if path else name] = fakes[id(tensor)]
    return state


def fake_inputs(inputs: Any, mode: FakeTensorMode) -> Any:
    """``inputs`` with every tensor replaced by a fake one of its shape."""

    def fake(leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf

    with mode:
        return pytree.tree_map(fake, inputs)


def device_of(inputs: Any) -> torch.device:
    """The device of the first tensor in ``inputs``."""
    return next((leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)), torch.device("cpu"))
