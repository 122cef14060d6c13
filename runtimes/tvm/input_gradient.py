"""The gradient of a layer's input, by the forward kernel on the transposed pattern (see lowering.input_gradient)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sift_compiler.lowering.input_gradient import TransposedLayer
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.live import Kernel
from sift_compiler.runtimes.recompile import MaskWatch


@dataclass(frozen=True)
class _Derived:
    """The layer that computes the gradient of inputs of one size, its kernel, and the index that this kernel watches."""

    layer: TransposedLayer
    kernel: Kernel
    index: Tensor


class InputGradient:
    """dL/dx of one layer for any input, following its mask.

    Args:
        spec: the layer.
        build: makes a forward kernel of a layer.
    """

    def __init__(self, spec: LayerSpec, build: Callable[[LayerSpec], Kernel]) -> None:
        self._spec, self._build = spec, build
        self._watch = MaskWatch()
        self._sizes: dict[tuple[int, int], _Derived] = {}
        self._kernels: dict[LayerSpec, tuple[Kernel, Tensor]] = {}

    def __call__(self, gradient: Tensor, values: Tensor, index: Tensor, input_shape: tuple[int, ...]) -> Tensor:
        """[N, M, H', W'] → [N, C, H, W], or [..., out] → [..., in]; contiguous."""
        if self._watch.moved(index):
            for derived in {id(derived.index): derived for derived in self._sizes.values()}.values():
                derived.index.copy_(torch.from_numpy(derived.layer.index(index.numpy())))
            self._watch.seen(index)
        size = (input_shape[2], input_shape[3]) if self._spec.kind == "conv2d" else (1, 1)
        if size not in self._sizes:
            self._sizes[size] = self._derive(size, index)
        derived = self._sizes[size]
        result = derived.kernel(gradient, values, derived.index, None)
        return result if derived.layer.direct else derived.layer.assemble(result)

    def _derive(self, size: tuple[int, int], index: Tensor) -> _Derived:
        layer = TransposedLayer(self._spec, size)
        if layer.spec not in self._kernels:
            self._kernels[layer.spec] = (self._build(layer.spec), torch.from_numpy(layer.index(index.numpy())))
        return _Derived(layer, *self._kernels[layer.spec])
