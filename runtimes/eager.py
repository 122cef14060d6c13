"""The eager runtime: the reference operators behind the runtime contract. It is the oracle of the conformance suite."""

from __future__ import annotations

from torch import Tensor

from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import reference
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.nn.image_vectors import by_image
from sift_compiler.options import Tune
from sift_compiler.runtimes.base import Specialisations


class EagerKernel:
    """Runs a layer on the reference path; it has no program, hence nothing to re-specialise."""

    def __init__(self, spec: LayerSpec, name: str, epilogue: Epilogue = PLAIN) -> None:
        self.name, self.spec, self.epilogue, self.specialisations = name, spec, epilogue, Specialisations()

    def prepare(self, input_shape: tuple[int, ...], index: Tensor | None) -> None:
        """Nothing is to be done."""

    def __call__(
        self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, finish: Finish = NOTHING
    ) -> Tensor:
        """Compute the layer with a dense operation."""
        y = self._layer(x, values, index, bias)
        if self.epilogue == PLAIN:
            return y
        return finish.apply(y, self.epilogue.activation, -1 if self.spec.kind == "linear" else 1).contiguous()

    def _layer(self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        spec = self.spec
        self.specialisations.calls += 1
        if spec.kind == "linear":
            return reference.linear(x, values, index, bias, spec.weight_shape)
        geometry = (spec.weight_shape, spec.stride, spec.padding, spec.dilation, spec.groups)
        return by_image(lambda x: reference.conv2d(x, values, index, bias, *geometry), x)


class EagerRuntime:
    """Takes every layer on every device."""

    name = "eager"
    image_lanes = 0

    def pool(self, threads: int) -> None:
        """None: torch's."""

    def refuse(self, spec: LayerSpec, device: str) -> str | None:
        """Never refuses."""
        return None

    def build(
        self,
        spec: LayerSpec,
        name: str,
        threads: int,
        epilogue: Epilogue = PLAIN,
        tune: Tune = "off",
        freeze: bool = False,
        winograd: int = 0,
    ) -> EagerKernel:
        """A kernel for ``spec``; torch's own thread setting holds, ``threads``, ``tune`` and ``freeze`` are not used."""
        return EagerKernel(spec, name, epilogue)
