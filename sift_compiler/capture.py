"""Capture: a model becomes a trainable FX graph of modules and ATen operators, with its original parameter names.

``torch.export`` in train mode, then raised (see passes/raise_modules.py). The captured graph owns *copies* of the model's
parameters and buffers: rewriting or training it never touches the model it came from.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from sift_compiler.errors import UnsupportedError, UserError
from sift_compiler.ir.inputs import Inputs, arguments_of, called
from sift_compiler.ir.inputs import as_inputs as as_inputs
from sift_compiler.ir.modes import training_mode
from sift_compiler.nn import SparseLayer
from sift_compiler.passes.manager import run_passes
from sift_compiler.passes.raise_modules import RaiseModules
from sift_compiler.passes.remove_mutation import RemoveMutation
from sift_compiler.passes.snapshot import copied

logger = logging.getLogger(__name__)

_NOT_SAVED = "sift_non_persistent_buffers"


def capture(
    model: nn.Module, example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
) -> fx.GraphModule:
    """The graph of ``model``, trainable, with the same state dict, outputs and gradients.

    Args:
        model: any module that ``torch.export`` accepts; it is left as it is, its train/eval flags included.
        example_inputs: the positional arguments of the model, the only one, or a dict of its keyword arguments. The first
            dimension of every tensor is taken to be the batch and stays free unless the model itself fixes it (then one
            warning says so).

    Returns:
        A GraphModule in the mode (train or eval) of ``model``, holding copies of its parameters and buffers.

    Raises:
        UserError: ``model`` or ``example_inputs`` is of the wrong kind, or the model does not run on them.
        UnsupportedError: the model cannot be exported, or does something a graph cannot follow.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"capture expects a torch.nn.Module, got {type(model).__name__}.")
    inputs = as_inputs(example_inputs)
    with training_mode(model, True):
        exported = _export(model, inputs)
    graph_module = raise_exported(exported)
    # Operators do not know the structure of a mask; the layers they came from do.
    structures = {path: layer.structure for path, layer in model.named_modules() if isinstance(layer, SparseLayer)}
    for path, layer in graph_module.named_modules():
        if isinstance(layer, SparseLayer) and path in structures:
            layer.structure = structures[path]
    graph_module.train(model.training)
    return graph_module


def raise_exported(exported: ExportedProgram) -> fx.GraphModule:
    """The trainable graph of an exported program, its operator calls raised to modules; in train mode, with copies of its tensors.

    Export in train mode: dropout vanishes and batch norm freezes in a program exported in eval mode.

    Raises:
        UnsupportedError: the program does something a graph cannot follow.
    """
    with _without_export_warnings():
        module = exported.module()
    _tie(module)
    graph_module = _owned_copy(module)
    for name in exported.graph_signature.non_persistent_buffers:
        path, _, buffer = name.rpartition(".")
        graph_module.get_submodule(path)._non_persistent_buffers_set.add(buffer)
    graph_module.meta[_NOT_SAVED] = tuple(graph_module._non_persistent_buffers_set)
    graph_module._register_deepcopy_hook(_keep_out_of_state_dict)
    run_passes(graph_module, (RemoveMutation(), RaiseModules()))
    graph_module.train()
    _report_frozen_norms(graph_module)
    return graph_module


def _tie(module: fx.GraphModule) -> None:
    """Make parameters in the same memory one again: a program that was read from a file has an object for each of their names."""
    known: dict[tuple[object, ...], nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is None or parameter.is_meta or not parameter.numel():
                continue
            place = (parameter.data_ptr(), parameter.shape, parameter.stride(), parameter.dtype, parameter.device)
            part._parameters[name] = known.setdefault(place, parameter)


def _report_frozen_norms(graph_module: fx.GraphModule) -> None:
    frozen = sum(node.target is torch.ops.aten.batch_norm.default for node in graph_module.graph.nodes)
    if frozen and not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in graph_module.modules()):
        logger.warning(
            "All %d batch norms are frozen, as in a program exported in eval mode; they will not follow .train(). "
            "If that is not meant, export the model in train mode.",
            frozen,
        )


def _keep_out_of_state_dict(copied: fx.GraphModule) -> None:
    """torch.fx forgets, when it copies a graph module, which of its own buffers are not persistent."""
    copied._non_persistent_buffers_set.update(copied.meta[_NOT_SAVED])


