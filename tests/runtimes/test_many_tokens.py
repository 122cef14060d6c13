"""Linear layers on many tokens: pair programs and their kernel, against a float64 oracle, for every width of vectors.

The error is relative to the largest output magnitude, as in test_conformance.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sift_compiler.ir.pattern import EMPTY, asleep
from sift_compiler.lowering import choose_pairs
from sift_compiler.lowering.choose import choose
from sift_compiler.lowering.epilogue import PLAIN, Epilogue
from sift_compiler.lowering.specification import LayerSpec
from sift_compiler.nn.fused import Finish
from sift_compiler.runtimes.tvm import pair_part
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.pair_part import PairPart
from sift_compiler.runtimes.tvm.prepare import prepare
from sift_compiler.runtimes.tvm.target import cpu_facts, host_cpu
from tests.runtimes.test_few_tokens import random_index

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _every_mask_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small layers with a full row are denser than what the rules leave to pairs. Every width would be a kernel to compile: one has them all."""
    monkeypatch.setattr(choose_pairs, "_DENSEST", 1.0)
    monkeypatch.setattr(choose_pairs, "_NEARLY", 10.0)
    torch.manual_seed(0)


def layer(shape: tuple[int, int], index: Tensor) -> tuple[LayerSpec, Tensor, Tensor]:
    spec = LayerSpec(kind="linear", weight_shape=shape, nnz=len(index), bias=True)
    return spec, torch.randn(len(index)), torch.randn(shape[0])


def oracle(shape: tuple[int, int], x: Tensor, values: Tensor, index: Tensor, bias: Tensor) -> Tensor:
    dense = torch.zeros(math.prod(shape), dtype=torch.float64)
    kept = index >= 0
    dense[index[kept].long()] = values[kept].double()
    return F.linear(x.double(), dense.view(shape), bias.double())


