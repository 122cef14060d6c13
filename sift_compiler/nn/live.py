"""Live kernels behind constant integer handles.

The operators of this package carry a ``kernel_handle``. 0 is the reference implementation; any other number is a kernel
that some runtime registered. A mask change replaces what is behind a handle, never the handle, so a traced graph stays valid.
This module knows no runtime: runtimes register here, the operators look up here.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

from torch import Tensor

from sift_compiler.errors import RuntimeBuildError

REFERENCE = 0
"""The handle of the reference implementation."""


class Kernel(Protocol):
    """Computes one sparse layer, given its tensors as the operators do."""

    def __call__(self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output, contiguous; none of the arguments is changed."""


_handles = itertools.count(1)
_kernels: weakref.WeakValueDictionary[int, Kernel] = weakref.WeakValueDictionary()


def register(kernel: Kernel) -> int:
    """Return a fresh handle for ``kernel``. The registry does not keep it alive: whoever compiled the graph does."""
    handle = next(_handles)
    _kernels[handle] = kernel
    return handle


def lookup(handle: int) -> Kernel:
    """The kernel behind ``handle``; RuntimeBuildError if it has been released."""
    try:
        return _kernels[handle]
    except KeyError:
        raise RuntimeBuildError(
            f"The compiled kernel {handle} of a sparse layer is gone: the compiled function that owned it was released. "
            "Compile the model again with torch.compile(model, backend='sift')."
        ) from None
