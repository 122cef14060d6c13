"""Infinities and NaN in Winograd's convolution: they reach the outputs that they reach in a sum of kept weights, and no others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sift_compiler.lowering.epilogue import Epilogue
from tests.runtimes.forced_winograd import (
    ALL,
    SCALED,
    SIDE_BY_SIDE,
    SIZE,
    build,
    ending,
    force,
    inputs,
    parts,
    run,
    three_by_three,
)
from tests.runtimes.test_conformance import TOLERANCE


@pytest.fixture(autouse=True)
def _force(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)


def deviation(y: Tensor, expected: Tensor) -> float:
    """Largest difference of finite numbers relative to the largest of them; the others must be the same at the same places."""
    finite = expected.isfinite()
    assert finite.any()
    torch.testing.assert_close(y[~finite], expected[~finite], rtol=0, atol=0, equal_nan=True)
    return float((y - expected)[finite].abs().max() / expected[finite].abs().max())


def refuse(*_: object) -> None:
    raise AssertionError("a finite input needs no other part")


@SIDE_BY_SIDE
@pytest.mark.parametrize("epilogue", [SCALED, ALL], ids=str)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 2, 4, 5), (-1, -1, -1, -1), (0, 3, 8, 0), (1, 0, 3, 3)])
def test_not_a_number_and_infinities_reach_what_they_reach_without(
    place: tuple[int, ...], number: float, epilogue: Epilogue, side_by_side: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, x = three_by_three(), inputs(side_by_side)
    kernel, without = (build(one, epilogue=epilogue, winograd=tile) for tile in (4, 0))
    finish = ending(kernel, len(x), SIZE)
    finite = x.clone()
    x[place] = number
    y, expected = (run(each, one, x, finish, side_by_side=side_by_side) for each in (kernel, without))
    assert expected.isfinite().float().mean() > 0.5
    assert epilogue == ALL or not expected.isfinite().all()
    assert deviation(y, expected) < TOLERANCE
    (part,) = parts(kernel)
    assert part._exact is not None
    monkeypatch.setattr(part._exact, "run", refuse)
    y, expected = (run(each, one, finite, finish, side_by_side=side_by_side) for each in (kernel, without))
    assert deviation(y, expected) < TOLERANCE


@SIDE_BY_SIDE
@pytest.mark.parametrize("threads", [2, 5])
def test_wherever_it_stands_it_is_noticed(side_by_side: bool, threads: int) -> None:
    one, finite = three_by_three(), inputs(side_by_side)
    kernel, without = (build(one, epilogue=SCALED, threads=threads, winograd=tile) for tile in (4, 0))
    finish = ending(kernel, len(finite), SIZE)
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            x = finite.clone()
            x[-1, -1, row, column] = math.inf
            y, expected = (run(each, one, x, finish, side_by_side=side_by_side) for each in (kernel, without))
            assert deviation(y, expected) < TOLERANCE


@SIDE_BY_SIDE
def test_sums_that_only_the_transforms_let_overflow(side_by_side: bool) -> None:
    one, x = three_by_three(), inputs(side_by_side)
    one.values.mul_(1e-3)
    x[1, 3, 4:7, 2:9] = 3e38
    kernel, without = (build(one, epilogue=SCALED, winograd=tile) for tile in (4, 0))
    finish = ending(kernel, len(x), SIZE)
    y, expected = (run(each, one, x, finish, side_by_side=side_by_side) for each in (kernel, without))
    assert expected.isfinite().all()
    assert deviation(y, expected) < TOLERANCE


@SIDE_BY_SIDE
@pytest.mark.parametrize("what", ["value", "bias", "scale", "residual"])
def test_what_is_not_finite_beside_the_input(what: str, side_by_side: bool) -> None:
    one, x = three_by_three(), inputs(side_by_side)
    kernel, without = (build(one, winograd=tile) for tile in (4, 0))
    finish = ending(kernel, len(x), SIZE)
    assert one.bias is not None
    assert finish.scale is not None
    assert finish.residual is not None
    {"value": one.values, "bias": one.bias, "scale": finish.scale, "residual": finish.residual[1, 4, 3]}[what][2] = (
        math.nan
    )
    y, expected = (run(each, one, x, finish, side_by_side=side_by_side) for each in (kernel, without))
    assert not expected.isfinite().all()
    assert deviation(y, expected) < TOLERANCE


@SIDE_BY_SIDE
@pytest.mark.parametrize("freeze", [False, True])
def test_what_runs_then_follows_a_mask_that_moves(side_by_side: bool, freeze: bool) -> None:
    one, x = three_by_three(), inputs(side_by_side)
    kernel, without = (build(one, epilogue=SCALED, freeze=freeze, winograd=tile) for tile in (4, 0))
    finish = ending(kernel, len(x), SIZE)
    x[1, 2, 4, 5] = math.nan
    for _ in range(3):
        y, expected = (run(each, one, x, finish, side_by_side=side_by_side) for each in (kernel, without))
        assert deviation(y, expected) < TOLERANCE
        one.index.copy_(torch.randperm(one.dense().numel())[: one.spec.nnz].int())