def _export(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Export with a free batch dimension; an example with a batch of 1, which would fix it, is shown twice."""
    shown = pytree.tree_map(_twice, inputs) if _batch_of_one(inputs) else inputs
    free = pytree.tree_map(lambda leaf: {0: Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None, shown)
    try:
        with _without_export_warnings():
            exported = torch.export.export(model, *arguments_of(shown), strict=False, dynamic_shapes=free)
    except Exception as error:
        if shown is not inputs:
            logger.info("Export with the example shown twice failed (%s); the batch size is fixed at 1.", error)
            try:
                with _without_export_warnings():
                    return torch.export.export(model, *arguments_of(inputs), strict=False)
            except Exception as second:
                error = second
        raise _explained(model, inputs, error) from error
    _report_fixed_batch(exported)
    return exported


def _batch_of_one(inputs: Inputs) -> bool:
    sizes = [leaf.shape[0] for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.dim()]
    return bool(sizes) and all(size == 1 for size in sizes)


def _twice(leaf: Any) -> Any:
    return torch.cat([leaf, leaf]) if isinstance(leaf, Tensor) and leaf.dim() else leaf


def _report_fixed_batch(exported: ExportedProgram) -> None:
    names = set(exported.graph_signature.user_inputs)
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        given = node.op == "placeholder" and node.name in names and isinstance(value, Tensor) and value.dim() > 0
        if given and str(value.shape[0]).isdigit():
            logger.warning("The model fixes the first dimension of its input %r at %s.", node.name, value.shape[0])


def _explained(model: nn.Module, inputs: Inputs, error: Exception) -> Exception:
    """Whether the model or the example is to blame for a failed export: run a copy of the model without export."""
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            called(copy.deepcopy(model).eval(), copy.deepcopy(inputs))
    except Exception as own:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))
        return UserError(
            f"{type(model).__name__} does not run on the example inputs (tensors of shape {shapes}): {_first_lines(own)} "
            "Give the positional arguments of the model's forward, with the shapes and dtypes it is used with."
        )
    return UnsupportedError(
        f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: {_first_lines(error)} "
        "Export needs a forward without control flow on tensor values and without calls it cannot trace: use torch.where or "
        "torch.cond instead of `if`, keep .item() and numpy out of forward, or rewrite only a submodule that exports. "
        "torch.export.export(model.train(), example_inputs, strict=False) shows the same failure with its full trace."
    )


def _first_lines(error: Exception, count: int = 3) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:count]) or type(error).__name__


def _owned_copy(exported: fx.GraphModule) -> fx.GraphModule:
    """A plain GraphModule with the exported module's graph and deep copies of its tensors; tied tensors stay tied."""
    tables = {name: getattr(exported, name) for name in ("_parameters", "_buffers", "_modules")}
    tables["_modules"] = {name: module for name, module in exported._modules.items() if name != "_guards_fn"}
    constants = {name: value for name, value in vars(exported).items() if isinstance(value, Tensor)}
    tables, constants = copy.deepcopy((tables, constants))
    root = fx.GraphModule(nn.Module(), fx.Graph(), class_name="CapturedModule")
    for name, entries in tables.items():
        getattr(root, name).update(entries)
    root._non_persistent_buffers_set = set(exported._non_persistent_buffers_set)
    for name, value in constants.items():
        root.register_buffer(name, value, persistent=False)
    graph = copied(exported.graph)
    for node in list(graph.nodes):
        node.meta.pop("from_node", None)
        if node.op == "call_module" and node.target == "_guards_fn":
            graph.erase_node(node)
    _simplify_signature(graph)
    root.graph = graph
    return root


def _simplify_signature(graph: fx.Graph) -> None:
    """Positional tensors in, a tensor or a flat tuple of tensors out: then the graph needs no packing and unpacking."""
    codegen = graph._codegen
    info = getattr(codegen, "pytree_info", None)
    if info is None:
        return
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    (flat,) = next(node for node in graph.nodes if node.op == "output").args
    probe = tuple(object() for _ in placeholders)
    if info.in_spec.num_leaves != len(probe):
        return
    positional, keywords = pytree.tree_unflatten(probe, info.in_spec)
    if tuple(positional) != probe or keywords:
        return
    marks = list(range(len(flat)))
    result = pytree.tree_unflatten(marks, info.out_spec)
    output = next(node for node in graph.nodes if node.op == "output")
    if result == 0:
        output.args = (flat[0],)
    elif result == tuple(marks):
        output.args = (tuple(flat),)
    else:
        return
    graph.set_codegen(CodeGen())
    for node, name in zip(placeholders, info.orig_args, strict=False):
        node.target = name


@contextlib.contextmanager
def _without_export_warnings() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\..*")
        yield
