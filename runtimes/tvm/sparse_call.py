"""One sparse layer inside a Relax function: the same kernels as in a torch process, with the mask and the values as constants.

A part knows how to call its kernels; here its calls are recorded instead of run, and replayed as ``call_tir`` of kernels
whose integer arguments have been made constants. So nothing about tiles, windows or programs is written twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.sharing import measured_loads
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes.tvm.part import Code
from sift_compiler.runtimes.tvm.prepare import LayerPart, prepare
from sift_compiler.runtimes.tvm.workspace import exact_scratch


@dataclass(frozen=True)
class FrozenLayer:
    """A sparse layer whose mask and values no longer change.

    Attributes:
        name: module path, for messages and symbols.
        spec: the layer.
        values, index: float32 and int32 [nnz].
        bias: float32 [out] or None.
    """

    name: str
    spec: LayerSpec
    values: Tensor
    index: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class _Call:
    """A recorded kernel call: what was compiled, and its arguments in order (tensors and integers)."""

    code: Code
    arguments: tuple[Any, ...]


def emit_sparse_layer(builder: Any, x: Any, input_shape: tuple[int, ...], layer: FrozenLayer, cpu: CpuFacts) -> Any:
    """Emit ``layer`` on the Relax expression ``x`` of static ``input_shape`` into the current binding block.

    Returns:
        The Relax expression of the output, [N, M, H', W'] or [..., out].
    """
    from tvm import relax

    spec = layer.spec
    linear = spec.kind == "linear"
    size = (1, 1) if linear else (input_shape[2], input_shape[3])
    items = int(np.prod(input_shape[:-1])) if linear else input_shape[0]
    inner = (spec.in_channels,) if linear else tuple(input_shape[1:])
    outer = (spec.out_channels,) if linear else (spec.out_channels, *spec.output_size(*size))
    output_shape = (*input_shape[:-1], spec.out_channels) if linear else (items, *outer)
    bias = torch.zeros(spec.out_channels) if layer.bias is None else layer.bias
    if layer.values.numel() == 0:
        constant = bias.view(-1, *(1 for _ in outer[1:])).expand(items, *outer).reshape(output_shape)
        return builder.emit(relax.const(constant.numpy()))
    x = builder.emit(relax.op.reshape(x, (items, *inner)))
    pieces, done = [], 0
    for choice in choose(spec, (items, *inner), cpu, loads=measured_loads(layer.index.numpy(), spec)):
        part = prepare(spec, choice, size, cpu, threads=1, recorded=True)
        order = part.repack(layer.index.numpy()).order
        piece = builder.emit(_slice(x, choice.first, choice.count, (items, *inner)))
        packed = layer.values[torch.from_numpy(order).long()]
        y = _emit_part(builder, piece, inner, outer, part, packed, bias)
        last = min(choice.first + choice.count, items)
        # Parts may overlap, or reach past the batch: keep of each what is new.
        pieces.append(builder.emit(_rows(y, done - choice.first, last - choice.first)))
        done = last
    whole = pieces[0] if len(pieces) == 1 else builder.emit(relax.op.concat(pieces, axis=0))
    return builder.emit(relax.op.reshape(whole, output_shape))


def _rows(x: Any, begin: int, end: int) -> Any:
    from tvm import relax

    return relax.op.strided_slice(x, axes=[0], begin=[begin], end=[end])


def _slice(x: Any, first: int, count: int, shape: tuple[int, ...]) -> Any:
    """``count`` images (tokens) from ``first`` on; zeros where the batch has ended."""
    from tvm import relax

    missing = max(0, first + count - shape[0])
    x = _rows(x, first, min(first + count, shape[0]))
    if not missing:
        return x
    return relax.op.concat([x, relax.op.zeros((missing, *shape[1:]), "float32")], axis=0)


def _emit_part(
    builder: Any, x: Any, inner: tuple[int, ...], outer: tuple[int, ...], part: LayerPart, values: Tensor, bias: Tensor
) -> Any:
    from tvm import relax

    source, target = torch.zeros(part.choice.count, *inner), torch.zeros(part.choice.count, *outer)
    known = {source.data_ptr(): builder.emit(relax.op.reshape(x, (source.numel(),)))}
    with exact_scratch():
        for call in _recorded(part, source, bias, target):
            _emit_call(builder, call, known, values, part)
    return builder.emit(relax.op.reshape(known[target.data_ptr()], tuple(target.shape)))


def _recorded(part: LayerPart, x: Tensor, bias: Tensor, y: Tensor) -> list[_Call]:
    """The kernel calls of one run of ``part``, in order, without running them."""
    calls: list[_Call] = []
    packing_code, kernel_code = part.code()

    def record(code: Code) -> Callable[..., None]:
        return lambda *arguments: calls.append(_Call(code, arguments))

    part.record(None if packing_code is None else record(packing_code), record(kernel_code))
    part.run(x, x, bias, y)
    return calls


def _emit_call(builder: Any, call: _Call, known: dict[int, Any], values: Tensor, part: LayerPart) -> None:
    """Replay one call. ``known`` maps the memory of tensors to Relax expressions; what a kernel writes is added to it."""
    from tvm import relax, tirx

    generator, constants = call.code
    symbol = f"sift_{generator.__name__}"
    function = generator(**constants, name=symbol)
    tensors = [argument for argument in call.arguments if isinstance(argument, Tensor)]
    integers = [argument for argument in call.arguments if not isinstance(argument, Tensor)]
    parameters = list(function.params)
    fixed = zip(parameters[len(tensors) :], integers, strict=True)
    function = function.specialize({parameter: tirx.IntImm("int32", value) for parameter, value in fixed})
    written = (
        1 if generator.__name__.startswith("pack") else 1 + part.workspace_count
    )  # packed input; or output and workspaces
    inputs, outputs = tensors[:-written], tensors[-written:]
    packed_values = part.packed_values_position if written > 1 else -1

    def expression(position: int, tensor: Tensor) -> Any:
        if position == packed_values:
            return relax.const(values.numpy())
        found = known.get(tensor.data_ptr())
        return relax.const(tensor.numpy()) if found is None else found

    arguments = [expression(position, tensor) for position, tensor in enumerate(inputs)]
    reference = builder.add_func(function.without_attr("global_symbol"), symbol)
    types = [relax.TensorType((tensor.numel(),), "float32") for tensor in outputs]
    result = builder.emit(relax.call_tir(reference, arguments, types if len(types) > 1 else types[0]))
    for tensor, expression in zip(outputs, _unpacked(builder, result, len(types)), strict=True):
        known[tensor.data_ptr()] = expression


def _unpacked(builder: Any, result: Any, count: int) -> Iterable[Any]:
    from tvm import relax

    return [result] if count == 1 else [builder.emit(relax.TupleGetItem(result, i)) for i in range(count)]
