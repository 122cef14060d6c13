"""Gradients of sparse layers over all runtimes, against float64: the operators with a kernel's handle, through autograd.

Errors are relative to the largest entry of the exact gradient. An entry of dL/dx sums as many products as a column of the weight keeps
entries: 1e-5, as for outputs. An entry of dL/dvalues sums over all positions of all images, in float32. Summed one by one, n products
err by up to n · 6e-8 of the sum of their magnitudes, typically by the root of n; kernels sum lane by lane and tile by tile, hence in
chains of some hundred additions, and so does the reference. The largest of many entries is a few times the root of n, hence 1e-5 again.
"""

import gc
import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.ir.pattern import EMPTY, asleep, entry_of
from sift_compiler.lowering.input_gradient import TransposedLayer
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import MaskHook, live
from sift_compiler.runtimes import registry
from sift_compiler.runtimes.base import LiveKernel

TOLERANCE_INPUT = 1e-5
TOLERANCE_VALUES = 1e-5


@dataclass
class Layer:
    """A random sparse layer behind a runtime's kernel."""

    spec: LayerSpec
    values: Tensor
    index: Tensor
    kernel: LiveKernel

    def __post_init__(self) -> None:
        self.handle = live.register(self.kernel)

    def forward(self, x: Tensor, values: Tensor, probe: int = 0) -> Tensor:
        spec = self.spec
        if spec.kind == "linear":
            return torch.ops.sift.linear(x, values, self.index, None, spec.weight_shape, probe, self.handle)
        geometry = (spec.stride, spec.padding, spec.dilation, spec.groups)
        return torch.ops.sift.conv2d(x, values, self.index, None, spec.weight_shape, *geometry, probe, self.handle)

    def dense(self) -> Tensor:
        spec, active = self.spec, self.index >= 0
        flat = torch.zeros(math.prod(spec.weight_shape), dtype=torch.float64)
        flat[self.index[active].long()] = self.values[active].double()
        return flat.view(spec.weight_shape).requires_grad_()

    def exact(self, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dL/dx, dL/dvalues and the dense gradient in float64."""
        spec, weight = self.spec, self.dense()
        x = x.detach().double().requires_grad_()
        if spec.kind == "linear":
            y = F.linear(x, weight)
        else:
            y = F.conv2d(x, weight, None, spec.stride, spec.padding, spec.dilation, spec.groups)
        dx, dense = torch.autograd.grad(y, (x, weight), upstream.double())
        entries = entry_of(self.index)
        taken = dense.flatten()[entries.clamp(min=0)]
        return dx, torch.where(entries == EMPTY, 0.0, taken), dense

    def check(self, *shape: int) -> None:
        x, values = torch.randn(shape).requires_grad_(), self.values.clone().requires_grad_()
        y = self.forward(x, values)
        upstream = torch.randn_like(y)
        dx, dv = torch.autograd.grad(y, (x, values), upstream)
        exact_dx, exact_dv, _ = self.exact(x, upstream)
        assert error(dx, exact_dx) < TOLERANCE_INPUT
        assert error(dv, exact_dv) < TOLERANCE_VALUES


def error(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert got.dtype == torch.float32
    if not got.numel():
        return 0.0
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def make(
    runtime: str, shape: tuple[int, ...], sparsity: float = 0.7, threads: int = 1, block: int = 1, **geometry: object
) -> Layer:
    """A layer with an empty and a full row, and two equal ones if there is room."""
    mask = (torch.rand(shape) >= sparsity).repeat_interleave(block, 0)[: shape[0]]
    mask[0], mask[-1] = False, True
    if shape[0] > 3:
        mask[2] = mask[1]
    kept = mask.reshape(-1).nonzero().squeeze(1)
    index = kept[torch.randperm(len(kept))].int()
    kind = "linear" if len(shape) == 2 else "conv2d"
    spec = LayerSpec(kind=kind, weight_shape=shape, nnz=len(index), **geometry)  # type: ignore[arg-type]
    return Layer(spec, torch.randn(len(index)), index, registry.get(runtime).build(spec, "layer", threads))


@pytest.mark.parametrize("batch", [1, 15, 16, 17])
def test_any_batch(runtime: str, batch: int) -> None:
    make(runtime, (13, 10, 3, 3), padding=(1, 1)).check(batch, 10, 9, 11)


@pytest.mark.parametrize("stride", [(1, 1), (3, 2)])
@pytest.mark.parametrize(("kernel", "padding"), [((1, 1), (0, 0)), ((3, 3), (1, 1)), ((5, 2), (3, 3))])
def test_any_geometry(runtime: str, stride: tuple[int, int], padding: tuple[int, int], kernel: tuple[int, int]) -> None:
    # Paddings reach beyond the kernel: the transposed pattern's padding is then negative. 17 images: lanes over images and over space.
    make(runtime, (7, 5, *kernel), stride=stride, padding=padding).check(17, 5, 8, 9)


@pytest.mark.parametrize("stride", [(1, 1), (2, 3)])
@pytest.mark.parametrize("dilation", [(2, 2)])
def test_dilation(runtime: str, stride: tuple[int, int], dilation: tuple[int, int]) -> None:
    make(runtime, (7, 5, 3, 3), stride=stride, padding=(2, 2), dilation=dilation).check(17, 5, 9, 9)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
@pytest.mark.parametrize("batch", [3, 16])
def test_groups(runtime: str, batch: int, stride: tuple[int, int]) -> None:
    make(runtime, (12, 3, 3, 3), padding=(1, 1), groups=4, stride=stride).check(batch, 12, 6, 7)


@pytest.mark.parametrize("size", [(1, 1), (7, 3)])
@pytest.mark.parametrize("batch", [17])
def test_odd_sizes(runtime: str, batch: int, size: tuple[int, int]) -> None:
    make(runtime, (5, 6, 3, 3), padding=(1, 1)).check(batch, 6, *size)


@pytest.mark.parametrize("shape", [(1,), (17,), (300,), (2, 3, 11)])
def test_linear(runtime: str, shape: tuple[int, ...]) -> None:
    make(runtime, (19, 23)).check(*shape, 23)


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("batch", [3, 16])
def test_blocks_of_rows(runtime: str, batch: int, block: int) -> None:
    make(runtime, (24, 18, 3, 3), 0.9, block=block, padding=(1, 1)).check(batch, 18, 7, 9)
    make(runtime, (48, 30), 0.9, block=block).check(20 * batch, 30)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_any_sparsity(runtime: str, sparsity: float) -> None:
    make(runtime, (26, 40, 3, 3), sparsity).check(16, 40, 7, 7)


@pytest.mark.parametrize("threads", [2])
def test_any_number_of_threads(runtime: str, threads: int) -> None:
    make(runtime, (7, 5, 3, 3), padding=(1, 1), threads=threads).check(17, 5, 8, 9)


def test_a_moved_mask_is_followed(runtime: str) -> None:
    one = make(runtime, (13, 10, 3, 3), padding=(1, 1), stride=(2, 1))
    inputs = [(n, 10, *size) for n in (3, 17) for size in ((9, 11),)]
    for shape in inputs:
        one.check(*shape)
    counted = one.kernel.specialisations.backward
    before = None if counted is None else (counted.builds, counted.repacks)
    for _ in range(2):
        one.index.copy_(torch.randperm(13 * 90)[: one.spec.nnz].int())
        for shape in inputs:
            one.check(*shape)
    if runtime == "tvm":
        assert counted is not None
        assert before is not None
        assert counted.builds == before[0]
        assert counted.repacks > before[1]
        assert counted.calls >= len(inputs) * 3


@pytest.mark.parametrize("shape", [(13, 10, 3, 3), (13, 10)])
def test_sleeping_slots_get_their_gradient_and_empty_ones_none(runtime: str, shape: tuple[int, ...]) -> None:
    one = make(runtime, shape)
    inner = (10, 6, 7) if len(shape) == 4 else (10,)
    one.index[::3] = asleep(one.index[::3])
    one.index[1::3] = EMPTY
    one.check(18, *inner)
    one.index[:] = EMPTY
    values, x = one.values.clone().requires_grad_(), torch.randn(18, *inner).requires_grad_()
    one.forward(x, values).square().sum().backward()
    assert not values.grad.any()
    assert not x.grad.any()


def test_nothing_kept(runtime: str) -> None:
    spec = LayerSpec(kind="linear", weight_shape=(4, 6), nnz=0)
    one = Layer(spec, torch.zeros(0), torch.zeros(0, dtype=torch.int32), registry.get(runtime).build(spec, "layer", 1))
    one.check(3, 6)


def test_an_empty_batch(runtime: str) -> None:
    make(runtime, (7, 5, 3, 3)).check(0, 5, 8, 8)
    make(runtime, (7, 5)).check(0, 5)


def test_the_gradient_of_many_values_comes_from_the_dense_one() -> None:
    from sift_compiler.runtimes.tvm.values_gradient import dense_reason

    assert dense_reason(LayerSpec(kind="linear", weight_shape=(10, 10), nnz=60)) is None
    assert "61 of 100" in str(dense_reason(LayerSpec(kind="linear", weight_shape=(10, 10), nnz=61)))


@pytest.mark.parametrize("shape", [(19, 7, 9, 9), (19, 7)])
def test_nothing_depends_on_what_memory_held(
    runtime: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = make(runtime, (5, 7, 3, 3) if len(shape) == 4 else (5, 7))
    real = torch.empty

    def poisoned(*a: object, **k: object) -> Tensor:
        made = real(*a, **k)
        return made.fill_(math.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    one.check(*shape)
    if runtime == "tvm":
        from sift_compiler.runtimes.tvm import workspace

        for buffer in workspace._local.buffers.values():
            buffer.fill_(math.nan)
    one.check(*shape)


def test_gradients_come_as_they_are(runtime: str) -> None:
    one = make(runtime, (7, 5, 3, 3), padding=(1, 1))
    x, values = torch.randn(16, 5, 8, 8).requires_grad_(), one.values.clone().requires_grad_()
    for upstream in (
        torch.ones(()).expand(16, 7, 8, 8),
        torch.randn(16, 7, 8, 8).to(memory_format=torch.channels_last),
        torch.randn(16 * 7 * 64 + 1)[1:].view(16, 7, 8, 8),
    ):
        before = upstream.clone()
        dx, dv = torch.autograd.grad(one.forward(x, values), (x, values), upstream)
        exact_dx, exact_dv, _ = one.exact(x, upstream)
        assert error(dx, exact_dx) < TOLERANCE_INPUT
        assert error(dv, exact_dv) < TOLERANCE_VALUES
        assert torch.equal(before, upstream)


def test_an_armed_probe_gets_the_dense_gradient(runtime: str) -> None:
    one, hook = make(runtime, (7, 5, 3, 3), padding=(1, 1)), MaskHook()
    x, values = torch.randn(16, 5, 8, 8), one.values.clone().requires_grad_()
    hook.probe.arm()
    y = one.forward(x, values, hook.handle)
    (dv,) = torch.autograd.grad(y, values, torch.ones_like(y))
    _, exact_dv, exact_dense = one.exact(x, torch.ones_like(y))
    dense = hook.probe.take()
    assert dense is not None
    assert error(dense, exact_dense) < TOLERANCE_VALUES
    assert error(dv, exact_dv) < TOLERANCE_VALUES


def test_a_backward_pass_may_outlive_its_kernel(runtime: str) -> None:
    one = make(runtime, (7, 5))
    x, values = torch.randn(4, 5).requires_grad_(), one.values.clone().requires_grad_()
    y = one.forward(x, values)
    upstream = torch.randn_like(y)
    del one.kernel
    gc.collect()  # where the kernel was compiled just now, TVMScript's parser has left the frames of its callers in a cycle
    assert live.gradients(one.handle) is None
    dx, _ = torch.autograd.grad(y, (x, values), upstream)
    assert error(dx, one.exact(x, upstream)[0]) < TOLERANCE_INPUT


def test_the_transposed_layer_keeps_every_weight_once() -> None:
    spec = LayerSpec(kind="conv2d", weight_shape=(8, 6, 3, 3), stride=(2, 2), padding=(1, 1), nnz=8 * 54)
    made = TransposedLayer(spec, (9, 9))
    # Taps at -1 and 1 meet odd positions, the one at 0 even ones: four phases, two taps each way, nine of sixteen in use.
    assert made.spec.weight_shape == (24, 8, 2, 2)
    index = made.index(torch.arange(8 * 54, dtype=torch.int32).numpy())
    assert len(set(index.tolist())) == 8 * 54
    assert index.max() < 24 * 8 * 4
    point = TransposedLayer(LayerSpec(kind="conv2d", weight_shape=(8, 6, 1, 1), stride=(2, 2), nnz=48), (9, 9))
    assert point.spec.weight_shape == (6, 8, 1, 1)  # three of four phases are zero and left out
