"""The operators ``sift::conv2d`` and ``sift::linear`` and their backward operators.

One boundary for everything: eager mode, autograd, torch.compile, autocast, the FLOP counter and every runtime meet here.

    y  = conv2d(x, values, index, bias, shape, stride, padding, dilation, groups, probe, kernel_handle)
    dx = conv2d_input_gradient(dy, values, index, shape, input_shape, stride, padding, dilation, groups, kernel_handle)
    dv = conv2d_values_gradient(dy, x, index, shape, stride, padding, dilation, groups, probe, kernel_handle)

``values`` and ``index``, both as long as there are slots, are the compact weight of dense ``shape`` (see ir.pattern). ``probe`` is a handle of
nn.growth (0: none), ``kernel_handle`` one of nn.live (0: the reference). Both are constants of the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sift_compiler.nn import growth, live, reference

Ints = Sequence[int]


@torch.library.custom_op("sift::conv2d", mutates_args=())
def conv2d(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, probe: int = 0, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    """Sparse convolution: x [N, C, H, W], dense weight shape [M, C / groups, kh, kw] → [N, M, H', W'], contiguous."""
    if kernel_handle != live.REFERENCE:
        return live.lookup(kernel_handle)(x, values, index, bias)
    return reference.conv2d(x, values, index, bias, shape, stride, padding, dilation, groups)


@conv2d.register_fake
def _(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, shape: Ints, stride: Ints,
    padding: Ints, dilation: Ints, groups: int, probe: int = 0, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    return empty_output(x, shape, stride, padding, dilation, groups)


def empty_output(x: Tensor, shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> Tensor:
    """An uninitialised [N, M, H', W'] for x [N, C, H, W] and a dense weight of ``shape``.

    Not by way of F.conv2d: on fake tensors that asks which of torch's implementations fits the batch, and the answer becomes a guard,
    hence another graph for batches below 16.
    """
    torch._check(  # type: ignore[no-untyped-call]
        x.dim() == 4 and x.shape[1] == shape[1] * groups,
        lambda: f"sift::conv2d expects an input [N, {shape[1] * groups}, H, W], got {list(x.shape)}",
    )
    size = [(x.shape[2 + a] + 2 * padding[a] - dilation[a] * (shape[2 + a] - 1) - 1) // stride[a] + 1 for a in (0, 1)]
    return x.new_empty((x.shape[0], shape[0], *size))


@torch.library.custom_op("sift::conv2d_input_gradient", mutates_args=())
def conv2d_input_gradient(
    gradient: Tensor, values: Tensor, index: Tensor, shape: Sequence[int], input_shape: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    """dL/dx of :func:`conv2d`, of ``input_shape``, contiguous."""
    kernel = live.gradients(kernel_handle)
    if kernel is not None:
        return kernel.input_gradient(gradient, values, index, input_shape)
    return reference.conv2d_input_gradient(
        gradient, values, index, shape, input_shape, stride, padding, dilation, groups
    )


@conv2d_input_gradient.register_fake
def _(
    gradient: Tensor, values: Tensor, index: Tensor, shape: Ints, input_shape: Ints,
    stride: Ints, padding: Ints, dilation: Ints, groups: int, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    return gradient.new_empty(input_shape)


@torch.library.custom_op("sift::conv2d_values_gradient", mutates_args=())
def conv2d_values_gradient(
    gradient: Tensor, x: Tensor, index: Tensor, shape: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int], groups: int, probe: int = 0, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    """dL/dvalues [slots] of :func:`conv2d`; leaves the dense gradient in the probe if that is armed."""
    wanted = growth.notice(probe)
    # Where the dense gradient is wanted it holds that of the kept values, too.
    kernel = live.gradients(kernel_handle) if wanted is None else None
    if kernel is not None:
        return kernel.values_gradient(gradient, x, index)
    dense = reference.conv2d_weight_gradient(gradient, x, shape, stride, padding, dilation, groups)
    if wanted is not None:
        wanted.add(dense)
    return reference.gather(dense, index)


@conv2d_values_gradient.register_fake
def _(
    gradient: Tensor, x: Tensor, index: Tensor, shape: Ints, stride: Ints,
    padding: Ints, dilation: Ints, groups: int, probe: int = 0, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    return gradient.new_empty(index.shape)


@torch.library.custom_op("sift::linear", mutates_args=())
def linear(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    bias: Tensor | None,
    shape: Sequence[int],
    probe: int = 0,
    kernel_handle: int = 0,
) -> Tensor:
    """Sparse linear map: x [..., in], dense weight shape [out, in] → [..., out], contiguous."""
    if kernel_handle != live.REFERENCE:
        return live.lookup(kernel_handle)(x, values, index, bias)
    return reference.linear(x, values, index, bias, shape)


@linear.register_fake
def _(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, shape: Ints, probe: int = 0, kernel_handle: int = 0
) -> Tensor:
    torch._check(  # type: ignore[no-untyped-call]
        x.shape[-1] == shape[1], lambda: f"sift::linear expects {shape[1]} input features, got {x.shape[-1]}"
    )
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.custom_op("sift::linear_input_gradient", mutates_args=())
def linear_input_gradient(
    gradient: Tensor, values: Tensor, index: Tensor, shape: Sequence[int], kernel_handle: int = 0
) -> Tensor:
    """dL/dx [..., in] of :func:`linear`."""
    kernel = live.gradients(kernel_handle)
    if kernel is not None:
        return kernel.input_gradient(gradient, values, index, (*gradient.shape[:-1], shape[1]))
    return reference.linear_input_gradient(gradient, values, index, shape)


@linear_input_gradient.register_fake
def _(gradient: Tensor, values: Tensor, index: Tensor, shape: Ints, kernel_handle: int = 0) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], shape[1]))


@torch.library.custom_op("sift::linear_values_gradient", mutates_args=())
def linear_values_gradient(
    gradient: Tensor, x: Tensor, index: Tensor, shape: Sequence[int], probe: int = 0, kernel_handle: int = 0
) -> Tensor:
    """dL/dvalues [slots] of :func:`linear`; leaves the dense gradient in the probe if that is armed."""
    wanted = growth.notice(probe)
    # Where the dense gradient is wanted it holds that of the kept values, too.
    kernel = live.gradients(kernel_handle) if wanted is None else None
    if kernel is not None:
        return kernel.values_gradient(gradient, x, index)
    dense = reference.linear_weight_gradient(gradient, x)
    if wanted is not None:
        wanted.add(dense)
    return reference.gather(dense, index)


@linear_values_gradient.register_fake
def _(gradient: Tensor, x: Tensor, index: Tensor, shape: Ints, probe: int = 0, kernel_handle: int = 0) -> Tensor:
    return gradient.new_empty(index.shape)


# --- autograd -------------------------------------------------------------------------------------------------------


def _save_conv2d(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, _bias, ctx.shape, ctx.stride, ctx.padding, ctx.dilation, ctx.groups, ctx.probe, ctx.kernel = (
        inputs
    )
    ctx.save_for_backward(x, values, index)


def _conv2d_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, index = ctx.saved_tensors
    geometry = (ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    dx = dv = db = None
    if ctx.needs_input_grad[0]:
        dx = conv2d_input_gradient(gradient, values, index, ctx.shape, x.shape, *geometry, ctx.kernel)
    if ctx.needs_input_grad[1]:
        dv = conv2d_values_gradient(gradient, x, index, ctx.shape, *geometry, ctx.probe, ctx.kernel)
    if ctx.needs_input_grad[3]:
        db = gradient.sum((0, 2, 3))
    return (dx, dv, None, db, *[None] * 7)


def _save_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, _bias, ctx.shape, ctx.probe, ctx.kernel = inputs
    ctx.save_for_backward(x, values, index)


def _linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    x, values, index = ctx.saved_tensors
    dx = dv = db = None
    if ctx.needs_input_grad[0]:
        dx = linear_input_gradient(gradient, values, index, ctx.shape, ctx.kernel)
    if ctx.needs_input_grad[1]:
        dv = linear_values_gradient(gradient, x, index, ctx.shape, ctx.probe, ctx.kernel)
    if ctx.needs_input_grad[3]:
        db = gradient.reshape(-1, gradient.shape[-1]).sum(0)
    return (dx, dv, None, db, *[None] * 3)


conv2d.register_autograd(_conv2d_backward, setup_context=_save_conv2d)
linear.register_autograd(_linear_backward, setup_context=_save_linear)


# --- autocast -------------------------------------------------------------------------------------------------------

_autocast = torch.library.Library("sift", "FRAGMENT")  # type: ignore[no-untyped-call]


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return tensor.to(dtype) if tensor is not None and tensor.dtype == torch.float32 else tensor


def _register_autocast(device: str) -> None:
    """Matrix products run in the autocast dtype, as torch's own conv2d and linear do."""
    name = f"Autocast{device.upper()}"
    key = getattr(torch._C.DispatchKey, name)

    def run(operator: Any, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        """``operator`` on tensors in the autocast dtype."""
        dtype = torch.get_autocast_dtype(device)
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            result: Tensor = operator(_cast(x, dtype), _cast(values, dtype), index, _cast(bias, dtype), *rest)
        return result

    _autocast.impl("conv2d", lambda *a: run(torch.ops.sift.conv2d.default, *a), name)  # type: ignore[no-untyped-call]
    _autocast.impl("linear", lambda *a: run(torch.ops.sift.linear.default, *a), name)  # type: ignore[no-untyped-call]


_register_autocast("cpu")
_register_autocast("cuda")


# --- FLOPs: 2 per multiply-add, kept weights only -------------------------------------------------------------------


@register_flop_formula(torch.ops.sift.conv2d)
def _conv2d_flops(x: Any, values: Any, index: Any, bias: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    # A fifth dimension holds images, see image_vectors.
    return int(2 * values[0] * math.prod(out_shape) // max(1, out_shape[1]))


@register_flop_formula([torch.ops.sift.conv2d_input_gradient])
def _conv2d_input_gradient_flops(gradient: Any, values: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * values[0] * gradient[0] * gradient[2] * gradient[3])


@register_flop_formula([torch.ops.sift.conv2d_values_gradient])
def _conv2d_values_gradient_flops(
    gradient: Any, x: Any, index: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(2 * index[0] * gradient[0] * gradient[2] * gradient[3])


def _rows(shape: Any) -> int:
    return int(torch.Size(shape[:-1]).numel())


@register_flop_formula(torch.ops.sift.linear)
def _linear_flops(x: Any, values: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * values[0] * _rows(x))


@register_flop_formula([torch.ops.sift.linear_input_gradient])
def _linear_input_gradient_flops(gradient: Any, values: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(2 * values[0] * _rows(gradient))


@register_flop_formula([torch.ops.sift.linear_values_gradient])
def _linear_values_gradient_flops(
    gradient: Any, x: Any, index: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(2 * index[0] * _rows(gradient))
