"""Export to a portable ONNX model: standard operators only, sparse weights compact in the file, the batch size free."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.nn import SparseLayer
from sift_compiler.whole_file import appearing_whole

_log = logging.getLogger(__name__)

_LARGEST_FILE = 2**31 - 2**20
"""Bytes that protocol buffers allow in one file, less what the graph itself takes."""
_KEPT_NODE_NOTES = ("namespace",)
"""Of what torch notes on every node only the module path is kept; the rest holds file names of this machine."""


def export_onnx(
    module: nn.Module, example_inputs: Sequence[Any], path: str | Path, target: str | None = None
) -> Path:  # fmt: skip
    """Write ``module`` as an ONNX model that plain ONNX Runtime runs; the file appears whole or not at all.

    The first dimension of every input tensor is free and called ``batch``, unless the model fixes it. The model's metadata hold
    ``sift.version`` and ``sift.layers`` (JSON: dense shape, kept weights and sparsity by module path).

    Args:
        module: in evaluation mode, on the CPU, hooks stripped.
        example_inputs: its positional arguments.
        path: by custom ending in ``.onnx``.
        target: must be None: the file runs on every machine.

    Raises:
        UserError: a target, or a path that cannot be written.
        UnsupportedError: an operator that ONNX does not have, or weights beyond what one file can hold.
    """
    if target is not None:
        raise UserError(f"The onnx runtime has no targets, got {target!r}: its files run everywhere. Leave target out.")
    destination = Path(path)
    size = sum(tensor.nbytes for tensor in module.state_dict().values())
    if size > _LARGEST_FILE:
        raise UnsupportedError(
            f"The model's tensors take {size / 2**30:.1f} GiB, one ONNX file holds at most 2. Convert the model to half precision "
            "before the export, or export it in parts."
        )
    with appearing_whole(destination) as unfinished:
        model = _to_onnx(module, tuple(example_inputs))
        model.metadata_props.update(_description(module))
        _save(model, unfinished)
    _log.info("Wrote %s (%.1f MB)", destination, destination.stat().st_size / 1e6)
    return destination


def _to_onnx(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """The onnx_ir model."""
    from sift_compiler.runtimes.onnx.translations import OPSET, translations

    try:
        with _quiet():
            program = _export(module, inputs)
            converted = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, custom_translation_table=translations(),
                dynamic_shapes=_axis_names(program), verbose=False,
            )  # fmt: skip
    except Exception as error:  # torch wraps whatever went wrong in errors of many kinds
        raise UnsupportedError(
            f"{type(module).__name__} cannot be exported to ONNX: {type(error).__name__}: {_reason(error)} "
            "Replace the operator named here, or export to TVM instead (runtime='tvm')."
        ) from error
    assert converted is not None
    model = converted.model
    for node in model.graph.all_nodes():
        for key in list(node.metadata_props):
            if not key.endswith(_KEPT_NODE_NOTES):
                del node.metadata_props[key]
    return model


def _export(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    """Export with a free batch; an example with a batch of 1, which would fix it, is shown twice."""
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    if tensors and all(tensor.shape[0] == 1 for tensor in tensors):
        shown = pytree.tree_map(lambda leaf: torch.cat([leaf, leaf]) if _batched(leaf) else leaf, inputs)
        try:
            return _with_free_batch(module, shown)
        except Exception as error:  # a model for a batch of 1 alone fails in its own way
            _log.warning("The model runs only with a batch of 1 (%s): so does the exported file.", _reason(error))
            return torch.export.export(module, inputs, strict=False)
    return _with_free_batch(module, inputs)


def _with_free_batch(module: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    free = pytree.tree_map(lambda leaf: {0: Dim.AUTO} if _batched(leaf) else None, inputs)
    return torch.export.export(module, inputs, strict=False, dynamic_shapes=free)


def _batched(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _axis_names(program: ExportedProgram) -> tuple[dict[int, str] | None, ...] | None:
    """A name for every free dimension of the inputs, one name for all dimensions that must be equal."""
    names: dict[str, str] = {}
    axes: list[dict[int, str] | None] = []
    users = set(program.graph_signature.user_inputs)
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name not in users:
            continue
        found: dict[int, str] = {}
        value = node.meta.get("val")
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if isinstance(size, SymInt):
                found[axis] = names.setdefault(str(size), "batch" if not names else f"batch_{len(names) + 1}")
        axes.append(found or None)
    return tuple(axes) if names else None


def _description(module: nn.Module) -> dict[str, str]:
    layers = {
        name: {"weight_shape": list(layer.weight_shape), "kept": layer.index.numel(), "sparsity": layer.sparsity}
        for name, layer in module.named_modules()
        if isinstance(layer, SparseLayer)
    }
    return {"sift.version": importlib.metadata.version("sift_compiler"), "sift.layers": json.dumps(layers)}


def _save(model: Any, path: str) -> None:
    from onnxscript import ir

    ir.save(model, path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch and onnxscript report every step, and that torchvision is not installed; what matters is raised."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(torch|onnxscript|onnx_ir|copyreg)\b.*")
            yield
    finally:
        registration.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the innermost error: torch wraps what an operator lacks in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
