"""The operators of this package in standard ONNX operators.

A sparse weight of dense shape [out, ...] stays compact in the file::

    zeros  = ConstantOfShape([numel])
    flat   = ScatterElements(zeros, index [nnz], values [nnz])
    weight = Reshape(flat, shape)

ONNX Runtime folds the three into one dense initializer when it loads the model; the file holds values and index only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir
from onnxscript import opset18 as op

OPSET = 18
"""ScatterElements and Conv as used here exist since; ONNX Runtime reads it from 1.14 on."""

WEIGHT_NODE = "ScatterElements"
"""The operator type that stands for a compact weight; one per sparse layer."""


def _dense_weight(values: Any, index: Any, shape: Sequence[int]) -> Any:
    zeros = op.ConstantOfShape(op.Constant(value_ints=[math.prod(shape)]), value=ir.tensor([0], dtype=values.dtype))
    flat = op.ScatterElements(zeros, index, values, axis=0)
    return op.Reshape(flat, op.Constant(value_ints=list(shape)))


def _conv2d(
    x: Any, values: Any, index: Any, bias: Any, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, probe: int = 0, kernel_handle: int = 0,
) -> Any:  # fmt: skip
    weight = _dense_weight(values, index, shape)
    return op.Conv(
        x, weight, bias, kernel_shape=list(shape[2:]), strides=list(stride), pads=[*padding, *padding],
        dilations=list(dilation), group=groups,
    )  # fmt: skip


def _linear(
    x: Any, values: Any, index: Any, bias: Any, shape: Sequence[int], probe: int = 0, kernel_handle: int = 0
) -> Any:
    product = op.MatMul(x, op.Transpose(_dense_weight(values, index, shape), perm=[1, 0]))
    return product if bias is None else op.Add(product, bias)


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table that ``torch.onnx.export`` takes as ``custom_translation_table``."""
    return {torch.ops.sift.conv2d.default: _conv2d, torch.ops.sift.linear.default: _linear}
