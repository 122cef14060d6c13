"""Saving and loading: one ``.pt2`` file with the module, its masks, their schedule, the optimizer and the random states.

The file is what ``torch.export.save`` writes (a zip archive with the graph as JSON and the tensors as raw bytes) and two records of
this package: ``sift/metadata.json`` and ``sift/state.pt`` (tensors and plain values, read with ``weights_only=True``). Nothing in
it is pickled code, and a file that asks for unpickling is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from sift_compiler import archive, processes
from sift_compiler.attachment import unwrapped
from sift_compiler.capture import raise_exported
from sift_compiler.checkpoint import Checkpoint, optimizer_by_name, random_states
from sift_compiler.errors import StaleArtifactError, UnsupportedError, UserError
from sift_compiler.freed_memory import release_freed_memory
from sift_compiler.ir import annotations as decided
from sift_compiler.ir.inputs import Inputs, arguments_of, as_inputs
from sift_compiler.ir.mask_structure import structure_from_plain
from sift_compiler.ir.modes import training_mode
from sift_compiler.ir.replaced_nodes import mark_replaced_nodes
from sift_compiler.nn import MaskHook, SparseLayer
from sift_compiler.schedule import MaskScheduler

log = logging.getLogger(__name__)

_FORMAT = 1
_SAMPLE_BATCH = 2
_SHARDED = (
    "Put them together first, in all processes: torch.distributed.checkpoint.state_dict.get_model_state_dict(module, "
    "options=StateDictOptions(full_state_dict=True)); then save, in one, a module that is not sharded and has loaded them."
)

StrPath = str | os.PathLike[str]


def save(
    sparse: nn.Module, path: StrPath, *, masks: MaskScheduler | None = None, optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None, example_inputs: Any = None,
) -> None:  # fmt: skip
    """Write ``sparse`` and, for training to go on, its mask schedule and optimizer to one file.

    The file appears whole or not at all. Hooks are not written: sift.schedule puts them in again.

    Args:
        sparse: what sift.rewrite returned (or another module; then ``example_inputs`` is needed).
        path: a file name, by custom ending in ``.pt2``.
        masks: what sift.schedule returned.
        optimizer: the optimizer of the module's parameters.
        extra: anything else to keep: numbers, strings, lists, dictionaries and tensors.
        example_inputs: a tensor or the tuple of the positional arguments of the module's forward.

    Raises:
        UserError: the path cannot be written, ``extra`` or the optimizer's state holds other than plain values and tensors,
            or ``example_inputs`` are needed.
        UnsupportedError: the module cannot be exported.
    """
    random = random_states()
    target = _as_path(path)
    if not isinstance(sparse, nn.Module):
        raise UserError(f"save expects a module first, as sift.rewrite returns it, not {type(sparse).__name__}.")
    module = unwrapped(sparse)
    processes.refuse_shards(module, "Saving", _SHARDED)
    state = {
        "optimizer": None if optimizer is None else optimizer_by_name(optimizer, module),
        "random": random,
        "extra": dict(extra or {}),
    }
    metadata = _metadata(module, masks)
    if metadata["masks"] is not None:
        state["mask_memory"] = metadata["masks"].pop("memory")
    records = {
        archive.METADATA: json.dumps(metadata, indent=1).encode(),
        archive.STATE: _plain_bytes(state),
    }
    program = _export(module, example_inputs)
    archive.write(program, target, records)
    log.info("Saved %s (%d bytes)", target, target.stat().st_size)


def load(path: StrPath) -> fx.GraphModule:
    """The module of a file that :func:`save` wrote, trainable, in the mode (train or eval) it was saved in.

    Raises:
        UserError: there is no such file, or :func:`save` did not write it.
        StaleArtifactError: the file is damaged or of another version.
    """
    return load_checkpoint(path).module


def load_checkpoint(path: StrPath) -> Checkpoint:
    """Everything in a file that :func:`save` wrote; see :class:`Checkpoint` for how training goes on.

    Raises:
        UserError: there is no such file, or :func:`save` did not write it.
        StaleArtifactError: the file is damaged or of another version.
    """
    checkpoint = _read(_as_path(path))
    release_freed_memory()
    return checkpoint


def _read(source: Path) -> Checkpoint:
    metadata, state_bytes = archive.read(source)
    if metadata.get("format") != _FORMAT:
        raise StaleArtifactError(
            f"{source} has format {metadata.get('format')!r}; this version reads {_FORMAT}. Load it with sift_compiler "
            f"{metadata.get('package', 'of its time')}, which wrote it."
        )
    try:
        state = torch.load(io.BytesIO(state_bytes), weights_only=True)
        with _quiet():
            module = raise_exported(torch.export.load(source))
        _restore_structures(module, metadata["layers"])
        _check_layers(source, _layers(module), metadata["layers"])
        _annotate(module, metadata["annotations"])
        masks = metadata["masks"]
        if masks is not None:
            masks["memory"] = state["mask_memory"]
        module.train(metadata["training"])
        return Checkpoint(
            module=module, masks=masks, optimizer=state["optimizer"], random=state["random"],
            extra=state["extra"], metadata=metadata,
        )  # fmt: skip
    except StaleArtifactError:
        raise
    except Exception as error:  # torch raises anything from KeyError to AssertionError on a program it cannot read
        raise StaleArtifactError(
            f"{source} could not be read ({type(error).__name__}: {error}). It was written with torch "
            f"{metadata.get('torch')}, this is torch {torch.__version__}; use that version, or save again."
        ) from error


def _as_path(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"path must be a file name, not {path!r}.")
    return Path(path)


def _metadata(module: nn.Module, masks: MaskScheduler | None) -> dict[str, Any]:
    layers = _layers(module)
    moving = None if masks is None else masks.state_dict()
    if moving is not None and not moving["layers"].keys() <= layers.keys():
        raise UserError(
            f"masks= moves {', '.join(sorted(moving['layers'].keys() - layers.keys())[:5])}, which the module does not have. "
            "Pass the scheduler that sift.schedule returned for this module."
        )
    return {
        "format": _FORMAT,
        "package": importlib.metadata.version("sift_compiler"),
        "torch": torch.__version__,
        "training": module.training,
        "hooks": any(isinstance(each, MaskHook) for each in module.modules()),
        "layers": layers,
        "annotations": _annotations(module),
        "masks": moving,
    }


def _layers(module: nn.Module) -> dict[str, Any]:
    return {
        name: {
            "kind": type(layer).__name__,
            "weight_shape": list(layer.weight_shape),
            "active": layer.index.numel(),
            "structure": layer.structure.to_plain(),
        }
        for name, layer in sorted(module.named_modules())
        if isinstance(layer, SparseLayer)
    }


def _annotations(module: nn.Module) -> dict[str, Any]:
    """What the passes decided, as plain data."""
    if not isinstance(module, fx.GraphModule):
        return {"decisions": [], "replacements": {}, "balance": None}
    balance = decided.balance(module)
    return {
        "decisions": [
            {**dataclasses.asdict(decision), "structure": decision.structure.to_plain()}
            for decision in decided.decisions(module).values()
        ],
        "replacements": dict(decided.replacements(module)),
        "balance": None if balance is None else dataclasses.asdict(balance),
    }


def _annotate(module: fx.GraphModule, saved: Mapping[str, Any]) -> None:
    decisions = {}
    for entry in saved["decisions"]:
        shapes = {name: tuple(entry[name]) for name in ("weight_shape", "widened_shape")}
        structure = structure_from_plain(entry["structure"])
        decisions[entry["path"]] = decided.LayerDecision(**{**entry, **shapes, "structure": structure})
    if decisions:
        decided.set_decisions(module, decisions)
    module.meta[decided.REPLACEMENTS] = dict(saved.get("replacements", {}))
    mark_replaced_nodes(module)
    if saved["balance"] is not None:
        module.meta[decided.BALANCE] = decided.Balance(**saved["balance"])


def _restore_structures(module: nn.Module, described: Mapping[str, Any]) -> None:
    """Give the sparse layers of ``module`` the structures that are described; a graph of operators does not know them."""
    for name, layer in module.named_modules():
        if isinstance(layer, SparseLayer) and name in described:
            structure = structure_from_plain(described[name]["structure"])
            structure.check(layer.pattern)
            layer.structure = structure


def _check_layers(source: Path, found: Mapping[str, Any], described: Mapping[str, Any]) -> None:
    if found != described:
        differing = sorted(name for name in {*found, *described} if found.get(name) != described.get(name))
        raise StaleArtifactError(
            f"The sparse layers in {source} are not those its description names: {', '.join(differing[:5])}. The file has "
            "been changed since it was saved; use another copy."
        )


def _plain_bytes(state: Mapping[str, Any]) -> bytes:
    """``state`` as bytes that load without running code; UserError if it holds anything but plain values and tensors."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:  # pickle raises whatever an object's __reduce__ raises
        raise UserError(
            "extra= and the optimizer's options may hold only tensors, numbers, strings, lists, tuples and dictionaries, so "
            f"that loading runs no code. Save state_dict()s instead of objects. ({type(error).__name__}: {error})"
        ) from error
    return buffer.getvalue()


