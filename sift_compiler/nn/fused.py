"""The operators ``sift::conv2d_fused`` and ``sift::linear_fused``: a sparse layer and what follows it, in one call, for inference.

    y = activation((layer(x) + bias) · scale + shift + residual)
    scale = γ / √(var + ε), shift = β - mean · scale        (all [M]: a batch norm in evaluation mode)

The norm's tensors are given at every call, so its statistics may change. Scale and shift are computed here and not in the graph, where
inductor would compile a kernel for each size there is: most of the time of compiling a ResNet. There is no
backward: the torch.compile backend puts these operators only into graphs that need none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sift_compiler.nn import live, operators, reference
from sift_compiler.nn.image_vectors import by_image

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}
"""What may follow a layer, by name."""


@dataclass(frozen=True)
class Finish:
    """The tensors of an epilogue.

    Attributes:
        scale, shift: [M], both or neither.
        residual: of the output's shape, or None.
    """

    scale: Tensor | None = None
    shift: Tensor | None = None
    residual: Tensor | None = None

    @classmethod
    def of_norm(
        cls, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
        residual: Tensor | None,
    ) -> Finish:  # fmt: skip
        """The epilogue of a batch norm in evaluation mode (none without ``mean`` and ``variance``) and an addition."""
        if mean is None or variance is None:
            return cls(residual=residual)
        scale = torch.rsqrt(variance + eps)
        if weight is not None:
            scale = scale.mul_(weight)
        shift = -mean * scale if bias is None else torch.addcmul(bias, mean, scale, value=-1)
        return cls(scale, shift, residual)

    def contiguous(self) -> Finish:
        """The same, detached and contiguous."""
        tensors = (self.scale, self.shift, self.residual)
        if all(t is None or (t.is_contiguous() and not t.requires_grad) for t in tensors):
            return self
        return Finish(*(t if t is None else t.detach().contiguous() for t in tensors))

    def like(self, y: Tensor) -> Finish:
        """The same with the residual in the shape of ``y``."""
        if self.residual is None or self.residual.shape == y.shape:
            return self
        return dataclasses.replace(self, residual=self.residual.view(y.shape))

    def rows(self, first: int, last: int) -> Finish:
        """What images (tokens) from ``first`` to before ``last`` need."""
        return self if self.residual is None else dataclasses.replace(self, residual=self.residual[first:last])

    def apply(self, y: Tensor, activation: str, channel: int) -> Tensor:
        """The reference: finish ``y``, whose channels are dimension ``channel``."""
        if self.scale is not None and self.shift is not None:
            shape = [1] * y.dim()
            shape[channel] = -1
            y = y * self.scale.view(shape) + self.shift.view(shape)
        if self.residual is not None:
            y = y + self.residual
        return ACTIVATIONS[activation](y)


NOTHING = Finish()


Norm = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Mean, variance, weight and bias of a batch norm, each [M] or None."""


class KeptNorm:
    """:meth:`Finish.of_norm`, whose scale and shift are kept until it is given other tensors or a version says that one was changed in place.

    Changes that no version counts (through ``.data`` or a NumPy view) go unnoticed.
    """

    def __init__(self) -> None:
        self._held: tuple[Tensor | None, ...] = ()
        self._state: tuple[object, ...] = ()
        self._kept = NOTHING

    def finish(self, norm: Norm, eps: float, residual: Tensor | None) -> Finish:
        """The epilogue of ``norm`` and an addition."""
        if norm[0] is None:
            return NOTHING if residual is None else Finish(residual=residual)
        # Memory besides versions, for ``.data`` that is given anew; tensors made in inference mode count none.
        state = tuple(None if t is None else (t.data_ptr(), 0 if t.is_inference() else t._version) for t in norm)
        if state != self._state:
            # Aliases hold the memory, so that it is not given to others.
            self._held = tuple(None if t is None else t.detach() for t in norm)
            self._kept, self._state = Finish.of_norm(*norm, eps, None).contiguous(), state
        return self._kept if residual is None else Finish(self._kept.scale, self._kept.shift, residual)


class FusedKernel(Protocol):
    """A kernel that was built with an epilogue."""

    def __call__(self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, finish: Finish) -> Tensor:
        """Return the finished output, contiguous; no argument is changed."""


def _kernel(handle: int) -> FusedKernel:
    return cast(FusedKernel, live.lookup(handle))


@torch.library.custom_op("sift::conv2d_fused", mutates_args=())
def conv2d_fused(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, norm_mean: Tensor | None,
    norm_variance: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    residual: Tensor | None, activation: str, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    """:func:`operators.conv2d`, finished; the norm's tensors [M], residual [N, M, H', W'] → [N, M, H', W'], contiguous.

    With images side by side in vectors (see image_vectors) x, residual and the result have a fifth dimension.
    """
    finish = Finish.of_norm(norm_mean, norm_variance, norm_weight, norm_bias, eps, residual)
    if kernel_handle != live.REFERENCE:
        return _kernel(kernel_handle)(x, values, index, bias, finish)
    y = by_image(lambda x: reference.conv2d(x, values, index, bias, shape, stride, padding, dilation, groups), x)
    return finish.apply(y, activation, 1).contiguous()


def direct(freeze: bool) -> Callable[..., Tensor]:
    """What does as :func:`conv2d_fused` and :func:`linear_fused` with a kernel do, given the same arguments, without the dispatcher.

    With ``freeze`` it belongs to one layer and keeps the layer's scale and shift (see :class:`KeptNorm`).
    """
    kept = KeptNorm() if freeze else None

    def call_kernel(
        x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, norm_mean: Tensor | None,
        norm_variance: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
        residual: Tensor | None, *rest: Any,
    ) -> Tensor:  # fmt: skip
        norm = (norm_mean, norm_variance, norm_weight, norm_bias)
        finish = Finish.of_norm(*norm, eps, residual) if kept is None else kept.finish(norm, eps, residual)
        return _kernel(rest[-1])(x, values, index, bias, finish)

    return call_kernel


@conv2d_fused.register_fake
def _(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, norm_mean: Tensor | None,
    norm_variance: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    residual: Tensor | None, activation: str, shape: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    y = by_image(lambda x: operators.empty_output(x, shape, stride, padding, dilation, groups), x)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


@torch.library.custom_op("sift::linear_fused", mutates_args=())
def linear_fused(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, norm_mean: Tensor | None,
    norm_variance: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    residual: Tensor | None, activation: str, shape: Sequence[int], kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    """:func:`operators.linear`, finished; the norm's tensors [out], residual [..., out] → [..., out], contiguous."""
    finish = Finish.of_norm(norm_mean, norm_variance, norm_weight, norm_bias, eps, residual)
    if kernel_handle != live.REFERENCE:
        return _kernel(kernel_handle)(x, values, index, bias, finish)
    return finish.apply(reference.linear(x, values, index, bias, shape), activation, -1).contiguous()


@linear_fused.register_fake
def _(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, norm_mean: Tensor | None,
    norm_variance: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float,
    residual: Tensor | None, activation: str, shape: Sequence[int], kernel_handle: int = 0,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], shape[0]))


# Those of operators.py take shapes out of tensors themselves, as registered formulas do; raw, they are not made to do it twice.
register_flop_formula(torch.ops.sift.conv2d_fused, get_raw=True)(operators._conv2d_flops)
register_flop_formula(torch.ops.sift.linear_fused, get_raw=True)(operators._linear_flops)
