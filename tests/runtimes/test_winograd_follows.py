"""Winograd's convolution between calls: masks that move, weights that are kept or made anew, memory that held something else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from sift_compiler.nn.fused import Finish
from sift_compiler.runtimes.tvm import workspace
from sift_compiler.runtimes.tvm.live_kernel import TvmKernel
from sift_compiler.runtimes.tvm.target import host_cpu
from tests.runtimes.forced_winograd import (
    CHANNELS,
    SCALED,
    SIDE_BY_SIDE,
    SIZE,
    build,
    error,
    force,
    inputs,
    parts,
    run,
    three_by_three,
)
from tests.runtimes.test_conformance import TOLERANCE, layer, sparse_mask


@pytest.fixture(autouse=True)
def _force(monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, 6)


@SIDE_BY_SIDE
@pytest.mark.parametrize("freeze", [False, True])
def test_a_mask_that_moves_is_followed(side_by_side: bool, freeze: bool) -> None:
    one, x = three_by_three(), inputs(side_by_side)
    kernel = build(one, epilogue=SCALED, freeze=freeze)
    other = torch.randn(len(x) if side_by_side else 3, CHANNELS, 6, 13)
    assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE
    assert error(kernel, one, other, side_by_side=side_by_side) < TOLERANCE
    for move in range(1, 3):
        one.index.copy_(torch.randperm(one.dense().numel())[: one.spec.nnz].int())
        assert error(kernel, one, other, side_by_side=side_by_side) < TOLERANCE
        assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE
        assert kernel.specialisations.repacks == move


def counted(kernel: TvmKernel) -> Callable[[], int]:
    """How often the weights of a kernel's parts have been transformed from now on; all have the same."""
    weights = {id(part._weights): part._weights for part in parts(kernel)}
    ((_, shared),) = weights.items()
    real, calls = shared._kernel, []
    shared._kernel = lambda *arguments: calls.append(1) or real(*arguments)  # type: ignore[func-returns-value]
    return lambda: len(calls)


@SIDE_BY_SIDE
def test_frozen_weights_are_transformed_when_torch_counts_a_change(side_by_side: bool) -> None:
    one, x = three_by_three(), inputs(side_by_side)
    kernel = build(one, freeze=True)
    other = torch.randn(len(x), CHANNELS, 6, 13)

    def check() -> None:
        assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE
        assert error(kernel, one, other, side_by_side=side_by_side) < TOLERANCE

    check()
    made, kept = counted(kernel), parts(kernel)[0]._weights._kept
    check()
    assert made() == 0
    for change in (
        lambda: one.values.mul_(2),
        lambda: one.values.copy_(torch.randn_like(one.values)),
        lambda: setattr(one, "values", torch.randn_like(one.values)),
        lambda: one.index.copy_(torch.randperm(one.dense().numel())[: one.spec.nnz].int()),
    ):
        before = made()
        change()
        check()
        check()
        assert made() == before + 1
    assert parts(kernel)[0]._weights._kept is kept, "in the same memory"


@SIDE_BY_SIDE
def test_weights_are_transformed_at_every_call_unless_frozen(side_by_side: bool) -> None:
    one, x = three_by_three(), inputs(side_by_side)
    kernel = build(one)
    assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE
    made = counted(kernel)
    for calls in range(1, 3):
        one.values.data.mul_(-3)  # which no version counts
        assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE
        assert made() == calls


def test_frozen_weights_of_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    one, x = three_by_three(), inputs(False)
    kernel = build(one, freeze=True)
    with torch.inference_mode():
        for _ in range(2):
            one.values = torch.randn(one.spec.nnz)
            assert error(kernel, one, x) < TOLERANCE


@SIDE_BY_SIDE
def test_nothing_depends_on_what_memory_held(side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    one, real = three_by_three(), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real(*a, **k).fill_(math.nan))
    kernel = build(one)
    images = host_cpu().lanes if side_by_side else 2
    for size in (SIZE, (3, 70), (17, 5), (1, 1), (28, 68), (28, 67)):
        x = torch.randn(images, CHANNELS, *size)
        assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE
        for buffer in workspace._local.buffers.values():
            buffer.fill_(math.nan)
        # Nor does it look as if a sum were not finite: error() refuses that.
        assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE


def test_layers_of_other_sizes_share_memory() -> None:
    several = [layer(sparse_mask((m, c, 3, 3)), padding=(1, 1)) for m, c in ((11, 5), (3, 40), (40, 3))]
    kernels = [build(one) for one in several]
    for size in ((9, 10), (21, 17), (2, 2)):
        for one, kernel in zip(several, kernels, strict=True):
            for side_by_side in (False, True):
                x = torch.randn(host_cpu().lanes, one.spec.in_channels, *size)
                assert error(kernel, one, x, side_by_side=side_by_side) < TOLERANCE


def test_outputs_do_not_change_afterwards() -> None:
    one, x = three_by_three(), inputs(False)
    kernel = build(one, epilogue=SCALED)
    finish = Finish(torch.ones(11), torch.zeros(11))
    first = run(kernel, one, x, finish)
    copy = first.clone()
    run(kernel, one, 2 * x, finish)
    assert torch.equal(first, copy)


def test_scratch_of_inference_mode_serves_outside() -> None:
    from sift_compiler.runtimes.tvm.workspace import exact_scratch, scratch

    with exact_scratch():
        for size in (20, 2**18):
            with torch.inference_mode():
                made = scratch("any", size)
            made.zero_()
            assert scratch("any", size) is made
