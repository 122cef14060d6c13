"""report: what a rewrite changed, in FLOPs, parameters and memory, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sift_compiler.capture import raise_exported
from sift_compiler.errors import SiftError, UserError
from sift_compiler.ir import annotations as notes
from sift_compiler.ir.activation_memory import activation_memory
from sift_compiler.ir.annotations import LayerDecision
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.ir.inputs import Inputs, as_inputs
from sift_compiler.ir.mask_structure import UNSTRUCTURED
from sift_compiler.ir.training_state import OPTIMIZERS, training_state
from sift_compiler.nn import SparseLayer
from sift_compiler.nn.multiply_adds import MultiplyAdds, executed_multiply_adds
from sift_compiler.reporting.layers import LayerReport, ReplacementReport
from sift_compiler.reporting.model import Activations, FlopCheck, Report, TrainingStates

__all__ = ["LayerReport", "ReplacementReport", "Report", "report"]

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, SparseLayer)

Executed = Mapping[str, MultiplyAdds]


def report(
    model: nn.Module | ExportedProgram,
    sparse: nn.Module,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any],
    *,
    name: str | None = None,
    execute: bool = True,
) -> Report:
    """Compare ``model`` with ``sparse``, its rewrite.

    Sizes, FLOPs and memory are told without computing. Then ``sparse`` runs once on the example inputs, in eval mode, and the
    multiply-adds that its sparse layers execute are compared with their FLOPs.

    Args:
        model: the dense model, or the program it was exported to. ``sparse`` itself, if there is no dense one to compare with.
        sparse: what ``rewrite`` made of it, or ``load`` brought back.
        example_inputs: positional arguments of both, the only one, or a dict of keyword arguments.
        name: what to call the model; the name of its class without it.
        execute: whether to run ``sparse``. False saves the time of a forward pass and leaves ``Report.check`` None, as does a model
            on the meta device.

    Raises:
        UserError: one of the models does not run on the example inputs, or the dense model costs nothing.
        SiftError: the FLOPs of a sparse layer are not twice what it executed.
    """
    inputs = as_inputs(example_inputs)
    dense = raise_exported(model) if isinstance(model, ExportedProgram) else model
    before = _counted(dense, inputs, "model")
    after = before if sparse is dense else _counted(sparse, inputs, "sparse")
    if not before.total:
        raise UserError(
            "The dense model has no convolution, linear layer or matrix product, so there is no ratio of FLOPs."
        )
    executed = _executed(sparse, inputs) if execute else {}
    layers = _layers(dense, sparse, before, after, executed)
    return Report(
        before.total, after.total, _parameters(dense), _parameters(sparse), _bytes(dense), _bytes(sparse),
        tuple(layers), _replacements(dense, sparse, before, layers),
        name=name or type(dense).__name__, example=_described(inputs), activations=_activations(dense, sparse, inputs),
        training={
            optimizer: TrainingStates(training_state(dense, make), training_state(sparse, make))
            for optimizer, make in OPTIMIZERS.items()
        },
        check=_check(after, executed), compared=dense is not sparse,
    )  # fmt: skip


def _counted(module: object, inputs: Inputs, name: str) -> FlopCount:
    if not isinstance(module, nn.Module):
        raise UserError(f"{name} must be a torch.nn.Module, not {type(module).__name__}.")
    try:
        return count_flops(module, inputs)
    except Exception as error:
        raise UserError(f"{name} ({type(module).__name__}) does not run on the example inputs: {error}") from error


def _executed(sparse: nn.Module, inputs: Inputs) -> Executed:
    tensors = [*sparse.parameters(), *sparse.buffers(), *pytree.tree_leaves(inputs)]
    if any(isinstance(tensor, Tensor) and tensor.is_meta for tensor in tensors):
        return {}
    if not any(isinstance(layer, SparseLayer) for layer in sparse.modules()):
        return {}
    try:
        return executed_multiply_adds(sparse, inputs)
    except Exception as error:
        raise UserError(
            f"sparse ({type(sparse).__name__}) does not run on the example inputs: {error} "
            "report(…, execute=False) looks at their sizes only."
        ) from error


def _check(after: FlopCount, executed: Executed) -> FlopCheck | None:
    """FLOPs beside what was executed.

    Raises:
        SiftError: they differ.
    """
    for path, found in executed.items():
        if after.of(path) != 2 * found.total:
            raise SiftError(
                f"Layer {path!r} has {after.of(path):,} FLOPs by formula, but executed {found.total:,} multiply-adds, which are "
                f"{2 * found.total:,} FLOPs. A report with such numbers would be wrong. Either a formula is at fault, or the model "
                "calls the layer another number of times on tensors with numbers than on tensors without: then report it with "
                "execute=False."
            )
    if not executed:
        return None
    total = sum(executed.values(), MultiplyAdds(0))
    return FlopCheck(sum(after.of(path) for path in executed), total.total, total.on_padding)


def _activations(dense: nn.Module, sparse: nn.Module, inputs: Inputs) -> Activations:
    """Activation memory, or why train mode refuses the example, as batch norm does a single value per channel."""
    try:
        of_dense = activation_memory(dense, inputs)
        return Activations(of_dense, of_dense if sparse is dense else activation_memory(sparse, inputs))
    except Exception as error:  # a model may raise anything
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return Activations(None, None, f"the model does not run on the example inputs in train mode: {lines[0]}")


def _layers(
    dense: nn.Module, sparse: nn.Module, before: FlopCount, after: FlopCount, executed: Executed
) -> list[LayerReport]:
    decisions = notes.decisions(sparse) if isinstance(sparse, fx.GraphModule) else {}
    summaries = notes.replacements(sparse) if isinstance(sparse, fx.GraphModule) else {}
    shared = _second_paths(dense)
    found = []
    for path, layer in sparse.named_modules():
        if not isinstance(layer, _WEIGHTED):
            continue
        if isinstance(layer, SparseLayer):
            shape, kept = layer.weight_shape, layer.pattern.nnz
            structure = "" if layer.structure == UNSTRUCTURED else str(layer.structure)
        else:
            shape, kept, structure = tuple(layer.weight.shape), layer.weight.numel(), ""
        decision, done = decisions.get(path), executed.get(path)
        origin = "" if decision is None else decision.origin
        shape_before = None if origin else _shape_before(dense, path, decision)
        flops_before = before.of(path)
        if not flops_before and decision is not None and not origin and shape_before is not None and path not in shared:
            flops_before = _flops_like(after.of(path), kept, shape_before)
        found.append(
            LayerReport(
                path, type(layer).__name__, shape_before, shape, 1 - kept / math.prod(shape), kept, flops_before, after.of(path),
                "" if decision is None else decision.reason, origin, _member(layer, decision, summaries), structure,
                None if done is None else done.total, None if done is None else done.on_padding,
            )
        )  # fmt: skip
    return found


def _member(layer: nn.Module, decision: LayerDecision | None, summaries: Mapping[str, str]) -> str:
    """The transformation that made a layer: a part's is told by what stands with it; alone, only widening makes a layer sparse."""
    if decision is None:
        return ""
    if decision.origin:
        return summaries.get(decision.origin, "").partition(",")[0]
    return "SparseWide" if isinstance(layer, SparseLayer) else ""


