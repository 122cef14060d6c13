"""The kernels for NEON, from the same description: machine code for aarch64, run under emulation, against a float64 oracle.

Tables and tensors are prepared here as ever; whatever is compiled code, the packer of masks included, runs in qemu.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.lowering.cpu import CpuFacts
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.program import pack
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import NOTHING, Finish
from sift_compiler.nn.image_vectors import from_image_vectors, to_image_vectors
from sift_compiler.runtimes.tvm import build, lane_part, part
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.mask_packer import MaskPacker
from sift_compiler.runtimes.tvm.pool_kernel import MaxPool
from sift_compiler.runtimes.tvm.target import cpu_facts
from tests.runtimes.emulation import TRIPLE, Emulation, missing
from tests.runtimes.forced_winograd import force

TOLERANCE = 1e-5
WHY_NOT = missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"NEON cannot be emulated here: {WHY_NOT}")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulation]:
    """Within it, kernels for aarch64 run in qemu; none of them is taken from or left in a cache."""
    made, patch = Emulation(tmp_path_factory.mktemp("aarch64")), pytest.MonkeyPatch()
    real = build._from_disk
    patch.setattr(
        build, "_from_disk", lambda generator, cpu, constants: (
            made.library(generator, constants) if cpu == TRIPLE else real(generator, cpu, constants)
        ),
    )  # fmt: skip
    patch.setattr(build, "_compiled", {})
    yield made
    patch.undo()


@pytest.fixture(scope="module")
def neon() -> CpuFacts:
    return cpu_facts(TRIPLE)


def layer(mask: Tensor, **geometry: object) -> tuple[LayerSpec, Tensor, Tensor, Tensor]:
    """A layer with ``mask``: its description, its dense weight in float64, its values and its index, in no order."""
    index = mask.reshape(-1).nonzero().squeeze(1).int()
    index = index[torch.randperm(len(index))]
    values, dense = torch.randn(len(index)), torch.zeros(mask.numel(), dtype=torch.float64)
    dense[index.long()] = values.double()
    kind = "conv2d" if mask.dim() == 4 else "linear"
    spec = LayerSpec(kind=kind, weight_shape=tuple(mask.shape), nnz=len(index), **geometry)  # type: ignore[arg-type]
    return spec, dense.view(mask.shape), values, index


def random_mask(*shape: int, density: float = 0.3) -> Tensor:
    """Random, with an empty row and a full one."""
    mask = torch.rand(shape) < density
    mask[0], mask[-1] = False, True
    return mask


def blocks(rows: int, *shape: int, density: float = 0.3) -> Tensor:
    """Random blocks of ``rows`` outputs × 1 input."""
    return (torch.rand(shape[0] // rows, *shape[1:]) < density).repeat_interleave(rows, 0)


def oracle(spec: LayerSpec, dense: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    if spec.kind == "linear":
        return F.linear(x.double(), dense, bias.double())
    return F.conv2d(x.double(), dense, bias.double(), spec.stride, spec.padding, spec.dilation, spec.groups)


def deviation(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return float((y.double() - expected).abs().max() / expected.abs().max())


def check(emulation: Emulation, neon: CpuFacts, mask: Tensor, x: Tensor, *ran: str, **geometry: object) -> None:
    """One call of a live kernel against the oracle; the kernels named must have run in the emulator."""
    spec, dense, values, index = layer(mask, **geometry)
    bias = torch.randn(spec.out_channels)
    emulation.calls.clear()
    y = TvmKernel(spec, "layer", 1, neon)(x, values, index, bias)
    assert deviation(y, oracle(spec, dense, x, bias)) < TOLERANCE
    assert set(ran) <= set(emulation.calls)


def test_vectors_of_four(neon: CpuFacts) -> None:
    assert (neon.lanes, neon.registers) == (4, 32)


@pytest.mark.parametrize(
    ("batch", "packing", "geometry"),
    [
        (1, "pack_space", {"padding": (1, 1)}),
        (9, "pack_images", {"padding": (1, 1)}),
        (4, "pack_images", {"stride": (2, 2), "dilation": (1, 2)}),
    ],
)
def test_images(emulation: Emulation, neon: CpuFacts, batch: int, packing: str, geometry: dict[str, object]) -> None:
    mask, x = random_mask(7, 5, 3, 3), torch.randn(batch, 5, 8, 9)
    check(emulation, neon, mask, x, packing, "sparse_tile", "pack_mask", "gather", **geometry)


@pytest.mark.parametrize(("tokens", "kernel"), [(1, "one_token"), (3, "few_tokens"), (37, "pair_tile")])
def test_tokens(emulation: Emulation, neon: CpuFacts, tokens: int, kernel: str) -> None:
    check(emulation, neon, random_mask(19, 23), torch.randn(tokens, 23), kernel)


@pytest.mark.parametrize("rows", [2, 4])
def test_blocks_of_rows(emulation: Emulation, neon: CpuFacts, rows: int) -> None:
    mask = blocks(rows, 12, 6, 3, 3, density=0.15)
    check(emulation, neon, mask, torch.randn(4, 6, 7, 6), "sparse_tile", padding=(1, 1))


@pytest.mark.parametrize(
    ("streamed", "epilogue"), [(False, PLAIN), (True, Epilogue(scaled=True, residual=True, activation="relu"))], ids=str
)
def test_images_side_by_side(
    emulation: Emulation, neon: CpuFacts, streamed: bool, epilogue: Epilogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lane_part, "STREAMED_BYTES", 0 if streamed else 1 << 40)
    spec, dense, values, index = layer(random_mask(10, 7, 3, 3), padding=(1, 1))
    x, bias = torch.randn(8, 7, 6, 9), torch.randn(10)
    expected, finish = oracle(spec, dense, x, bias), NOTHING
    if epilogue.scaled:
        scale, shift, residual = torch.randn(10), torch.randn(10), torch.randn(expected.shape)
        expected = Finish(scale.double(), shift.double(), residual.double()).apply(expected, epilogue.activation, 1)
        finish = Finish(scale, shift, to_image_vectors(residual, 4))
    kernel = TvmKernel(spec, "layer", 1, neon, epilogue=epilogue)
    y = kernel(to_image_vectors(x, 4), values, index, bias, finish)
    assert deviation(from_image_vectors(y), expected) < TOLERANCE


@pytest.mark.parametrize(("kernel", "stride", "reach"), [((3, 3), 1, 6), ((5, 6), 2, 4)])
@pytest.mark.parametrize(
    ("side_by_side", "images", "generator"), [(False, 3, "winograd_space"), (True, 8, "winograd_lanes")]
)
def test_winograds_convolution(
    emulation: Emulation, neon: CpuFacts, side_by_side: bool, images: int, generator: str, kernel: tuple[int, int], stride: int,
    reach: int, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    force(monkeypatch, reach)
    spec, dense, values, index = layer(random_mask(10, 7, *kernel), padding=(1, 2), stride=(stride, stride))
    x, bias = torch.randn(images, 7, 9, 14), torch.randn(10)
    expected = oracle(spec, dense, x, bias)
    scale, shift, residual = torch.randn(10), torch.randn(10), torch.randn(expected.shape)
    expected = Finish(scale.double(), shift.double(), residual.double()).apply(expected, "relu", 1)
    made = TvmKernel(
        spec, "layer", 1, neon, epilogue=Epilogue(scaled=True, residual=True, activation="relu"), winograd=4
    )
    emulation.calls.clear()
    if side_by_side:
        finish = Finish(scale, shift, to_image_vectors(residual, 4))
        y = from_image_vectors(made(to_image_vectors(x, 4), values, index, bias, finish))
    else:
        y = made(x, values, index, bias, Finish(scale, shift, residual))
    assert deviation(y, expected) < TOLERANCE
    assert emulation.calls == {"winograd_weights": 1, generator: 1}


def test_a_moved_mask_is_followed(emulation: Emulation, neon: CpuFacts) -> None:
    spec, _, values, index = layer(blocks(4, 12, 6, 3, 3, density=0.15))
    kernel, x, bias = TvmKernel(spec, "layer", 1, neon), torch.randn(4, 6, 7, 6), torch.randn(12)
    kernel(x, values, index, bias)
    index.copy_(torch.randperm(12 * 54)[: spec.nnz].int())
    dense = torch.zeros(12 * 54, dtype=torch.float64)
    dense[index.long()] = values.double()
    y = kernel(x, values, index, bias)
    assert deviation(y, oracle(spec, dense.view(spec.weight_shape), x, bias)) < TOLERANCE
    assert kernel.specialisations.repacks == 1


def test_not_a_number_spreads_as_it_does_in_torch(emulation: Emulation, neon: CpuFacts) -> None:
    spec, dense, values, index = layer(torch.ones(3, 2, 3, 3, dtype=torch.bool), padding=(1, 1))
    x, bias = torch.randn(4, 2, 6, 6), torch.zeros(3)
    x[0, 0, 5, 5], x[2, 1, 0, 3] = math.inf, math.nan
    y = TvmKernel(spec, "layer", 1, neon)(x, values, index, bias)
    expected = oracle(spec, dense, x, bias)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isfinite(), expected.isfinite())


def test_parallel_kernels_divide_the_work(emulation: Emulation, neon: CpuFacts) -> None:
    spec, dense, values, index = layer(random_mask(7, 5, 3, 3), padding=(1, 1))
    x, bias = torch.randn(8, 5, 8, 9), torch.randn(7)
    kernel = TvmKernel(spec, "layer", 2, neon)
    assert deviation(kernel(x, values, index, bias), oracle(spec, dense, x, bias)) < TOLERANCE


def test_exported_kernels_are_of_one_piece(
    emulation: Emulation, neon: CpuFacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A TVM library holds the kernel with its inner loops inside; see runtimes.tvm.sparse_call.
    real = part.Part.code
    monkeypatch.setattr(part.Part, "code", lambda self, inline=True: real(self, True))
    check(emulation, neon, random_mask(7, 5, 3, 3), torch.randn(4, 5, 8, 9), "sparse_tile", padding=(1, 1))


def test_gradient_of_the_values(emulation: Emulation, neon: CpuFacts) -> None:
    spec, dense, _values, index = layer(random_mask(7, 5, 3, 3, density=0.2), padding=(1, 1))
    x, upstream = torch.randn(4, 5, 8, 9), torch.randn(4, 7, 8, 9)
    emulation.calls.clear()
    made = TvmKernel(spec, "layer", 1, neon).values_gradient(upstream, x, index)
    weight = dense.requires_grad_()
    F.conv2d(x.double(), weight, None, padding=1).backward(upstream.double())
    assert weight.grad is not None
    assert deviation(made, weight.grad.reshape(-1)[index.long()]) < TOLERANCE
    assert "sampled_tile" in emulation.calls


@pytest.mark.parametrize("rows", [1, 4])
def test_the_packer_of_masks_equals_the_one_in_numpy(emulation: Emulation, neon: CpuFacts, rows: int) -> None:
    rng, offsets = np.random.default_rng(0), np.arange(9, dtype=np.int32) * 4
    for mask in (random_mask(13, 10, 3, 3), blocks(4, 12, 10, 3, 3)):
        index = rng.permutation(np.flatnonzero(mask.numpy())).astype(np.int32)
        spec = LayerSpec(kind="conv2d", weight_shape=tuple(mask.shape), nnz=index.size)
        made = MaskPacker(spec, rows, 4, offsets, 36, neon.name).pack(torch.from_numpy(index))
        expected = pack(index, spec, rows, 4, offsets, 36)
        for field in ("stream", "block_column", "block_value", "order"):
            assert np.array_equal(getattr(made, field), getattr(expected, field)), field


def test_max_pooling(emulation: Emulation, neon: CpuFacts) -> None:
    x = torch.randn(4, 3, 9, 11)
    x[3, 1, 4, 5], x[1, 0, -1, -1], x[2] = math.nan, math.inf, -math.inf
    geometry = ([3, 3], [2, 2], [1, 1])
    expected, pool = F.max_pool2d(x, *geometry), MaxPool(neon, 1)
    torch.testing.assert_close(pool(x, *geometry), expected, rtol=0, atol=0, equal_nan=True)
    side_by_side = from_image_vectors(pool(to_image_vectors(x, 4), *geometry))
    torch.testing.assert_close(side_by_side, expected, rtol=0, atol=0, equal_nan=True)
