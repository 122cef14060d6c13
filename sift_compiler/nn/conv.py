"""Sparse two-dimensional convolution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sift_compiler.errors import UnsupportedError
from sift_compiler.ir.mask_structure import UNSTRUCTURED, Structure
from sift_compiler.ir.pattern import Pattern
from sift_compiler.nn.growth import NO_PROBE
from sift_compiler.nn.layer import SparseLayer

Size2d = int | tuple[int, int]


def _pair(size: Size2d) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


class SparseConv2d(SparseLayer):
    """Convolution with a compact sparse weight of dense shape [out_channels, in_channels / groups, kh, kw].

    Args:
        in_channels: channels of x.
        out_channels: channels of y.
        kernel_size, stride, padding, dilation: as in torch.nn.Conv2d; padding is with zeros, in numbers.
        groups: as in torch.nn.Conv2d.
        bias: whether a bias is added.
        sparsity: removed share in [0, 1), for a random pattern with an exact count; ignored when ``pattern`` is given.
        pattern: where the kept weights sit.
        generator: source of randomness of the random pattern.
        structure: what the pattern must look like.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Size2d, stride: Size2d = 1, padding: Size2d = 0,
        dilation: Size2d = 1, groups: int = 1, bias: bool = True, *, sparsity: float = 0.9,
        pattern: Pattern | None = None, generator: torch.Generator | None = None,
        device: torch.device | str | None = None, dtype: torch.dtype | None = None,
        structure: Structure = UNSTRUCTURED,
    ) -> None:  # fmt: skip
        shape = (out_channels, in_channels // groups, *_pair(kernel_size))
        if pattern is None:
            pattern = structure.random(shape, structure.kept(shape, sparsity), generator)
        super().__init__(pattern, bias, device, dtype, structure)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = _pair(kernel_size), _pair(stride)
        self.padding, self.dilation = _pair(padding), _pair(dilation)

    @classmethod
    def like(cls, dense: nn.Conv2d, pattern: Pattern, structure: Structure = UNSTRUCTURED) -> SparseConv2d:
        """A layer with the geometry, device, dtype and kept weights of ``dense``.

        Raises:
            UnsupportedError: padding that is not zeros in numbers.
        """
        if isinstance(dense.padding, str) or dense.padding_mode != "zeros":
            raise UnsupportedError(
                f"A sparse convolution pads with zeros, in numbers; this one has padding={dense.padding!r}, "
                f"padding_mode={dense.padding_mode!r}. Give the padding as numbers, or keep the layer dense."
            )
        weight = dense.weight
        layer = cls(
            dense.in_channels, dense.out_channels, _pair(dense.kernel_size), _pair(dense.stride), _pair(dense.padding),  # type: ignore[arg-type]
            _pair(dense.dilation), dense.groups, dense.bias is not None, pattern=pattern,  # type: ignore[arg-type]
            device=weight.device, dtype=weight.dtype, structure=structure,
        )  # fmt: skip
        layer.set_weight(weight.detach())
        if dense.bias is not None and layer.bias is not None:
            layer.bias.data.copy_(dense.bias.detach())
        return layer

    def forward(self, x: Tensor, hook: int = NO_PROBE) -> Tensor:
        """x [N, in_channels, H, W] → [N, out_channels, H', W']; ``hook`` is the handle of a mask hook."""
        result: Tensor = torch.ops.sift.conv2d(
            x, self.values, self.index, self.bias, self.weight_shape, self.stride, self.padding, self.dilation,
            self.groups, hook, 0,
        )  # fmt: skip
        return result

    def extra_repr(self) -> str:
        """Sizes and sparsity."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, groups={self.groups}, bias={self.bias is not None}, "
            f"{self.described()}"
        )
