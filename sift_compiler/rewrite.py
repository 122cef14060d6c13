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
from sift_compiler.options import LowRank, SparseWide, Transformation
from sift_compiler.passes.assign_rules import Rules
from sift_compiler.passes.read_schemes import is_trained

logger = logging.getLogger(__name__)


def rewrite(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any],
    transform: Transformation | Mapping[str, Transformation | None],
) -> fx.GraphModule:
    """Rewrite ``model`` into a sparse one with the FLOPs it has now.

    Args:
        model: a module, a graph that ``capture`` made, or a program exported in train mode. It is left as it is: the result owns
            its parameters and shares none.
        example_inputs: the model's positional arguments, the only one, or a dict of its keyword arguments; FLOPs are balanced
            for these sizes.
        transform: which rewrite, e.g. ``SparseWide(sparsity=0.9)``; or several by pattern of module paths, e.g.
            ``{"layer1.*": SparseParallel(sparsity=0.75), "layer4.*": SparseDoped(sparsity=0.75)}``: the first pattern that fits a
            layer has it, None keeps layers as they are, and so does no pattern.

    Returns:
        A trainable GraphModule with the module paths of ``model``; its layers are ``SparseConv2d`` and ``SparseLinear`` where they
        were made sparse. A layer that became several is a container of them at its path (``conv1.branch0``, ``conv1.u``). Parameters that kept their shape keep their values, all others are drawn anew
        by ``init``; the scheme of a model of one's own is read from its weights, so give it untrained. The first dimension of the
        inputs stays free.

    Raises:
        UserError: wrong inputs, or a transformation that is not possible on this model.
        UnsupportedError: the model does something for which there is no rule.
    """
    rules = _rules(transform)
    inputs = as_inputs(example_inputs)
    graph_module = _dense(model, inputs)
    device = next((parameter.device for parameter in graph_module.parameters()), torch.device("cpu"))
    dense = _counted(graph_module, inputs)
    steps = pipeline.rewriting(rules, dense, inputs, device, _as_made(model, graph_module))
    result = pipeline.run(graph_module, steps).graph_module
    verify(result)
    return result


def plan(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any],
    transform: Transformation | Mapping[str, Transformation | None],
) -> fx.GraphModule:
    """What :func:`rewrite` would make, without masks and new values: a graph to look at, not to run.

    Arguments and errors are those of :func:`rewrite`. ``ir.annotations.decisions`` of the result tells of every layer what becomes of
    it and why, ``balance`` the FLOPs.
    """
    rules = _rules(transform)
    inputs = as_inputs(example_inputs)
    graph_module = _dense(model, inputs)
    return pipeline.run(graph_module, pipeline.planning(rules, _counted(graph_module, inputs), inputs)).graph_module


def _rules(transform: object) -> Rules:
    """The transformations by pattern; a single one takes every layer."""
    example = 'SparseWide(sparsity=0.9) or {"layer1.*": SparseParallel(sparsity=0.75)}'
    if isinstance(transform, Transformation):
        return {"*": transform}
    if not isinstance(transform, Mapping):
        raise UserError(f"transform must be options such as {example}, not {type(transform).__name__}.")
    for pattern, each in transform.items():
        if not isinstance(pattern, str) or not (each is None or isinstance(each, Transformation)):
            raise UserError(
                f"{pattern!r}: {each!r} is not possible in transform. Expected is, e.g., {example}, or None to keep layers."
            )
    chosen = [each for each in transform.values() if each is not None]
    if not chosen:
        raise UserError(f"transform has no transformation in it. Expected is, e.g., {example}.")
    if any(isinstance(each, LowRank) for each in chosen) and len(chosen) > 1:
        raise UserError("LowRank is a dense baseline of its own: it cannot be mixed with other transformations.")
    if sum(isinstance(each, SparseWide) for each in chosen) > 1:
        raise UserError(
            "A mix can hold one SparseWide: widths that meet can grow by one factor only. Name its layers with one pattern."
        )
    for name in ("seed", "init"):
        if len({getattr(each, name) for each in chosen}) > 1:
            raise UserError(f"The transformations of a mix share one {name}; give all of them the same.")
    return transform


def _dense(model: object, inputs: Inputs) -> fx.GraphModule:
    graph_module = _captured(model, inputs)
    if any(isinstance(module, SparseLayer) for module in graph_module.modules()):
        raise UserError("The model is sparse already; rewrite the dense model it came from.")
    return pipeline.run(graph_module, pipeline.preparing()).graph_module


def _as_made(model: object, graph_module: fx.GraphModule) -> Mapping[str, Tensor] | None:
    """The tensors a trained model had before training, or such as its author's initialiser makes; None where nobody can tell.

    Hugging Face's models are made from their configuration alone, with their own initialiser.
    """
    if not is_trained(graph_module):
        return None
    configuration: Any = getattr(model, "config", None)
    if isinstance(model, nn.Module) and configuration is not None and hasattr(model, "_init_weights"):
        logger.info("The model is trained: a new one is made from its configuration, for the scheme of new weights")
        with torch.random.fork_rng(devices=[]):
            twin: nn.Module = type(model)(copy.deepcopy(configuration))
        return {name: tensor.detach() for name, tensor in twin.named_parameters(remove_duplicate=False)}
    logger.warning(
        "The model is trained, so the scheme of its first weights cannot be read: new linear layers have torch's default. For the "
        "model's own, give it as its constructor made it."
    )
    return None


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
