"""One suite for all runtimes: every layer kind against a float64 oracle built from the dense weight.

The error is relative to the largest output magnitude: a float32 sum of a few thousand products errs by about 1e-6 of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.runtimes import registry
from sift_compiler.runtimes.base import LiveKernel

TOLERANCE = 1e-5


@dataclass
class Layer:
    """A random sparse layer and its tensors."""

    spec: LayerSpec
    values: Tensor
    index: Tensor
    bias: Tensor | None

    def dense(self) -> Tensor:
        flat = torch.zeros(math.prod(self.spec.weight_shape), dtype=torch.float64)
        flat[self.index.long()] = self.values.double()
        return flat.view(self.spec.weight_shape)

    def oracle(self, x: Tensor) -> Tensor:
        spec, bias = self.spec, None if self.bias is None else self.bias.double()
        if spec.kind == "linear":
            return F.linear(x.double(), self.dense(), bias)
        return F.conv2d(x.double(), self.dense(), bias, spec.stride, spec.padding, spec.dilation, spec.groups)

    def kernel(self, runtime: str, threads: int = 1) -> LiveKernel:
        return registry.get(runtime).build(self.spec, "layer", threads)

    def error(self, kernel: LiveKernel, x: Tensor) -> float:
        y, expected = kernel(x, self.values, self.index, self.bias), self.oracle(x)
        assert y.shape == expected.shape
        assert y.is_contiguous()
        assert y.dtype == torch.float32
        return float((y.double() - expected).abs().max() / expected.abs().max())


def sparse_mask(shape: tuple[int, ...], sparsity: float = 0.7) -> Tensor:
    """Random, with an empty row, a full row and, if there is room, two equal rows."""
    mask = torch.rand(shape) >= sparsity
    mask[0] = False
    mask[-1] = True
    if shape[0] > 3:
        mask[2] = mask[1]
    return mask


def layer(mask: Tensor, *, bias: bool = True, kind: str = "conv2d", **geometry: object) -> Layer:
    kept = mask.reshape(-1).nonzero().squeeze(1)
    index = kept[torch.randperm(len(kept))].int()
    spec = LayerSpec(kind=kind, weight_shape=tuple(mask.shape), nnz=len(index), bias=bias, **geometry)  # type: ignore[arg-type]
    return Layer(spec, torch.randn(len(index)), index, torch.randn(mask.shape[0]) if bias else None)


@pytest.mark.parametrize("batch", [1, 2, 15, 16, 17, 33])
def test_any_batch(runtime: str, batch: int) -> None:
    one = layer(sparse_mask((13, 10, 3, 3)), padding=(1, 1))
    assert one.error(one.kernel(runtime), torch.randn(batch, 10, 9, 11)) < TOLERANCE


@pytest.mark.parametrize("batch", [2, 17])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 0)])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 3)])
def test_any_geometry(
    runtime: str, batch: int, stride: tuple[int, int], padding: tuple[int, int], kernel: tuple[int, int]
) -> None:
    one = layer(sparse_mask((7, 5, *kernel)), bias=False, stride=stride, padding=padding)
    assert one.error(one.kernel(runtime), torch.randn(batch, 5, 8, 9)) < TOLERANCE


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
def test_dilation(runtime: str, batch: int, stride: tuple[int, int]) -> None:
    one = layer(sparse_mask((7, 5, 3, 3)), stride=stride, padding=(2, 2), dilation=(2, 2))
    assert one.error(one.kernel(runtime), torch.randn(batch, 5, 9, 9)) < TOLERANCE


@pytest.mark.parametrize("batch", [3, 16])
def test_groups(runtime: str, batch: int) -> None:
    one = layer(sparse_mask((12, 3, 3, 3)), padding=(1, 1), groups=4)
    assert one.error(one.kernel(runtime), torch.randn(batch, 12, 6, 7)) < TOLERANCE


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (2, 2), (7, 3), (20, 1)])
@pytest.mark.parametrize("batch", [1, 16])
def test_odd_sizes(runtime: str, batch: int, size: tuple[int, int]) -> None:
    one = layer(sparse_mask((5, 6, 3, 3)), padding=(1, 1))
    assert one.error(one.kernel(runtime), torch.randn(batch, 6, *size)) < TOLERANCE


@pytest.mark.parametrize("shape", [(1,), (5,), (15,), (16,), (17,), (65,), (2, 9), (2, 3, 11), ()])
def test_linear(runtime: str, shape: tuple[int, ...]) -> None:
    one = layer(sparse_mask((19, 23)), kind="linear")
    assert one.error(one.kernel(runtime), torch.randn(*shape, 23)) < TOLERANCE


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.75, 0.9, 0.97])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_any_sparsity(runtime: str, sparsity: float, kind: str) -> None:
    shape, x = ((50, 70), torch.randn(130, 70)) if kind == "linear" else ((26, 40, 3, 3), torch.randn(17, 40, 7, 7))
    one = layer(sparse_mask(shape, sparsity), kind=kind)
    assert one.error(one.kernel(runtime), x) < TOLERANCE


@pytest.mark.parametrize("rows", [2, 3, 4])
@pytest.mark.parametrize("batch", [1, 16, 17])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_blocks_of_rows(runtime: str, kind: str, batch: int, rows: int) -> None:
    # The last block is cut off; another lies across two groups of rows of most tiles.
    shape, x = (
        ((26, 90), torch.randn(5 * batch, 90)) if kind == "linear" else ((26, 20, 3, 3), torch.randn(batch, 20, 7, 9))
    )
    mask = (torch.rand(26, *shape[1:]) < 0.15).repeat_interleave(rows, 0)[1:27]
    one = layer(mask, kind=kind)
    kernel = one.kernel(runtime)
    assert one.error(kernel, x) < TOLERANCE
    # The structure may be lost; the tiles stay.
    one.index.copy_(torch.randperm(mask.numel())[: one.spec.nnz].int())
    assert one.error(kernel, x) < TOLERANCE


@pytest.mark.parametrize("kept", ["one", "all", "last"])
def test_extreme_masks(runtime: str, kept: str) -> None:
    mask = torch.full((10, 9, 3, 3), kept == "all")
    if kept != "all":
        mask.view(-1)[-1 if kept == "last" else 200] = True
    one = layer(mask, padding=(1, 1))
    assert one.error(one.kernel(runtime), torch.randn(17, 9, 5, 6)) < TOLERANCE


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_nothing_kept(runtime: str, bias: bool, kind: str) -> None:
    shape, x = ((4, 6), torch.randn(3, 6)) if kind == "linear" else ((4, 6, 3, 3), torch.randn(3, 6, 5, 5))
    one = layer(torch.zeros(shape, dtype=torch.bool), bias=bias, kind=kind)
    y = one.kernel(runtime)(x, one.values, one.index, one.bias)
    assert torch.equal(y.double(), one.oracle(x))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(runtime: str, threads: int) -> None:
    one = layer(sparse_mask((13, 10, 3, 3)), padding=(1, 1), stride=(2, 2))
    kernel = one.kernel(runtime, threads)
    for batch in (1, 16, 35):
        assert one.error(kernel, torch.randn(batch, 10, 9, 11)) < TOLERANCE


def test_a_moved_mask_is_followed(runtime: str) -> None:
    one = layer(sparse_mask((13, 10, 3, 3)), padding=(1, 1))
    kernel, inputs = one.kernel(runtime), [torch.randn(n, 10, 9, 11) for n in (3, 17)]
    for x in inputs:
        one.error(kernel, x)
    builds = kernel.specialisations.builds
    for move in range(1, 4):
        one.index.copy_(torch.randperm(13 * 90)[: one.spec.nnz].int())
        for x in inputs:
            assert one.error(kernel, x) < TOLERANCE
        if runtime != "eager":
            assert kernel.specialisations.repacks == move
    assert kernel.specialisations.builds == builds
    assert kernel.specialisations.calls == 8


def test_another_index_tensor_is_followed(runtime: str) -> None:
    one = layer(sparse_mask((13, 10)), kind="linear")
    kernel, x = one.kernel(runtime), torch.randn(4, 10)
    one.error(kernel, x)
    one.index = torch.randperm(130)[: one.spec.nnz].int()
    assert one.error(kernel, x) < TOLERANCE


def test_values_may_change_without_a_new_version(runtime: str) -> None:
    one = layer(sparse_mask((13, 10, 3, 3)))
    kernel, x = one.kernel(runtime), torch.randn(16, 10, 5, 5)
    one.error(kernel, x)
    one.values.data.mul_(-3)
    assert one.error(kernel, x) < TOLERANCE


@pytest.mark.parametrize("batch", [2, 16])
def test_zero_values_are_alive(runtime: str, batch: int) -> None:
    # A kept weight of zero meets a NaN in x: the mask is the pattern, never value != 0.
    mask = torch.zeros(4, 3, 1, 1, dtype=torch.bool)
    mask[1, 2] = mask[3, 0] = True
    one = layer(mask, bias=False)
    one.values.zero_()
    x = torch.randn(batch, 3, 4, 4)
    x[1, 2, 3, 1] = math.nan
    y = one.kernel(runtime)(x, one.values, one.index, None)
    expected = torch.zeros(batch, 4, 4, 4)
    expected[1, 1, 3, 1] = math.nan
    if runtime == "eager":  # it multiplies what is not kept by zero, too
        y[1, (0, 2, 3), 3, 1] = 0
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("batch", [3, 16])
def test_infinities_stay_where_they_belong(runtime: str, batch: int) -> None:
    one = layer(torch.ones(3, 2, 3, 3, dtype=torch.bool), padding=(1, 1), bias=False)
    x = torch.randn(batch, 2, 6, 6)
    x[0, 0, 5, 5] = math.inf
    y = one.kernel(runtime)(x, one.values, one.index, None)
    assert torch.equal(y.isfinite(), one.oracle(x).isfinite())


@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_nothing_depends_on_what_memory_held(runtime: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, x = ((7, 5), torch.randn(19, 5)) if kind == "linear" else ((7, 5, 3, 3), torch.randn(19, 5, 9, 9))
    one = layer(sparse_mask(shape), kind=kind)
    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
    kernel = one.kernel(runtime)
    assert one.error(kernel, x) < TOLERANCE
    if runtime == "tvm":
        from sift_compiler.runtimes.tvm import workspace

        for buffer in workspace._local.buffers.values():
            buffer.fill_(math.nan)
    assert one.error(kernel, x) < TOLERANCE


def test_arguments_come_as_they_are(runtime: str) -> None:
    one = layer(sparse_mask((7, 5, 3, 3)), padding=(1, 1))
    kernel = one.kernel(runtime)
    x = torch.randn(16, 5, 8, 8)
    with torch.no_grad():
        assert one.error(kernel, x.to(memory_format=torch.channels_last)) < TOLERANCE
        assert one.error(kernel, torch.randn(16, 8, 8, 5).permute(0, 3, 1, 2)) < TOLERANCE
        storage = torch.randn(16 * 5 * 64 + 1)
        assert one.error(kernel, storage[1:].view(16, 5, 8, 8)) < TOLERANCE  # not 64-byte aligned
    one.values.requires_grad_()
    with torch.no_grad():
        assert one.error(kernel, x.requires_grad_()) < TOLERANCE


def test_arguments_are_not_changed(runtime: str) -> None:
    one = layer(sparse_mask((7, 5, 3, 3)))
    assert one.bias is not None
    x = torch.randn(17, 5, 8, 8)
    before = [t.clone() for t in (x, one.values, one.index, one.bias)]
    one.kernel(runtime)(x, one.values, one.index, one.bias)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, one.values, one.index, one.bias), strict=True))


def test_an_empty_batch(runtime: str) -> None:
    one = layer(sparse_mask((7, 5, 3, 3)))
    assert one.kernel(runtime)(torch.randn(0, 5, 8, 8), one.values, one.index, one.bias).shape == (0, 7, 6, 6)


def test_a_wrong_shape_is_refused() -> None:
    one = layer(sparse_mask((7, 5, 3, 3)))
    with pytest.raises(UserError, match=r"\[N, 5, H, W\]"):
        one.kernel("tvm")(torch.randn(2, 6, 8, 8), one.values, one.index, one.bias)
    with pytest.raises(UserError, match="no output"):
        one.kernel("tvm")(torch.randn(2, 5, 2, 2), one.values, one.index, one.bias)


def test_refusals_have_reasons() -> None:
    tvm, spec = registry.get("tvm"), LayerSpec(kind="linear", weight_shape=(3, 4), nnz=2)
    assert tvm.refuse(spec, "cpu") is None
    assert "CPU" in str(tvm.refuse(spec, "cuda:0"))
    half = LayerSpec(kind="linear", weight_shape=(3, 4), nnz=2, dtype="bfloat16")
    assert "float32" in str(tvm.refuse(half, "cpu"))
    with pytest.raises(UserError, match="tvm"):
        registry.get("tvmm")


@pytest.mark.parametrize("cpu", ["x86-64-v3", "x86-64"])
def test_narrower_vectors(cpu: str) -> None:
    from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
    from sift_compiler.runtimes.tvm.target import cpu_facts, host_cpu

    if host_cpu().lanes < cpu_facts(cpu).lanes:
        pytest.skip(f"this machine is not an {cpu}")
    for one, inner in (
        (layer(sparse_mask((13, 10, 3, 3)), padding=(1, 1)), (10, 9, 11)),
        (layer(sparse_mask((13, 20)), kind="linear"), (20,)),
    ):
        kernel = TvmKernel(one.spec, "layer", 1, cpu_facts(cpu))
        for batch in (1, 11, 16):
            assert one.error(kernel, torch.randn(batch, *inner)) < TOLERANCE
