"""What a runtime is: it refuses a layer with a reason, or builds a live kernel for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.nn.image_vectors import Pool
from sift_compiler.options import Tune


@dataclass
class Specialisations:
    """How often, and for how long, a kernel was brought up to date with its mask."""

    builds: int = 0
    """Times machine code was compiled or fetched from a cache for this kernel."""
    build_ms: float = 0.0
    repacks: int = 0
    """Times the program of the mask was packed anew because the mask had moved (the first packing is not counted)."""
    repack_ms: float = 0.0
    last_repack_ms: float = 0.0
    calls: int = field(default=0)
    backward: Specialisations | None = None
    """The same for the gradients' kernels, each with a program of its own; None where gradients run on the reference path."""


class LiveKernel(Protocol):
    """A kernel behind a handle (see nn.live) that follows its layer's mask."""

    name: str
    spec: LayerSpec
    specialisations: Specialisations

    def prepare(self, input_shape: tuple[int, ...], index: Tensor | None) -> None:
        """Do before the first input of ``input_shape`` what would else be done when it comes; any thread may ask.

        ``index`` is the layer's mask, None if it is not known yet. Doing nothing is right, too.

        Raises:
            RuntimeBuildError: the kernel cannot be compiled.
        """

    def __call__(
        self, x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, finish: Finish = NOTHING
    ) -> Tensor:
        """Compute the layer for any batch size; re-specialises first if ``index`` has changed since the last call.

        ``finish`` holds the tensors of the epilogue that the kernel was built with.
        """


class Runtime(Protocol):
    """Builds live kernels."""

    name: str

    @property
    def image_lanes(self) -> int:
        """Images in a vector of its kernels for convolutions between convolutions (see nn.image_vectors); 0 if it has none."""

    def pool(self, threads: int) -> Pool | None:
        """A kernel for max pooling of float32 on the CPU in either layout, None if it has none."""

    def refuse(self, spec: LayerSpec, device: str) -> str | None:
        """Why this runtime does not take the layer on this device, or None if it does."""

    def build(
        self,
        spec: LayerSpec,
        name: str,
        threads: int,
        epilogue: Epilogue = PLAIN,
        tune: Tune = "off",
        freeze: bool = False,
        winograd: int = 0,
    ) -> LiveKernel:
        """A live kernel for ``spec``; ``name`` is the layer's module path, for messages and reports. One with an epilogue is for inference.

        ``tune`` says whether it may time tiles when it sees an input of a new shape, ``freeze`` whether it may keep a copy of the values
        until it is given others, or their version says that they were changed. ``winograd`` is the largest tile of Winograd's convolution that
        it may use, 0 for none (see lowering.winograd).
        """
