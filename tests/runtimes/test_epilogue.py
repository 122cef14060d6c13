"""Fused epilogues on every runtime, against float64; errors are relative to the largest output magnitude."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.errors import UserError
from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import ACTIVATIONS, NOTHING, Finish
from sift_compiler.runtimes import registry
from sift_compiler.runtimes.base import LiveKernel

TOLERANCE = 1e-5
ALL = Epilogue(scaled=True, residual=True, activation="relu")


def layer(kind: str, epilogue: Epilogue, runtime: str) -> tuple[LiveKernel, Tensor, Tensor, Tensor]:
    shape = (21, 23) if kind == "linear" else (21, 10, 3, 3)
    kept = (torch.rand(shape) < 0.4).view(-1).nonzero().squeeze(1).int()
    padding = (0, 0) if kind == "linear" else (1, 1)
    spec = LayerSpec(kind=kind, weight_shape=shape, nnz=len(kept), bias=True, padding=padding)  # type: ignore[arg-type]
    kernel = registry.get(runtime).build(spec, "layer", 1, epilogue)
    return kernel, torch.randn(len(kept)), kept, torch.randn(21)


def oracle(
    kernel: LiveKernel, x: Tensor, values: Tensor, index: Tensor, bias: Tensor, end: Finish, kind: str
) -> Tensor:
    spec = kernel.spec
    weight = torch.zeros(math.prod(spec.weight_shape), dtype=torch.float64)
    weight[index.long()] = values.double()
    weight = weight.view(spec.weight_shape)
    if spec.kind == "linear":
        y = F.linear(x.double(), weight, bias.double())
    else:
        y = F.conv2d(x.double(), weight, bias.double(), padding=spec.padding)
    wide = Finish(*(None if t is None else t.double() for t in (end.scale, end.shift, end.residual)))
    return wide.apply(y, kind, -1 if spec.kind == "linear" else 1)


def error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    assert y.is_contiguous()
    return float((y.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("kind", "activation"), [*(("linear", name) for name in ACTIVATIONS), ("conv2d", "gelu"), ("conv2d", "hard_swish")]
)
def test_activations(runtime: str, kind: str, activation: str) -> None:
    kernel, values, index, bias = layer(kind, Epilogue(activation=activation), runtime)
    x = torch.randn(32, 23) if kind == "linear" else torch.randn(16, 10, 5, 6)
    y = kernel(x, values, index, bias, NOTHING)
    assert error(y, oracle(kernel, x, values, index, bias, NOTHING, activation)) < TOLERANCE


@pytest.mark.parametrize(
    ("parts", "x_shape"),
    [
        ("both", (17, 10, 5, 6)),
        ("both", (16, 10, 1, 2)),
        ("both", (2, 3, 23)),
        ("scaled", (19, 23)),
        ("residual", (19, 23)),
    ],
)
def test_scale_and_residual(runtime: str, parts: str, x_shape: tuple[int, ...]) -> None:
    kind = "conv2d" if len(x_shape) == 4 else "linear"
    epilogue = Epilogue(scaled=parts != "residual", residual=parts != "scaled", activation="relu")
    kernel, values, index, bias = layer(kind, epilogue, runtime)
    x = torch.randn(x_shape)
    y_shape = (x_shape[0], 21, *x_shape[2:]) if kind == "conv2d" else (*x_shape[:-1], 21)
    scale, shift = (torch.randn(21), torch.randn(21)) if epilogue.scaled else (None, None)
    finish = Finish(scale, shift, torch.randn(y_shape) if epilogue.residual else None)
    for _ in range(2):  # the second time with other statistics, another residual and another mask
        y = kernel(x, values, index, bias, finish)
        assert error(y, oracle(kernel, x, values, index, bias, finish, "relu")) < TOLERANCE
        for tensor in (finish.scale, finish.shift, finish.residual):
            if tensor is not None:
                tensor.data.mul_(-0.7)
        index.copy_(torch.randperm(math.prod(kernel.spec.weight_shape))[: len(index)].int())


def test_the_residual_may_lie_in_any_order(runtime: str) -> None:
    kernel, values, index, bias = layer("conv2d", ALL, runtime)
    x = torch.randn(16, 10, 5, 6)
    residual = torch.randn(16, 21, 5, 6).to(memory_format=torch.channels_last)
    finish = Finish(torch.randn(21), torch.randn(21), residual)
    y = kernel(x, values, index, bias, finish)
    assert error(y, oracle(kernel, x, values, index, bias, finish, "relu")) < TOLERANCE


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - {"none"}))
def test_large_arguments_and_nan(activation: str) -> None:
    spec = LayerSpec(kind="linear", weight_shape=(21, 1), nnz=21)
    kernel = registry.get("tvm").build(spec, "layer", 1, Epilogue(activation=activation))
    x = torch.tensor([-1e30, -200.0, -88.0, -20.0, -3.0, -1e-6, 0.0, 1e-6, 0.5, 3.0, 6.0, 20.0, 88.0, 1e30])[:, None]
    y = kernel(x, torch.ones(21), torch.arange(21).int(), None)
    expected = ACTIVATIONS[activation](x.double()).expand(-1, 21)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert kernel(torch.full((14, 1), math.nan), torch.ones(21), torch.arange(21).int(), None).isnan().all()


def test_a_layer_that_keeps_nothing_is_finished(runtime: str) -> None:
    spec = LayerSpec(kind="linear", weight_shape=(4, 6), nnz=0, bias=True)
    kernel = registry.get(runtime).build(spec, "layer", 1, ALL)
    bias, finish = torch.randn(4), Finish(torch.randn(4), torch.randn(4), torch.randn(3, 4))
    y = kernel(torch.randn(3, 6), torch.zeros(0), torch.zeros(0, dtype=torch.int32), bias, finish)
    torch.testing.assert_close(y, finish.apply(bias.expand(3, 4), "relu", -1), rtol=1e-6, atol=1e-6)


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UserError, match="relu"):
        Epilogue(activation="relo")