def error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return float((y.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("shape", [(150, 67), (64, 16), (17, 5), (3, 140), (1, 33), (33, 1)])
def test_any_number_of_tokens(cpu: str, shape: tuple[int, int], in_order: bool) -> None:
    index = random_index(*shape, 0.3, in_order=in_order)
    spec, values, bias = layer(shape, index)
    kernel = TvmKernel(spec, "layer", 1, cpu_facts(cpu))
    for tokens in (65, 128, 259):
        x = torch.randn(tokens, shape[1])
        assert isinstance(
            prepare(spec, choose(spec, (tokens, shape[1]), cpu_facts(cpu))[0], (1, 1), cpu_facts(cpu), 1), PairPart
        )
        assert error(kernel(x, values, index, bias), oracle(shape, x, values, index, bias)) < TOLERANCE


def test_2050_tokens_and_several_blocks() -> None:
    shape = (70, 1300)
    index = random_index(*shape, 0.1)
    spec, values, bias = layer(shape, index)
    assert choose(spec, (2050, 1300), host_cpu())[0].tile.channels < 1300
    x = torch.randn(2, 1025, 1300)
    y = TvmKernel(spec, "layer", 1, host_cpu())(x, values, index, bias)
    assert error(y, oracle(shape, x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("kept", ["none of the first rows", "one", "all"])
def test_extreme_masks(cpu: str, kept: str) -> None:
    mask = torch.full((40, 30), kept == "all")
    if kept != "all":
        mask[-1 if kept != "one" else 7, 11:] = True
        mask[:, 12:] &= kept != "one"
    index = mask.view(-1).nonzero().squeeze(1).int()
    spec, values, bias = layer((40, 30), index)
    x = torch.randn(100, 30)
    y = TvmKernel(spec, "layer", 1, cpu_facts(cpu))(x, values, index, bias)
    assert error(y, oracle((40, 30), x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("rows", [15, 90, 263])
def test_threads_and_panels(monkeypatch: pytest.MonkeyPatch, threads: int, rows: int) -> None:
    monkeypatch.setattr(pair_part, "_PANEL", 64)
    monkeypatch.setattr(pair_part, "WORTH_A_WORKER", 1)
    shape = (rows, 70)
    index = random_index(*shape, 0.3)
    spec, values, bias = layer(shape, index)
    kernel = TvmKernel(spec, "layer", threads, host_cpu())
    for tokens in (65, 300):
        x = torch.randn(tokens, 70)
        assert error(kernel(x, values, index, bias), oracle(shape, x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("width", [1, 3, 6])
@pytest.mark.parametrize("channels", [1, 20, 50])
def test_every_tile(width: int, channels: int) -> None:
    index = random_index(37, 50, 0.3)
    spec, values, bias = layer((37, 50), index)
    (choice,) = choose(spec, (111, 50), host_cpu())
    tile = dataclasses.replace(choice.tile, width=width, channels=channels)
    part = prepare(spec, dataclasses.replace(choice, tile=tile), (1, 1), host_cpu(), 1)
    part.repack(index.numpy())
    x, y = torch.randn(111, 50), torch.empty(111, 37)
    part.run(x, values, bias, y)
    assert error(y, oracle((37, 50), x, values, index, bias)) < TOLERANCE


def test_more_tokens_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_part, "_INDEX_LIMIT", 130 * 50)
    index = random_index(37, 50, 0.3)
    spec, values, bias = layer((37, 50), index)
    x = torch.randn(333, 50)
    y = TvmKernel(spec, "layer", 1, host_cpu())(x, values, index, bias)
    assert error(y, oracle((37, 50), x, values, index, bias)) < TOLERANCE


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers_meet_kept_weights_only(cpu: str, bad: float) -> None:
    index = random_index(40, 50, 0.2)
    spec, values, bias = layer((40, 50), index)
    x = torch.randn(90, 50)
    x[3, 25] = x[70, 0] = x[70, 49] = bad
    values[len(index) // 2] = bad
    y = TvmKernel(spec, "layer", 1, cpu_facts(cpu))(x, values, index, bias)
    expected = bias.double().repeat(90, 1)
    expected.index_add_(1, index.long() // 50, x.double()[:, index.long() % 50] * values.double())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf())
    assert torch.equal(y.isneginf(), expected.isneginf())
    fine = expected.isfinite()
    assert fine.any()
    assert (y.double()[fine] - expected[fine]).abs().max() < TOLERANCE * expected[fine].abs().max()


def test_masks_values_and_slots_are_followed(cpu: str) -> None:
    index = random_index(70, 30, 0.3)
    spec, values, bias = layer((70, 30), index)
    kernel = TvmKernel(spec, "layer", 1, cpu_facts(cpu))
    inputs = [torch.randn(tokens, 30) for tokens in (70, 128, 192, 256)]

    def check() -> None:
        for x in inputs:
            assert error(kernel(x, values, index, bias), oracle((70, 30), x, values, index, bias)) < TOLERANCE

    check()
    tiles = {(plan.tile.width, plan.tile.channels) for plan in kernel.plans}
    assert kernel.programs == len(tiles) < len(inputs)
    values.mul_(-2)
    check()
    index.copy_(torch.randperm(70 * 30)[: len(index)].int())
    check()
    index[::3] = asleep(index[::3])
    index[1::3] = EMPTY
    check()
    assert kernel.programs == len(tiles)


@pytest.mark.parametrize(
    "epilogue", [PLAIN, Epilogue(activation="gelu"), Epilogue(scaled=True, residual=True, activation="relu")]
)
@pytest.mark.parametrize("out", [7, 37])
def test_epilogues(epilogue: Epilogue, out: int) -> None:
    index = random_index(out, 40, 0.4)
    spec, values, bias = layer((out, 40), index)
    x = torch.randn(100, 40)
    finish = Finish(torch.randn(out), torch.randn(out), torch.randn(100, out)) if epilogue.scaled else Finish()
    y = TvmKernel(spec, "layer", 1, host_cpu(), epilogue=epilogue)(x, values, index, bias, finish)
    wide = Finish(*(None if t is None else t.double() for t in (finish.scale, finish.shift, finish.residual)))
    assert error(y, wide.apply(oracle((out, 40), x, values, index, bias), epilogue.activation, -1)) < TOLERANCE
