"""Export to a TVM shared library: the whole graph through Relax, sparse layers as calls of the generated kernels.

The library holds the mask programs and the packed values as constants. It runs with TVM alone, without torch::

    import numpy, tvm
    from tvm import relax
    machine = relax.VirtualMachine(tvm.runtime.load_module("model.so"), tvm.cpu())
    output = machine["main"](tvm.runtime.tensor(numpy.zeros((16, 3, 32, 32), "float32")))[0].numpy()

It may be made for another platform, with a cross compiler of that platform to link it. Dense layers are compiled by TVM's default schedules, which are correct and slow.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from sift_compiler.errors import RuntimeBuildError, UnsupportedError, UserError
from sift_compiler.lowering.partition import SparseNode, partition
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.sparse_call import FrozenLayer, emit_sparse_layer
from sift_compiler.runtimes.tvm.target import TRIPLES, cpu_facts, host_cpu, llvm_target

_log = logging.getLogger(__name__)

HOST = "host"
"""This machine's CPU; the other targets are :data:`target.TRIPLES`."""


def export_tvm(
    module: fx.GraphModule, example_inputs: Sequence[Tensor], path: str | Path, target: str | None = None
) -> Path:
    """Write a shared library of ``module`` for inputs of exactly the shapes of ``example_inputs``.

    Args:
        module: in evaluation mode, on the CPU, hooks stripped.
        example_inputs: tensors; only their shapes and dtypes matter.
        path: where the library goes; written beside it first, then moved.
        target: ``"host"`` or None, or ``"aarch64-linux-gnu"`` for any 64-bit ARM processor on Linux, which takes its cross compiler,
            aarch64-linux-gnu-g++.

    Raises:
        UserError: an unknown target, or a path that cannot be written.
        UnsupportedError: an operator that TVM cannot import, or a sparse layer that is not float32.
        RuntimeBuildError: TVM or the linker failed.
    """
    if target not in (None, HOST, *TRIPLES):
        raise UserError(
            f"Unknown target {target!r} of the tvm runtime. Known: {HOST} (this machine's CPU), {', '.join(TRIPLES)}."
        )
    linker = _linker(target)
    path = Path(path)
    if not path.parent.is_dir():
        raise UserError(
            f"Cannot write {path}: its folder {path.parent} does not exist. Make it, or choose another path."
        )
    program = torch.export.export(module, tuple(example_inputs), strict=False)
    cpu = host_cpu() if linker is None else cpu_facts(str(target))
    relax_module = _to_relax(program, cpu.name)
    try:
        import tvm

        executable = tvm.compile(relax_module, target=llvm_target(cpu.name))
    except Exception as error:
        raise RuntimeBuildError(f"TVM could not compile the model for {cpu.name}: {_first_line(error)}.") from error
    return _write(executable, path, linker)


def _linker(target: str | None) -> str | None:
    """The cross compiler that links for ``target``; None for this machine."""
    if target not in TRIPLES:
        return None
    linker = f"{target}-g++"
    if shutil.which(linker) is None:
        raise UserError(
            f"A library for {target} is linked by {linker}, which is not installed. Debian and Ubuntu have it: apt install g++-{target}"
        )
    return linker


def _to_relax(program: torch.export.ExportedProgram, cpu: str) -> Any:
    """The Relax module of an exported program, weights and programs of masks as constants."""
    from tvm.relax.frontend.torch import from_exported_program

    # Decomposed here, so that the nodes TVM shows are those of our own partition.
    with warnings.catch_warnings():
        # torch copies its own tree specifications in a way that it warns about.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        program = program.run_decompositions()
    tensors = _frozen_tensors(program)
    layers = {node.node.name: node for node in partition(program.graph, lambda spec, device: _refuse(spec))}
    for node in layers.values():
        if node.refusal is not None:
            raise UnsupportedError(f"{node.name}: {node.refusal}. Export the model in float32.")

    def convert(node: fx.Node, importer: Any) -> Any:
        sparse = layers[node.name]
        x = node.args[0]
        assert isinstance(x, fx.Node)
        layer = _frozen_layer(sparse, tensors)
        shape = tuple(int(size) for size in x.meta["val"].shape)
        return emit_sparse_layer(importer.block_builder, importer.env[x], shape, layer, cpu_facts(cpu))

    try:
        return from_exported_program(
            program, custom_convert_map={"conv2d.default": convert, "linear.default": convert},
            keep_params_as_input=False, run_ep_decomposition=False,
        )  # fmt: skip
    except (UnsupportedError, RuntimeBuildError):
        raise
    except Exception as error:
        raise UnsupportedError(
            f"TVM cannot import this model: {_first_line(error)}. Export it to ONNX instead (runtime='onnx'), or replace the "
            "operator that TVM names."
        ) from error


def _refuse(spec: LayerSpec) -> str | None:
    return None if spec.dtype == "float32" else f"kernels compute in float32, the layer holds {spec.dtype}"


def _frozen_tensors(program: torch.export.ExportedProgram) -> Mapping[str, Tensor]:
    """Parameters, buffers and constants by the name of their placeholder."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = {}
    for placeholder, name in names.items():
        tensor = program.state_dict.get(name, program.constants.get(name))
        assert isinstance(tensor, Tensor), name
        found[placeholder] = tensor.detach().contiguous()
    return found


def _frozen_layer(sparse: SparseNode, tensors: Mapping[str, Tensor]) -> FrozenLayer:
    values, index, bias = sparse.node.args[1:4]
    assert isinstance(values, fx.Node)
    assert isinstance(index, fx.Node)
    return FrozenLayer(
        name=sparse.name, spec=sparse.spec, values=tensors[values.name], index=tensors[index.name],
        bias=tensors[bias.name] if isinstance(bias, fx.Node) else None,
    )  # fmt: skip


def _write(executable: Any, path: Path, linker: str | None) -> Path:
    from tvm.support import cc

    try:
        handle, temporary = tempfile.mkstemp(suffix=".so", prefix=f".{path.stem}-", dir=path.parent)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error}. Choose a path in a folder you may write.") from error
    os.close(handle)
    try:
        executable.export_library(temporary, **({} if linker is None else {"fcompile": cc.cross_compiler(linker)}))
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    except Exception as error:
        raise RuntimeBuildError(
            f"TVM could not link {path}: {_first_line(error)}. A C++ compiler ({linker or 'g++ or clang++'}) is needed for export."
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    _log.info("wrote %s (%.1f MB)", path, path.stat().st_size / 1e6)
    return path


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"