def _shape_before(dense: nn.Module, path: str, decision: LayerDecision | None) -> tuple[int, ...] | None:
    """What the rewrite saw, which turns transposed weights around; without its notes, what the dense model has."""
    return _weight_shape(dense, path) if decision is None else decision.weight_shape


def _flops_like(flops: int, kept: int, shape: tuple[int, ...]) -> int:
    """FLOPs of a dense weight of ``shape`` on as many positions as a layer of ``kept`` weights has.

    For layers that are no modules in the dense model, as in nn.MultiheadAttention: its count tells of the whole module only.
    """
    return flops // kept * math.prod(shape) if kept else 0


def _second_paths(dense: nn.Module) -> set[str]:
    """All paths but the first of modules that have several; their FLOPs are under the first."""
    return {path for path, _ in dense.named_modules(remove_duplicate=False)} - {
        path for path, _ in dense.named_modules()
    }


def _replacements(
    dense: nn.Module, sparse: nn.Module, before: FlopCount, layers: Sequence[LayerReport]
) -> tuple[ReplacementReport, ...]:
    summaries = notes.replacements(sparse) if isinstance(sparse, fx.GraphModule) else {}
    shared = _second_paths(dense)
    found = []
    for path, summary in summaries.items():
        parts = tuple(layer for layer in layers if layer.origin == path)
        shape, flops = _outputs_first(_weight_shape(dense, path), parts), before.of(path)
        if not flops and shape is not None and parts and path not in shared:
            flops = _flops_like(parts[0].flops_after, parts[0].kept, shape)
        found.append(ReplacementReport(path, summary, shape, flops, parts))
    return tuple(found)


def _outputs_first(shape: tuple[int, ...] | None, parts: Sequence[LayerReport]) -> tuple[int, ...] | None:
    """``shape`` as its parts have it: GPT-2 holds linear weights as [in, out]."""
    if shape is None or len(shape) != 2 or not parts:
        return shape
    ends = (parts[-1].shape_after[0], parts[0].shape_after[1])
    return ends if shape == ends[::-1] else shape


def _weight_shape(dense: nn.Module, path: str) -> tuple[int, ...] | None:
    """Shape of the weight at ``path``, or of the bare parameter that a rewrite makes the layer ``path`` of."""
    module = dict(dense.named_modules(remove_duplicate=False)).get(path)
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        weight = dict(dense.named_parameters(remove_duplicate=False)).get(f"{path}_weight")
    return tuple(weight.shape) if isinstance(weight, Tensor) else None


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in [*module.parameters(), *module.buffers()])


def _described(inputs: Inputs) -> tuple[str, ...]:
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    return tuple(f"{str(each.dtype).removeprefix('torch.')} {list(each.shape)}" for each in tensors)
