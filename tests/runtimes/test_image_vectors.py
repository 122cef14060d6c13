"""Kernels between sparse convolutions, images side by side: against a float64 oracle, on every kind of processor there is code for."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.plan import Choice
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.nn.image_vectors import from_image_vectors, to_image_vectors
from sift_compiler.runtimes.tvm import lane_part, live_kernel
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.target import cpu_facts, host_cpu

TOLERANCE = 1e-5
# What is not of this machine cannot run; narrower vectors of the same machine can.
PROCESSORS = ("host", *(name for name, lanes in (("haswell", 8), ("x86-64", 4)) if host_cpu().lanes > lanes))


def cpu(name: str):  # type: ignore[no-untyped-def]
    return host_cpu() if name == "host" else cpu_facts(name)


def spec_and_dense(
    shape: tuple[int, ...], *, density: float = 0.3, **geometry: object
) -> tuple[LayerSpec, Tensor, Tensor]:
    """A random layer with an empty and a full row: its description, its dense weight in float64, its index."""
    torch.manual_seed(0)
    mask = torch.rand(shape) < density
    mask[0], mask[-1] = False, True
    index = mask.reshape(-1).nonzero().squeeze(1).int()
    index = index[torch.randperm(len(index))]
    dense = torch.zeros(math.prod(shape), dtype=torch.float64)
    dense[index.long()] = torch.randn(len(index)).double()
    return LayerSpec(kind="conv2d", weight_shape=shape, nnz=len(index), **geometry), dense.view(shape), index  # type: ignore[arg-type]


def error(
    spec: LayerSpec, dense: Tensor, index: Tensor, size: tuple[int, int], *, groups: int = 1, processor: str = "host", threads: int = 1,
    epilogue: Epilogue = PLAIN,
) -> float:  # fmt: skip
    """Largest error of a kernel relative to the largest output."""
    facts = cpu(processor)
    kernel = TvmKernel(spec, "layer", threads, facts, epilogue=epilogue)
    x, bias = torch.randn(groups * facts.lanes, spec.in_channels, *size), torch.randn(spec.out_channels)
    expected = F.conv2d(x.double(), dense, bias.double(), spec.stride, spec.padding, spec.dilation, spec.groups)
    finish = NOTHING
    if epilogue.scaled:
        finish = Finish(torch.randn(spec.out_channels), torch.randn(spec.out_channels))
    if epilogue.residual:
        finish = dataclasses.replace(finish, residual=torch.randn(expected.shape))
    plain = Finish(*(None if t is None else t.double() for t in (finish.scale, finish.shift, finish.residual)))
    expected = plain.apply(expected, epilogue.activation, 1)
    if finish.residual is not None:
        finish = dataclasses.replace(finish, residual=to_image_vectors(finish.residual, facts.lanes))
    values = dense.reshape(-1)[index.long()].float()
    y = kernel(to_image_vectors(x, facts.lanes), values, index, bias, finish)
    assert y.is_contiguous()
    assert y.shape == (groups, spec.out_channels, *expected.shape[2:], facts.lanes)
    return float((from_image_vectors(y).double() - expected).abs().max() / expected.abs().max())


def test_the_layout_keeps_every_number_in_its_place() -> None:
    x = torch.randn(32, 3, 5, 7)
    there = to_image_vectors(x, 16)
    assert there.shape == (2, 3, 5, 7, 16)
    assert there[1, 2, 4, 6, 9] == x[25, 2, 4, 6]
    assert torch.equal(from_image_vectors(there), x)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("density", [0.05, 0.3, 0.6, 1.0])
def test_any_density(processor: str, density: float) -> None:
    assert (
        error(*spec_and_dense((13, 11, 3, 3), density=density, padding=(1, 1)), (9, 11), processor=processor)
        < TOLERANCE
    )


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "geometry", "size"),
    [
        ((1, 1), {}, (5, 6)),
        ((1, 1), {"stride": (2, 2)}, (8, 7)),
        ((3, 3), {"stride": (2, 2), "padding": (1, 1)}, (15, 14)),
        ((3, 3), {"stride": (3, 2), "padding": (0, 2)}, (10, 13)),
        ((3, 3), {"padding": (2, 2), "dilation": (2, 2)}, (7, 9)),
        ((5, 2), {"padding": (4, 0)}, (3, 8)),
        ((7, 7), {"stride": (2, 2), "padding": (3, 3)}, (17, 18)),
        ((3, 3), {"padding": (1, 1)}, (1, 1)),
        ((3, 3), {"padding": (3, 3)}, (2, 30)),
    ],
)  # fmt: skip
def test_any_geometry(groups: int, kernel: tuple[int, int], geometry: dict[str, object], size: tuple[int, int]) -> None:
    assert error(*spec_and_dense((10, 7, *kernel), **geometry), size, groups=groups) < TOLERANCE


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("block", [2, 4])
def test_blocks_of_rows(processor: str, rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(7, 11, 3, 3) < 0.1).repeat_interleave(block, 0)
    index = mask.reshape(-1).nonzero().squeeze(1).int()
    dense = torch.where(mask, torch.randn(mask.shape), 0).double()
    spec = LayerSpec(kind="conv2d", weight_shape=tuple(mask.shape), nnz=len(index), padding=(1, 1))

    def with_rows(*arguments: object, **named: object) -> tuple[Choice, ...]:
        """What is chosen, but for the rows: blocks that fill a tile's rows, lie across two tiles, or share one."""
        made = choose(*arguments, **named)  # type: ignore[arg-type]
        return tuple(dataclasses.replace(one, tile=dataclasses.replace(one.tile, rows=rows)) for one in made)

    monkeypatch.setattr(live_kernel, "choose", with_rows)
    assert error(spec, dense, index, (6, 9), groups=2, processor=processor) < TOLERANCE


