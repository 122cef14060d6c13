"""Kernels that run Winograd's convolution whatever it costs, and their errors against a float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sift_compiler.lowering import choose, choose_winograd
from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.nn.fused import Finish
from sift_compiler.nn.image_vectors import from_image_vectors, to_image_vectors
from sift_compiler.runtimes.tvm import winograd_part
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.target import cpu_facts, ensure_pool, host_cpu
from sift_compiler.runtimes.tvm.winograd_part import WinogradPart
from tests.runtimes.test_conformance import Layer, layer, sparse_mask

ALL = Epilogue(scaled=True, residual=True, activation="relu")
SCALED = Epilogue(scaled=True)
SIDE_BY_SIDE = pytest.mark.parametrize("side_by_side", [False, True], ids=["usual order", "side by side"])
CHANNELS, SIZE = 5, (9, 10)


def inputs(side_by_side: bool) -> Tensor:
    """Images for :func:`three_by_three`, as many as either layout needs."""
    return torch.randn(host_cpu().lanes if side_by_side else 2, CHANNELS, *SIZE)


def three_by_three() -> Layer:
    """A small layer with an empty row."""
    return layer(sparse_mask((11, CHANNELS, 3, 3)), padding=(1, 1))


def force(patch: pytest.MonkeyPatch, reach: int, shape: int = 0) -> None:
    """Every layer that fits takes tiles that read ``reach`` rows, summed in the ``shape``-th way; also by several workers where one would do."""
    one_way = {many: ways[shape : shape + 1] for many, ways in choose_winograd._SHAPES.items()}
    patch.setattr(choose, "_dense_cost", lambda *_: math.inf)
    patch.setattr(choose_winograd, "POINTS", {reach: choose_winograd.POINTS[reach]})
    patch.setattr(choose_winograd, "_SHAPES", one_way)
    patch.setattr(winograd_part, "WORTH_A_WORKER", 1)


def build(
    one: Layer, *, threads: int = 2, epilogue: Epilogue = ALL, freeze: bool = False, winograd: int = 4, processor: str = "host"
) -> TvmKernel:  # fmt: skip
    """A kernel that may use Winograd's convolution."""
    ensure_pool(threads)
    cpu = host_cpu() if processor == "host" else cpu_facts(processor)
    return TvmKernel(one.spec, "layer", threads, cpu, epilogue=epilogue, freeze=freeze, winograd=winograd)


def ending(kernel: TvmKernel, images: int, size: tuple[int, int]) -> Finish:
    """Random tensors for the kernel's epilogue."""
    epilogue, channels = kernel.epilogue, kernel.spec.out_channels
    scale, shift = (torch.randn(channels), torch.randn(channels)) if epilogue.scaled else (None, None)
    output = (images, channels, *kernel.spec.output_size(*size))
    return Finish(scale, shift, torch.randn(output) if epilogue.residual else None)


def run(kernel: TvmKernel, one: Layer, x: Tensor, finish: Finish, *, side_by_side: bool = False) -> Tensor:
    """The kernel's output for x [N, C, H, W], in either layout, as [N, M, H', W']."""
    if not side_by_side:
        return kernel(x, one.values, one.index, one.bias, finish)
    lanes, residual = kernel.cpu.lanes, finish.residual
    finish = Finish(finish.scale, finish.shift, None if residual is None else to_image_vectors(residual, lanes))
    y = kernel(to_image_vectors(x, lanes), one.values, one.index, one.bias, finish)
    assert y.is_contiguous()
    return from_image_vectors(y)


def error(kernel: TvmKernel, one: Layer, x: Tensor, *, side_by_side: bool = False) -> float:
    """Largest error relative to the largest output; whatever else than Winograd's convolution ran is no success."""
    finish = ending(kernel, x.shape[0], (x.shape[2], x.shape[3]))
    wide = Finish(*(None if t is None else t.double() for t in (finish.scale, finish.shift, finish.residual)))
    expected = wide.apply(one.oracle(x), kernel.epilogue.activation, 1)
    y = run(kernel, one, x, finish, side_by_side=side_by_side)
    assert y.shape == expected.shape
    assert {part.tile.lanes for plan in kernel.plans for part in plan.parts} == {"winograd"}
    assert not any(part._exact for part in parts(kernel)), "sums are finite"
    return float((y.double() - expected).abs().max() / expected.abs().max())


def parts(kernel: TvmKernel) -> list[WinogradPart]:
    """What runs, for every shape of input seen."""
    made = [part for _, several, _ in kernel._shapes.values() for part in several]
    assert all(isinstance(part, WinogradPart) for part in made)
    return made  # type: ignore[return-value]
