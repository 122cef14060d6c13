"""Kernels made ready before the first call, several at a time: machine code and the programs of the masks.

The graph knows the shape of every layer's input, and which index is its mask. Otherwise each layer would be prepared when its first input
comes, one after another.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import optimization_hint

from sift_compiler.errors import SiftError
from sift_compiler.freed_memory import trim_memory
from sift_compiler.lowering.partition import fake
from sift_compiler.nn import live
from sift_compiler.runtimes.base import LiveKernel

_X, _INDEX, _HANDLE = 0, 2, -1
_NAMES = ("conv2d", "linear", "conv2d_fused", "linear_fused")

Task = tuple[LiveKernel, tuple[int, ...], Tensor | None]


def prepare_ahead(graph: fx.Graph, example_inputs: Sequence[Any], kernels: Sequence[LiveKernel], threads: int) -> None:
    """Prepare those of ``kernels`` that ``graph`` calls, for the shapes it was traced with.

    Args:
        graph: holds fake tensors as Dynamo leaves them, and handles of kernels (see nn.live).
        example_inputs: the graph's inputs, among them the indices of layers.
        kernels: whoever else stands behind a handle is left alone.
        threads: how many are prepared at a time.
    """
    tasks = _by_class(_tasks(graph, example_inputs, kernels))
    # Threads even if it is one at a time: TVMScript reads the source of every caller on the stack, and theirs are few.
    with ThreadPoolExecutor(max(1, min(threads, len(tasks)))) as pool:
        for done in [pool.submit(kernel.prepare, shape, index) for kernel, shape, index in tasks]:
            # What cannot be prepared cannot be called either, and then the error reaches the user as it is.
            with contextlib.suppress(SiftError):
                done.result()
    # Packing a mask takes several times the memory of its program, in every thread.
    trim_memory()


def _tasks(graph: fx.Graph, example_inputs: Sequence[Any], kernels: Sequence[LiveKernel]) -> list[Task]:
    given = dict(zip(graph.find_nodes(op="placeholder"), example_inputs, strict=False))
    ours = {id(kernel): kernel for kernel in kernels}
    tasks = []
    lengths: dict[object, int] = {}
    for operator in (getattr(torch.ops.sift, name) for name in _NAMES):
        lengths[operator] = lengths[operator.default] = len(operator.default._schema.arguments)
    for node in graph.nodes:
        arguments: tuple[Any, ...] = node.args
        # The handle is the last argument, where it is given at all.
        complete = node.op == "call_function" and lengths.get(node.target) == len(arguments)
        if complete and arguments[_HANDLE] != live.REFERENCE:
            kernel = ours.get(id(live.lookup(arguments[_HANDLE])))
            index = given.get(arguments[_INDEX])
            # Sizes that are free count as they are now; nothing is guarded.
            shape = tuple(optimization_hint(size) for size in fake(arguments[_X]).shape)
            if kernel is not None:
                tasks.append((kernel, shape, None if isinstance(index, FakeTensor) else index))
    return tasks


def _by_class(tasks: Sequence[Task]) -> list[Task]:
    """One of each class of layers first: those of one class share code, and who comes second would only wait for who compiles it."""
    first: dict[object, Task] = {}
    later = []
    for task in tasks:
        spec, shape = task[0].spec, task[1]
        alike = (spec.kind, spec.kernel_size, spec.stride, spec.dilation, shape[2:])
        if first.setdefault(alike, task) is not task:
            later.append(task)
    return [*first.values(), *later]
