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
def shadowed(module: nn.Module, mode: FakeTensorMode, device: torch.device) -> Iterator[None]:
    """In the block ``module`` is in eval mode and all its tensors are fake, on ``device``; afterwards it is as it was."""
    with mode:
        state = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        }
    # A fused encoder layer, which torch may choose in eval mode, is opaque to the FLOP counter.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            training_mode(module, False),
            _reparametrize_module(module, state, tie_weights=True),
            mode,
            torch.no_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def fake_inputs(inputs: Any, mode: FakeTensorMode) -> Any:
    """``inputs`` with every tensor replaced by a fake one of its shape."""

    def fake(leaf: Any) -> Any:
        return torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device) if isinstance(leaf, Tensor) else leaf

    with mode:
        return pytree.tree_map(fake, inputs)


def device_of(inputs: Any) -> torch.device:
    """The device of the first tensor in ``inputs``."""
    return next((leaf.device for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)), torch.device("cpu"))
