"""Saving and loading: one ``.pt2`` file with the module, its masks, their schedule, the optimizer and the random states.

The file is what ``torch.export.save`` writes (a zip archive with the graph as JSON and the tensors as raw bytes) and two records of
this package: ``sift/metadata.json`` and ``sift/state.pt`` (tensors and plain values, read with ``weights_only=True``). Nothing in
it is pickled code, and a file that asks for unpickling is refused.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.optim import Optimizer

from sift_compiler.attachment import unwrapped
from sift_compiler.capture import as_inputs, raise_exported
from sift_compiler.checkpoint import Checkpoint, optimizer_by_name, random_states
from sift_compiler.errors import StaleArtifactError, UnsupportedError, UserError
from sift_compiler.ir.modes import training_mode
from sift_compiler.nn import MaskHook, SparseLayer
from sift_compiler.schedule import MaskScheduler

log = logging.getLogger(__name__)

_FORMAT = 1
_METADATA, _STATE = "sift/metadata.json", "sift/state.pt"
_SAMPLE_BATCH = 2

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
    module = unwrapped(sparse)
    target = Path(path)
    state = {
        "optimizer": None if optimizer is None else optimizer_by_name(optimizer, module),
        "random": random,
        "extra": dict(extra or {}),
    }
    records = {
        _METADATA: json.dumps(_metadata(module, masks), indent=1).encode(),
        _STATE: _plain_bytes(state),
    }
    program = _export(module, example_inputs)
    with _appearing_whole(target) as unfinished:
        with open(unfinished, "w+b") as file:
            torch.export.save(program, file)
        with zipfile.ZipFile(unfinished, "a", zipfile.ZIP_STORED) as archive:
            root = archive.namelist()[0].split("/", 1)[0]
            for name, content in records.items():
                archive.writestr(f"{root}/{name}", content)
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
    source = Path(path)
    metadata, state_bytes = _read_records(source)
    if metadata.get("format") != _FORMAT:
        raise StaleArtifactError(
            f"{source} has format {metadata.get('format')!r}; this version reads {_FORMAT}. Load it with sift_compiler "
            f"{metadata.get('package', 'of its time')}, which wrote it."
        )
    try:
        state = torch.load(io.BytesIO(state_bytes), weights_only=True)
        with _quiet():
            module = raise_exported(torch.export.load(source))
        found = _layers(module)
    except Exception as error:  # torch raises anything from KeyError to AssertionError on a program it cannot read
        raise StaleArtifactError(
            f"{source} could not be read ({type(error).__name__}: {error}). It was written with torch "
            f"{metadata.get('torch')}, this is torch {torch.__version__}; use that version, or save again."
        ) from error
    if found != metadata["layers"]:
        raise StaleArtifactError(
            f"The sparse layers in {source} are not those its description names: {_difference(found, metadata['layers'])}. "
            "The file has been changed since it was saved; use another copy."
        )
    module.train(metadata["training"])
    return Checkpoint(
        module=module, masks=metadata["masks"], optimizer=state["optimizer"], random=state["random"],
        extra=state["extra"], metadata=metadata,
    )  # fmt: skip


def _metadata(module: nn.Module, masks: MaskScheduler | None) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "package": importlib.metadata.version("sift_compiler"),
        "torch": torch.__version__,
        "training": module.training,
        "hooks": any(isinstance(each, MaskHook) for each in module.modules()),
        "layers": _layers(module),
        "masks": None if masks is None else masks.state_dict(),
    }


def _layers(module: nn.Module) -> dict[str, Any]:
    return {
        name: {"kind": type(layer).__name__, "weight_shape": list(layer.weight_shape), "active": layer.index.numel()}
        for name, layer in sorted(module.named_modules())
        if isinstance(layer, SparseLayer)
    }


def _difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    return ", ".join(sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))[:5])


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
    if example_inputs is None:
        inputs, free = _remembered_inputs(module)
    else:
        inputs = as_inputs(example_inputs)
        free = tuple({0: Dim.AUTO} if isinstance(one, Tensor) and one.dim() else None for one in inputs)
    try:
        with training_mode(module, True), _quiet():
            program = torch.export.export(module, inputs, strict=False, dynamic_shapes=free)
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


# --- the file -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _appearing_whole(target: Path) -> Iterator[str]:
    """The name of a file beside ``target`` that takes its place when the block ends well, and vanishes otherwise."""
    unfinished = None
    try:
        handle, unfinished = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".pt2", dir=target.parent)
        os.close(handle)
        yield unfinished
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, target)
        unfinished = None
    except (OSError, RuntimeError) as error:  # torch's archive writer raises RuntimeError on a full disk
        raise UserError(
            f"{target} cannot be written ({error}). Nothing was changed. Choose a file in a folder that exists, may be "
            "written to and has room."
        ) from error
    finally:
        if unfinished is not None:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_records(source: Path) -> tuple[dict[str, Any], bytes]:
    """This package's records, after a look at the whole file: that it is intact and asks for no unpickling."""
    if not source.is_file():
        raise UserError(f"There is no file {source}. Pass the path that was given to sift.save.")
    foreign = UserError(
        f"{source} was not written by sift.save. To rewrite a program of torch.export, load it with torch.export.load and "
        "pass its module() to sift.rewrite."
    )
    try:
        with zipfile.ZipFile(source) as archive:
            names = archive.namelist()
            root = names[0].split("/", 1)[0] if names else ""
            if f"{root}/{_METADATA}" not in names or f"{root}/{_STATE}" not in names:
                raise foreign
            broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"bad checksum of {broken}")
            _refuse_pickles(archive, source)
            metadata: dict[str, Any] = json.loads(archive.read(f"{root}/{_METADATA}"))
            return metadata, archive.read(f"{root}/{_STATE}")
    except OSError as error:
        raise UserError(f"{source} cannot be read ({error}).") from error
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, zipfile.BadZipFile) and not _begins_as_zip(source):
            raise foreign from error
        raise StaleArtifactError(
            f"{source} is damaged or was cut short ({error}). Copy it again from where it was saved, or use an older checkpoint."
        ) from error


def _begins_as_zip(source: Path) -> bool:
    with source.open("rb") as file:
        return file.read(2) == b"PK"


def _refuse_pickles(archive: zipfile.ZipFile, source: Path) -> None:
    """torch.export.load unpickles whatever a file declares as pickled; files of sift.save never do."""
    names = archive.namelist()
    reason = "it holds a record twice" if len(set(names)) != len(names) else None
    configurations = [name for name in names if name.endswith(("_weights_config.json", "_constants_config.json"))]
    if len(configurations) != 2:
        reason = "it is not laid out as torch.export writes programs"
    for name in configurations:
        entries = json.loads(archive.read(name))["config"]
        if any(entry["use_pickle"] for entry in entries.values()):
            reason = "it holds pickled objects, which could run code"
    for name in names:
        # torch falls back to full unpickling where this fails.
        if "/data/sample_inputs/" in name:
            try:
                torch.load(io.BytesIO(archive.read(name)), weights_only=True)
            except Exception:  # whatever it is, the file is not taken
                reason = "its sample inputs are not plain tensors"
        elif ("/data/weights/" in name or "/data/constants/" in name) and name.endswith(".pt"):
            reason = "its tensors are in an old, pickled format"
    if reason is not None:
        raise StaleArtifactError(f"{source} is refused: {reason}. Load only files that sift.save wrote.")