def test_grouped_and_depthwise() -> None:
    assert error(*spec_and_dense((12, 4, 3, 3), groups=3, padding=(1, 1)), (6, 5)) < TOLERANCE
    assert error(*spec_and_dense((9, 1, 3, 3), groups=9, padding=(1, 1)), (6, 5)) < TOLERANCE


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    "epilogue",
    [
        Epilogue(activation="relu"),
        Epilogue(scaled=True, activation="gelu"),
        Epilogue(residual=True),
        Epilogue(scaled=True, residual=True, activation="hard_swish"),
    ],
    ids=str,
)
def test_finished_sums(processor: str, epilogue: Epilogue) -> None:
    layer = spec_and_dense((10, 7, 3, 3), padding=(1, 1))
    assert error(*layer, (6, 9), epilogue=epilogue, processor=processor) < TOLERANCE


def test_two_threads_give_the_same_bits() -> None:
    spec, dense, index = spec_and_dense((10, 7, 3, 3), padding=(1, 1))
    x, bias = torch.randn(2, 7, 9, 8, host_cpu().lanes), torch.randn(10)
    values = dense.reshape(-1)[index.long()].float()
    one, two = (TvmKernel(spec, "layer", threads, host_cpu())(x, values, index, bias) for threads in (1, 2))
    assert torch.equal(one, two)


def test_follows_a_mask_that_moves() -> None:
    spec, dense, index = spec_and_dense((6, 5, 3, 3), padding=(1, 1))
    kernel = TvmKernel(spec, "layer", 1, host_cpu())
    x, values = torch.randn(1, 5, 4, 4, host_cpu().lanes), torch.randn(spec.nnz)
    kernel(x, values, index, None)
    index.copy_(torch.randperm(dense.numel())[: spec.nnz])
    moved = torch.zeros(dense.numel(), dtype=torch.float64)
    moved[index.long()] = values.double()
    expected = F.conv2d(from_image_vectors(x).double(), moved.view(spec.weight_shape), padding=1)
    y = from_image_vectors(kernel(x, values, index, None)).double()
    assert (y - expected).abs().max() / expected.abs().max() < TOLERANCE
    assert kernel.specialisations.repacks == 1


def test_an_input_that_does_not_begin_on_a_cache_line() -> None:
    spec, dense, index = spec_and_dense((6, 5, 1, 1))
    lanes = host_cpu().lanes
    x = torch.randn(5 * 4 * lanes + 1)[1:].view(1, 5, 2, 2, lanes)
    values = dense.reshape(-1)[index.long()].float()
    kernel = TvmKernel(spec, "layer", 1, host_cpu())
    assert torch.equal(kernel(x, values, index, None), kernel(x.clone(), values, index, None))


def test_not_a_number_spreads_as_it_does_in_torch() -> None:
    spec, dense, index = spec_and_dense((6, 5, 3, 3), padding=(1, 1))
    x = torch.randn(1, 5, 4, 4, host_cpu().lanes)
    x[0, 2, 1, 1, 3], x[0, 1, 2, 2, 0] = math.nan, math.inf
    values = dense.reshape(-1)[index.long()].float()
    kernel = TvmKernel(spec, "layer", 1, host_cpu(), epilogue=Epilogue(activation="relu"))
    y = from_image_vectors(kernel(x, values, index, None))
    finite = torch.isfinite(y).flatten(1).all(1)
    assert finite.sum() == host_cpu().lanes - 2
    assert torch.isnan(y[3]).any()


def test_vectors_of_another_width_are_refused() -> None:
    spec, _dense, index = spec_and_dense((6, 5, 1, 1))
    with pytest.raises(UserError, match=r"expected an input of shape \[N, 5, H, W\], or"):
        TvmKernel(spec, "layer", 1, host_cpu())(torch.randn(1, 5, 2, 2, 3), torch.randn(spec.nnz), index, None)


@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize("threads", [1, 2])
def test_outputs_stored_past_the_caches(processor: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane_part, "STREAMED_BYTES", 0)
    epilogue = Epilogue(scaled=True, residual=True, activation="relu")
    one = spec_and_dense((13, 10, 3, 3), padding=(1, 1))
    assert error(*one, (9, 6), groups=2, processor=processor, threads=threads, epilogue=epilogue) < TOLERANCE