# --- the module -----------------------------------------------------------------------------------------------------


def _export(module: nn.Module, example_inputs: Any) -> ExportedProgram:
    inputs: Inputs
    if example_inputs is None:
        inputs, free = _remembered_inputs(module)
    else:
        inputs = as_inputs(example_inputs)
        free = pytree.tree_map(lambda one: {0: Dim.AUTO} if isinstance(one, Tensor) and one.dim() else None, inputs)
    try:
        with training_mode(module, True), _quiet():
            program = torch.export.export(module, *arguments_of(inputs), strict=False, dynamic_shapes=free)
    except Exception as error:  # export raises errors of many kinds
        raise UnsupportedError(
            f"{type(module).__name__} cannot be exported, so it cannot be saved: {type(error).__name__}: {error}. "
            "torch.save(module.state_dict(), …) keeps the tensors; sift.rewrite with the same options and seed makes the module."
        ) from error
    _without_handles(program)
    return program


def _remembered_inputs(module: nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Inputs like those the graph was captured with, and which of their dimensions are free."""
    if not isinstance(module, fx.GraphModule):
        raise UserError(
            f"Saving a {type(module).__name__} needs example_inputs=(…), the positional arguments of its forward; only the "
            "graph that sift.rewrite returns remembers them."
        )
    inputs: list[Any] = []
    free: list[Any] = []
    for node in module.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if value is None:
            raise UserError(
                f"The graph does not remember the shape of its input {node.target!r} any more. Pass example_inputs=(…), "
                "the positional arguments of its forward."
            )
        if not isinstance(value, Tensor):
            inputs.append(value)
            free.append(None)
            continue
        shape = [_SAMPLE_BATCH if isinstance(size, SymInt) else int(size) for size in value.shape]
        inputs.append(torch.zeros(shape, dtype=value.dtype, device=value.device))
        free.append({place: Dim.AUTO for place, size in enumerate(value.shape) if isinstance(size, SymInt)})
    return tuple(inputs), tuple(free)


def _without_handles(program: ExportedProgram) -> None:
    """Handles of probes and kernels mean something in one process only."""
    for node in program.graph.nodes:
        if node.target in (torch.ops.sift.conv2d.default, torch.ops.sift.linear.default):
            names = [argument.name for argument in node.target._schema.arguments]
            kept = [
                0 if name in ("probe", "kernel_handle") else argument
                for name, argument in zip(names, node.args, strict=False)
            ]
            node.args = tuple(kept)
            node.kwargs = {name: value for name, value in node.kwargs.items() if name not in ("probe", "kernel_handle")}
    program.graph_module.recompile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*|copyreg")
        yield
