"""The sparse operators: opcheck, float64 oracle, gradients, FLOPs, autocast, dense gradient on demand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sift_compiler import nn as sift_nn
from sift_compiler.errors import RuntimeBuildError, UnsupportedError, UserError
from sift_compiler.ir.pattern import Pattern, kept_entries

CONVS = [
    # in, out, kernel, stride, padding, dilation, groups
    (6, 8, 3, 2, 1, 1, 2),
    (5, 7, (3, 5), (2, 1), (0, 2), 1, 1),
    (4, 4, 1, 1, 0, 1, 1),
    (3, 6, 3, 1, 2, 2, 1),
]


def conv(case, sparsity=0.5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return sift_nn.SparseConv2d(*case, sparsity=sparsity, generator=generator, dtype=dtype)


def conv_arguments(layer, x, probe=0):
    return (
        x, layer.values, layer.index, layer.bias, layer.weight_shape, layer.stride, layer.padding, layer.dilation,
        layer.groups, probe, 0,
    )  # fmt: skip


@pytest.mark.parametrize("case", CONVS)
def test_conv2d_passes_opcheck(case):
    layer = conv(case)
    x = torch.randn(3, case[0], 9, 8, requires_grad=True)
    torch.library.opcheck(torch.ops.sift.conv2d.default, conv_arguments(layer, x))


def test_linear_passes_opcheck_in_two_and_three_dimensions():
    layer = sift_nn.SparseLinear(8, 5, sparsity=0.5)
    for shape in ((3, 8), (2, 4, 8)):
        x = torch.randn(*shape, requires_grad=True)
        torch.library.opcheck(
            torch.ops.sift.linear.default, (x, layer.values, layer.index, layer.bias, layer.weight_shape, 0, 0)
        )


@pytest.mark.parametrize("case", CONVS)
def test_conv2d_and_its_gradients_equal_a_dense_convolution_in_float64(case):
    torch.manual_seed(0)
    layer = conv(case, dtype=torch.float64)
    x = torch.randn(3, case[0], 9, 8, dtype=torch.float64, requires_grad=True)
    weight = layer.dense_weight().detach().requires_grad_()
    expected = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    upstream = torch.randn_like(expected)
    dx, dw, db = torch.autograd.grad(expected, (x, weight, layer.bias), upstream)
    got = layer(x)
    gx, gv, gb = torch.autograd.grad(got, (x, layer.values, layer.bias), upstream)
    exact = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(got, expected, **exact)
    torch.testing.assert_close(gx, dx, **exact)
    torch.testing.assert_close(gv, dw.flatten()[layer.index.long()], **exact)
    torch.testing.assert_close(gb, db, **exact)


def test_linear_gradients_hold_numerically():
    layer = sift_nn.SparseLinear(6, 4, sparsity=0.5, dtype=torch.float64)

    def run(x, values, bias):
        return torch.ops.sift.linear(x, values, layer.index, bias, layer.weight_shape, 0, 0)

    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, layer.values, layer.bias))


def test_a_mask_is_the_pattern_never_the_value():
    """A kept weight of value zero receives a gradient, so it can come alive."""
    layer = sift_nn.SparseLinear(6, 4, sparsity=0.5)
    with torch.no_grad():
        layer.values.zero_()
    layer(torch.randn(3, 6)).square().sum().backward()
    layer.zero_grad()
    layer(torch.randn(3, 6)).sum().backward()
    assert (layer.values.grad != 0).all()


def test_flops_are_two_per_kept_weight_and_position():
    layer = conv(CONVS[0])
    x = torch.randn(3, 6, 9, 8, requires_grad=True)
    positions = 3 * 5 * 4
    with FlopCounterMode(display=False) as counter:
        y = layer(x)
    assert counter.get_total_flops() == 2 * layer.values.numel() * positions
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * layer.values.numel() * positions
    linear = sift_nn.SparseLinear(8, 5, sparsity=0.75)
    with FlopCounterMode(display=False) as counter:
        linear(torch.randn(2, 3, 8))
    assert counter.get_total_flops() == 2 * linear.values.numel() * 6


def test_autocast_runs_in_its_dtype():
    layer, linear = conv(CONVS[0]), sift_nn.SparseLinear(8, 5, sparsity=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 6, 9, 9)).dtype == torch.bfloat16
        y = linear(torch.randn(2, 8))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert linear.values.grad.dtype == torch.float32


@pytest.mark.parametrize("compiled", [False, True])
def test_an_armed_hook_receives_the_dense_gradient_and_only_then(compiled):
    torch.manual_seed(0)
    layer, hook = conv(CONVS[1]), sift_nn.MaskHook()
    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    x = torch.randn(4, 5, 9, 8)
    weight = layer.dense_weight().detach().requires_grad_()
    y = F.conv2d(x, weight, layer.bias, layer.stride, layer.padding)
    (expected,) = torch.autograd.grad(y.square().sum(), weight)

    run(x, hook.handle).square().sum().backward()
    assert hook.probe.take() is None
    hook.probe.arm()
    for _ in range(2):  # gradient accumulation adds up
        run(x, hook.handle).square().sum().backward()
    torch.testing.assert_close(hook.probe.take(), 2 * expected, rtol=1e-4, atol=1e-4)
    assert not hook.probe.armed


def test_a_copied_hook_listens_for_itself():
    hook = sift_nn.MaskHook()
    twin = copy.deepcopy(hook)
    assert twin.handle != hook.handle
    twin.probe.arm()
    assert not hook.probe.armed


def test_a_released_kernel_is_an_error_that_says_what_to_do():
    layer = sift_nn.SparseLinear(6, 4, sparsity=0.5)
    with pytest.raises(RuntimeBuildError, match="Compile the model again"):
        torch.ops.sift.linear(torch.randn(2, 6), layer.values, layer.index, None, layer.weight_shape, 0, 10**9)


def test_like_keeps_geometry_and_kept_weights_and_refuses_other_paddings():
    dense = torch.nn.Conv2d(4, 6, 3, 2, 1, bias=True)
    layer = sift_nn.SparseConv2d.like(dense, Pattern.from_mask(torch.ones(6, 4, 3, 3)))
    x = torch.randn(2, 4, 7, 7)
    torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-6)
    with pytest.raises(UnsupportedError, match="padding"):
        sift_nn.SparseConv2d.like(torch.nn.Conv2d(4, 6, 3, padding="same"), layer.pattern)


@pytest.mark.parametrize(
    ("numel", "sparsity", "kept"),
    [(120, 0.5, 60), (8, 0.8, 2), (30, 0.1, 27), (10, 0.8, 2), (10, 0.0, 10), (1000, 0.9, 100)],
)
def test_counts_are_those_of_rigl(numel, sparsity, kept):
    assert kept_entries(numel, sparsity) == kept


def test_patterns_refuse_what_is_not_one():
    with pytest.raises(UserError, match="int32"):
        Pattern((2, 2), torch.tensor([0, 1])).check()
    with pytest.raises(UserError, match="lie in"):
        Pattern((2, 2), torch.tensor([0, 4], dtype=torch.int32)).check()
    with pytest.raises(UserError, match="twice"):
        Pattern((2, 2), torch.tensor([1, 1], dtype=torch.int32)).check()
    with pytest.raises(UserError, match="Cannot keep"):
        Pattern.random((2, 2), 5)
