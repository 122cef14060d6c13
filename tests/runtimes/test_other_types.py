"""The kernels' generators take the type of the numbers as a constant: in float64 they compute what float64 promises.

Live kernels are float32. Here the calls that a part would make are recorded, their tensors made float64, and given to kernels generated for it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.errors import RuntimeBuildError
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.packing import packing
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import Finish
from sift_compiler.nn.image_vectors import from_image_vectors, to_image_vectors
from sift_compiler.runtimes.tvm.build import compiled
from sift_compiler.runtimes.tvm.lane_kernel import lane_tile
from sift_compiler.runtimes.tvm.lane_part import LanePart
from sift_compiler.runtimes.tvm.part import Part
from sift_compiler.runtimes.tvm.target import host_cpu

TOLERANCE = 1e-14
"""Of the largest output: sums of a few hundred products; in float32 they err by about 1e-7."""


class Twins:
    """float64 tensors in the place of float32 ones, each the same at every call."""

    def __init__(self, known: dict[Tensor, Tensor]) -> None:
        self._known = {float32.data_ptr(): float64.reshape(-1) for float32, float64 in known.items()}

    def of(self, argument: Any) -> Any:
        if not isinstance(argument, Tensor) or argument.dtype != torch.float32:
            return argument
        return self._known.setdefault(argument.data_ptr(), argument.double().reshape(-1))


def layer(kind: str, **geometry: Any) -> tuple[LayerSpec, Tensor, Tensor, Tensor]:
    """A layer of seven inputs and ten outputs: specification, index, values, dense weight."""
    torch.manual_seed(0)
    shape = (10, 7) if kind == "linear" else (10, 7, 3, 3)
    mask = torch.rand(shape) < 0.4
    index = mask.reshape(-1).nonzero().squeeze(1).int()
    spec = LayerSpec(kind=kind, weight_shape=shape, nnz=len(index), bias=True, **geometry)  # type: ignore[arg-type]
    values = torch.randn(len(index), dtype=torch.float64)
    dense = torch.zeros(shape, dtype=torch.float64)
    dense.view(-1)[index.long()] = values
    return spec, index, values, dense


def eight_lanes() -> Any:
    """This processor with vectors of eight: 64 bytes of float64."""
    return dataclasses.replace(host_cpu(), lanes=8)


def error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("kind", "shape"), [("conv2d", (8, 7, 6, 9)), ("conv2d", (1, 7, 6, 9)), ("linear", (40, 7))],
    ids=["lanes over images", "lanes over positions", "lanes over tokens"],
)  # fmt: skip
def test_kernels_in_float64(kind: str, shape: tuple[int, ...]) -> None:
    spec, index, values, dense = layer(kind, **({} if kind == "linear" else {"padding": (1, 1)}))
    cpu, x, bias = eight_lanes(), torch.randn(shape, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    (choice,) = choose(spec, shape, cpu, whole_vectors=True)
    epilogue = Epilogue(scaled=True, residual=True, activation="relu6")
    part = Part(spec, choice, shape[2:] or (1, 1), cpu, 1, epilogue, recorded=True)
    part.repack(index.numpy())
    expected = F.linear(x, dense, bias) if kind == "linear" else F.conv2d(x, dense, bias, padding=1)
    residual, scale, shift = torch.randn_like(expected), *(torch.rand(2, 10, dtype=torch.float64) + 0.5)
    small = [t.float() for t in (x, values, bias, residual, scale, shift)]
    y, y64 = torch.empty(expected.shape), torch.empty_like(expected)
    twins = Twins(
        {**dict(zip(small, (x, values, bias, residual, scale, shift), strict=True)), y: y64.view(-1)}
    )  # fmt: skip
    packing_code, (generator, constants) = part.code(inline=False)
    kernel = compiled(generator, cpu.name, **constants, dtype="float64")
    assert part._mask is not None
    order = part._mask.order

    def run(*arguments: Any) -> None:
        given = [twins.of(argument) for argument in arguments]
        given[part.packed_values_position] = values[order.long()]
        kernel(*given)

    pack = None
    if packing_code is not None:
        packs = compiled(packing_code[0], cpu.name, **packing_code[1], dtype="float64")
        pack = lambda *arguments: packs(*(twins.of(argument) for argument in arguments))  # noqa: E731
    part.record(pack, run)
    part.run(small[0], small[1], small[2], y, Finish(small[4], small[5], small[3]))
    channel = (1, -1, *(1,) * (expected.dim() - 2))
    assert error(y64, F.relu6(expected * scale.view(channel) + shift.view(channel) + residual)) < TOLERANCE


@pytest.mark.parametrize("past_caches", [False, True])
def test_images_side_by_side_in_float64(past_caches: bool) -> None:
    spec, index, values, dense = layer("conv2d", padding=(1, 1))
    cpu, x, bias = eight_lanes(), torch.randn(16, 7, 6, 9, dtype=torch.float64), torch.randn(10, dtype=torch.float64)
    (choice,) = choose(spec, (2, 7, 6, 9, 8), cpu)
    part = LanePart(spec, choice, (6, 9), cpu, 1)
    part.repack(index.numpy())
    tile, layout = choice.tile, packing(spec, 16, (6, 9), choice.tile)
    kernel = compiled(
        lane_tile, cpu.name, lanes=8, rows=tile.rows, height=tile.height, width=tile.width, pitch=layout.window if tile.height > 1 else 0,
        parallel=False, epilogue=Epilogue(), past_caches=past_caches, dtype="float64",
    )  # fmt: skip
    given, y = to_image_vectors(x, 8), torch.empty(2, 10, 6, 9, 8)
    assert part._mask is not None
    # Memory of the kernels begins on cache lines.
    y64 = torch.empty(y.numel() + 8, dtype=torch.float64)
    y64 = y64[(-y64.data_ptr() % 64) // 8 :][: y.numel()]
    small, packed = given.float(), torch.zeros(max(16, len(values)))
    arguments = part._arguments(small, packed, bias.float(), Finish(), y, part._tiles(small))
    twins = Twins({arguments[0]: given, packed: values[part._mask.order.long()], arguments[5]: bias, y: y64})
    kernel(*(twins.of(argument) for argument in arguments))
    expected = F.conv2d(x, dense, bias, padding=1)
    assert error(from_image_vectors(y64.view(y.shape)), expected) < TOLERANCE


def test_what_is_written_for_float32_says_so() -> None:
    with pytest.raises(RuntimeBuildError, match=r"e\^x is written for float32"):
        compiled(
            lane_tile, host_cpu().name, lanes=8, rows=1, height=1, width=1, pitch=0, parallel=False, epilogue=Epilogue(activation="silu"),
            dtype="float64",
        )  # fmt: skip
