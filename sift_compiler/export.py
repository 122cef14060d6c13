"""export: a trained sparse model becomes a file that runs without this package."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from sift_compiler.attachment import unwrapped
from sift_compiler.errors import RuntimeBuildError, UserError, unknown_name
from sift_compiler.ir.inputs import as_inputs, positional
from sift_compiler.nn import SparseLayer
from sift_compiler.nn.storage import compact
from sift_compiler.passes.strip_hooks import StripHooks

_EXPORTERS = {
    "onnx": ("sift_compiler.runtimes.onnx.export", "export_onnx"),
    "tvm": ("sift_compiler.runtimes.tvm.export", "export_tvm"),
}


def runtimes() -> tuple[str, ...]:
    """Names of the runtimes a model can be exported for."""
    return tuple(_EXPORTERS)


def export(
    module: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    runtime: str,
    target: str | None = None,
) -> Path:
    """Write ``module``, as it computes in evaluation mode, for another runtime; ``module`` itself is left as it is.

    Args:
        module: what sift.rewrite returned, trained or not; or any module with or without sparse layers.
        example_inputs: the positional arguments of its forward, the only one, or a dict of its keyword arguments.
        path: where the file goes. It appears whole or not at all.
        runtime: ``"onnx"``: an ONNX model of standard operators, sparse weights compact in the file, batch size free.
            ``"tvm"``: a shared library with kernels specialised to the masks, for inputs of exactly these shapes.
        target: what ``"tvm"`` compiles for; None is this machine, ``"aarch64-linux-gnu"`` 64-bit ARM processors on Linux.

    Returns:
        The path.

    Raises:
        UserError: an unknown runtime or target, inputs the module does not run on, a path that cannot be written.
        UnsupportedError: the module uses something the runtime does not have.
        RuntimeBuildError: the runtime is not installed, or could not compile.
    """
    if runtime not in _EXPORTERS:
        raise unknown_name("runtime", runtime, _EXPORTERS)
    if not isinstance(module, nn.Module):
        raise UserError(f"export expects a torch.nn.Module, got {type(module).__name__}.")
    given = positional(module, as_inputs(example_inputs))
    inputs = pytree.tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, Tensor) else leaf, given)
    frozen = _frozen(unwrapped(module))
    _check_runs(frozen, inputs)
    home, name = _EXPORTERS[runtime]
    try:
        exporter = getattr(importlib.import_module(home), name)
    except ImportError as error:
        raise RuntimeBuildError(
            f"The runtime {runtime!r} cannot be loaded: {error}. Install its dependencies: pip install sift_compiler"
        ) from error
    written: Path = exporter(frozen, inputs, Path(path), target)
    return written


def _frozen(module: nn.Module) -> nn.Module:
    """A copy in evaluation mode, on the CPU and without hooks; where it can it shares the tensors of ``module``."""
    tensors = [*module.parameters(), *module.buffers()]
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in tensors} if on_cpu else {}
    frozen = copy.deepcopy(module, shared)
    if not on_cpu:
        frozen = frozen.cpu()
    frozen.eval()
    if any(isinstance(each, SparseLayer) for each in frozen.modules()):
        # Other runtimes know no slots that are empty or asleep.
        compact(frozen)
    return StripHooks()(frozen).graph_module if isinstance(frozen, fx.GraphModule) else frozen


def _check_runs(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            module(*inputs)
    except Exception as error:  # whatever a model raises, it is what the user has to see
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        raise UserError(
            f"{type(module).__name__} does not run on the example inputs (tensors of shape {shapes}): "
            f"{type(error).__name__}: {str(error).strip() or 'no message'} Give the positional arguments of its forward, with the shapes "
            "and dtypes it is used with."
        ) from error
