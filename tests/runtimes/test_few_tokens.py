"""Linear layers on few tokens: row programs and their kernels, against a float64 oracle, for every width of vectors.

The error is relative to the largest output magnitude, as in test_conformance.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.ir.pattern import EMPTY, asleep
from sift_compiler.lowering.epilogue import Epilogue
from sift_compiler.lowering.row_program import BALANCED, SHORT_COLUMNS, pack_rows
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn import SparseLinear
from sift_compiler.nn.fused import Finish
from sift_compiler.nn.storage import compact
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.target import cpu_facts, host_cpu

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random_index(out: int, features: int, density: float, *, in_order: bool = True) -> Tensor:
    """Flat positions of a random mask with an empty row, a full row and one of a single weight."""
    mask = torch.rand(out, features) < density
    mask[0] = False
    mask[-1] = True
    if out > 2:
        mask[1] = False
        mask[1, features // 2] = True
    index = mask.view(-1).nonzero().squeeze(1)
    return (index if in_order else index[torch.randperm(len(index))]).int()


def oracle(shape: tuple[int, int], x: Tensor, values: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    dense = torch.zeros(math.prod(shape), dtype=torch.float64)
    kept = index >= 0
    dense[index[kept].long()] = values.detach()[kept].double()
    return F.linear(x.double(), dense.view(shape), bias.double())


def error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return float((y.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("shape", [(150, 67), (64, 16), (17, 5), (3, 40), (1, 33)])
def test_any_number_of_tokens(cpu: str, shape: tuple[int, int], in_order: bool) -> None:
    index = random_index(*shape, 0.3, in_order=in_order)
    values, bias = torch.randn(len(index)), torch.randn(shape[0])
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index), bias=True)
    kernel = TvmKernel(spec, "layer", 1, cpu_facts(cpu))
    lanes = cpu_facts(cpu).lanes
    for tokens in (1, 3, 4, lanes - 1, lanes + 1, 2 * lanes, 4 * lanes - 1):
        x = torch.randn(tokens, shape[1])
        assert error(kernel(x, values, index, bias), oracle(shape, x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kept", [1, 2, 15, 16, 17])
def test_a_handful_of_weights(cpu: str, tokens: int, kept: int) -> None:
    shape = (20, 30)
    index = torch.randperm(600)[:kept].sort().values.int()
    values, bias, x = torch.randn(kept), torch.randn(20), torch.randn(tokens, 30)
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=kept, bias=True)
    y = TvmKernel(spec, "layer", 1, cpu_facts(cpu))(x, values, index, bias)
    assert error(y, oracle(shape, x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 3])
def test_wide_inputs_need_wide_columns(cpu: str, tokens: int) -> None:
    shape = (18, SHORT_COLUMNS + 9)
    index = random_index(*shape, 0.001)
    values, bias, x = torch.randn(len(index)), torch.randn(18), torch.randn(tokens, shape[1])
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index), bias=True)
    y = TvmKernel(spec, "layer", 1, cpu_facts(cpu))(x, values, index, bias)
    assert error(y, oracle(shape, x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_stay_in_their_rows(cpu: str, tokens: int, bad: float) -> None:
    # Vectors of values reach into neighbouring rows, so both a weight and an input must not leak.
    shape = (40, 50)
    index = random_index(*shape, 0.2)
    values, bias, x = torch.randn(len(index)), torch.randn(40), torch.randn(tokens, 50)
    x[0, 25] = bad
    values[len(index) // 2] = bad
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index), bias=True)
    y = TvmKernel(spec, "layer", 1, cpu_facts(cpu))(x, values, index, bias)
    # Only kept weights may meet the bad input: the oracle must not multiply it by zero.
    expected = bias.double().repeat(tokens, 1)
    row, column = index.long() // 50, index.long() % 50
    expected.index_add_(1, row, x.double()[:, column] * values.double())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())
    fine = expected.isfinite()
    assert (y.double()[fine] - expected[fine]).abs().max() < TOLERANCE * expected[fine].abs().max()


@pytest.mark.parametrize("tokens", [1, 4])
def test_masks_values_and_slots_are_followed(cpu: str, tokens: int) -> None:
    shape = (70, 30)
    index = random_index(*shape, 0.3)
    values, bias, x = torch.randn(len(index)), torch.randn(70), torch.randn(tokens, 30)
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index), bias=True)
    kernel = TvmKernel(spec, "layer", 1, cpu_facts(cpu))

    def check() -> None:
        assert error(kernel(x, values, index, bias), oracle(shape, x, values, index, bias)) < TOLERANCE

    check()
    values.data.mul_(-2)
    check()
    index.copy_(torch.randperm(70 * 30)[: len(index)].int())
    check()
    values.data.mul_(-2)
    check()
    index[::3] = asleep(index[::3])
    index[1::3] = EMPTY
    check()
    index.copy_(random_index(*shape, 0.3)[: len(index)].repeat(2)[: len(index)])
    index[len(index) - 20 :] = EMPTY
    index[: len(index) - 20] = torch.randperm(70 * 30)[: len(index) - 20].sort().values.int()
    check()


@pytest.mark.parametrize("threads", [2, 5])
def test_any_number_of_threads(threads: int) -> None:
    shape = (330, 300)
    index = random_index(*shape, 0.5)
    values, bias = torch.randn(len(index)), torch.randn(330)
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index), bias=True)
    kernel = TvmKernel(spec, "layer", threads, host_cpu())
    for tokens in (1, 3):
        x = torch.randn(tokens, 300)
        assert error(kernel(x, values, index, bias), oracle(shape, x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_epilogues(tokens: int, activation: str) -> None:
    shape = (37, 40)
    index = random_index(*shape, 0.4)
    values, bias, x = torch.randn(len(index)), torch.randn(37), torch.randn(tokens, 40)
    finish = Finish(torch.randn(37), torch.randn(37), torch.randn(tokens, 37))
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index), bias=True)
    epilogue = Epilogue(scaled=True, residual=True, activation=activation)
    y = TvmKernel(spec, "layer", 1, host_cpu(), epilogue=epilogue)(x, values, index, bias, finish)
    assert finish.scale is not None
    assert finish.shift is not None
    assert finish.residual is not None
    wide = Finish(finish.scale.double(), finish.shift.double(), finish.residual.double())
    assert error(y, wide.apply(oracle(shape, x, values, index, bias), activation, -1)) < TOLERANCE


@pytest.mark.parametrize("in_order", [True, False])
def test_the_row_program_holds_the_mask(in_order: bool) -> None:
    shape = (3 * BALANCED + 5, 20)
    index = random_index(*shape, 0.3, in_order=in_order)
    index[5] = EMPTY
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index))
    program = pack_rows(index.numpy(), spec)
    kept = index.numpy()[program.order[: program.starts[-1]]]
    rows = np.repeat(np.arange(shape[0]), np.diff(program.starts))
    assert np.array_equal(kept, rows * 20 + program.columns)
    assert set(kept) == set(index[index >= 0].tolist())
    assert not program.direct
    blocks = np.split(program.balanced, range(BALANCED, shape[0], BALANCED))
    for number, block in enumerate(blocks):
        assert sorted(block) == list(range(number * BALANCED, min(shape[0], (number + 1) * BALANCED)))
        assert (np.diff(np.diff(program.starts)[block]) <= 0).all()


def test_values_in_order_are_read_where_they_are() -> None:
    index = random_index(50, 40, 0.3)
    spec = LayerSpec(kind="linear", weight_shape=(50, 40), nnz=len(index))
    assert pack_rows(index.numpy(), spec).direct
    assert not pack_rows(index.flip(0).numpy(), spec).direct


def test_compact_brings_moved_weights_into_order() -> None:
    layer = SparseLinear(40, 50, sparsity=0.7)
    before = layer.values
    compact(layer)
    assert layer.values is before
    layer.index.copy_(layer.index[torch.randperm(len(layer.index))])
    layer.index[7] = EMPTY
    dense = layer.dense_weight().detach().clone()
    compact(layer)
    assert torch.equal(layer.dense_weight(), dense)
    assert len(layer.index) == len(before) - 1
    spec = LayerSpec(kind="linear", weight_shape=(50, 40), nnz=len(layer.index))
    assert pack_rows(layer.index.numpy(), spec).direct
