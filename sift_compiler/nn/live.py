"""Live kernels behind constant integer handles.

The operators of this package carry a ``kernel_handle``. 0 is the reference implementation; any other number is a kernel
that some runtime registered. A mask change replaces what is behind a handle, never the handle, so a traced graph stays valid.
This module knows no runtime: runtimes register here, the operators look up here.
"""

from __future__ import annotations

import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor

from sift_compiler.errors import RuntimeBuildError

REFERENCE = 0
"""The handle of the reference implementation."""


class Kernel(Protocol):
    """Computes one sparse layer, given its tensors as the operators do."""

    def __call__(self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output, contiguous; none of the arguments is changed."""


@runtime_checkable
class GradientKernel(Kernel, Protocol):
    """A kernel that computes the layer's gradients, too. Kernels need not: gradients of the others run on the reference path."""

    def input_gradient(self, gradient: Tensor, values: Tensor, index: Tensor, input_shape: Sequence[int]) -> Tensor:
        """dL/dx of ``input_shape``, contiguous, from dL/dy; no argument is changed."""

    def values_gradient(self, gradient: Tensor, x: Tensor, index: Tensor) -> Tensor:
        """dL/dvalues [slots] from dL/dy; slots that are asleep get theirs, empty ones 0."""


log = logging.getLogger(__name__)

_handles = itertools.count(1)
_kernels: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()


def register(kernel: Kernel | Callable[..., Tensor]) -> int:
    """Return a fresh handle for ``kernel`` (or what another operator calls). The registry does not keep it alive: whoever compiled the graph does."""
    handle = next(_handles)
    _kernels[handle] = kernel
    return handle


def lookup(handle: int) -> Kernel:
    """The kernel behind ``handle``; RuntimeBuildError if it has been released."""
    try:
        return cast(Kernel, _kernels[handle])
    except KeyError:
        raise RuntimeBuildError(
            f"The compiled kernel {handle} of a sparse layer is gone: the compiled function that owned it was released. "
            "Compile the model again with torch.compile(model, backend='sift')."
        ) from None


def gradients(handle: int) -> GradientKernel | None:
    """The kernel behind ``handle`` if it computes gradients; None stands for the reference.

    A backward pass may outlive the compiled function whose forward pass it belongs to, and with it the kernel. Nothing is lost but
    time: the gradients then come from the reference, which needs no more than the layer's tensors. It is said once.
    """
    kernel = _kernels.get(handle)
    if kernel is None and handle != REFERENCE:
        _say_released()
    return kernel if isinstance(kernel, GradientKernel) else None


@functools.cache
def _say_released() -> None:
    log.warning(
        "A backward pass ran after its compiled function was released: gradients come from the dense reference. "
        "Keep what torch.compile returned until backward() is done."
    )
