"""rewrite: a dense model becomes an iso-FLOP sparse one."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from sift_compiler import pipeline
from sift_compiler.capture import capture, raise_exported
from sift_compiler.errors import UserError
from sift_compiler.ir.flops import FlopCount, count_flops
from sift_compiler.ir.inputs import Inputs, as_inputs
from sift_compiler.ir.verify import verify
from sift_compiler.nn import SparseLayer
from sift_compiler.options import SparseWide

logger = logging.getLogger(__name__)


def rewrite(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any],
    transform: SparseWide,
) -> fx.GraphModule:
    """Rewrite ``model`` into a sparse one with the FLOPs it has now.

    Args:
        model: a module, a graph that ``capture`` made, or a program exported in train mode. It is left as it is: the result owns
            its parameters and shares none.
        example_inputs: the model's positional arguments, the only one, or a dict of its keyword arguments; FLOPs are balanced
            for these sizes.
        transform: which rewrite, e.g. ``SparseWide(sparsity=0.9)``.

    Returns:
        A trainable GraphModule with the module paths of ``model``; its layers are ``SparseConv2d`` and ``SparseLinear`` where they
        were made sparse. Parameters that kept their shape keep their values, all others are drawn anew. The first dimension of the
        inputs stays free.

    Raises:
        UserError: wrong inputs, or a transformation that is not possible on this model.
        UnsupportedError: the model does something for which there is no rule.
    """
    if not isinstance(transform, SparseWide):
        raise UserError(f"transform must be options such as SparseWide(sparsity=0.9), not {type(transform).__name__}.")
    inputs = as_inputs(example_inputs)
    graph_module = _captured(model, inputs)
    if any(isinstance(module, SparseLayer) for module in graph_module.modules()):
        raise UserError("The model is sparse already; rewrite the dense model it came from.")
    device = next((parameter.device for parameter in graph_module.parameters()), torch.device("cpu"))
    dense = _counted(graph_module, inputs)
    steps = pipeline.sparse_wide(transform, dense, inputs, device)
    result = pipeline.run(graph_module, steps).graph_module
    verify(result)
    return result


def _counted(graph_module: fx.GraphModule, inputs: Inputs) -> FlopCount:
    try:
        return count_flops(graph_module, inputs)
    except Exception as error:
        shapes = ", ".join(str(tuple(each.shape)) for each in pytree.tree_leaves(inputs) if isinstance(each, Tensor))
        raise UserError(f"The captured model does not run on the example inputs (shapes {shapes}): {error}") from error


def _captured(model: object, inputs: Inputs) -> fx.GraphModule:
    if isinstance(model, ExportedProgram):
        return raise_exported(model)
    if isinstance(model, fx.GraphModule) and all(
        "val" in node.meta for node in model.graph.nodes if node.op == "placeholder"
    ):
        return copy.deepcopy(model)
    if isinstance(model, nn.Module):
        return capture(model, inputs)
    raise UserError(f"model must be a torch.nn.Module or an ExportedProgram, not {type(model).__name__}.")
