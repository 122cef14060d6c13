"""Which nn module an operator call stands for.

An exported graph holds operator calls with literals; each entry here reads one of them back into the module that makes the same
call: its class, its settings and which of the call's arguments are the module's own tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from sift_compiler.ir.pattern import Pattern
from sift_compiler.nn import SparseConv2d, SparseLinear
from sift_compiler.nn.attention import ScaledDotProductAttention
from sift_compiler.passes.operators import arguments, attribute, lengthened, module_type

aten = torch.ops.aten
_META = torch.device("meta")
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


@dataclass(frozen=True)
class Call:
    """A module call that an operator call stands for.

    Attributes:
        inputs: the call's arguments that remain arguments.
        tensors: the module's own tensors by name; None where the module has none of that name.
        extra: names of further tensors the module may own although the operator does not read them.
        settings: everything but tensors that tells two modules of the kind apart.
        build: makes the module, its parameters still without values.
    """

    inputs: tuple[Node, ...]
    tensors: Mapping[str, Node | None]
    settings: tuple[Any, ...]
    build: Callable[[], nn.Module]
    extra: tuple[str, ...] = ()


Reader = Callable[[GraphModule, Node], Call | None]


def _convolution(kind: Callable[..., nn.Module], rank: int, graph_module: GraphModule, node: Node) -> Call | None:
    call = arguments(node)
    weight = attribute(graph_module, call["weight"])
    if weight is None:
        return None
    stride, dilation = lengthened(call["stride"], rank), lengthened(call["dilation"], rank)
    padding = call["padding"] if isinstance(call["padding"], str) else lengthened(call["padding"], rank)
    out, inner, *kernel = weight.shape
    settings = (kind, tuple(weight.shape), stride, padding, dilation, call["groups"])
    build = partial(
        kind, inner * call["groups"], out, tuple(kernel), stride, padding, dilation, call["groups"],
        bias=call["bias"] is not None, device=_META, dtype=weight.dtype,
    )  # fmt: skip
    return Call((call["input"],), {"weight": call["weight"], "bias": call["bias"]}, settings, build)


def _linear(graph_module: GraphModule, node: Node) -> Call | None:
    call = arguments(node)
    weight = attribute(graph_module, call["weight"])
    if weight is None or weight.dim() != 2:
        return None
    out, inner = weight.shape
    build = partial(nn.Linear, inner, out, call["bias"] is not None, device=_META, dtype=weight.dtype)
    tensors = {"weight": call["weight"], "bias": call["bias"]}
    return Call((call["input"],), tensors, (nn.Linear, tuple(weight.shape)), build)


def _batch_norm(graph_module: GraphModule, node: Node) -> Call | None:
    """A frozen batch norm (training=False in a graph exported in train mode) stays an operator: it never follows .train()."""
    call = arguments(node)
    mean, value = attribute(graph_module, call["running_mean"]), call["input"].meta.get("val")
    if mean is None or value is None or not call["training"] or isinstance(call["momentum"], Node):
        return None
    kind, affine = _BATCH_NORMS[value.dim()], call["weight"] is not None
    build = partial(kind, mean.numel(), call["eps"], call["momentum"], affine, device=_META, dtype=mean.dtype)
    tensors = {name: call[name] for name in ("weight", "bias", "running_mean", "running_var")}
    settings = (kind, mean.numel(), call["eps"], call["momentum"], affine)
    return Call((call["input"],), tensors, settings, build, extra=("num_batches_tracked",))


def _layer_norm(graph_module: GraphModule, node: Node) -> Call | None:
    call = arguments(node)
    weight, shape = attribute(graph_module, call["weight"]), tuple(call["normalized_shape"])
    if weight is None:
        return None
    build = partial(nn.LayerNorm, shape, call["eps"], True, call["bias"] is not None, device=_META, dtype=weight.dtype)
    tensors = {"weight": call["weight"], "bias": call["bias"]}
    return Call((call["input"],), tensors, (nn.LayerNorm, shape, call["eps"]), build)


def _embedding(graph_module: GraphModule, node: Node) -> Call | None:
    call = arguments(node)
    weight = attribute(graph_module, call["weight"])
    if weight is None:
        return None
    padding = None if call["padding_idx"] < 0 else call["padding_idx"]
    build = partial(
        nn.Embedding, weight.shape[0], weight.shape[1], padding, scale_grad_by_freq=call["scale_grad_by_freq"],
        sparse=call["sparse"], device=_META, dtype=weight.dtype,
    )  # fmt: skip
    settings = (nn.Embedding, tuple(weight.shape), padding, call["scale_grad_by_freq"], call["sparse"])
    return Call((call["indices"],), {"weight": call["weight"]}, settings, build)


def _dropout(kinds: tuple[type[nn.Module], ...], graph_module: GraphModule, node: Node) -> Call | None:
    """Which of ``kinds`` it was the node remembers, or it is taken for the first."""
    call = arguments(node)
    if not call["train"]:
        return None
    kind = next((kind for kind in kinds if kind.__name__ == module_type(node)), kinds[0])
    return Call((call["input"],), {}, (kind, call["p"]), partial(kind, call["p"]))


def _attention(graph_module: GraphModule, node: Node) -> Call | None:
    """Only attention with dropout: without, the operator does the same in training and evaluation."""
    call = arguments(node)
    if not isinstance(call["dropout_p"], float) or call["dropout_p"] == 0 or isinstance(call["scale"], Node):
        return None
    given = (call["query"], call["key"], call["value"], call["attn_mask"])
    settings = (call["dropout_p"], call["is_causal"], call["scale"], call["enable_gqa"])
    inputs = tuple(each for each in given if each is not None)
    return Call(inputs, {}, (ScaledDotProductAttention, *settings), partial(ScaledDotProductAttention, *settings))


def _sparse_linear(graph_module: GraphModule, node: Node) -> Call | None:
    call = arguments(node)
    index = attribute(graph_module, call["index"])
    if index is None:
        return None
    out, inner = call["shape"]
    build = partial(SparseLinear, inner, out, call["bias"] is not None, pattern=Pattern((out, inner), index))
    tensors = {name: call[name] for name in ("values", "index", "bias")}
    return Call((call["x"],), tensors, (SparseLinear, out, inner), build)


def _sparse_conv2d(graph_module: GraphModule, node: Node) -> Call | None:
    call = arguments(node)
    index = attribute(graph_module, call["index"])
    if index is None:
        return None
    out, inner, *kernel = call["shape"]
    stride, padding, dilation = (lengthened(call[name], 2) for name in ("stride", "padding", "dilation"))
    build = partial(
        SparseConv2d, inner * call["groups"], out, (kernel[0], kernel[1]), stride, padding, dilation, call["groups"],  # type: ignore[arg-type]
        call["bias"] is not None, pattern=Pattern(tuple(call["shape"]), index),
    )  # fmt: skip
    tensors = {name: call[name] for name in ("values", "index", "bias")}
    settings = (SparseConv2d, tuple(call["shape"]), stride, padding, dilation, call["groups"])
    return Call((call["x"],), tensors, settings, build)


READERS: Mapping[Any, Reader] = {
    aten.conv1d.default: partial(_convolution, nn.Conv1d, 1),
    aten.conv1d.padding: partial(_convolution, nn.Conv1d, 1),
    aten.conv2d.default: partial(_convolution, nn.Conv2d, 2),
    aten.conv2d.padding: partial(_convolution, nn.Conv2d, 2),
    aten.conv3d.default: partial(_convolution, nn.Conv3d, 3),
    aten.conv3d.padding: partial(_convolution, nn.Conv3d, 3),
    aten.linear.default: _linear,
    aten.batch_norm.default: _batch_norm,
    aten.layer_norm.default: _layer_norm,
    aten.embedding.default: _embedding,
    aten.dropout.default: partial(_dropout, (nn.Dropout,)),
    aten.feature_dropout.default: partial(_dropout, (nn.Dropout2d, nn.Dropout1d, nn.Dropout3d)),
    aten.alpha_dropout.default: partial(_dropout, (nn.AlphaDropout,)),
    aten.scaled_dot_product_attention.default: _attention,
    torch.ops.sift.linear.default: _sparse_linear,
    torch.ops.sift.conv2d.default: _sparse_conv2d,
}
"""What reads each operator."""


def tensor_of(graph_module: GraphModule, node: Node | None) -> Tensor | None:
    """The parameter or buffer behind a ``get_attr`` node."""
    value = attribute(graph_module, node)
    return value if isinstance(value, Tensor) else None
